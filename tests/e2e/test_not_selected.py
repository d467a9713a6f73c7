"""Installed but not selected, vLLM is as it was; selected but dense, it computes the same."""

import pytest

from tests.e2e.conftest import CHUNKED, tokens_and_logprobs
from tests.e2e.texts import prompt


def answers(client, model_path: str, **xargs):
    return [
        tokens_and_logprobs(client.complete(prompt(model_path, start, length), 24, **xargs))
        for start, length in ((50, 700), (900, 33), (1200, 1400))
    ]


def test_stock_installed_and_dense_are_the_same_to_the_bit(serve, sparse, model_path) -> None:
    stock = serve(None, CHUNKED, {"SPARSE_ATTENTION_PLUGIN_DISABLED": "1", "VLLM_PLUGINS": ""})
    expected = answers(stock, model_path)
    stock.server.stop()
    installed = serve(None, CHUNKED)
    assert answers(installed, model_path) == expected
    assert installed.statistics().status_code == 404
    with pytest.raises(Exception, match="attention-backend CUSTOM; this one was not"):
        installed.complete("Hello", 4, sparse_attention="on")
    installed.server.stop()
    assert answers(sparse, model_path, sparse_attention="off") == expected
