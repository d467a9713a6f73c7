"""Dense or sparse: the rule, and that no mode reaches another adapter, thread or task."""

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache, StaticCache

from sparse_attention_hub import Request
from sparse_attention_hub.adapters.attention_session import AttentionSession, attention_session
from sparse_attention_hub.sparse_attention import (
    LocalMaskerConfig,
    OracleTopKConfig,
    QuestTopKMaskerConfig,
    ResearchAttentionConfig,
    SinkMaskerConfig,
)

WINDOW = ResearchAttentionConfig([SinkMaskerConfig(2), LocalMaskerConfig(6)])
HEAVY = ResearchAttentionConfig([SinkMaskerConfig(1), OracleTopKConfig(5)])
CONTEXT = "The river Foo is 312 km long. It rises in the Bar hills and ends in lake Baz. " * 2
REQUEST = Request(CONTEXT, [" How long is it?", " Where does it rise?"])
GENERATION = {"max_new_tokens": 6}


def tokens_of(response) -> list[tuple[int, ...]]:
    return [item.token_ids for item in response.details]


def sparse(adapter, request: Request = REQUEST, **options):
    with adapter.enable_sparse_mode():
        return adapter.process_request(request, GENERATION, options or None)


@pytest.fixture
def expected(make_tiny) -> dict[str, list[tuple[int, ...]]]:
    """Answers of adapters that are alone."""
    answers = {
        "dense": tokens_of(make_tiny().process_request(REQUEST, GENERATION)),
        "window": tokens_of(sparse(make_tiny(WINDOW))),
        "heavy": tokens_of(sparse(make_tiny(HEAVY))),
    }
    assert len(set(map(str, answers.values()))) == 3
    return answers


def test_outside_dense_inside_sparse_and_the_response_says_so(make_tiny, expected) -> None:
    adapter = make_tiny(WINDOW)
    before = adapter.process_request(REQUEST, GENERATION)
    inside = sparse(adapter)
    after = adapter.process_request(REQUEST, GENERATION)
    assert tokens_of(before) == tokens_of(after) == expected["dense"]
    assert tokens_of(inside) == expected["window"]
    assert (before.mode, before.density) == ("dense", 1.0)
    assert inside.mode == "sparse"
    assert inside.density < 0.5


def test_density_counts_question_and_answer(make_tiny) -> None:
    """By hand: 2 sinks and 6 neighbours, of all keys up to the query, per layer and head."""
    adapter = make_tiny(WINDOW)
    for detail in sparse(adapter).details:
        config = adapter.model.config
        heads = config.num_hidden_layers * config.num_attention_heads
        # The last generated token is never a query.
        last = detail.prompt_tokens + detail.new_tokens - 1
        visible = sum(range(detail.context_tokens + 1, last + 1))
        assert detail.visible_keys == heads * visible
        assert detail.read_keys == heads * 8 * (last - detail.context_tokens)
        assert detail.density == detail.read_keys / detail.visible_keys


def test_a_mode_ends_with_an_error(make_tiny, expected) -> None:
    adapter = make_tiny(WINDOW)
    with pytest.raises(KeyError), adapter.enable_sparse_mode():
        raise KeyError
    assert tokens_of(adapter.process_request(REQUEST, GENERATION)) == expected["dense"]


def test_direct_calls_of_one_block_are_prompts_of_their_own(make_tiny) -> None:
    """The second prompt is the longer one: nothing but its first call says that it is new."""
    adapter = make_tiny(
        ResearchAttentionConfig([SinkMaskerConfig(2), QuestTopKMaskerConfig(12, 4)])
    )
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randint(3, 200, (1, n), generator=generator) for n in (60, 80))

    def generated(ids: torch.Tensor) -> list[int]:
        return adapter.model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()

    with torch.inference_mode():
        with adapter.enable_sparse_mode():
            alone = generated(second)
        with adapter.enable_sparse_mode():
            generated(first)
            assert generated(second) == alone


def test_modes_nest(make_tiny, expected) -> None:
    window, heavy = make_tiny(WINDOW), make_tiny(HEAVY)
    with window.enable_sparse_mode():
        with heavy.enable_sparse_mode(), window.enable_sparse_mode():
            assert tokens_of(window.process_request(REQUEST, GENERATION)) == expected["window"]
            assert tokens_of(heavy.process_request(REQUEST, GENERATION)) == expected["heavy"]
        assert heavy.process_request(REQUEST, GENERATION).mode == "dense"
        assert window.process_request(REQUEST, GENERATION).mode == "sparse"


def test_adapters_of_one_model_take_turns(make_tiny, expected) -> None:
    dense, window, heavy = make_tiny(), make_tiny(WINDOW), make_tiny(HEAVY, sparse_by_default=True)
    assert dense.model is window.model is heavy.model
    with window.enable_sparse_mode():
        for _ in range(2):
            assert tokens_of(dense.process_request(REQUEST, GENERATION)) == expected["dense"]
            assert tokens_of(window.process_request(REQUEST, GENERATION)) == expected["window"]
            assert tokens_of(heavy.process_request(REQUEST, GENERATION)) == expected["heavy"]


