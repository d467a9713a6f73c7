"""The in-process reference, on the small real model."""

import pytest
import torch

from sparse_attention_hub import ModelAdapterHF, Request
from sparse_attention_hub.sparse_attention import (
    LocalMaskerConfig,
    OracleTopKConfig,
    ResearchAttentionConfig,
    SinkMaskerConfig,
)

CONFIG = ResearchAttentionConfig([SinkMaskerConfig(4), LocalMaskerConfig(16)])
FULL = ResearchAttentionConfig([OracleTopKConfig(1.0)])
CONTEXT = "The river Foo is 312 km long. It rises in the Bar hills and ends in lake Baz. " * 6
QUESTIONS = [" How long is the river?", " Where does it rise?"]
REQUEST = Request(CONTEXT, QUESTIONS, answer_prefix="Answer:")
GENERATION = {"max_new_tokens": 12}
MODEL_KWARGS = {"dtype": torch.float32}


@pytest.fixture
def make(model_path: str):
    adapters = []

    def build(config=None, **kwargs) -> ModelAdapterHF:
        adapters.append(
            ModelAdapterHF(model_path, config, model_kwargs=MODEL_KWARGS, device=None, **kwargs)
        )
        return adapters[-1]

    yield build
    for adapter in adapters:
        adapter.close()


def sparse(adapter: ModelAdapterHF, request: Request = REQUEST, **options):
    with adapter.enable_sparse_mode():
        return adapter.process_request(request, GENERATION, options or None)


def plain_generation(adapter: ModelAdapterHF, request: Request) -> list[tuple[int, ...]]:
    """transformers alone, each prompt from nothing."""
    answers = []
    for question in request.questions:
        text = adapter.tokenizer.apply_chat_template(
            [{"role": "user", "content": request.context + question}],
            tokenize=False,
            add_generation_prompt=True,
        )
        ids = adapter.tokenizer(
            text + request.answer_prefix, return_tensors="pt", add_special_tokens=False
        )
        out = adapter.model.generate(**ids, max_new_tokens=12, do_sample=False)
        answers.append(tuple(out[0, ids["input_ids"].shape[1] :].tolist()))
    return answers


def test_dense_is_what_transformers_generates(make) -> None:
    adapter = make()
    response = adapter.process_request(REQUEST, GENERATION)
    assert [item.token_ids for item in response.details] == plain_generation(adapter, REQUEST)
    assert all(item.mode == "dense" and item.density == 1.0 for item in response.details)
    assert all(text.startswith("Answer:") for text in response.responses)


def test_sparse_reads_less_and_answers_differently(make) -> None:
    response = sparse(make(CONFIG))
    for item in response.details:
        assert item.mode == "sparse"
        assert item.density == item.read_keys / item.visible_keys < 0.3
    dense = make().process_request(REQUEST, GENERATION)
    assert response.details[0].token_ids != dense.details[0].token_ids


def test_full_masks_are_dense_attention(make) -> None:
    full = sparse(make(FULL))
    dense = make().process_request(REQUEST, GENERATION)
    assert [d.token_ids for d in full.details] == [d.token_ids for d in dense.details]
    assert full.details[0].density == 1.0
    assert full.details[0].mode == "sparse"


def test_questions_together_equal_questions_alone_bit_for_bit(make) -> None:
    adapter = make(CONFIG)
    together = sparse(adapter, return_logits=True)
    for index, question in enumerate(QUESTIONS):
        alone = sparse(adapter, Request(CONTEXT, question, "Answer:"), return_logits=True)
        assert alone.responses == together.responses[index]
        assert torch.equal(alone.details[0].logits, together.details[index].logits)


def test_padded_batch_is_the_same_as_rows_alone(make) -> None:
    """Direct calls inside sparse mode, with padding on the left."""
    adapter = make(CONFIG)
    adapter.tokenizer.padding_side = "left"
    texts = ["The capital of France is", "One two three four five six seven eight nine ten " * 4]
    batch = adapter.tokenizer(texts, return_tensors="pt", padding=True)
    with adapter.enable_sparse_mode(), torch.inference_mode():
        together = adapter.model(**batch).logits
        for row, text in enumerate(texts):
            alone = adapter.model(**adapter.tokenizer(text, return_tensors="pt")).logits[0]
            # Logits of order 10, 30 layers of float32 sums in another order.
            assert (together[row, -len(alone) :] - alone).abs().max() < 1e-3


def test_custom_attention_function(make) -> None:
    adapter = make(CONFIG)
    attend = adapter.get_custom_attention_function(adapter.sparse_attention)
    query, key = torch.randn(1, 9, 3, 8), torch.randn(1, 3, 20, 8)
    with pytest.raises(ValueError, match="sparse_meta_data"):
        attend(torch.nn.Identity(), query, key, key, None)
    output, weights = attend(torch.nn.Identity(), query, key, key, None, sparse_meta_data={})
    assert output.shape == (1, 3, 9, 8)
    assert weights.shape == (1, 9, 3, 20)
