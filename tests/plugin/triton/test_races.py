"""No kernel has a race that matters, neither between its programs nor between threads of one."""

from functools import partial
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime.errors import InterpreterError

from benchmarks.gpu import small_cases
from tests.plugin.triton.interpreter import DEVICE, kernel_of
from tests.plugin.triton.races import ADD, LOWER, READ, WRITE, Race, watched
from tests.plugin.triton.test_compiled import KERNELS
from vllm_sparse_plugin.paged.device import queries
from vllm_sparse_plugin.paged.device.maskers import top_k
from vllm_sparse_plugin.paged.triton_kernels import (
    flags,
    key_numbers,
    label_scores,
    mass_selection,
    pooling,
    sampling,
    selection,
    tiles,
)

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="nothing is interpreted there")

PROGRAMS, THREADS = "programs", "threads"
DO_NOT_MATTER = {
    Race("page_bounds._update_pages", PROGRAMS, WRITE, READ): "keys that others write are loaded, "
    "and not used: they are taken from the model's own tensor",
    Race("page_bounds._update_pages", THREADS, WRITE, READ): "likewise, of the program's own key",
    Race("learned_blocks._note_codes", THREADS, READ, WRITE): "a thread stores what it loaded",
    Race("read_counts._add_kernel", THREADS, READ, WRITE): "a thread stores what it loaded",
}
"""With the reason; programs meet in the other order where they are run backwards."""
SMALL_TILES = (
    (flags, "_TILE", 256),
    (mass_selection, "_TILE", 256),
    *((module, "POOLING_TILE", 256) for module in (key_numbers, label_scores, pooling)),
    (sampling, "TILE", 256),
    (selection, "TILE", 256),
    (tiles, "TILE_NUMBERS", 2048),
)


@pytest.mark.parametrize("is_backwards", [False, True], ids=["forwards", "backwards"])
def test_every_kernel(is_backwards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of some hundred keys, rows are long, and are split among programs.
    monkeypatch.setattr(top_k, "MOST_NUMBERS", 64)
    for module, name, size in SMALL_TILES:
        monkeypatch.setattr(module, name, size)
    workspace_of = partial(queries.RadixWorkspace.of, long_row=128, short_row=64)
    monkeypatch.setattr(queries.RadixWorkspace, "of", workspace_of)
    with watched(is_backwards) as found:
        result = small_cases.measure(torch.device("cpu"), keys=90, many_keys=700, many_sequences=3)
    assert not result["failures"]
    assert len(found) == KERNELS
    races = {race for of_kernel in found.values() for race in of_kernel}
    assert races == {
        race._replace(first=race.then, then=race.first)
        if is_backwards and race.between == PROGRAMS
        else race
        for race in DO_NOT_MATTER
    }


def neighbours(x, y, counter, ONE: tl.constexpr):
    own = tl.program_id(0) * 4
    tl.store(x + own + tl.arange(0, 8), tl.program_id(0))


def own_parts(x, y, counter, ONE: tl.constexpr):
    at = x + tl.program_id(0) * 128 + tl.arange(0, 128)
    tl.store(at, tl.load(at) + 1)


def the_same(x, y, counter, ONE: tl.constexpr):
    tl.store(x, 7)


def others(x, y, counter, ONE: tl.constexpr):
    own = tl.program_id(0)
    tl.store(x + own, 7)
    tl.store(y + own, tl.load(x + 3 - own))


def sums(x, y, counter, ONE: tl.constexpr):
    tl.atomic_add(x + tl.arange(0, 8), 1, sem="relaxed")


def sums_that_are_read(x, y, counter, ONE: tl.constexpr):
    tl.atomic_add(x, 1, sem="relaxed")
    tl.store(y + tl.program_id(0), tl.load(x + 8 - 8 * ONE))


def sums_and_minima(x, y, counter, ONE: tl.constexpr):
    tl.atomic_add(x + tl.arange(0, 8), 1, sem="relaxed")
    tl.atomic_min(x + tl.arange(0, 8), -2, sem="relaxed")


def last_one(x, y, counter, ONE: tl.constexpr):
    tl.store(x + tl.program_id(0) * 8 + tl.arange(0, 8), 7)
    tl.debug_barrier()
    if tl.atomic_add(counter, 1) == 3:
        tl.store(y + tl.arange(0, 32), tl.load(x + tl.arange(0, 32)))


def each_one(x, y, counter, ONE: tl.constexpr):
    tl.store(x + tl.program_id(0) * 8 + tl.arange(0, 8), 7)
    tl.debug_barrier()
    if tl.atomic_add(counter, 1) < 4:
        tl.store(y + tl.program_id(0), tl.load(x + 8))


def last_one_without_order(x, y, counter, ONE: tl.constexpr):
    tl.store(x + tl.program_id(0) * 8 + tl.arange(0, 8), 7)
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="relaxed") == 3:
        tl.store(y + tl.arange(0, 32), tl.load(x + tl.arange(0, 32)))


def last_one_of_a_block(x, y, counter, ONE: tl.constexpr):
    tl.store(x + tl.program_id(0) * 8 + tl.arange(0, 8), 7)
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, scope="cta") == 3:
        tl.store(y + tl.arange(0, 32), tl.load(x + tl.arange(0, 32)))


