"""`Mask`: which keys each query reads, and with what probability each was selected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partialmethod

import torch

from sparse_attention_hub.sparse_attention.utils.mask_indices import (
    last_of_duplicates,
    row_pointers,
    rows_by_pointers,
)

Shape = tuple[int, ...]
IndexMask = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_MODES = ("dense", "sparse")


class Mask:
    """One weight per element: 0 = not selected, w in (0, 1] = selected with probability w.

    The last dimension counts keys, the ones before it rows (batch, query head, query). A mask is
    stored as nothing at all (`is_full`, `is_empty`), as a dense tensor, as sorted flat indices with
    row pointers, or as equally many key positions per row (`rows`). Every form gives the same
    answers, and shares no memory with a tensor of the caller (`create_from_rows` excepted). The two
    flags are set by construction only: finding out that a dense mask happens to be full would cost
    a pass over it, and a host sync on a GPU.

    Attributes:
        shape: Of the mask.
        dtype: Of its weights.
        device: Of its weights; None when unknown.
        mask: Dense weights, or None. Not to be written to.
        indices: Flat positions of selected elements, ascending; or None.
        ptr: `prod(shape[:-1]) + 1` offsets into `indices`, one row after the other; or None.
        data: Weights at `indices`; or None.
        from_dense_mask: Stored dense.
        from_index: Stored by index.
        is_full: Every element is selected with probability 1.
        is_empty: No element is selected.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | None = None,
        mask: torch.Tensor | None = None,
        indices: torch.Tensor | None = None,
        ptr: torch.Tensor | None = None,
        data: torch.Tensor | None = None,
        from_dense_mask: bool = False,
        from_index: bool = False,
        is_full: bool = False,
        is_empty: bool = False,
    ) -> None:
        """Stores a mask; the `create_*` methods read better.

        Raises:
            ValueError: Nothing says what the mask is, a flag comes without a device, or the
                tensors do not fit `shape`.
        """
        self.shape: Shape = tuple(shape)
        if not self.shape:
            raise ValueError("shape must have at least one dimension, got ()")
        self.dtype = dtype
        self.device = device
        self.mask: torch.Tensor | None = None
        self.indices: torch.Tensor | None = None
        self.ptr: torch.Tensor | None = None
        self.data: torch.Tensor | None = None
        self._rows: tuple[torch.Tensor, torch.Tensor] | None = None
        self.from_dense_mask = from_dense_mask
        self.from_index = from_index
        self.is_full = is_full
        self.is_empty = is_empty and not is_full
        if is_full or is_empty:
            if device is None:
                raise ValueError("device must be given for a full or an empty mask, got None")
            self.from_dense_mask = self.from_index = False
        elif from_dense_mask and mask is not None:
            self._store_dense(mask)
        elif from_index and indices is not None and ptr is not None:
            self._store_index(indices, ptr, data)
        else:
            raise ValueError(
                "a mask needs is_full, is_empty, from_dense_mask with mask, or from_index with "
                "indices and ptr"
            )

    def _store_dense(self, mask: torch.Tensor) -> None:
        if tuple(mask.shape) != self.shape:
            raise ValueError(f"mask must have the shape {self.shape}, got {tuple(mask.shape)}")
        self.mask = mask.detach().to(self.dtype, copy=True)
        self.device = mask.device
        self.from_index = False

    def _store_index(
        self, indices: torch.Tensor, ptr: torch.Tensor, data: torch.Tensor | None
    ) -> None:
        rows = math.prod(self.shape[:-1])
        if ptr.numel() != rows + 1:
            raise ValueError(f"ptr must have {rows + 1} elements, got {ptr.numel()}")
        if data is not None and data.numel() != indices.numel():
            raise ValueError(f"data must have {indices.numel()} elements, got {data.numel()}")
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self._numel():
            raise ValueError(f"indices must lie in [0, {self._numel()})")
        weights = torch.ones(indices.numel(), dtype=self.dtype, device=indices.device)
        if data is not None:
            weights = data.detach().flatten().to(self.dtype, copy=True)
        self.indices, self.data = last_of_duplicates(indices.detach().flatten().long(), weights)
        keep = self.data != 0
        self.indices, self.data = self.indices[keep], self.data[keep]
        # The flat positions say which row they are in; a pointer that says otherwise is wrong.
        own_rows = rows_by_pointers(ptr, indices.numel())
        if not torch.equal(own_rows.to(indices.device), indices.flatten().long() // self.shape[-1]):
            raise ValueError("ptr and indices disagree about the rows that indices are in")
        self.ptr = row_pointers(self.indices, rows, self.shape[-1])
        self.device = indices.device
        self.from_dense_mask = False

    def _numel(self) -> int:
        return math.prod(self.shape)

    @classmethod
    def create_full_mask(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Mask:
        """A mask that selects everything with probability 1."""
        return cls(shape, dtype, device, is_full=True)

    @classmethod
    def create_empty_mask(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Mask:
        """A mask that selects nothing."""
        return cls(shape, dtype, device, is_empty=True)

    @classmethod
    def create_mask_from_dense_mask(
        cls, shape: Sequence[int], mask: torch.Tensor, dtype: torch.dtype
    ) -> Mask:
        """A mask from one weight per element; the tensor is copied.

        Raises:
            ValueError: The shapes differ.
        """
        return cls(shape, dtype, mask=mask, from_dense_mask=True)

    @classmethod
    def create_mask_from_indices(
        cls,
        shape: Sequence[int],
        indices: torch.Tensor,
        ptr: torch.Tensor,
        data: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> Mask:
        """A mask from flat positions.

        Args:
            shape: Of the mask.
            indices: `(n,)` positions over the whole shape; of duplicates the last one counts.
            ptr: `(rows + 1,)` offsets of the rows in `indices`.
            data: `(n,)` weights; None = 1.
            dtype: Of the weights.

        Raises:
            ValueError: A size, a position or a row pointer does not fit.
        """
        return cls(shape, dtype, indices=indices, ptr=ptr, data=data, from_index=True)

    @classmethod
    def create_from_rows(
        cls, shape: Sequence[int], key_indices: torch.Tensor, weights: torch.Tensor
    ) -> Mask:
        """A mask from key positions per row, taken as they are: nothing is checked or copied.

        Args:
            shape: Of the mask.
            key_indices: `(*shape[:-1], n)`; distinct within a row where the weight is not 0.
            weights: Of the same shape and in the mask's dtype; 0 = no key.
        """
        mask = cls(shape, weights.dtype, key_indices.device, is_empty=True)
        mask.is_empty = False
        mask._rows = (key_indices, weights)
        return mask

    @classmethod
    def create_from_row_wise_idx(
        cls,
        shape: Sequence[int],
        row_wise_idx: torch.Tensor,
        data: torch.Tensor,
        mask_type: str = "index",
        dtype: torch.dtype = torch.float32,
        use_padding: bool = False,
        mode: str = "dense",
    ) -> Mask:
        """A mask from key positions per row.

        Args:
            shape: Of the mask.
            row_wise_idx: `(*shape[:-1], k)` key positions; of duplicates the last one counts.
            data: Weights, of the same shape.
            mask_type: How the result is stored: "index" or "dense".
            dtype: Of the weights.
            use_padding: Whether -1 in `row_wise_idx` means "no key".
            mode: Accepted for the field's API; both modes give the same mask.

        Raises:
            ValueError: A shape, a position or a name does not fit.
        """
        _check_choice("mode", mode, _MODES)
        _check_choice("mask_type", mask_type, ("index", "dense"))
        shape = tuple(shape)
        if row_wise_idx.shape[:-1] != shape[:-1] or row_wise_idx.dim() != len(shape):
            raise ValueError(
                f"row_wise_idx must have the shape {(*shape[:-1], 'k')}, "
                f"got {tuple(row_wise_idx.shape)}"
            )
        if data.shape != row_wise_idx.shape:
            raise ValueError(
                f"data must have the shape {tuple(row_wise_idx.shape)}, got {tuple(data.shape)}"
            )
        rows, num_keys = math.prod(shape[:-1]), shape[-1]
        row = torch.arange(rows, device=row_wise_idx.device)[:, None]
        positions = row_wise_idx.reshape(rows, -1)
        kept = torch.ones_like(positions, dtype=torch.bool)
        if use_padding:
            kept = positions != -1
        if bool(((positions < 0) | (positions >= num_keys))[kept].any()):
            raise ValueError(f"row_wise_idx must lie in [0, {num_keys})")
        ptr = torch.zeros(rows + 1, dtype=torch.long, device=positions.device)
        ptr[1:] = kept.sum(-1).cumsum(0)
        flat = (positions + row * num_keys)[kept]
        mask = cls.create_mask_from_indices(shape, flat, ptr, data.reshape(rows, -1)[kept], dtype)
        if mask_type == "index":
            return mask
        return cls.create_mask_from_dense_mask(shape, mask.get_dense_mask(), dtype)

    def is_full_mask(self) -> bool:
        """Whether the mask was made full (see the class about flags)."""
        return self.is_full

    def is_empty_mask(self) -> bool:
        """Whether the mask was made empty (see the class about flags)."""
        return self.is_empty

    def rows(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Key positions and weights per row, if the mask is stored so or empty; else None.

        Returns:
            Two `(*shape[:-1], n)`, not to be written to; a weight of 0 = no key.
        """
        if self.is_empty:
            shape = (*self.shape[:-1], 0)
            positions = torch.empty(shape, dtype=torch.int64, device=self.device)
            return positions, torch.empty(shape, dtype=self.dtype, device=self.device)
        return self._rows

    def get_dense_mask(self) -> torch.Tensor:
        """The weights as a tensor of `shape` that belongs to the caller."""
        if self.mask is not None:
            return self.mask.clone()
        if self._rows is not None:
            weights = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
            return weights.scatter_add_(-1, *self._rows)
        fill = torch.ones if self.is_full else torch.zeros
        dense = fill(self._numel(), dtype=self.dtype, device=self.device)
        if self.indices is not None and self.data is not None:
            dense[self.indices] = self.data
        return dense.view(self.shape)

    def get_index_mask(self) -> IndexMask:
        """The mask as `(indices, ptr, data)`: flat positions, row offsets, weights."""
        if self.indices is not None and self.ptr is not None and self.data is not None:
            return self.indices.clone(), self.ptr.clone(), self.data.clone()
        dense = self.get_dense_mask().flatten()
        indices = dense.nonzero().flatten()
        ptr = row_pointers(indices, math.prod(self.shape[:-1]), self.shape[-1])
        return indices, ptr, dense[indices]

    def apply_mask(self, input_tensor: torch.Tensor, mode: str = "dense") -> torch.Tensor:
        """`input_tensor * weight`; zero where nothing is selected.

        Args:
            input_tensor: Of the mask's shape.
            mode: "dense" or "sparse": the same result; "sparse" touches selected elements only.

        Raises:
            ValueError: The shape or the mode does not fit.
        """
        return self._apply(input_tensor, mode, inverse=False)

    def apply_inv_mask(self, input_tensor: torch.Tensor, mode: str = "dense") -> torch.Tensor:
        """`input_tensor / weight` where something is selected, zero elsewhere.

        Args: and Raises: as in `apply_mask`.
        """
        return self._apply(input_tensor, mode, inverse=True)

    def _apply(self, x: torch.Tensor, mode: str, inverse: bool) -> torch.Tensor:
        _check_choice("mode", mode, _MODES)
        if tuple(x.shape) != self.shape:
            raise ValueError(f"the tensor must have the shape {self.shape}, got {tuple(x.shape)}")
        if self.is_full:
            return x
        if self.is_empty:
            return torch.zeros_like(x)
        if mode == "sparse":
            indices, _, weights = self.get_index_mask()
            picked = x.flatten()[indices]
            scaled = picked / weights if inverse else picked * weights
            result = torch.zeros(self._numel(), dtype=scaled.dtype, device=x.device)
            return result.index_put((indices,), scaled).view(self.shape)
        weights = self.mask if self.mask is not None else self.get_dense_mask()
        selected = weights > 0
        # Weights of 1 in place of 0, and inputs of 0, keep inf and NaN out of what is not selected.
        x = x.masked_fill(~selected, 0)
        return x / weights.masked_fill(~selected, 1) if inverse else x * weights

    def merge_mask(self, other_mask: Mask, inplace: bool = False, mode: str = "dense") -> Mask:
        """The union: weights are added and cut off at 1.

        Args:
            other_mask: Of the same shape.
            inplace: Whether this mask becomes the result.
            mode: How the result is stored: "dense", or "sparse" = by index.

        Returns:
            The merged mask, in this mask's dtype; this mask itself when `inplace`.

        Raises:
            ValueError: The shapes differ, or the mode is unknown.
        """
        _check_choice("mode", mode, _MODES)
        if self.shape != other_mask.shape:
            raise ValueError(f"masks differ in shape: {self.shape} and {other_mask.shape}")
        merged = self._merged(other_mask, mode)
        if not inplace:
            return merged
        self.__dict__.update(merged.__dict__)
        return self

    def _merged(self, other: Mask, mode: str) -> Mask:
        device = self.device if self.device is not None else torch.device("cpu")
        if self.is_full or other.is_full:
            return Mask.create_full_mask(self.shape, self.dtype, device)
        if self.is_empty and other.is_empty:
            return Mask.create_empty_mask(self.shape, self.dtype, device)
        total = self.get_dense_mask() + other.get_dense_mask().to(self.dtype)
        merged = Mask.create_mask_from_dense_mask(self.shape, total.clamp_(max=1), self.dtype)
        if mode == "dense":
            return merged
        return Mask.create_mask_from_indices(self.shape, *merged.get_index_mask(), self.dtype)

    # The same with the mode in the name, as in the field's API.
    create_from_row_wise_idx_dense = partialmethod(create_from_row_wise_idx, mode="dense")
    create_from_row_wise_idx_sparse = partialmethod(create_from_row_wise_idx, mode="sparse")
    apply_mask_dense = partialmethod(apply_mask, mode="dense")
    apply_mask_sparse = partialmethod(apply_mask, mode="sparse")
    apply_inv_mask_dense = partialmethod(apply_inv_mask, mode="dense")
    apply_inv_mask_sparse = partialmethod(apply_inv_mask, mode="sparse")
    merge_mask_dense = partialmethod(merge_mask, mode="dense")
    merge_mask_sparse = partialmethod(merge_mask, mode="sparse")

    def count_active(self) -> int:
        """How many elements are selected."""
        if self.is_full:
            return self._numel()
        if self.is_empty:
            return 0
        if self.indices is not None:
            return self.indices.numel()
        if self._rows is not None:
            return int((self._rows[1] > 0).sum())
        assert self.mask is not None
        return int((self.mask > 0).sum())

    def get_density(self) -> float:
        """The share of elements that are selected, each counted once; 0.0 for a mask of no size."""
        return self.count_active() / self._numel() if self._numel() else 0.0

    def __repr__(self) -> str:
        """Shape, dtype and form; no weights."""
        return (
            f"Mask(shape={self.shape}, dtype={self.dtype}, from_dense_mask={self.from_dense_mask}, "
            f"from_index={self.from_index}, is_full={self.is_full}, is_empty={self.is_empty})"
        )


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
