"""MagicPIG on pages: the signatures that the masker makes, its sample, and the sample's weights."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attention_hub.sparse_attention.research_attention.maskers.random_projections import (
    bucket_codes,
    projections_of_layer,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.sampling import (
    MagicPig,
    MagicPigConfig,
)
from tests.plugin.paged.label_rows import (
    assert_independent_rows,
    assert_same_keys,
    assert_same_with_threads,
    slots_of,
)
from tests.plugin.paged.paged_rows import (
    SINK_LOCAL,
    attend,
    general,
    make_rows,
    paged_attention,
    shape_of,
)
from tests.tolerances import ATTENTION_ATOL
from vllm_sparse_plugin.paged.bucket_signatures import BucketSignatures, stored_signatures
from vllm_sparse_plugin.paged.kernels.bucket_signatures import sampling_probability
from vllm_sparse_plugin.paged.kernels.group_lists import NOT_SELECTED
from vllm_sparse_plugin.paged.learned_index import stored_headers
from vllm_sparse_plugin.paged.token_lists import TokenLists

pytestmark = pytest.mark.usefixtures("one_thread")


def config(tables: int = 20, bits: int = 5, **fields) -> dict:
    return {"type": "magic_pig", "lsh_l": tables, "lsh_k": bits, **fields}


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "block_size", "tables", "bits"),
    [
        (8, 2, 32, 20, 5),
        (9, 3, 128, 150, 9),
        (3, 3, 128, 8, 2),
        (10, 2, 16, 300, 17),
        (4, 1, 48, 60, 33),
        (4, 2, 32, 3, 1),
    ],
)
def test_same_sample_and_output(center, heads, kv_heads, block_size, tables, bits) -> None:
    """Buckets of one, two, four and eight bytes; more projections than are made at once."""
    maskers = [*SINK_LOCAL, config(tables, bits, center=center)]
    for exact in (True, False):
        assert_same_keys(
            maskers,
            exact=exact,
            near_ties=1,
            heads=heads,
            kv_heads=kv_heads,
            block_size=block_size,
        )


QUEST = {"type": "quest_top_k", "heavy_size": 0.1, "page_size": 8, "head_granularity": "kv_head"}
LISTS = {
    "alone": [config(60, 4)],
    "other seed": [*SINK_LOCAL, config(60, 4, seed=2**63 - 1)],
    "after the oracle": [*SINK_LOCAL, {"type": "oracle_top_k", "heavy_size": 9}, config()],
    "after a group's Quest": [*SINK_LOCAL, QUEST, config()],
    # What a certain choice takes over from a sample is certain.
    "before the oracle": [config(60, 4), {"type": "oracle_top_k", "heavy_size": 9}],
    "before local": [config(60, 4), *SINK_LOCAL],
    "before a group's Quest": [config(60, 4), QUEST],
}


@pytest.mark.parametrize("name", LISTS)
def test_beside_other_maskers(name: str) -> None:
    attention, layout = paged_attention(LISTS[name], shape_of())
    rows = make_rows(layout, layer_index=2)
    output, read = attend(attention, rows)
    expected, counts = general(LISTS[name], rows)
    assert read.keys.tolist() == counts
    assert (output - expected).abs().max() <= ATTENTION_ATOL[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    maskers = [*SINK_LOCAL, config()]
    attention, layout = paged_attention(maskers, shape_of(dtype=dtype))
    rows = make_rows(layout)
    output, read = attend(attention, rows)
    expected, counts = general(maskers, rows)
    assert read.keys.tolist() == counts
    # The reference keeps probabilities in the keys' type.
    assert (output - expected).abs().max() <= 2 * ATTENTION_ATOL[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(("tables", "bits"), [(20, 8), (40, 15), (7, 62)])
def test_the_index_holds_the_reference_s_signatures(dtype, center, tables, bits) -> None:
    """Of keys centred by each sequence's own mean, however they came."""
    attention, layout = paged_attention(
        [config(tables, bits, center=center)], shape_of(dtype=dtype)
    )
    rows = make_rows(layout, exact=False, layer_index=3)
    attend(attention, rows)
    [index] = layout.indices
    assert isinstance(index, BucketSignatures)
    stored, (counts, _) = stored_signatures(index, rows.cache), stored_headers(index, rows.cache)
    projections = projections_of_layer({}, 42, 3, (2, 32, tables * bits))
    different = total = 0
    for row, keys in enumerate(rows.keys):
        prefix = keys[:, :, : 1 << (keys.shape[2].bit_length() - 1)]
        mean = prefix.double().mean(dim=2, keepdim=True).float() * center
        expected = bucket_codes(keys, projections, bits, mean)[0].transpose(0, 1)
        slots = slots_of(rows, row)
        found = stored[slots // 32, :, slots % 32]
        different += int((found != expected).sum())
        total += found.numel()
        assert (counts[slots // 32] > (slots % 32)[:, None]).all()
    # A projection within float noise of 0.
    assert different <= total // 2000


@settings(deadline=None, max_examples=150)
@given(
    cosine=st.floats(-1, 1, width=32),
    tables=st.integers(2, 132),
    bits=st.integers(1, 62),
)
def test_any_probability_is_the_reference_s(cosine, tables, bits) -> None:
    """Of a query and a key at some angle; also at 0 and pi."""
    masker = MagicPig(MagicPigConfig(tables, bits, center=False))
    query = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    key = torch.tensor([cosine, math.sqrt(1 - cosine**2)]).view(1, 1, 1, 2)
    expected = masker.sampling_probability(query, key, torch.zeros(1, 1, 1, 2)).item()
    exact = (key[0, 0, 0, 0] / key.norm()).item()
    found = sampling_probability(exact, tables, bits)
    # The cosine's last bits, which count most near the poles: 2**-24 there is 2**-12 of an angle.
    assert found == pytest.approx(expected, rel=0.02, abs=1e-9)
    agree = 1 - math.acos(max(-1.0, min(1.0, exact))) / math.pi
    hit = agree**bits
    chance = 1 - (1 - hit) ** tables - tables * hit * (1 - hit) ** (tables - 1)
    assert found == pytest.approx(min(1.0, max(1e-12, chance)), rel=1e-9, abs=1e-12)


def test_weights_of_flagged_keys() -> None:
    """A probability of their own for keys with flag 3, the unit's for those with flag 2."""
    flags = np.zeros((2, 16), np.uint8)
    flags[0, [1, 4, 9]] = 1, 3, 3
    flags[1, [4, 5]] = 2, 1
    own = np.full((2, 16), np.nan, np.float32)
    own[0, [4, 9]] = 0.25, 0.5
    lengths = np.array([12], np.int32)
    probability = np.array([0, 0.125], np.float32)
    lists = TokenLists.of(flags, probability, lengths, 2, 1, True, own)
    assert lists.tokens[0, : lists.counts[0]].tolist() == [1, 4, 5, 9]
    weights = [[0, NOT_SELECTED], [math.log(4), math.log(8)], [NOT_SELECTED, 0]]
    weights += [[math.log(2), NOT_SELECTED]]
    assert np.allclose(lists.log_weights[0, :4], np.array(weights, np.float32))
    assert lists.keys_read.tolist() == [5]
    # One query head per KV head.
    lists = TokenLists.of(flags[:1], np.zeros(1, np.float32), lengths, 1, 1, True, own[:1])
    assert np.allclose(lists.log_weights[0, :3, 0], [0, math.log(4), math.log(2)])


def test_keys_that_are_read_for_their_weights_are_counted() -> None:
    """Each once for the query heads of a group, beside the signatures and what attention reads."""
    attention, layout = paged_attention([config(60, 3)], shape_of())
    rows = make_rows(layout, lengths=(97, 33), exact=False)
    _, read = attend(attention, rows)
    [index] = layout.indices
    width = 2 * 32 * 4  # of a key and a value
    scanned = rows.batch.lengths * 2 * index.bytes_per_block(layout.shape) // 32
    # Half as much again as what attention reads: the keys without the values.
    loaded = read.loaded_bytes - scanned
    assert (loaded % (width + width // 2) == 0).all()
    union = loaded // (width + width // 2)
    assert (union >= read.keys // 4).all()
    assert (union <= 2 * rows.batch.lengths).all()
    assert (union > 0).all()


def test_the_number_of_threads_does_not_matter() -> None:
    assert_same_with_threads([*SINK_LOCAL, config(60, 4)])


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    assert_independent_rows([*SINK_LOCAL, config(60, 4)])


def test_bytes_per_block() -> None:
    """A line for the header, and a bucket per table in whole bytes."""
    shape = shape_of()
    found = {
        bits: BucketSignatures(10, bits, True, 0).bytes_per_block(shape) - 64
        for bits in (1, 8, 9, 16, 17, 32, 33, 62)
    }
    widths = {1: 1, 8: 1, 9: 2, 16: 2, 17: 4, 32: 4, 33: 8, 62: 8}
    assert found == {bits: 32 * 10 * width for bits, width in widths.items()}
