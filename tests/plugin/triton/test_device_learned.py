"""Maskers on the device that learn from a sequence: step by step, against the ones on CPUs.

Both hold the same sequences in blocks of their own. What the host plans is `SequenceStates`' own.
"""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attention_hub.sparse_attention.serialization import config_from_dict
from tests.plugin.paged.paged_rows import SINK_LOCAL, model_dtype, paged_attention, shape_of
from tests.plugin.triton.interpreter import DEVICE
from tests.tolerances import ATTENTION_ATOL
from vllm_sparse_plugin.paged.attention import QueryBatch
from vllm_sparse_plugin.paged.cache_scales import UNSCALED, CacheScales
from vllm_sparse_plugin.paged.device.attention import KEYS_READ, DeviceAttention
from vllm_sparse_plugin.paged.device.cache import DeviceCache
from vllm_sparse_plugin.paged.device.indices.learned import DeviceLearnedIndex
from vllm_sparse_plugin.paged.device.sequences import SequenceStates, StepSequences
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.layout import BlockShape, LayerCache
from vllm_sparse_plugin.paged.triton_kernels.cache_rows import DeviceBatch
from vllm_sparse_plugin.paged.triton_kernels.learned_blocks import digest_keys
from vllm_sparse_plugin.request_parameters import RequestParameters
from vllm_sparse_plugin.row_table import Row

BLOCKS = 24
CAPACITY = 128
PLACES = 3
PQ = {
    "type": "pq_cache",
    "heavy_size": 6,
    "pq_sub_dim": 8,
    "pq_bits": 3,
    "kmeans_iterations": 2,
}


def new_row() -> Row:
    return Row(RequestParameters("{}", "", None, None), 0, 0)


@dataclass
class Sequence:
    """One request: its blocks, how many keys it has, and whose it is for the host."""

    blocks: list[int]
    length: int = 0
    row: Row = field(default_factory=new_row)


