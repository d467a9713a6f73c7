"""A list of maskers for each kind that has a counterpart on pages."""

from pathlib import Path
from typing import Any

from sparse_attention_hub.sparse_attention.utils.hashattention_utils import save_hat_weights
from tests.hub.top_k_maskers import channel_file, hash_weights
from tests.plugin.paged.paged_rows import SINK_LOCAL

NAMES = (
    "oracle",
    "top-p",
    "quest",
    "quest, 4 bits",
    "double sparsity",
    "double sparsity, 4 bits",
    "hash attention",
    "pq",
    "magic pig",
    "random",
    "adaptive",
)


def masker_list(name: str, folder: Path, heads: int) -> list[dict[str, Any]]:
    """One of `NAMES` behind sink and local, with the files that it needs.

    Args:
        name: Of the list.
        folder: Where files are written.
        heads: Query heads, of `HEAD_SIZE` channels.
    """
    networks = folder / "networks.safetensors"
    save_hat_weights(hash_weights(heads), networks)
    quest = {"type": "quest_top_k", "heavy_size": 0.2, "page_size": 8}
    double_sparsity = {
        "type": "double_sparsity_top_k",
        "heavy_size": 0.2,
        "group_factor": 4,
        "sorted_channel_file": channel_file(folder, heads),
    }
    lists: dict[str, dict[str, Any]] = {
        "oracle": {"type": "oracle_top_k", "heavy_size": 0.2},
        "top-p": {"type": "oracle_top_p", "top_p": 0.6},
        "quest": {**quest, "label_bits": 16},
        "quest, 4 bits": {**quest, "label_bits": 4},
        "double sparsity": {**double_sparsity, "label_bits": 16},
        "double sparsity, 4 bits": {**double_sparsity, "label_bits": 4},
        "hash attention": {
            "type": "hash_attention_top_k",
            "heavy_size": 0.2,
            "hat_bits": 40,
            "hat_mlp_layers": 2,
            "hat_mlp_hidden_size": 24,
            "hat_mlp_activation": "silu",
            "hat_weight_file": str(networks),
        },
        "pq": {"type": "pq_cache", "heavy_size": 0.2, "pq_sub_dim": 4, "pq_bits": 3},
        "magic pig": {"type": "magic_pig", "lsh_l": 20, "lsh_k": 5},
        "random": {"type": "random_sampling", "sampling_rate": 0.3},
        "adaptive": {
            "type": "adaptive_sampling",
            "base_rate_sampling": 0.2,
            "epsilon": 0.2,
            "delta": 0.2,
            "init_offset": 0,
            "local_offset": 0,
        },
    }
    return [*SINK_LOCAL, lists[name]]
