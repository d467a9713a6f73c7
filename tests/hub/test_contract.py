"""The field's names, where its users import them from."""

import importlib

import pytest
import torch

from sparse_attention_hub.sparse_attention import (
    ChannelConfig,
    DoubleSparsity,
    DoubleSparsityConfig,
    DoubleSparsityTopKMaskerConfig,
    EfficientAttention,
    EfficientAttentionConfig,
    HashAttention,
    HashAttentionConfig,
    LocalMaskerConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    SinkMaskerConfig,
    SparseAttention,
)
from sparse_attention_hub.sparse_attention.utils.mask_attention_utils import (
    create_sampling_mask_with_per_head_budget,
)
from tests.hub.top_k_maskers import channel_file, hash_weights, tensors

SPARSE = "sparse_attention_hub.sparse_attention"
MASKERS = f"{SPARSE}.research_attention.maskers"
NAMES = {
    "sparse_attention_hub": "SparseAttention EfficientAttention ResearchAttention "
    "MicroMetricLogger PlotGenerator Granularity Request RequestResponse ModelHubAdapterInterface "
    "SparseAttentionAdapterInterface ModelAdapter ModelAdapterHF __version__ __author__",
    "sparse_attention_hub.adapters": "Request RequestResponse ModelHubAdapterInterface "
    "SparseAttentionAdapterInterface ModelAdapter ModelAdapterHF ModelServer ModelServerHF "
    "ModelEntry TokenizerEntry ModelServerConfig ModelServerError ModelCreationError "
    "TokenizerCreationError ReferenceCountError ResourceCleanupError cleanup_gpu_memory",
    SPARSE: "SparseAttention SparseAttentionConfig EfficientAttention EfficientAttentionConfig "
    "ResearchAttention ResearchAttentionConfig DoubleSparsity DoubleSparsityConfig HashAttention "
    "HashAttentionConfig ChannelConfig DoubleSparsityTopKMasker DoubleSparsityTopKMaskerConfig "
    "HashAttentionTopKMasker HashAttentionTopKMaskerConfig ResearchMasker SamplingMasker "
    "FixedMasker TopKMasker TopKMaskerConfig TopPMasker LocalMasker LocalMaskerConfig CausalMasker "
    "SinkMasker SinkMaskerConfig PQCache OracleTopK RandomSamplingMasker MagicPig "
    "SparseAttentionMetadata Mask",
    f"{SPARSE}.research_attention": "ResearchAttention ResearchAttentionConfig",
    MASKERS: "ResearchMasker MaskerConfig",
    f"{MASKERS}.base": "AttentionTensorDimensions MaskerRegistry",
    f"{MASKERS}.fixed": "FixedMasker FixedMaskerConfig TopKMasker TopKMaskerConfig TopPMasker "
    "TopPMaskerConfig LocalMasker LocalMaskerConfig CausalMasker SinkMasker SinkMaskerConfig "
    "OracleTopK OracleTopKConfig OracleTopPMasker OracleTopPMaskerConfig PQCache PQCacheConfig "
    "HashAttentionTopKMasker HashAttentionTopKMaskerConfig DoubleSparsityTopKMasker "
    "DoubleSparsityTopKMaskerConfig QuestTopKMasker QuestTopKMaskerConfig",
    f"{MASKERS}.fixed.implementations.basic_fixed": "SinkMasker LocalMasker CausalMasker",
    f"{MASKERS}.fixed.implementations.double_sparsity_top_k": "DoubleSparsityTopKMasker",
    f"{MASKERS}.fixed.implementations.hashattention_top_k": "HashAttentionTopKMasker",
    f"{MASKERS}.fixed.implementations.oracle_top_k": "OracleTopKMasker",
    f"{MASKERS}.fixed.implementations.oracle_top_p": "OracleTopPMasker",
    f"{MASKERS}.fixed.implementations.pq_top_k": "PQCache",
    f"{MASKERS}.fixed.implementations.quest_top_k": "QuestTopKMasker",
    f"{MASKERS}.fixed.implementations.utils.common_utils": "pseudo_quantize",
    f"{MASKERS}.fixed.implementations.utils.double_sparsity_utils": "extract_layer_channels "
    "load_sorted_channels_from_file validate_channel_data",
    f"{MASKERS}.fixed.implementations.utils.quest_utils": "compute_page_min_max quest_page_scores "
    "pages_to_token_mask attention_mask_to_allowed_prob pages_valid",
    f"{MASKERS}.sampling": "SamplingMasker SamplingMaskerConfig RandomSamplingMasker "
    "RandomSamplingMaskerConfig MagicPig MagicPigConfig AdaptiveSamplingMasker "
    "AdaptiveSamplingMaskerConfig",
    f"{MASKERS}.sampling.implementations": "MagicPig RandomSamplingMasker AdaptiveSamplingMasker",
    f"{SPARSE}.utils": "Mask",
    f"{SPARSE}.utils.mask": "Mask",
    f"{SPARSE}.utils.kv_utils": "repeat_kv _get_num_key_value_groups",
    f"{SPARSE}.utils.mask_attention_utils": "get_true_attention_output get_attention_numerator "
    "get_attention_denominator get_masked_attention_output apply_inv_mask_sum "
    "create_sampling_mask_with_per_head_budget",
    f"{SPARSE}.utils.hashattention_utils": "load_hat_weights create_hat_weights_file_from_usa "
    "convert_usa_weights_to_hash_attention",
    "sparse_attention_hub.metric_logging": "MicroMetricLogger LogEvent",
    "sparse_attention_hub.plotting": "PlotGenerator Granularity",
}


