"""HashAttention on pages: the signatures that the masker makes, and the keys that it selects."""

from pathlib import Path

import pytest
import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed import (
    HashAttentionTopKMaskerConfig,
)
from sparse_attention_hub.sparse_attention.utils.hashattention_utils import save_hat_weights
from tests.plugin.paged.label_rows import (
    assert_independent_rows,
    assert_same_keys,
    at_slots,
    rebuilt,
    slots_of,
)
from tests.plugin.paged.paged_rows import (
    SINK_LOCAL,
    attend,
    make_rows,
    paged_attention,
    shape_of,
)
from vllm_sparse_plugin.paged.attention import PagedAttention
from vllm_sparse_plugin.paged.hash_signatures import HashSignatures, stored_signatures
from vllm_sparse_plugin.paged.layout import BlockLayout
from vllm_sparse_plugin.paged.maskers.base import Unsupported

HEAD_SIZE, HIDDEN, LAYERS = 32, 20, (0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("weights")


def hash_weights(heads: int, networks: int, bits: int, exact: bool) -> dict:
    """Other networks for every layer and head; small integers give many outputs of exactly 0."""
    generator = torch.Generator().manual_seed(networks + bits)

    def numbers(*size: int) -> torch.Tensor:
        if exact:
            return torch.randint(-1, 2, size, generator=generator).float()
        return torch.randn(size, generator=generator)

    def parts(side: str, count: int) -> dict:
        sizes = [(HEAD_SIZE, HIDDEN), (HIDDEN, bits)]
        return {
            f"{side}_matrix": [numbers(count, *size) for size in sizes],
            f"{side}_bias": [numbers(count, size[1]) for size in sizes],
        }

    return {layer: {**parts("query", heads), **parts("key", networks)} for layer in LAYERS}


def weight_file(folder: Path, heads: int, networks: int, bits: int, exact: bool) -> str:
    path = folder / f"{heads}-{networks}-{bits}-{exact}.safetensors"
    if not path.exists():
        save_hat_weights(hash_weights(heads, networks, bits, exact), path)
    return str(path)


def config(
    folder: Path,
    networks: int,
    heads: int = 8,
    bits: int = 40,
    exact: bool = True,
    granularity: str = "query_head",
    **fields,
) -> dict:
    return {
        "type": "hash_attention_top_k",
        "heavy_size": 0.15,
        "hat_bits": bits,
        "hat_mlp_layers": 2,
        "hat_mlp_hidden_size": HIDDEN,
        "hat_mlp_activation": "relu",
        "hat_weight_file": weight_file(folder, heads, networks, bits, exact),
        "head_granularity": granularity,
        **fields,
    }


@pytest.mark.parametrize("granularity", ["query_head", "kv_head"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "networks", "block_size", "bits"),
    [
        (8, 2, 8, 32, 40),
        (8, 2, 2, 32, 32),
        (9, 3, 9, 128, 64),
        (9, 3, 3, 32, 7),
        (3, 3, 3, 128, 33),
    ],
)
def test_same_keys(folder, granularity, heads, kv_heads, networks, block_size, bits) -> None:
    """Scores are whole numbers: many ties, all of them decided by place."""
    maskers = [*SINK_LOCAL, config(folder, networks, heads, bits, granularity=granularity)]
    # Means over heads can be near ties of keys whose heads score differently.
    near_ties = 1 if granularity == "kv_head" and heads > kv_heads else 0
    assert_same_keys(
        maskers, near_ties=near_ties, heads=heads, kv_heads=kv_heads, block_size=block_size
    )


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "tanh"])
def test_activations(folder, activation) -> None:
    maskers = [*SINK_LOCAL, config(folder, 8, exact=False, hat_mlp_activation=activation)]
    assert_same_keys(maskers, exact=False, near_ties=1)


