"""What counts as the same answer."""

import pytest
import torch

from sparse_attention_hub.adapters.base import AnswerDetails
from sparse_attention_hub.adapters.comparison import NEAR_TIE, compare_answers


def answer(*tokens: int, logits: torch.Tensor | None = None) -> AnswerDetails:
    return AnswerDetails(
        "dense", tokens, 1, 1, 1.0, None, None, None, None, "length", logits=logits
    )


def test_same() -> None:
    comparison = compare_answers(answer(1, 2), answer(1, 2))
    assert comparison.is_equal
    assert str(comparison) == "same 2 tokens"


@pytest.mark.parametrize(("gap", "is_tie"), [(NEAR_TIE / 2, True), (NEAR_TIE * 2, False)])
def test_ties_are_told_with_both_logits(gap: float, is_tie: bool) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = gap
    comparison = compare_answers(answer(1, 3, logits=logits), answer(1, 2))
    assert not comparison.is_equal
    assert comparison.is_near_tie == is_tie
    assert comparison.num_equal == 1
    assert f"{gap:.6f} and 0.000000" in str(comparison)


def test_one_that_ends_early_is_never_a_tie() -> None:
    comparison = compare_answers(answer(1, 2), answer(1))
    assert not comparison.is_equal
    assert not comparison.is_near_tie


def test_needs_logits_to_judge() -> None:
    with pytest.raises(ValueError, match="return_logits"):
        compare_answers(answer(1), answer(2))
