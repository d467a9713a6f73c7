"""What the programs of a split radix selection tell each other, and when rows are split."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparse_plugin.paged.triton_kernels.radix import BINS, LEVELS, WORDS
from vllm_sparse_plugin.paged.triton_kernels.row_selection import MOST_NUMBERS

_LONG_ROW = 8192
"""Numbers that one program selects from as fast as the launches of a split selection take."""
_MAX_SPLIT_ROWS = 128
"""About as many rows as a large GPU has processors: more need no splitting."""
_PARTS = 16


@dataclass(frozen=True)
class RadixWorkspace:
    """Memory for rows that are split.

    Attributes:
        histograms: `[max_rows, LEVELS, BINS]`, int32, of whole rows, per digit; 0 between
            selections.
        states: `[max_rows, WORDS]`, int32: what is known of whole rows, see `radix.WORDS`.
        equals: `[max_rows, parts, BINS]`, int32: of each part, the histogram of the last digit.
        long_row: Rows of at least this capacity are split, if there are no more than `max_rows`.
        short_row: Rows of at most this capacity: in few launches, see `row_selection`.
    """

    histograms: torch.Tensor
    states: torch.Tensor
    equals: torch.Tensor
    long_row: int
    short_row: int

    @classmethod
    def of(
        cls,
        device: torch.device | str,
        max_rows: int = _MAX_SPLIT_ROWS,
        parts: int = _PARTS,
        long_row: int = _LONG_ROW,
        short_row: int = MOST_NUMBERS,
    ) -> RadixWorkspace:
        """Asks for the memory: 2.5 MiB, unless it is told otherwise.

        Args:
            device: Of the kernels.
            max_rows: Rows that are split.
            parts: Programs per row.
            long_row: See the class.
            short_row: See the class; at most `MOST_NUMBERS`.
        """
        # A selection adds to them, counts its programs, and leaves both as it has found them.
        histograms = torch.zeros((max_rows, LEVELS, BINS), dtype=torch.int32, device=device)
        states = torch.zeros((max_rows, WORDS), dtype=torch.int32, device=device)
        equals = torch.empty((max_rows, parts, BINS), dtype=torch.int32, device=device)
        return cls(histograms, states, equals, long_row, short_row)

    @property
    def parts(self) -> int:
        """Programs per row."""
        return self.equals.shape[1]

    def splits(self, rows: int, capacity: int) -> bool:
        """Whether rows of a capacity are split; the result is the same."""
        return capacity >= self.long_row and rows <= len(self.equals)
