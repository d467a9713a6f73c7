"""Attention under a `Mask`, and dense attention to compare with.

For a query with scaled scores `s_i` and a selection S with probabilities `p_i`:
`out = sum_S (exp(s_i) / p_i) v_i / sum_S (exp(s_i) / p_i)` (self-normalised inverse-probability
estimate; with all `p_i = 1`, attention over S). It is computed stably: the maximum of
`s_i - log p_i` over the selected keys is subtracted, so scores of keys that were not selected
cannot make it underflow. Half-precision inputs are computed in float32.

A row that selects nothing it may see has no defined output; it gives zeros, never NaN.

Models with learned attention sinks (gpt-oss) have one more logit per query head, of a key that
everybody sees and that has no value: `exp(sink)` is added to the denominator, whatever S is.

In training, dropout takes weights of the numerator alone: softmax first, then dropout, as models
have it. (The field's API drops weights of both sums, each by a draw of its own.)
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import nn

from sparse_attention_hub.sparse_attention.utils.kv_utils import (
    accumulation_dtype,
    grouped_scores,
    grouped_sum,
)
from sparse_attention_hub.sparse_attention.utils.mask import Mask
from sparse_attention_hub.sparse_attention.utils.row_attention import attend_rows, sink_mass
from sparse_attention_hub.sparse_attention.visibility import add_bias, visible_keys


def _compute_masked_exp_attention_weights(
    queries: torch.Tensor,
    keys: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    sparse_attention_mask: Mask,
) -> torch.Tensor:
    """`exp(s_i - m) / p_i` of the selected visible keys, 0 elsewhere; m is a row constant.

    Args:
        queries: `(B, H, Q, D)`.
        keys: `(B, G, K, D)`.
        attention_mask: Additive or boolean, `(B, 1 or H, Q, >= K)`; see `visible_keys`.
        scaling: Of the scores.
        sparse_attention_mask: Of shape `(B, H, Q, K)`.

    Returns:
        `(B, H, Q, K)`, at least float32.
    """
    return _weights_and_largest(queries, keys, attention_mask, scaling, sparse_attention_mask)[0]


def _weights_and_largest(
    queries: torch.Tensor,
    keys: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    sparse_attention_mask: Mask,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of `_compute_masked_exp_attention_weights`, and m, `(B, H, Q, 1)`."""
    logits = add_bias(grouped_scores(queries, keys) * scaling, attention_mask)
    visible = visible_keys(attention_mask, keys.shape[2])
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    if sparse_attention_mask.is_empty_mask():
        logits = torch.full_like(logits, -torch.inf)
    elif not sparse_attention_mask.is_full_mask():
        # log 0 = -inf takes the keys that are not selected out.
        logits = logits - _log_or_inf(sparse_attention_mask.get_dense_mask().to(logits.dtype))
    largest = logits.amax(dim=-1, keepdim=True)
    largest = largest.masked_fill(largest == -torch.inf, 0)
    return torch.exp(logits - largest), largest


def _denominator(
    weights: torch.Tensor, largest: torch.Tensor, sink_logits: torch.Tensor | None
) -> torch.Tensor:
    """The sum of weights, and the learned sinks' share; `(B, H, Q, 1)`."""
    total = weights.sum(dim=-1, keepdim=True)
    return total if sink_logits is None else total + sink_mass(sink_logits, largest)


def _log_or_inf(probabilities: torch.Tensor) -> torch.Tensor:
    """`log p`, and +inf for p = 0, so that subtracting it removes the key."""
    return torch.where(probabilities > 0, probabilities.log(), torch.inf)


