"""Architectures: in process and served, densely and sparsely, they give the same tokens.

Tiny models with random weights, built from transformers' own configuration classes and read by
both sides from the same files.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from examples.documents import python_manual
from sparse_attention_hub import Request
from sparse_attention_hub.adapters.base import AnswerDetails
from sparse_attention_hub.adapters.model_servers import ModelServerHF
from sparse_attention_hub.adapters.prompt import RequestOptions, tokenize_request
from sparse_attention_hub.sparse_attention.serialization import config_from_dict, config_to_json
from tests.e2e.reference import assert_same_answer, reference_adapter
from tests.e2e.start_engines import Asked, EngineReport
from tests.e2e.tiny_models import HEADS, LAYERS, SERVED, write_tiny_model

TOKENS = 16
SINK, LOCAL, HEAVY = 4, 16, 8
SINK_LOCAL = [{"type": "sink", "sink_size": SINK}, {"type": "local", "window_size": LOCAL}]
ORACLE = [*SINK_LOCAL, {"type": "oracle_top_k", "heavy_size": HEAVY}]
MASKERS = {
    "dense": None,
    "oracle": ORACLE,
    "quest": [
        *SINK_LOCAL,
        {"type": "quest_top_k", "heavy_size": 32, "page_size": 16, "label_bits": 8},
    ],
}
CONFIGS = {
    name: None if maskers is None else config_from_dict({"maskers": maskers})
    for name, maskers in MASKERS.items()
}
WINDOWED_LAYERS = {
    "mistral-window": LAYERS,
    "gemma3": 2,
    "gemma4": 1,
    "granite-swa": 1,
    "gpt-oss": 2,
}
RECURRENT_LAYERS = {"granite-hybrid": 2}
"""Without attention; falcon-h1's have both."""
PEAKED = {("gemma4", "oracle")}
"""Its scores are not scaled down: the oracle finds all that counts."""
HYBRID = ("granite-hybrid", "falcon-h1")
NAMED = {kind: {"0": SINK_LOCAL} for kind in ("granite-hybrid", "gpt-oss")}
"""Maskers for a layer that has none: recurrent, or with a window."""


def layers_with_maskers(kind: str) -> int:
    return LAYERS - WINDOWED_LAYERS.get(kind, 0) - RECURRENT_LAYERS.get(kind, 0)


REQUEST = Request(
    python_manual(["formatstrings"], 1000), "\n\nWhat is a field?", answer_prefix="\nAnswer:"
)


@contextmanager
def one_thread() -> Iterator[None]:
    """With tensors this small, threads do little but wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(model_path: str, tmp_path_factory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("architectures")
    yield {kind: write_tiny_model(kind, root, model_path) for kind in SERVED}
    ModelServerHF().cleanup_unused()


@pytest.fixture(scope="module")
def reference(folders) -> Callable[[str, str], AnswerDetails]:
    """The in-process answer of a model with a configuration."""
    found: dict[tuple[str, str], AnswerDetails] = {}

    def answer(kind: str, name: str) -> AnswerDetails:
        if (kind, name) not in found:
            with one_thread(), reference_adapter(str(folders[kind]), CONFIGS[name]) as adapter:
                response = adapter.process_request(
                    REQUEST, {"max_new_tokens": TOKENS}, {"return_logits": True}
                )
            found[kind, name] = response.details[0]
        return found[kind, name]

    return answer


def asked_of(folder: Path) -> dict[str, Asked]:
    """The request, for each configuration."""
    tokens = tokenize_request(AutoTokenizer.from_pretrained(folder), REQUEST, RequestOptions())
    prompt = tokens.context_ids + tokens.question_ids[0]
    return {
        name: Asked(
            prompt,
            {"sparse_attention": "off"}
            if config is None
            else {
                "sparse_attention_config": config_to_json(config),
                "sparse_attention_dense_prefix": len(tokens.context_ids),
            },
            TOKENS,
        )
        for name, config in CONFIGS.items()
    }


@pytest.fixture(scope="module")
def engine_report(folders, start_engine) -> Callable[[str], EngineReport]:
    """What the engine of a model answered to the same tokens, and logged."""
    found: dict[str, EngineReport] = {}

    def report(kind: str) -> EngineReport:
        if kind not in found:
            asked = asked_of(folders[kind])
            # vLLM 0.32 cannot keep recurrent states for prefixes on CPUs.
            options = {"enable_prefix_caching": False} if kind in HYBRID else {}
            options["sparse_attention"] = {"layers": NAMED.get(kind, {})}
            found[kind] = start_engine(folders[kind], MASKERS["quest"], asked, options)
        return found[kind]

    return report


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", SERVED)
def test_same_tokens_and_same_counts(kind, name, reference, engine_report, capsys) -> None:
    expected, report = reference(kind, name), engine_report(kind)
    assert report.error is None
    answered = report.answers[name]
    found = AnswerDetails(
        mode=expected.mode,
        token_ids=tuple(answered.token_ids),
        prompt_tokens=expected.prompt_tokens,
        context_tokens=expected.context_tokens,
        density=None,
        # There are none for a model without a layer that could be sparse.
        read_keys=(answered.statistics or {}).get("read_keys"),
        visible_keys=(answered.statistics or {}).get("visible_keys"),
        time_to_first_token_s=None,
        time_per_output_token_s=None,
        finish_reason=answered.finish_reason,
    )
    comparison = assert_same_answer(expected, found, f"{kind}, {name}", capsys)
    # Two implementations can agree on the best token by luck, but not on its probability.
    logprobs = torch.tensor(answered.logprobs[: comparison.num_equal])
    row, column = range(comparison.num_equal), expected.token_ids[: comparison.num_equal]
    wanted = expected.logits.log_softmax(-1)[row, column]
    torch.testing.assert_close(logprobs, wanted, atol=1e-4, rtol=0)
    assert len(found.token_ids) == len(expected.token_ids) == TOKENS
    # A prefix that both agree on only because one token repeats would prove nothing.
    assert len(set(expected.token_ids)) > TOKENS // 2
    counts = [(answer.read_keys or 0, answer.visible_keys or 0) for answer in (expected, found)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", SERVED)
def test_counts_are_those_of_the_definition(kind, reference) -> None:
    """Sparse queries are the question's tokens and every generated token that was fed back."""
    answer = reference(kind, "oracle")
    positions = range(answer.context_tokens, answer.prompt_tokens + TOKENS - 1)
    heads = HEADS * layers_with_maskers(kind)
    assert answer.visible_keys == sum(position + 1 for position in positions) * heads
    assert answer.read_keys == len(positions) * (SINK + LOCAL + HEAVY) * heads