def ordered_twice(x, y, counter, ONE: tl.constexpr):
    own = tl.program_id(0)
    tl.atomic_add(counter, 1)
    tl.store(x + own, 7)
    tl.debug_barrier()
    tl.store(y + own, tl.load(x + (own ^ 1)))
    tl.debug_barrier()
    tl.atomic_add(counter, 1)


def last_one_without_barrier(x, y, counter, ONE: tl.constexpr):
    tl.store(x + tl.program_id(0) * 8 + tl.arange(0, 8), 7)
    if tl.atomic_add(counter, 1) == 3:
        tl.store(y + tl.arange(0, 32), tl.load(x + tl.arange(0, 32)))


def last_one_of_numbers(x, y, counter, ONE: tl.constexpr):
    tl.store(x + tl.program_id(0), 7)
    if tl.atomic_add(counter, 1) == 3:
        tl.debug_barrier()
        tl.store(y, tl.load(x) + tl.load(x + 1))


def shifted(x, y, counter, ONE: tl.constexpr):
    at = tl.program_id(0) * 256 + tl.arange(0, 128)
    tl.store(x + at, 7)
    tl.store(y + at, tl.load(x + at + ONE))


def shifted_behind_a_barrier(x, y, counter, ONE: tl.constexpr):
    at = tl.program_id(0) * 256 + tl.arange(0, 128)
    tl.store(x + at, 7)
    tl.debug_barrier()
    tl.store(y + at, tl.load(x + at + ONE))


def own_lanes(x, y, counter, ONE: tl.constexpr):
    at = tl.program_id(0) * 256 + tl.arange(0, 128)
    tl.store(x + at, 7)
    tl.store(y + at, tl.load(x + at))


def two_in_one_place(x, y, counter, ONE: tl.constexpr):
    lanes = tl.arange(0, 8)
    tl.store(y + tl.program_id(0) * 8 + lanes // 2, lanes // 2)
    tl.store(x + tl.program_id(0) * 8 + lanes // 2, lanes)


def last_one_resets(x, y, counter, ONE: tl.constexpr):
    tl.atomic_add(x + tl.arange(0, 128), 1, sem="relaxed")
    tl.debug_barrier()
    if tl.atomic_add(counter, 1) == 3:
        tl.store(counter, 0)
        sums = tl.load(x + tl.arange(0, 128))
        tl.store(x + tl.arange(0, 128), tl.zeros([128], tl.int32))
        tl.store(y + tl.arange(0, 128), sums)


def fewer_lanes_than_threads(x, y, counter, ONE: tl.constexpr):
    at = tl.program_id(0) * 256 + tl.arange(0, 64)
    tl.store(y + at, tl.load(x + at))
    tl.store(x + at, 7)


@pytest.mark.parametrize("is_backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (neighbours, {(PROGRAMS, WRITE, WRITE)}),
        (own_parts, set()),
        (the_same, set()),
        (others, {(PROGRAMS, READ, WRITE), (PROGRAMS, WRITE, READ)}),
        (sums, set()),
        (
            sums_that_are_read,
            {(PROGRAMS, ADD, READ), (PROGRAMS, READ, ADD), (THREADS, ADD, READ)},
        ),
        (sums_and_minima, {(PROGRAMS, ADD, LOWER), (PROGRAMS, LOWER, ADD), (THREADS, ADD, LOWER)}),
        (last_one, set()),
        (each_one, {(PROGRAMS, READ, WRITE)}),
        (last_one_without_order, {(PROGRAMS, WRITE, READ)}),
        (last_one_of_a_block, {(PROGRAMS, WRITE, READ)}),
        (ordered_twice, {(PROGRAMS, WRITE, READ), (PROGRAMS, READ, WRITE)}),
        (last_one_without_barrier, {(PROGRAMS, WRITE, READ), (THREADS, WRITE, READ)}),
        (last_one_of_numbers, set()),
        (last_one_resets, set()),
        (shifted, {(THREADS, WRITE, READ)}),
        (shifted_behind_a_barrier, set()),
        (own_lanes, {(THREADS, WRITE, READ)}),
        (two_in_one_place, {(THREADS, WRITE, WRITE)}),
        (fewer_lanes_than_threads, {(THREADS, READ, WRITE)}),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_what_is_found(function: Any, wanted: set[Any], is_backwards: bool) -> None:
    kernel = kernel_of(function)
    x, y = (torch.zeros(1024, dtype=torch.int32) for _ in range(2))
    counter = torch.zeros(1, dtype=torch.int32)
    with watched(is_backwards) as found:
        kernel[(4,)](x, y, counter, ONE=1)
    name = f"test_races.{function.__name__}"
    assert found == {name: {Race(name, *race) for race in wanted}}


def exchanged(x, y, counter, ONE: tl.constexpr):
    tl.atomic_xchg(x, tl.program_id(0))


def compared(x, y, counter, ONE: tl.constexpr):
    tl.atomic_cas(x, 0, 7)


@pytest.mark.parametrize("function", [exchanged, compared])
def test_what_is_not_known(function: Any) -> None:
    x = torch.zeros(8, dtype=torch.int32)
    with watched(), pytest.raises(InterpreterError, match="disturbs"):
        kernel_of(function)[(2,)](x, x, x, ONE=1)