def test_adapters_of_one_model_in_threads_at_the_same_time(make_tiny, expected) -> None:
    window, heavy = make_tiny(WINDOW), make_tiny(HEAVY)
    together = threading.Barrier(4)

    def work(kind: str) -> list[list[tuple[int, ...]]]:
        together.wait(60)
        if kind == "window":
            return [tokens_of(sparse(window)) for _ in range(3)]
        if kind == "heavy":
            return [tokens_of(sparse(heavy)) for _ in range(3)]
        adapter = window if kind == "dense" else heavy
        return [tokens_of(adapter.process_request(REQUEST, GENERATION)) for _ in range(3)]

    kinds = ["window", "dense", "heavy", "dense too"]
    with ThreadPoolExecutor(4) as pool:
        answers = dict(zip(kinds, pool.map(work, kinds), strict=True))
    for kind, runs in answers.items():
        assert runs == [expected[kind.removesuffix(" too")]] * 3


def test_a_task_has_its_own_mode(make_tiny, expected) -> None:
    adapter = make_tiny(WINDOW)
    inside = asyncio.Event()

    async def ask_inside() -> None:
        with adapter.enable_sparse_mode():
            inside.set()
            await asyncio.sleep(0)
            assert tokens_of(adapter.process_request(REQUEST, GENERATION)) == expected["window"]

    async def ask_beside() -> None:
        await inside.wait()
        assert tokens_of(adapter.process_request(REQUEST, GENERATION)) == expected["dense"]

    async def both() -> None:
        await asyncio.gather(ask_inside(), ask_beside())

    asyncio.run(both())


def test_direct_calls_follow_the_mode(make_tiny) -> None:
    adapter = make_tiny(WINDOW)
    ids = adapter.tokenizer(CONTEXT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        dense = adapter.model(ids).logits
        with adapter.enable_sparse_mode():
            inside = adapter.model(ids).logits
        assert torch.equal(adapter.model(ids).logits, dense)
    assert not torch.allclose(inside, dense)


@pytest.mark.parametrize(
    "config", [WINDOW, ResearchAttentionConfig([SinkMaskerConfig(2), QuestTopKMaskerConfig(8, 4)])]
)
def test_a_sparse_context_is_one_sparse_pass_over_the_whole_prompt(make_tiny, config) -> None:
    adapter = make_tiny(config)
    whole = sparse(adapter, sparse_context=True, return_logits=True)
    assert tokens_of(whole) != tokens_of(sparse(adapter))
    for detail, question in zip(whole.details, REQUEST.questions, strict=True):
        prompt = adapter.tokenizer.encode(CONTEXT) + adapter.tokenizer.encode(question)
        tokens = torch.tensor([[*prompt, *detail.token_ids[:-1]]])
        session = AttentionSession(adapter.sparse_attention)
        with torch.inference_mode(), attention_session(session):
            logits = adapter.model(tokens, use_cache=False).logits[0, len(prompt) - 1 :]
        # Logits of order 10, sums in another order.
        assert (logits - detail.logits).abs().max() < 1e-4
        if detail is whole.details[0]:  # the question that paid for the context
            assert detail.read_keys == session.read_keys
            assert detail.visible_keys == session.visible_keys


def test_a_cache_with_room_for_more_keys_is_refused_in_sparse_mode(make_tiny) -> None:
    adapter = make_tiny(WINDOW)
    tokens = torch.tensor([[5, 6, 7, 8]])

    def logits(cache) -> torch.Tensor:
        with torch.no_grad():
            first = adapter.model(tokens, past_key_values=cache).logits
            return torch.cat([first, adapter.model(tokens[:, :1], past_key_values=cache).logits], 1)

    def static() -> StaticCache:
        return StaticCache(config=adapter.model.config, max_cache_len=16)

    grown = logits(DynamicCache())
    assert torch.allclose(logits(static()), grown, atol=1e-5)
    with adapter.enable_sparse_mode():
        # Sinks and window are all of so few keys.
        assert torch.allclose(logits(DynamicCache()), grown, atol=1e-5)
        with pytest.raises(ValueError, match="room for 16 keys was given where there are 4"):
            logits(static())


def test_a_sparse_context_is_for_sparse_mode(make_tiny) -> None:
    with pytest.raises(ValueError, match="sparse_context'.=True needs sparse mode"):
        make_tiny(WINDOW).process_request(REQUEST, GENERATION, {"sparse_context": True})


def test_sparse_by_default_needs_no_context_manager_and_warns_of_nothing(
    make_tiny, expected, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = make_tiny(WINDOW, sparse_by_default=True)
    with caplog.at_level(logging.WARNING, "sparse_attention_hub"):
        assert tokens_of(adapter.process_request(REQUEST, GENERATION)) == expected["window"]
        make_tiny().process_request(REQUEST, GENERATION)
    assert not caplog.records


def test_each_adapter_warns_once_that_its_configuration_is_not_used(
    make_tiny, caplog: pytest.LogCaptureFixture
) -> None:
    adapters = [make_tiny(WINDOW), make_tiny(HEAVY)]
    with caplog.at_level(logging.WARNING, "sparse_attention_hub"):
        for adapter in adapters * 2:
            adapter.process_request(REQUEST, GENERATION)
    assert ["runs dense" in record.message for record in caplog.records] == [True, True]


def test_sparse_mode_needs_a_configuration(make_tiny) -> None:
    with pytest.raises(RuntimeError, match="sparse_attention_config"):
        make_tiny().enable_sparse_mode().__enter__()
    with pytest.raises(ValueError, match="sparse_by_default=True needs a sparse_attention_config"):
        make_tiny(None, sparse_by_default=True)