def _divide(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """The quotient; 0 for a row that selected nothing."""
    return numerator / denominator.masked_fill(denominator == 0, 1)


def _drops(module: nn.Module | None, dropout: float) -> bool:
    """Whether dropout applies: to a module in training."""
    return module is not None and module.training and dropout > 0.0


def get_attention_denominator(
    module: nn.Module | None,
    queries: torch.Tensor,
    keys: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
    sparse_attention_mask: Mask,
    sink_logits: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The denominator of the formula above, up to the row constant `exp(-m)`.

    Args: as `get_masked_attention_output`; `module` and `dropout` take no part.

    Returns:
        `(B, H, Q, 1)`, at least float32, with the row constant that `get_attention_numerator` of
        the same arguments has; 0 in a row that selects nothing, where there are no sinks.
    """
    weights, largest = _weights_and_largest(
        queries, keys, attention_mask, scaling, sparse_attention_mask
    )
    return _denominator(weights, largest, sink_logits)


def get_attention_numerator(
    module: nn.Module | None,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
    sparse_attention_mask: Mask,
    **kwargs: Any,
) -> torch.Tensor:
    """The numerator of the formula above, up to the row constant `exp(-m)`.

    Args: as `get_masked_attention_output`.

    Returns:
        `(B, H, Q, Dv)`, at least float32; in training, of what dropout leaves.
    """
    weights = _compute_masked_exp_attention_weights(
        queries, keys, attention_mask, scaling, sparse_attention_mask
    )
    if _drops(module, dropout):
        weights = nn.functional.dropout(weights, p=dropout)
    return grouped_sum(weights, values)


@overload
def get_masked_attention_output(
    module: nn.Module | None,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
    sparse_attention_mask: Mask,
    return_attention_weights: Literal[False] = False,
    sink_logits: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor: ...


@overload
def get_masked_attention_output(
    module: nn.Module | None,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
    sparse_attention_mask: Mask,
    return_attention_weights: Literal[True],
    sink_logits: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def get_masked_attention_output(
    module: nn.Module | None,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
    sparse_attention_mask: Mask,
    return_attention_weights: bool = False,
    sink_logits: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over the selected keys.

    Args:
        module: Tells whether dropout applies; None = inference.
        queries: `(B, H, Q, D)`.
        keys: `(B, G, K, D)`.
        values: `(B, G, K, Dv)`.
        attention_mask: Additive or boolean, `(B, 1 or H, Q, >= K)`; see `visible_keys`.
        scaling: Of the scores.
        dropout: Of the weights, in training.
        sparse_attention_mask: Of shape `(B, H, Q, K)`.
        return_attention_weights: Whether to return the weights too.
        sink_logits: `(H,)`, of learned attention sinks; None = the model has none.
        kwargs: Ignored (the attention module's own).

    Returns:
        The output `(B, Q, H, Dv)`, contiguous, in the dtype of `queries`; with the weights
        `(B, H, Q, K)` when asked for: their softmax, then dropout. Beside learned sinks, weights
        of a row add up to less than 1.
    """
    drops = _drops(module, dropout)
    rows = sparse_attention_mask.rows()
    if rows is not None and attention_mask is None and not (return_attention_weights or drops):
        return attend_rows(queries, keys, values, scaling, *rows, sink_logits)
    weights, largest = _weights_and_largest(
        queries, keys, attention_mask, scaling, sparse_attention_mask
    )
    denominator = _denominator(weights, largest, sink_logits)
    if drops:
        weights = nn.functional.dropout(weights, p=dropout)
    output = _divide(grouped_sum(weights, values), denominator)
    output = output.to(queries.dtype).transpose(1, 2).contiguous()
    if return_attention_weights:
        return output, _divide(weights, denominator).to(queries.dtype)
    return output


def get_true_attention_output(
    module: nn.Module | None,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
    sink_logits: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention over all visible keys: softmax, then dropout in training.

    Returns:
        The output `(B, Q, H, Dv)` and the weights `(B, H, Q, K)`, in the dtype of `queries`.
    """
    shape = (*queries.shape[:3], keys.shape[2])
    full = Mask.create_full_mask(shape, accumulation_dtype(queries.dtype), queries.device)
    return get_masked_attention_output(
        module, queries, keys, values, attention_mask, scaling, dropout, full, True, sink_logits
    )


def apply_inv_mask_sum(input_tensor: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Row sums of `input / weight` over the selected elements.

    Args:
        input_tensor: Of the mask's shape.
        mask: The selection; a full one gives plain sums, an empty one zeros.

    Returns:
        `(..., 1)`.

    Raises:
        ValueError: The shapes differ.
    """
    return mask.apply_inv_mask(input_tensor).sum(dim=-1, keepdim=True)


def create_sampling_mask_with_per_head_budget(
    budgets: torch.Tensor,
    sampling_probability: torch.Tensor,
    seq_len_keys: int,
    start_idx: int,
    end_idx: int,
    dtype: torch.dtype = torch.float32,
) -> Mask:
    """A uniform sample of keys per row, without replacement, from torch's own generator.

    (The maskers of this package sample with `counter_random` instead, so that a sample does not
    depend on what else is drawn.)

    Args:
        budgets: int64 `(B, H, Q, 1)`, keys to draw per row; at most `end_idx - start_idx` are.
        sampling_probability: `(B, H, Q, 1)`, the weight of a row's keys.
        seq_len_keys: K.
        start_idx: First position that may be drawn.
        end_idx: One past the last.
        dtype: Of the weights.

    Returns:
        A mask `(B, H, Q, K)`.

    Raises:
        ValueError: The range does not lie in the keys.
    """
    if not 0 <= start_idx <= end_idx <= seq_len_keys:
        raise ValueError(
            f"start_idx and end_idx must lie in order in [0, {seq_len_keys}], got {start_idx} and "
            f"{end_idx}"
        )
    shape = (*budgets.shape[:-1], end_idx - start_idx)
    order = torch.rand(shape, device=budgets.device).argsort(dim=-1)
    drawn = torch.arange(shape[-1], device=budgets.device) < budgets
    weights = drawn * sampling_probability.to(dtype)
    return Mask.create_from_rows((*shape[:-1], seq_len_keys), order + start_idx, weights)
