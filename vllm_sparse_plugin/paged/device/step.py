"""One engine step on the device: who attends sparsely, and what they see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_sparse_plugin.paged.device.attention import DeviceAttention
from vllm_sparse_plugin.paged.device.sequences import StepSequences
from vllm_sparse_plugin.paged.group_counts import GroupCounts
from vllm_sparse_plugin.paged.served import is_dense_layer
from vllm_sparse_plugin.paged.triton_kernels.cache_rows import DeviceBatch
from vllm_sparse_plugin.step_plan import DenseRow, SparseRow


@dataclass(frozen=True)
class DeviceGroup:
    """The sparse queries of all requests with the same maskers.

    Attributes:
        config_json: The maskers.
        tokens: `[num_queries]`, int64: their places among the step's flat queries; None: they are
            the first ones, one per row of the batch, in order, and those of other rows are dense
            (see `whole`) or padding.
        batch: What they see.
        sizes: For each list of maskers in the layers, see `DeviceAttention.sizes`.
        reads: `[num_queries, 3]`, int64: what they have read, see `KEYS_READ`.
        rows: The rows that they belong to.
        counts: Where the general path counts.
        sequences: Of the queries; None where no masker needs them.
        whole: `[num_queries]`, int32: how many keys dense queries among them read, 0 for others;
            None where there are none, or the dense backend takes them.
    """

    config_json: str
    tokens: torch.Tensor | None
    batch: DeviceBatch
    sizes: Mapping[DeviceAttention, torch.Tensor]
    reads: torch.Tensor
    rows: tuple[SparseRow, ...]
    counts: GroupCounts
    sequences: StepSequences | None = None
    whole: torch.Tensor | None = None

    def take(self, query: torch.Tensor) -> torch.Tensor:
        """Their part of the step's queries `[num_tokens, num_heads, head_size]`."""
        if self.tokens is None:
            return query[: len(self.batch.lengths)]
        return query[self.tokens]


@dataclass(frozen=True)
class DeviceStep:
    """A step.

    Attributes:
        dense: The dense backend's metadata, in which rows without dense queries see next to
            nothing: their output is overwritten. None: no query is dense, or those that are belong
            to a group.
        whole: The dense backend's own metadata, for layers that stay dense in one of the groups;
            None where there are none.
        groups: By configuration.
        block_table: `[num_rows, max_blocks]`, int32.
    """

    dense: Any
    whole: Any
    groups: tuple[DeviceGroup, ...]
    block_table: torch.Tensor

    def of_layer(
        self, layer_index: int, can_be_sparse: bool
    ) -> tuple[tuple[DeviceGroup, ...], Any]:
        """What a layer has to do: groups that attend sparsely, and before them the dense metadata.

        Args:
            layer_index: Of the attention layer.
            can_be_sparse: Whether it has no window.
        """
        if not can_be_sparse:
            return (), self.whole
        groups = tuple(
            group for group in self.groups if not is_dense_layer(group.config_json, layer_index)
        )
        return groups, self.dense if len(groups) == len(self.groups) else self.whole


def dense_lengths(
    query_starts: Sequence[int], seq_lens: Sequence[int], dense: Sequence[DenseRow]
) -> np.ndarray:
    """How many keys the dense backend has to see of each row.

    A row with dense queries keeps all of its keys: its last query sees the last of them. Of another
    row it sees no more than the row's own queries, as few as it can.

    Args:
        query_starts: `num_rows + 1` offsets of the rows in the step's flat queries.
        seq_lens: Per row, keys after this step.
        dense: The dense parts of rows.

    Returns:
        `[num_rows]`, int32; 0 for rows without queries.
    """
    lengths = np.diff(np.asarray(query_starts[: len(seq_lens) + 1], np.int32))
    for row in dense:
        lengths[row.row] = seq_lens[row.row]
    return np.maximum(lengths, 0)


def staged(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A host tensor that a device can copy without anyone waiting for it."""
    tensor = torch.from_numpy(values)
    # The allocator of pinned memory takes care not to give it away before it is copied.
    return tensor.pin_memory() if device.type == "cuda" else tensor


def upload(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device, without waiting for it."""
    return staged(values, device).to(device, non_blocking=True)


class StepTable:
    """Lengths and sizes of decode steps, in memory that CUDA graphs know.

    Attributes:
        whole: `[max_rows]`, int32: keys that each row's query reads if it is dense, else 0.
        lengths: `[max_rows]`, int32: keys that each row's query sees if it is sparse, else 0.
        places: `[max_rows]`, int32: where what was learned from each row is.
        rows: `[max_rows]`, int32: 0, 1, 2, ...
    """

    def __init__(
        self, attentions: Sequence[DeviceAttention], max_rows: int, device: torch.device
    ) -> None:
        """Asks for the memory.

        Args:
            attentions: The lists of maskers whose sizes it holds.
            max_rows: Of a batch.
            device: Of the memory.
        """
        self._attentions = tuple(attentions)
        self._device = device
        rows = 3 + sum(attention.num_sizes for attention in attentions)
        self._table = torch.zeros((rows, max_rows), dtype=torch.int32, device=device)
        self.whole, self.lengths, self.places = self._table[:3]
        self.rows = torch.arange(max_rows, dtype=torch.int32, device=device)

    def sizes(self, num_rows: int) -> dict[DeviceAttention, torch.Tensor]:
        """The sizes of the first rows, for each list of maskers; views."""
        found, start = {}, 3
        for attention in self._attentions:
            end = start + attention.num_sizes
            found[attention] = self._table[start:end, :num_rows]
            start = end
        return found

    def fill(
        self, whole: np.ndarray, lengths: np.ndarray, places: np.ndarray | None = None
    ) -> None:
        """Uploads the lengths of a step, and the sizes that follow from them.

        Args:
            whole: `[num_rows]`, int32.
            lengths: `[num_rows]`, int32.
            places: `[num_rows]`, int32; None: zeros.
        """
        places = np.zeros_like(lengths) if places is None else places
        sizes = [attention.sizes(lengths) for attention in self._attentions]
        values = np.concatenate([whole[None], lengths[None], places[None], *sizes]).astype(np.int32)
        table = np.zeros(self._table.shape, np.int32)
        table[:, : values.shape[1]] = values
        self._table.copy_(staged(table, self._device), non_blocking=True)
