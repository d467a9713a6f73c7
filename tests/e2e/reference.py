"""The in-process reference that served answers are compared with."""

import pytest
import torch

from sparse_attention_hub import ModelAdapterHF
from sparse_attention_hub.adapters.base import AnswerDetails
from sparse_attention_hub.adapters.comparison import Comparison, compare_answers
from sparse_attention_hub.sparse_attention.research_attention import ResearchAttentionConfig


def reference_adapter(model: str, config: ResearchAttentionConfig | None) -> ModelAdapterHF:
    """In float32; it answers sparsely where there are maskers."""
    return ModelAdapterHF(
        model,
        config,
        model_kwargs={"dtype": torch.float32},
        device=None,
        sparse_by_default=config is not None,
    )


def assert_same_answer(
    expected: AnswerDetails, found: AnswerDetails, name: str, capsys: pytest.CaptureFixture[str]
) -> Comparison:
    """The same tokens, up to where two logits tie closer than float noise, which is printed."""
    comparison = compare_answers(expected, found)
    if not comparison.is_equal:
        with capsys.disabled():
            print(f"\n{name}: {comparison}")
    assert comparison.is_equal or comparison.is_near_tie, str(comparison)
    return comparison
