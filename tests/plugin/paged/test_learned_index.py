"""Codes of what was learned from a sequence's first keys, in blocks that sequences share."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.plugin.paged.block_pool import Pool, Sequence
from tests.plugin.paged.paged_rows import attend, general, paged_attention, shape_of
from tests.tolerances import ATTENTION_ATOL
from vllm_sparse_plugin.paged import learned_index
from vllm_sparse_plugin.paged.bucket_signatures import BucketSignatures
from vllm_sparse_plugin.paged.centroid_codes import CentroidCodes
from vllm_sparse_plugin.paged.layout import BlockLayout
from vllm_sparse_plugin.paged.learned_index import LearnedIndex, stored_headers
from vllm_sparse_plugin.paged.learned_states import LearnedStates
from vllm_sparse_plugin.paged.stamps import StampCounter

pytestmark = pytest.mark.usefixtures("one_thread")

PQ = {
    "type": "pq_cache",
    "heavy_size": 9,
    "pq_sub_dim": 4,
    "pq_bits": 3,
    "kmeans_iterations": 2,
    "head_granularity": "kv_head",
}
PIG = {"type": "magic_pig", "lsh_l": 9, "lsh_k": 3}
# Both indices in one block.
MASKERS = [{"type": "sink", "sink_size": 2}, PQ, PIG]
SHAPE = {"heads": 4, "kv_heads": 2, "head_size": 16}


def pool_of(maskers: list[dict] = MASKERS, block_size: int = 32, seed: int = 0):
    """A pool, and a function that checks queries in it."""
    attention, layout = paged_attention(maskers, shape_of(**SHAPE, block_size=block_size))
    pool = Pool(layout, seed=seed)

    def check(*queries: tuple[Sequence, int]) -> torch.Tensor:
        return pool.check(attention, maskers, list(queries))

    return pool, check


def indices_of(pool: Pool) -> tuple[LearnedIndex, LearnedIndex]:
    centroids, buckets = pool.cache.layout.indices
    assert isinstance(centroids, CentroidCodes)
    assert isinstance(buckets, BucketSignatures)
    return centroids, buckets


class Calls:
    """Counts what is learned, and the blocks that get codes, of both indices."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.learned: list[int] = []
        self.encoded: list[int] = []
        for kind in (CentroidCodes, BucketSignatures):
            monkeypatch.setattr(kind, "learn", self._learn(kind.learn))
            monkeypatch.setattr(kind, "encode", self._encode(kind.encode))

    def _learn(self, real: Callable) -> Callable:
        def learn(index: LearnedIndex, keys: torch.Tensor) -> np.ndarray:
            self.learned.append(keys.shape[2])
            return real(index, keys)

        return learn

    def _encode(self, real: Callable) -> Callable:
        def encode(index: LearnedIndex, cache, short, states) -> None:
            self.encoded.append(len(short.blocks))
            real(index, cache, short, states)

        return encode

    def take(self) -> tuple[list[int], list[int]]:
        """Sizes of learned prefixes and numbers of blocks, since the last call."""
        taken = self.learned, self.encoded
        self.learned, self.encoded = [], []
        return taken


steps = st.tuples(
    st.sampled_from(["start", "append", "one", "rewrite", "fork", "copy", "end", "query"]),
    st.integers(0, 10**6),
    st.integers(1, 70),
)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(
    history=st.lists(steps, min_size=5, max_size=25),
    block_size=st.sampled_from([16, 32, 48]),
    seed=st.integers(0, 1000),
)
def test_any_history(history, block_size, seed) -> None:
    """Whatever happened to blocks: what is selected is what the keys alone say."""
    pool, check = pool_of(block_size=block_size, seed=seed)
    pool.start(40)
    for what, which, count in history:
        if what == "start" or not pool.sequences:
            if len(pool.sequences) < 4:
                pool.start(count)
            continue
        sequence = pool.sequences[which % len(pool.sequences)]
        if what == "append" and len(sequence.keys) < 140:
            pool.append(sequence, count)
        elif what == "one":
            pool.append(sequence, 1)
        elif what == "rewrite":
            pool.rewrite(sequence, count)
        elif what in ("fork", "copy") and len(pool.sequences) < 4:
            other = pool.fork(sequence, what == "copy")
            pool.append(other, count)
        elif what == "end":
            pool.end(sequence)
        elif what == "query":
            shown = pool.sequences[which % len(pool.sequences) :]
            middle = 1 + which % len(sequence.keys)
            check(*((other, len(other.keys)) for other in shown), (sequence, middle))
    if pool.sequences:
        check(*((sequence, len(sequence.keys)) for sequence in pool.sequences))


