"""Races in kernels, found by what each program of a launch reads and writes in the interpreter.

It runs one program after the other, and all lanes of a program at once, so it never shows what
happens in another order. Here are found, of the same memory within one launch:

- of two programs: a write, and a read or another write, unless each did the one atomic operation
  that orders memory, on a common address, in between ("the last one reads what all have written"),
  and the first one's threads waited for each other before theirs;
- of one program, without a barrier in between: the same, unless what is written follows from what
  was read (blocks with a lane for each thread, the same addresses in the same order: that the read
  is what the write depends on is taken for granted), or one thread does both (single numbers);
- of one store: lanes that write different things to one place.

Adding is a write that nobody else's adding disturbs, so are minima; other atomic operations are not
known here, and raise. Writes that change nothing are none to
readers, and two writes of the same do not disturb each other. Who reads without being the last one
is seen in one of two orders of programs. Whether what is found matters is for people to say.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from triton._C.libtriton.ir import ATOMIC_OP, MEM_SEMANTIC, MEM_SYNC_SCOPE
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

READ, WRITE, ADD, LOWER = "reads", "writes", "adds", "lowers"
_KINDS = {ATOMIC_OP.ADD: ADD, ATOMIC_OP.FADD: ADD, ATOMIC_OP.MIN: LOWER}
_UNKNOWN = ("cas", "load", "store", "poll")
_THREADS = 32
"""Of a warp."""


class Race(NamedTuple):
    """A kernel's module and name, whether its programs or threads meet, and what they do."""

    kernel: str
    between: str
    first: str
    then: str


@dataclass
class _Access:
    """Of a block of memory by a program.

    Attributes:
        kind: What it does there.
        pointers: Of the whole block.
        bytes: Addresses that are not masked off.
        program: Number.
        epoch: Barriers before it in its launch.
        orders: Whether it is an atomic operation that orders other memory.
        values: Of the bytes, before and after, where it writes.
    """

    kind: str
    pointers: np.ndarray
    bytes: np.ndarray
    program: int
    epoch: int
    orders: bool
    values: tuple[np.ndarray, np.ndarray] | None


@dataclass
class _Launch:
    """What the programs of a launch have done so far, in the order in which they were run."""

    kernel: str
    threads: int
    accesses: list[_Access] = field(default_factory=list)
    epoch: int = 0
    found: set[Race] = field(default_factory=set)

    def add(
        self,
        kind: str,
        pointers: TensorHandle,
        mask: TensorHandle,
        *values: np.ndarray,
        orders: bool = False,
    ) -> None:
        """Notes one; its values are elements."""
        where = pointers.data
        chosen = np.broadcast_to(mask.data.astype(bool), where.shape)
        if not chosen.any():
            return
        addresses = where[chosen].astype(np.uint64)
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        builder, program = interpreter.interpreter_builder, 0
        for own, of_axis in zip(builder.grid_idx, builder.grid_dim, strict=True):
            program = program * of_axis + own
        before_and_after = [np.ascontiguousarray(one[chosen]).view(np.uint8) for one in values]
        self.accesses.append(
            _Access(
                kind,
                where,
                (addresses[:, None] + np.arange(size, dtype=np.uint64)).ravel(),
                program,
                self.epoch,
                orders,
                (before_and_after[0], before_and_after[1]) if values else None,
            )
        )
        if kind == WRITE:
            _, lanes = np.unique(addresses, return_inverse=True)
            after = values[1][chosen]
            last = np.empty_like(after, shape=lanes.max() + 1)
            last[lanes] = after
            if (last[lanes] != after).any():
                self.found.add(Race(self.kernel, "threads", WRITE, WRITE))

    def races(self) -> set[Race]:
        """Those that nothing excuses."""
        found = set(self.found)
        lowest, highest, programs, epochs = np.array(
            [(one.bytes.min(), one.bytes.max(), one.program, one.epoch) for one in self.accesses],
            np.uint64,
        ).T
        orders = self._orders()
        for number, write in enumerate(self.accesses):
            if write.kind == READ:
                continue
            is_near = (lowest <= highest[number]) & (highest >= lowest[number])
            is_near &= (programs != write.program) | (epochs == write.epoch)
            for other in np.flatnonzero(is_near).tolist():
                first, then = min(number, other), max(number, other)
                one, two = self.accesses[first], self.accesses[then]
                if first == then or (one.kind == two.kind != WRITE):
                    continue
                is_within = one.program == two.program
                race = Race(self.kernel, "threads" if is_within else "programs", one.kind, two.kind)
                if race in found or not _disagree(one, two):
                    continue
                if is_within:
                    is_excused = self._is_one_threads(one, two)
                else:
                    is_excused = self._are_ordered(
                        first, orders[one.program], then, orders[two.program]
                    )
                if not is_excused:
                    found.add(race)
        return found

    def _orders(self) -> dict[int, dict[int, list[int]]]:
        """By program, and by address: when it did an atomic operation that orders memory."""
        found: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for number, access in enumerate(self.accesses):
            if access.orders:
                for address in access.bytes.tolist():
                    found[access.program][address].append(number)
        return found

    def _are_ordered(
        self, first: int, of_first: dict[int, list[int]], then: int, of_then: dict[int, list[int]]
    ) -> bool:
        access = self.accesses[first]
        for address in of_first.keys() & of_then.keys():
            if len(of_first[address]) + len(of_then[address]) > 2:
                continue  # which one of them was before which is not the same in each order
            [release], [acquire] = of_first[address], of_then[address]
            released = self.accesses[release]
            # One thread does what concerns a single number; loads of it are all threads'.
            has_waited = (
                release == first
                or released.epoch > access.epoch
                or (access.kind != READ and access.pointers.size == released.pointers.size == 1)
            )
            if release >= first and has_waited and acquire < then:
                return True
        return False

    def _is_one_threads(self, one: _Access, two: _Access) -> bool:
        if one.pointers.size == two.pointers.size == 1:
            return READ not in (one.kind, two.kind)  # loads are all threads'
        if (one.kind, two.kind) != (READ, WRITE) or one.pointers.shape != two.pointers.shape:
            return False
        return one.pointers.size >= self.threads and bool((one.pointers == two.pointers).all())


