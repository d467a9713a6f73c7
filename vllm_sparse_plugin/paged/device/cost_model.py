"""What attention of a decode step costs, dense and sparse, as a function of its rows and keys.

The numbers are seconds of a whole step: of all layers that can be sparse. `measure_costs` measures
them when a worker starts; here is what follows from them, without a device.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NEVER = 1 << 30
"""More keys than any model takes: maskers never pay."""


@dataclass(frozen=True)
class Point:
    """What was measured once.

    Attributes:
        rows: Queries of the step, each of another request.
        keys: That they see, all together.
        seconds: Of all layers.
    """

    rows: int
    keys: int
    seconds: float


@dataclass(frozen=True)
class CostModel:
    """`constant + per_row * rows + per_key * keys`.

    Attributes:
        constant: Seconds of a step, >= 0.
        per_row: Seconds, >= 0.
        per_key: Seconds, >= 0.
        low: What was measured is nowhere less than so many times the formula.
        high: Nor more than so many times.
    """

    constant: float
    per_row: float
    per_key: float
    low: float = 1.0
    high: float = 1.0

    @classmethod
    def fit(cls, points: Sequence[Point]) -> CostModel:
        """The formula whose relative errors have the least squares.

        Relative ones, since small steps count as much as large ones; and no number below zero,
        since more work that takes less time is noise.

        Args:
            points: At least one.

        Raises:
            ValueError: There is none, or one without a time above zero.
        """
        if not points or any(not point.seconds > 0 for point in points):
            raise ValueError(f"points must be measured ones of more than 0 seconds, got {points!r}")
        table = np.array([[1.0, point.rows, point.keys] for point in points])
        seconds = np.array([point.seconds for point in points])
        # Columns of like size, for the rank of the matrix to mean something.
        scale = table.max(axis=0).clip(min=1.0)
        found = _non_negative(table / scale / seconds[:, None]) / scale
        ratios = seconds / (table @ found)
        constant, per_row, per_key = map(float, found)
        return cls(constant, per_row, per_key, float(ratios.min()), float(ratios.max()))

    def seconds(self, rows: int, keys: int) -> float:
        """By the formula.

        Args:
            rows: Of a step.
            keys: That they see, all together.
        """
        return self.constant + self.per_row * rows + self.per_key * keys

    def __add__(self, other: CostModel) -> CostModel:
        """Of steps that do both."""
        return CostModel(
            self.constant + other.constant,
            self.per_row + other.per_row,
            self.per_key + other.per_key,
            min(self.low, other.low),
            max(self.high, other.high),
        )


def _non_negative(matrix: np.ndarray) -> np.ndarray:
    """The `x >= 0` with the least `|matrix @ x - 1|`; of several, one with few members above zero.

    Those members solve the problem without the bound; so each set of columns is tried.
    """
    rows, columns = matrix.shape
    best, least = np.zeros(columns), math.inf
    for count in range(1, columns + 1):
        for chosen in map(list, itertools.combinations(range(columns), count)):
            part, _, rank, _ = np.linalg.lstsq(matrix[:, chosen], np.ones(rows), rcond=1e-9)
            error = float(np.square(matrix[:, chosen] @ part - 1).sum())
            # A column more must be worth it, or rounding errors would choose.
            if rank == count and part.min() >= 0 and error < least - 1e-12:
                best, least = np.zeros(columns), error
                best[chosen] = part
    return best


@dataclass(frozen=True)
class StepLoad:
    """The rows of a step whose mode is to be chosen.

    Attributes:
        rows: How many.
        row_keys: Keys that their last queries see: what dense attention reads.
        queries: Their sparse queries, as many as rows in a decode step.
        query_keys: Keys that those see, all together.
    """

    rows: int
    row_keys: int
    queries: int
    query_keys: int


@dataclass(frozen=True)
class AttentionCosts:
    """Of one way of running steps.

    Attributes:
        dense: All rows attend densely.
        sparse: All rows attend sparsely.
    """

    dense: CostModel
    sparse: CostModel

    def sparse_pays(self, load: StepLoad, launches_are_paid: bool) -> bool:
        """Whether rows take less time sparse than dense, by more than the formulas are wrong.

        Where whole steps are compared, and one was measured, what is said to take less time did.

        Args:
            load: The rows.
            launches_are_paid: Whether the step has the launches of sparse attention in any case;
                then only the keys count.
        """
        if launches_are_paid:
            dense = self.dense.per_key * load.row_keys
            sparse = self.sparse.per_key * load.query_keys
        else:
            dense = self.dense.seconds(load.rows, load.row_keys)
            sparse = self.sparse.seconds(load.queries, load.query_keys)
        return self.sparse.high * sparse < self.dense.low * dense

    def break_even(self, rows: int) -> int:
        """Keys of each row from which on `sparse_pays` in a decode step; `NEVER` if never.

        Args:
            rows: Of the step, >= 1.
        """

        def pays(keys: int) -> bool:
            return self.sparse_pays(StepLoad(rows, rows * keys, rows, rows * keys), False)

        # More keys speak for maskers the more there are, or not at all.
        return 1 if pays(1) else bisect.bisect_left(range(NEVER), True, lo=1, key=pays)

    def __add__(self, other: AttentionCosts) -> AttentionCosts:
        """Of steps with the layers of both."""
        return AttentionCosts(self.dense + other.dense, self.sparse + other.sparse)


@dataclass(frozen=True)
class StepCosts:
    """What is known about the steps of an engine.

    Attributes:
        launched: Of steps that the host launches kernel by kernel.
        replayed: Of steps that are CUDA graphs; None where there are none.
    """

    launched: AttentionCosts
    replayed: AttentionCosts | None

    def of_step(self, is_replayed: bool) -> AttentionCosts:
        """Of a step.

        Args:
            is_replayed: Whether it is a CUDA graph.
        """
        return self.replayed if is_replayed and self.replayed is not None else self.launched

    def __add__(self, other: StepCosts) -> StepCosts:
        """Of steps with the layers of both, which are graphs or not alike."""
        replayed = None
        if self.replayed is not None and other.replayed is not None:
            replayed = self.replayed + other.replayed
        return StepCosts(self.launched + other.launched, replayed)