@pytest.mark.parametrize("module", NAMES)
def test_names(module: str) -> None:
    loaded = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(loaded, name)] == []


def efficient_configs(tmp_path):
    sizes = {"heavy_size": 5, "sink_size": 2, "local_size": 3}
    channels = ChannelConfig(channel_file(tmp_path, 4))
    return {
        DoubleSparsity: DoubleSparsityConfig(
            **sizes, ds_channel_config=channels, ds_bits=8, ds_group_factor=4
        ),
        HashAttention: HashAttentionConfig(
            **sizes,
            hat_weights=hash_weights(4),
            hat_bits=40,
            hat_mlp_layers=2,
            hat_mlp_hidden_size=24,
        ),
    }


@pytest.mark.parametrize("kind", [DoubleSparsity, HashAttention])
def test_efficient_attention_is_its_maskers(kind, tmp_path) -> None:
    config = efficient_configs(tmp_path)[kind]
    attention = SparseAttention.create_from_config(config)
    assert type(attention) is kind
    assert attention.sparse_attention_config is config
    maskers = config.to_research_config().masker_configs
    assert maskers[:2] == [SinkMaskerConfig(2), LocalMaskerConfig(3)]
    reference = ResearchAttention.create_from_config(ResearchAttentionConfig(maskers))
    query, key, value = tensors(1, 4, 2, 1, 50)
    arguments = (None, query, key, value, None, 0.25, 0.0)
    for sinks in (None, torch.linspace(-2, 4, 4)):  # learned ones
        named = {"layer_idx": 1, "s_aux": sinks}
        output, weights = attention.custom_attention(*arguments, {}, **named)
        expected, _ = reference.custom_attention(*arguments, {}, **named)
        assert weights is None
        torch.testing.assert_close(output, expected)


def test_efficient_attention_refuses_other_configurations(tmp_path) -> None:
    with pytest.raises(TypeError, match="expected a EfficientAttentionConfig"):
        EfficientAttention.create_from_config(ResearchAttentionConfig([]))
    with pytest.raises(TypeError, match="expected a HashAttentionConfig"):
        HashAttention.create_from_config(efficient_configs(tmp_path)[DoubleSparsity])
    with pytest.raises(ValueError, match="no attention belongs to EfficientAttentionConfig"):
        SparseAttention.create_from_config(EfficientAttentionConfig())


def test_budget_masks_draw_each_key_once() -> None:
    budgets = torch.tensor([0, 1, 4, 7, 50]).view(1, 5, 1, 1)
    probability = torch.full((1, 5, 1, 1), 0.5)
    mask = create_sampling_mask_with_per_head_budget(budgets, probability, 12, 3, 10)
    dense = mask.get_dense_mask()
    assert (dense > 0).sum(-1).flatten().tolist() == [0, 1, 4, 7, 7]
    assert not dense[..., :3].any()
    assert not dense[..., 10:].any()
    assert set(dense.unique().tolist()) == {0.0, 0.5}
    with pytest.raises(ValueError, match="start_idx"):
        create_sampling_mask_with_per_head_budget(budgets, probability, 12, 3, 13)


def test_double_sparsity_config_defaults(tmp_path) -> None:
    config = DoubleSparsityTopKMaskerConfig(8, channel_file(tmp_path, 2))
    assert (config.group_factor, config.label_bits, config.channel_selection) == (16, 4, "qk_proj")
