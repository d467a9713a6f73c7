"""The context is forwarded once, and every question finds it as if it were the first."""

from pathlib import Path

import pytest
import torch

from sparse_attention_hub import ModelAdapterHF, Request
from sparse_attention_hub.sparse_attention import (
    LocalMaskerConfig,
    PQCacheConfig,
    ResearchAttentionConfig,
    SinkMaskerConfig,
)
from tests.e2e.tiny_models import WINDOW, write_tiny_model

SPARSE = ResearchAttentionConfig([SinkMaskerConfig(2), LocalMaskerConfig(8)])
STATEFUL = ResearchAttentionConfig(
    [SinkMaskerConfig(2), PQCacheConfig(heavy_size=8, pq_sub_dim=8, pq_bits=2)]
)
CONTEXT = "The river Foo is 312 km long. It rises in the Bar hills and ends in lake Baz. " * 5
QUESTIONS = ["How long is the river, all in all?", "Where?", "Where does it rise?"]
REQUEST = Request(CONTEXT, QUESTIONS, "Answer:")
GENERATION = {"max_new_tokens": 5}


@pytest.mark.parametrize("config", [None, SPARSE])
def test_each_token_is_forwarded_once(make_tiny, config) -> None:
    adapter = make_tiny(config, sparse_by_default=config is not None)
    lengths: list[int] = []
    hook = adapter.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    details = adapter.process_request(REQUEST, GENERATION).details
    hook.remove()
    expected = [details[0].context_tokens]
    for detail in details:
        # The last generated token is forwarded by nobody.
        expected += [detail.prompt_tokens - detail.context_tokens]
        expected += [1] * (detail.new_tokens - 1)
    assert lengths == expected


@pytest.mark.parametrize("config", [None, SPARSE, STATEFUL])
def test_questions_together_equal_questions_alone_bit_for_bit(make_tiny, config) -> None:
    adapter = make_tiny(config, sparse_by_default=config is not None)
    options = {"return_logits": True}
    together = adapter.process_request(REQUEST, GENERATION, options)
    for question, detail in zip(QUESTIONS, together.details, strict=True):
        alone = adapter.process_request(Request(CONTEXT, question, "Answer:"), GENERATION, options)
        assert alone.details[0].token_ids == detail.token_ids
        assert torch.equal(alone.details[0].logits, detail.logits)


@pytest.mark.parametrize("kind", ["mistral-window", "gemma3"])
def test_caches_of_sliding_windows_are_restored_too(
    tmp_path: Path, model_path: str, kind: str
) -> None:
    """A context longer than the window: such a layer's cache drops keys as it grows."""
    folder = str(write_tiny_model(kind, tmp_path, model_path))
    options = {"return_logits": True}
    with ModelAdapterHF(folder, device=None, model_kwargs={"dtype": torch.float32}) as adapter:
        together = adapter.process_request(REQUEST, GENERATION, options)
        assert together.details[0].context_tokens > WINDOW
        for question, detail in zip(QUESTIONS, together.details, strict=True):
            request = Request(CONTEXT, question, "Answer:")
            alone = adapter.process_request(request, GENERATION, options)
            assert torch.equal(alone.details[0].logits, detail.logits)
            prompt = [
                *adapter.tokenizer.encode(CONTEXT),
                *adapter.tokenizer.encode(question + "Answer:"),
            ]
            with torch.inference_mode():
                tokens = torch.tensor([[*prompt, *detail.token_ids[:-1]]])
                logits = adapter.model(tokens, use_cache=False).logits[0, len(prompt) - 1 :]
            # Logits of order 10, sums in another order.
            assert (logits - detail.logits).abs().max() < 1e-4