@pytest.mark.parametrize("name", ["oracle", "quest"])
@pytest.mark.parametrize("kind", SERVED)
def test_answers_depend_on_what_is_read(kind, name, reference) -> None:
    """Otherwise equal sparse answers would prove nothing; with windows everywhere, all is dense."""
    reads_all = layers_with_maskers(kind) == 0 or (kind, name) in PEAKED
    is_equal = reference(kind, name).token_ids == reference(kind, "dense").token_ids
    assert is_equal == reads_all


@pytest.mark.parametrize("kind", SERVED)
def test_layers_with_a_window_are_said_to_be_dense(kind, folders, engine_report, caplog) -> None:
    with reference_adapter(str(folders[kind]), CONFIGS["oracle"]):
        pass
    for messages in (caplog.messages, engine_report(kind).log):
        # The engine says it once for each group of layers that share a table of blocks.
        said = re.findall(
            r"(\d+) (?:of \d+ )?layers have a sliding window and stay dense", "\n".join(messages)
        )
        assert sum(map(int, said)) == WINDOWED_LAYERS.get(kind, 0)


@pytest.mark.parametrize("kind", SERVED)
def test_maskers_run_on_pages(kind, engine_report) -> None:
    """Also where vLLM asks for blocks of one token in order to choose the size of the others."""
    report = engine_report(kind)
    assert not [message for message in report.log if "no index for" in message]
    for name, answer in report.answers.items():
        rows = (answer.statistics or {}).get("general_rows", 0)
        assert rows == 0, (name, answer.statistics)


@pytest.mark.parametrize("kind", SERVED)
def test_layers_that_have_no_maskers_are_named(kind, engine_report) -> None:
    said = [message for message in engine_report(kind).log if "changes nothing" in message]
    expected = ["says something of layers 0, and changes nothing there"] if kind in NAMED else []
    assert len(said) == len(expected)
    assert all(part in message for part, message in zip(expected, said, strict=True))


def test_windows_may_have_another_backend(folders, engine_report, start_engine) -> None:
    """vLLM lets one be chosen for each kind of layer."""
    expected = engine_report("gemma3").answers["oracle"]
    asked = {"oracle": asked_of(folders["gemma3"])["oracle"]}
    others = {"attention_config": {"backend_per_kind": {"sliding_window": "CPU_ATTN"}}}
    report = start_engine(folders["gemma3"], MASKERS["quest"], asked, others)
    assert report.error is None
    assert report.answers["oracle"].token_ids == expected.token_ids
    for name in ("sparse_queries", "read_keys", "visible_keys", "general_rows"):
        assert report.answers["oracle"].statistics[name] == expected.statistics[name]


@pytest.mark.parametrize("kind", HYBRID)
def test_blocks_are_larger_beside_recurrent_states(kind, engine_report) -> None:
    assert engine_report(kind).block_size > 128