class Twins:
    """The same caches on both sides."""

    def __init__(self, maskers: list[dict], shape: BlockShape) -> None:
        self.shape = shape
        self.host, layout = paged_attention(maskers, shape)
        width = layout.bytes_per_token // shape.dtype.itemsize
        size = (BLOCKS, shape.num_kv_heads, shape.block_size, width)
        scales = CacheScales(0.5, 0.25) if shape.dtype.itemsize == 1 else UNSCALED
        self.host_cache = LayerCache.of(torch.zeros(size, dtype=shape.dtype), layout, 0, scales)
        device = torch.device(DEVICE)
        space = DeviceSpace(shape, 8, CAPACITY, 64, device, PLACES)
        configs = config_from_dict({"maskers": maskers}).masker_configs
        self.device = DeviceAttention(configs, space)
        kv_cache = torch.zeros(size, dtype=shape.dtype, device=device)
        self.cache = DeviceCache.of(kv_cache, layout, 0, space, scales)
        self.states = SequenceStates(PLACES)
        self._generator = torch.Generator().manual_seed(0)
        [self.index] = self.cache.indices.values()
        assert isinstance(self.index, DeviceLearnedIndex)

    def numbers(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self._generator).to(model_dtype(self.shape))

    def write(self, sequence: Sequence, count: int, start: int | None = None) -> None:
        """Writes keys; those behind them are gone."""
        start = sequence.length if start is None else start
        places = np.arange(start, start + count)
        size = self.shape.block_size
        slots = torch.from_numpy(np.array(sequence.blocks)[places // size] * size + places % size)
        numbers = (count, self.shape.num_kv_heads, self.shape.head_size)
        key, value = self.numbers(*numbers), self.numbers(*numbers)
        self.host_cache.write(key, value, slots)
        self.cache.write(key.to(DEVICE), value.to(DEVICE), slots.to(DEVICE))
        sequence.length = start + count

    def attend(self, *sequences: Sequence) -> tuple[torch.Tensor, StepSequences]:
        """A query per sequence, on both sides: the same answers."""
        number, width = len(sequences), CAPACITY // self.shape.block_size
        table = np.full((number, width), BLOCKS + 9, np.int32)
        for row, sequence in enumerate(sequences):
            table[row, : len(sequence.blocks)] = sequence.blocks
        owners = np.arange(number, dtype=np.int32)
        lengths = np.array([sequence.length for sequence in sequences], np.int32)
        query = self.numbers(number, self.shape.num_heads, self.shape.head_size)
        scaling = self.shape.head_size**-0.5
        expected, read = self.host.attend(
            query.float().numpy(), self.host_cache, QueryBatch(table, owners, lengths), scaling
        )
        rows = [(sequence.row, sequence.length, sequence.length) for sequence in sequences]
        self.states.see((row, length) for row, _, length in rows)
        places, changes = self.states.take(rows)
        batch = DeviceBatch(
            *(torch.from_numpy(part).to(DEVICE) for part in (table, owners, lengths, places))
        )
        steps = StepSequences(batch, changes)
        sizes = torch.from_numpy(self.device.sizes(lengths)).to(DEVICE)
        output = torch.zeros(query.shape, device=DEVICE)
        counts = torch.zeros(number, 3, dtype=torch.int64, device=DEVICE)
        self.device.attend(
            query.float().to(DEVICE), self.cache, batch, sizes, scaling, output, counts, steps
        )
        assert counts[:, KEYS_READ].tolist() == read.keys.tolist()
        error = np.abs(output.cpu().numpy() - expected).max()
        assert error <= ATTENTION_ATOL[model_dtype(self.shape)]
        return output, steps


PIG = {"type": "magic_pig", "lsh_l": 10, "lsh_k": 3}
SINK, LOCAL = SINK_LOCAL
BY_GROUP = {"pq_bits": 4, "head_granularity": "kv_head"}
SHAPES = [
    ([SINK, PQ], shape_of(4, 2, 32, 16)),
    ([SINK, {**PQ, **BY_GROUP}], shape_of(6, 2, 32, 32, torch.bfloat16)),
    ([SINK, {**PQ, "pq_sub_dim": 32, "heavy_size": 0.2}], shape_of(3, 1, 64, 16, torch.float16)),
    ([SINK, {**PIG, "lsh_k": 9}], shape_of(3, 1, 40, 32, torch.bfloat16)),
    ([SINK, {**PIG, "center": False, "lsh_l": 5}], shape_of(2, 2, 32, 16, torch.float16)),
    ([SINK, PQ], shape_of(4, 2, 32, 16, torch.float8_e4m3fn)),
    ([SINK, PIG], shape_of(3, 1, 40, 32, torch.float8_e4m3fn)),
]
BOTH = [SHAPES[0], ([SINK, PIG], shape_of(2, 1, 32, 16))]


@pytest.mark.parametrize(("maskers", "shape"), SHAPES, ids=str)
def test_a_sequence_grows_key_by_key_over_blocks_and_doublings(maskers: list, shape) -> None:
    twins = Twins(maskers, shape)
    sequence, other = Sequence([5, 2, 9, 11]), Sequence([7, 1, 3])
    twins.write(sequence, 30)
    twins.write(other, 1)
    changed = []
    for _ in range(4):
        _, steps = twins.attend(sequence, other)
        changed.append([change.number for change in steps.changes])
        twins.write(sequence, 1)
        twins.write(other, 1)
    # 30 keys: 16 first ones; from 32 on 32. The other one has 1, 2, 3 and 4 keys.
    assert changed == [[0, 1], [1], [0], [1]]


@pytest.mark.parametrize("later", [LOCAL, {"type": "oracle_top_k", "heavy_size": 9}], ids=str)
def test_what_a_certain_choice_takes_over_from_a_sample_is_certain(later: dict) -> None:
    twins = Twins([PIG, later], shape_of(2, 1, 32, 16))
    sequence = Sequence([5, 2, 9])
    twins.write(sequence, 40)
    twins.attend(sequence)


def test_what_needs_no_change_asks_for_no_memory() -> None:
    """As a CUDA graph has to be."""
    twins = Twins(*SHAPES[0])
    sequence = Sequence([5, 2])
    twins.write(sequence, 17)
    twins.attend(sequence)
    twins.write(sequence, 1)
    held = twins.index
    batch = DeviceBatch(
        *(torch.tensor(part, dtype=torch.int32, device=DEVICE) for part in ([[5, 2]], [0], [18])),
        torch.zeros(1, dtype=torch.int32, device=DEVICE),
    )
    before = held.states.clone()
    held.prepare(twins.cache.kv_cache, StepSequences(batch))
    assert torch.equal(held.states, before)
    held.reserve()
    assert torch.equal(held.states, before)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_sequences_that_share_blocks_and_want_different_codes(case: tuple, together: bool) -> None:
    """One has doubled past what they share, the other one has not."""
    twins = Twins(*case)
    first = Sequence([5, 2, 9])
    twins.write(first, 32)
    second = Sequence([5, 2, 7, 8, 12], length=32)
    twins.write(first, 5)
    twins.write(second, 33)
    for step in range(2):
        if together:
            _, steps = twins.attend(first, second)
            assert bool(steps.changes) is (step == 0)
        else:
            twins.attend(first)
            twins.attend(second)
        twins.write(first, 1)
        twins.write(second, 1)


@pytest.mark.parametrize("case", BOTH, ids=str)
def test_a_shared_prefix_of_one_state_is_encoded_once(case: tuple) -> None:
    twins = Twins(*case)
    first = Sequence([5, 2, 9])
    twins.write(first, 32)
    second = Sequence([5, 2, 7], length=32)
    twins.write(first, 1)
    twins.write(second, 4)
    twins.attend(first)
    blocks = twins.cache.kv_cache[[5, 2]].clone()
    twins.attend(second)
    assert torch.equal(twins.index.tags[0], twins.index.tags[1])
    assert torch.equal(twins.index.states[0], twins.index.states[1])
    assert torch.equal(twins.cache.kv_cache[[5, 2]].view(torch.uint8), blocks.view(torch.uint8))


@pytest.mark.parametrize("case", BOTH, ids=str)
def test_keys_that_are_written_again_lose_their_codes(case: tuple) -> None:
    """A preempted request comes back in other blocks, which another one has left."""
    twins = Twins(*case)
    first = Sequence([5, 2, 9])
    twins.write(first, 40)
    twins.attend(first)
    again = Sequence([9, 5, 2])
    twins.write(again, 35)
    twins.attend(again)
    # And from the middle of a block, within what its state was learned from.
    again.row = new_row()
    twins.write(again, 20, start=22)
    twins.attend(again)


def test_more_sequences_than_places_learn_again() -> None:
    twins = Twins(*SHAPES[0])
    sequences = [Sequence([block]) for block in range(PLACES + 2)]
    for number, sequence in enumerate(sequences):
        twins.write(sequence, 8 + number % 3)
    for _ in range(2):
        for start in range(0, len(sequences), PLACES):
            twins.attend(*sequences[start : start + PLACES])


def digest_of(keys: torch.Tensor, blocks: list[int], count: int, size: int) -> int:
    """Of keys `[count, heads, head_size]` in such blocks."""
    _, heads, head_size = keys.shape
    dtype = keys.dtype
    kind = torch.uint8 if keys.dtype.itemsize == 1 else keys.dtype
    cache = torch.full((8, heads, size, 2 * head_size), torch.nan, dtype=keys.dtype).view(kind)
    keys = keys.view(kind)
    for place in range(count):
        cache[blocks[place // size], :, place % size, :head_size] = keys[place]
    digest = torch.tensor([99], device=DEVICE)
    table = torch.tensor([[0, 0, 0], blocks], dtype=torch.int32, device=DEVICE)
    rows = torch.ones(1, dtype=torch.int32, device=DEVICE)
    cache = cache.view(dtype).to(DEVICE)
    digest_keys(cache, table, rows, count, head_size, digest)
    return int(digest)


@settings(deadline=None, max_examples=15)
@given(
    count=st.integers(1, 24),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]),
    data=st.data(),
)
def test_a_digest_is_of_keys_in_their_order_and_nothing_else(count, seed, dtype, data) -> None:
    keys = torch.randn(count, 2, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)
    found = digest_of(keys, [3, 1, 6], count, 8)
    assert digest_of(keys, [2, 5, 4], count, 8) == found
    place = data.draw(st.integers(0, count - 1))
    numbers = keys.float()
    numbers[place, 1, 23] *= -1
    other = numbers.to(dtype)
    assert digest_of(other, [3, 1, 6], count, 8) != found
    if count > 1:
        swapped = keys.float()
        swapped[[place, place - 1]] = keys.float()[[place - 1, place]]
        assert digest_of(swapped.to(dtype), [3, 1, 6], count, 8) != found
        assert digest_of(keys, [3, 1, 6], count - 1, 8) != found