def _disagree(one: _Access, two: _Access) -> bool:
    """Whether the order of a write and another access matters, of any byte that they share."""
    _, of_one, of_two = np.intersect1d(one.bytes, two.bytes, return_indices=True)
    if one.values and two.values:
        return bool((one.values[1][of_one] != two.values[1][of_two]).any())
    before, after = one.values or two.values or ()
    shared = of_one if one.values else of_two
    return bool((before[shared] != after[shared]).any())


@contextmanager
def watched(is_backwards: bool = False) -> Iterator[dict[str, set[Race]]]:
    """Notes what the launches inside do.

    Args:
        is_backwards: Whether programs are run from the last one to the first one.

    Yields:
        By kernel, its races; also of kernels that have none.
    """
    found: dict[str, set[Race]] = defaultdict(set)
    running: list[_Launch] = []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    add, barrier = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_barrier
    set_place, run = InterpreterBuilder.set_grid_idx, GridExecutor.__call__

    def values_at(pointers: TensorHandle, mask: TensorHandle) -> np.ndarray:
        values: np.ndarray = load(
            interpreter.interpreter_builder, pointers, mask, None, None, False
        ).data
        return values

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        running[-1].add(READ, pointers, mask)
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        before = values_at(pointers, mask)
        after = np.broadcast_to(value.data, before.shape).view(before.dtype)
        running[-1].add(WRITE, pointers, mask, before, after)
        return store(self, pointers, value, mask, *rest)

    def watched_add(
        self: Any, operation: Any, pointers: Any, value: Any, mask: Any, order: Any, scope: Any
    ) -> Any:
        if operation not in _KINDS:
            raise NotImplementedError(f"what {operation} disturbs")
        before = values_at(pointers, mask)
        result = add(self, operation, pointers, value, mask, order, scope)
        orders = order == MEM_SEMANTIC.ACQUIRE_RELEASE and scope != MEM_SYNC_SCOPE.CTA
        after = values_at(pointers, mask)
        running[-1].add(_KINDS[operation], pointers, mask, before, after, orders=orders)
        return result

    def watched_barrier(self: Any) -> Any:
        running[-1].epoch += 1
        return barrier(self)

    def unknown(self: Any, *args: Any) -> Any:
        raise NotImplementedError("what this atomic operation disturbs")

    def backwards(self: Any, *place: int) -> None:
        set_place(self, *(size - 1 - one for one, size in zip(place, self.grid_dim, strict=True)))

    def watched_run(self: Any, *args: Any, **kwargs: Any) -> None:
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        launch = _Launch(name, _THREADS * kwargs.get("num_warps", 4))
        running.append(launch)
        try:
            run(self, *args, **kwargs)
        finally:
            running.pop()
        if launch.accesses:
            found[name].update(launch.races())

    replaced: list[tuple[type, str, Callable[..., Any]]] = [
        (InterpreterBuilder, "create_masked_load", watched_load),
        (InterpreterBuilder, "create_masked_store", watched_store),
        (InterpreterBuilder, "create_atomic_rmw", watched_add),
        *((InterpreterBuilder, f"create_atomic_{name}", unknown) for name in _UNKNOWN),
        (InterpreterBuilder, "create_barrier", watched_barrier),
        (InterpreterBuilder, "set_grid_idx", backwards if is_backwards else set_place),
        (GridExecutor, "__call__", watched_run),
    ]
    with ExitStack() as stack:
        for place, name, value in replaced:
            stack.enter_context(mock.patch.object(place, name, value))
        yield found