@pytest.mark.parametrize("maskers", [[PQ], [PIG], [{**PIG, "center": False}]], ids=str)
@pytest.mark.parametrize("block_size", [32, 128])
def test_a_decode_step_makes_the_codes_of_its_token(monkeypatch, maskers, block_size) -> None:
    """What is learned is learned once, also while a block larger than the prefix fills."""
    calls = Calls(monkeypatch)
    pool, check = pool_of(maskers, block_size)
    sequence = pool.start(64)
    check((sequence, 64))
    learned, encoded = calls.take()
    centred = maskers[0].get("center", True)
    assert learned == [64 if centred else 0]
    assert encoded == [-(-64 // block_size)]
    [index] = pool.cache.layout.indices
    for length in (*range(65, 70), *range(94, 100)):
        pool.append(sequence, length - 1 - len(sequence.keys))
        check((sequence, length - 1))
        calls.take()
        pool.append(sequence, 1)
        check((sequence, length))
        assert calls.take() == ([], [1])
        counts, _ = stored_headers(index, pool.cache)
        last = sequence.blocks[-1]
        assert counts[last].tolist() == [(length - 1) % block_size + 1] * 2
    check((sequence, 99))
    assert calls.take() == ([], [0])


def test_a_sequence_that_doubles(monkeypatch) -> None:
    calls = Calls(monkeypatch)
    pool, check = pool_of()
    sequence = pool.start(126)
    for length, learned in ((126, [64, 64]), (127, []), (128, [128, 128]), (129, []), (257, [256])):
        pool.append(sequence, length - len(sequence.keys))
        check((sequence, length))
        assert calls.take()[0] == (learned if length < 257 else learned * 2)


def test_sequences_that_share_blocks_take_turns(monkeypatch) -> None:
    """They want different codes of the same blocks, in one step and step by step."""
    calls = Calls(monkeypatch)
    pool, check = pool_of([PQ])
    long = pool.start(140)
    short = pool.fork(long, with_last_block=False)  # 128 keys in 4 shared blocks
    for _ in range(3):
        check((short, 120), (long, 140))
    assert calls.take() == ([64, 128], [4, 5, 4, 4, 4, 4])
    for _ in range(2):
        check((short, 100))
        check((long, 140))
    assert calls.take() == ([], [4, 4, 4, 4])
    # With as many keys, they want the same codes.
    pool.append(short, 9)
    check((short, 137), (long, 140))
    check((short, 137), (long, 140))
    assert calls.take() == ([], [1, 0])


def test_sequences_that_want_the_same_codes_of_a_block_up_to_different_places(monkeypatch) -> None:
    calls = Calls(monkeypatch)
    pool, check = pool_of([PQ])
    long = pool.start(140)
    short = pool.fork(long, with_last_block=False)
    check((short, 99), (long, 125), (short, 70))
    assert calls.take() == ([64], [4])
    [index] = pool.cache.layout.indices
    counts, _ = stored_headers(index, pool.cache)
    assert counts[long.blocks[3]].tolist() == [125 - 96] * 2


def test_a_chunk_within_which_a_sequence_doubles_twice() -> None:
    """Queries of one sequence want different codes of the same blocks."""
    for maskers in (MASKERS, [PQ], [PIG]):
        pool, check = pool_of(maskers)
        sequence, other = pool.start(150), pool.start(70)
        lengths = [63, 150, 1, 64, 33, 128, 127, 2, 65]
        batch = [(sequence, length) for length in lengths]
        outputs = check(*batch[:4], (other, 70), *batch[4:])
        assert outputs.isfinite().all()


def test_a_block_used_again_has_other_codes_and_another_name(monkeypatch) -> None:
    calls = Calls(monkeypatch)
    pool, check = pool_of()
    first = pool.start(70)
    check((first, 70))
    blocks = set(first.blocks)
    pool.end(first)
    second = pool.start(70)
    assert set(second.blocks) == blocks
    check((second, 70))
    assert calls.take() == ([64] * 4, [3] * 4)


def test_keys_rewritten_within_the_prefix_are_learned_again(monkeypatch) -> None:
    """Without a write to any block's first place, as after a rejected draft."""
    calls = Calls(monkeypatch)
    pool, check = pool_of([PQ])
    sequence = pool.start(70)
    check((sequence, 70))
    pool.rewrite(sequence, 5)  # behind the prefix of 64
    check((sequence, 70))
    assert calls.take() == ([64], [3, 1])
    pool.rewrite(sequence, 20)  # its last key is at place 63
    check((sequence, 70))
    assert calls.take() == ([64], [3])


def test_copies_of_a_block_that_is_not_full(monkeypatch) -> None:
    """Both go on with keys of their own: the same name up to there, other names behind."""
    calls = Calls(monkeypatch)
    pool, check = pool_of([PQ])
    sequence = pool.start(40)
    check((sequence, 40))
    copy = pool.fork(sequence, with_last_block=True)
    pool.append(sequence, 1)
    pool.append(copy, 1)
    check((sequence, 41), (copy, 41))
    assert calls.take() == ([32], [2, 2])  # the shared block has its codes, the others lack one
    pool.append(sequence, 23)
    pool.append(copy, 23)
    check((sequence, 64), (copy, 64))
    assert calls.take()[0] == [64, 64]


@pytest.mark.parametrize("places", [1, 2])
def test_a_memo_with_little_room(monkeypatch, places) -> None:
    """Everything is learned again and again, and is right."""
    known: dict[LearnedIndex, LearnedStates] = {}

    def states(index: LearnedIndex, shape) -> LearnedStates:
        width = index.state_width(shape)
        return known.setdefault(index, LearnedStates(width, places * 4 * width))

    monkeypatch.setattr(learned_index, "_states", states)
    pool, check = pool_of()
    sequences = [pool.start(count) for count in (70, 130, 20, 65)]
    for _ in range(2):
        check(*((sequence, len(sequence.keys)) for sequence in sequences))
        check((sequences[1], 130), (sequences[0], 40))
        for sequence in sequences:
            pool.append(sequence, 1)
    assert len(known) == 2
    assert all(len(memo) == places for memo in known.values())


def test_a_memo_that_forgets_changes_nothing(monkeypatch) -> None:
    """What is learned again has the same tag: its codes are still good."""
    calls = Calls(monkeypatch)
    pool, _ = pool_of()
    attention, _ = paged_attention(MASKERS, pool.cache.layout.shape)
    first, second = pool.start(70), pool.start(130)
    rows = pool.rows([(first, 70), (second, 130)])
    output, read = attend(attention, rows)
    tags = [stored_headers(index, pool.cache)[1] for index in indices_of(pool)]
    assert calls.take() == ([64, 128] * 2, [8, 8])
    for index in indices_of(pool):
        index.states(pool.cache.layout.shape).clear()
    again, counts = attend(attention, rows)
    assert calls.take() == ([64, 128] * 2, [0, 0])
    assert torch.equal(output, again)
    assert np.array_equal(read.keys, counts.keys)
    for index, before in zip(indices_of(pool), tags, strict=True):
        assert torch.equal(stored_headers(index, pool.cache)[1], before)


def test_states_used_last_are_kept(caplog) -> None:
    memo = LearnedStates(3, max_bytes=2 * 3 * 4 + 11)
    assert memo.values.shape == (2, 3)
    asked = []

    def place(name: str) -> int:
        def learn() -> np.ndarray:
            asked.append(name)
            return np.full(3, ord(name), np.float32)

        found = memo.place_of(name.encode(), learn)
        assert memo.values[found].tolist() == [ord(name)] * 3
        return found

    assert [place(name) for name in "aba"] == [0, 1, 0]
    assert not caplog.records
    assert [place(name) for name in "cbb"] == [1, 0, 0]
    [said] = caplog.records  # once
    assert "3 learned states are in use at once, 2 are kept" in said.getMessage()
    assert "".join(asked) == "abcb"
    memo.clear()
    assert len(memo) == 0
    assert [place(name) for name in "ca"] == [0, 1]
    assert LearnedStates(1000, max_bytes=1).values.shape == (1, 1000)


def test_a_state_that_cannot_be_learned_leaves_the_memo_as_it_was() -> None:
    memo = LearnedStates(1, max_bytes=4)
    memo.place_of(b"known", lambda: np.ones(1, np.float32))

    def fail() -> np.ndarray:
        raise MemoryError

    with pytest.raises(MemoryError):
        memo.place_of(b"other", fail)
    assert memo.place_of(b"known", fail) == 0


def test_stamps_are_drawn_once_and_go_round() -> None:
    stamps = StampCounter()
    assert stamps.draw(5) != StampCounter().draw(5)  # a chance of 2**-61 that they meet
    first = stamps.draw(3)
    assert stamps.draw(1) == first + 3 or first > 2**63 - 4
    stamps._next = 2**64 - 2
    assert stamps.draw(4) == 2**63 - 2
    assert stamps.draw(1) == -(2**63) + 2


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 1023, 1024, 2**31 - 1])
def test_prefix_sizes(length: int) -> None:
    sizes = CentroidCodes(4, 3, 2).prefix_sizes(np.array([length], np.int32))
    assert sizes.tolist() == [1 << (length.bit_length() - 1)]