@pytest.mark.parametrize("fields", [{"heavy_size": 40}, {"heavy_size": 1.0}], ids=str)
def test_sizes(folder, fields) -> None:
    assert_same_keys([config(folder, 8, **fields)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folder, dtype) -> None:
    assert_same_keys([*SINK_LOCAL, config(folder, 2)], dtype=dtype)


def test_networks_of_kv_heads_for_queries_too(folder) -> None:
    assert_same_keys([*SINK_LOCAL, config(folder, 2, heads=2)])


def bits_of(words: torch.Tensor, count: int) -> torch.Tensor:
    return ((words[..., None] >> torch.arange(32)) & 1).flatten(start_dim=-2)[..., :count].bool()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("networks", [8, 2])
def test_the_index_holds_the_networks_signs_however_keys_came(folder, dtype, networks) -> None:
    """In whole numbers: an output of exactly 0 is a set bit."""
    index = HashSignatures(weight_file(folder, 8, networks, 40, True), 40, "relu")
    shape = shape_of(dtype=dtype)
    written = make_rows(BlockLayout(shape, (index,)), layer_index=1)
    weights = hash_weights(8, networks, 40, True)[1]
    (first, second), (bias, last_bias) = weights["key_matrix"], weights["key_bias"]
    stored = stored_signatures(index, written.cache)
    zeros = 0
    for row, keys in enumerate(written.keys):
        inputs = keys[0].float().repeat_interleave(networks // 2, dim=0)
        outputs = torch.relu(inputs @ first + bias[:, None]) @ second + last_bias[:, None]
        found = bits_of(at_slots(stored, slots_of(written, row), shape.block_size), 40)
        assert torch.equal(found.flatten(1, 2), (outputs >= 0).transpose(0, 1))
        zeros += int((outputs == 0).sum())
    assert zeros > 100


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_signature_does_not_depend_on_how_many_keys_are_written_at_once(folder, activation):
    """Bit for bit, with keys at which a sum in another order would change some sign."""
    index = HashSignatures(weight_file(folder, 8, 8, 64, False), 64, activation)
    shape = shape_of()
    written = make_rows(BlockLayout(shape, (index,)), lengths=(1, 33, 700, 1500), exact=False)
    stored = stored_signatures(index, written.cache)
    again = stored_signatures(index, rebuilt(written))
    for row in range(len(written.keys)):
        slots = slots_of(written, row)
        found = at_slots(stored, slots, shape.block_size)
        assert torch.equal(found, at_slots(again, slots, shape.block_size))


def test_a_row_does_not_depend_on_its_neighbours(folder) -> None:
    assert_independent_rows([*SINK_LOCAL, config(folder, 8, exact=False, granularity="kv_head")])


def test_bytes_per_token(folder) -> None:
    """Words of 32 bits, per network that reads the key."""
    found = {
        (networks, bits): HashSignatures(
            weight_file(folder, 8, networks, bits, True), bits, "relu"
        ).bytes_per_block(shape_of())
        for networks in (2, 8)
        for bits in (32, 40)
    }
    assert found == {(2, 32): 32 * 4, (2, 40): 32 * 8, (8, 32): 32 * 16, (8, 40): 32 * 32}


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"heads": 16}, "layer 0 has 8 key networks"),
        ({"head_size": 64}, "layer 0: the query networks take 32 channels, the heads have 64"),
    ],
)
def test_what_has_no_counterpart(folder, shape, reason) -> None:
    with pytest.raises(Unsupported, match=f"hash_attention_top_k: {reason}"):
        paged_attention([config(folder, 8)], shape_of(**shape))


def test_weights_without_a_file_have_no_counterpart() -> None:
    in_process = HashAttentionTopKMaskerConfig(
        0.1, 40, 2, HIDDEN, "relu", hat_weights=hash_weights(8, 8, 40, True)
    )
    with pytest.raises(Unsupported, match="only weights in a file"):
        PagedAttention([in_process], shape_of())


def test_a_layer_that_the_file_leaves_out(folder) -> None:
    """Its keys get no signatures; a masker that asks for them gets the reference's error."""
    attention, layout = paged_attention([config(folder, 8)], shape_of())
    rows = make_rows(layout, layer_index=2)
    with pytest.raises(ValueError, match="the weights have no layer 2"):
        attend(attention, rows)
