"""Installed but not selected, vLLM is as it was; selected but dense, it computes the same."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import CHUNKED, tokens_and_logprobs
from tests.e2e.texts import prompt

LOGPROB_ATOL = 1e-4
"""Kernels of two kinds round differently, by about 2**-24 of each sum; thirty layers of it moved
log-probabilities by 1e-5 at most."""


def answers(client, model_path: str, **xargs):
    return [
        tokens_and_logprobs(client.complete(prompt(model_path, start, length), 12, **xargs))
        for start, length in ((50, 300), (900, 33), (1200, 700))
    ]


def test_stock_installed_and_dense_are_the_same(serve, sparse, model_path) -> None:
    """To the bit where vLLM's own kernels run: without the plugin's backend, or with its general
    path."""
    without = {"SPARSE_ATTENTION_PLUGIN_DISABLED": "1", "VLLM_PLUGINS": ""}
    with ThreadPoolExecutor() as pool:  # most of a start is one thread's work
        others = [pool.submit(serve, None, CHUNKED, variables) for variables in (without, {})]
    stock, installed = (other.result() for other in others)
    expected = answers(stock, model_path)
    stock.server.stop()
    assert answers(installed, model_path) == expected
    assert installed.statistics().status_code == 404
    with pytest.raises(Exception, match="attention-backend CUSTOM; this one was not"):
        installed.complete("Hello", 4, sparse_attention="on")
    installed.server.stop()
    sink = [{"type": "sink", "sink_size": 4}]
    general = serve({"maskers": sink, "sparse_by_default": False, "fast_path": False}, CHUNKED)
    assert answers(general, model_path, sparse_attention="off") == expected
    general.server.stop()
    for found, wanted in zip(
        answers(sparse, model_path, sparse_attention="off"), expected, strict=True
    ):
        assert found[0] == wanted[0]
        assert found[1] == pytest.approx(wanted[1], abs=LOGPROB_ATOL)