def test_queries_in_any_order_and_alone_get_the_same() -> None:
    """Bit for bit, while some of them want different codes of the same blocks."""
    attention, layout = paged_attention(MASKERS, shape_of(**SHAPE))
    pool = Pool(layout)
    long = pool.start(140)
    short = pool.fork(long, with_last_block=False)
    rows = pool.rows([(long, 140), (short, 100), (long, 30), (short, 128), (pool.start(7), 7)])
    output, read = attend(attention, rows)
    expected, counts = general(MASKERS, rows)
    assert read.keys.tolist() == counts
    assert (output - expected).abs().max() <= ATTENTION_ATOL[torch.float32]
    for order in ([4, 2, 0, 1, 3], [1], [2], [3, 0]):
        batch = replace(rows.batch, rows=rows.batch.rows[order], lengths=rows.batch.lengths[order])
        found, _ = attend(attention, replace(rows, query=rows.query[order], batch=batch))
        assert torch.equal(found, output[order])


def test_the_header_before_the_codes() -> None:
    """Count, tag, and a stamp for 16, 32, ... keys and the block: one line of the cache."""
    index = CentroidCodes(4, 3, 2)
    for block_size, words in ((16, 3), (32, 4), (48, 5), (128, 6)):
        shape = shape_of(**SHAPE, block_size=block_size)
        assert index.header_words(shape) == words
        assert index.codes_at(shape) == 64
        # 4 codes of 3 bits, each in 4 bits.
        assert index.bytes_per_block(shape) == 64 + block_size * 2
        offset, stride = BlockLayout(shape, (index,)).place_of(index)
        assert offset % 16 == stride % 16 == 0
