"""Whether two runs gave the same tokens; and where not, whether float noise explains it."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_attention_hub.adapters.base import AnswerDetails

NEAR_TIE = 1e-3
"""Logits closer than this are a tie in float32: logits of order 10 after some tens of layers, each
with sums in another order, differ by about 1e-4 between two correct implementations."""


@dataclass(frozen=True)
class Comparison:
    """Of greedy answers of a reference and of another implementation.

    Attributes:
        num_equal: Leading tokens that are equal.
        is_equal: All of them are.
        reference_logit: The reference's logit of its own token where the two part; None if equal,
            or where one answer merely ended.
        other_logit: The reference's logit of the other's token there; likewise.
    """

    num_equal: int
    is_equal: bool
    reference_logit: float | None = None
    other_logit: float | None = None

    @property
    def is_near_tie(self) -> bool:
        """Whether the answers part where two logits tie closer than float noise."""
        if self.reference_logit is None or self.other_logit is None:
            return False
        return abs(self.reference_logit - self.other_logit) < NEAR_TIE

    def __str__(self) -> str:
        """For a person."""
        if self.is_equal:
            return f"same {self.num_equal} tokens"
        if self.reference_logit is None:
            return f"one ends after {self.num_equal} tokens"
        verdict = "a tie within float noise" if self.is_near_tie else "NOT a tie"
        return (
            f"part after {self.num_equal} tokens, logits {self.reference_logit:.6f} and "
            f"{self.other_logit:.6f}: {verdict}"
        )


def compare_answers(reference: AnswerDetails, other: AnswerDetails) -> Comparison:
    """Compares greedy answers to the same prompt.

    Args:
        reference: With logits (`request_kwargs["return_logits"]`).
        other: With or without.

    Raises:
        ValueError: The answers part, and the reference has no logits.
    """
    left, right = reference.token_ids, other.token_ids
    shorter = min(len(left), len(right))
    equal = next((i for i in range(shorter) if left[i] != right[i]), shorter)
    if left == right:
        return Comparison(equal, True)
    if equal == shorter:
        return Comparison(equal, False)
    if reference.logits is None:
        raise ValueError(
            "the reference has no logits: request_kwargs['return_logits'] must be True"
        )
    row = reference.logits[equal]
    return Comparison(equal, False, float(row[left[equal]]), float(row[right[equal]]))
