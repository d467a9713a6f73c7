"""Installed but not selected, vLLM is as it was; selected but dense, it computes the same."""

from typing import Any

import pytest

from tests.plugin.cuda.run_engines import OPTIONS, run_on_cpu, write_tiny_llama

LOGPROB_ATOL = 1e-5
"""Kernels of two kinds round differently, by about 2**-24 of each sum."""
CHUNKED = {"max_model_len": 512, "max_num_batched_tokens": 256}
CONFIG = {
    "maskers": [{"type": "sink", "sink_size": 4}],
    "min_sparse_keys": 0,
    "index": [
        {"type": "quest_top_k", "heavy_size": 1, "page_size": 16},
        {"type": "pq_cache", "heavy_size": 1, "pq_sub_dim": 16, "pq_bits": 4},
    ],
}
OFF = {"sparse_attention": "off"}


def selected(**fields: Any) -> dict[str, Any]:
    return {
        "attention_backend": "CUSTOM",
        "additional_config": {"sparse_attention": {**CONFIG, **fields}},
    }


def test_stock_installed_and_dense_are_the_same(tmp_path) -> None:
    """To the bit where vLLM's own kernels run: without the plugin's backend, or with its general
    path."""
    # One after the other, and in a batch.
    requests = [
        {
            "prompt_token_ids": [(37 * place + length) % 512 for place in range(length)],
            "max_tokens": 12,
            "arrives": step,
        }
        for length, step in ((130, 0), (33, 20), (450, 22))
    ]
    model = str(write_tiny_llama(tmp_path / "model"))

    asked_off = [{**request, "extra_args": OFF} for request in requests]

    def engine(**options: Any) -> dict[str, Any]:
        own = asked_off if "attention_backend" in options else requests
        return {"options": {**OPTIONS, **CHUNKED, "model": model, **options}} | {"batches": [own]}

    disabled = {"SPARSE_ATTENTION_PLUGIN_DISABLED": "1", "VLLM_PLUGINS": ""}
    stock = run_on_cpu({"stock": engine()}, tmp_path / "stock", **disabled)["stock"]
    found = run_on_cpu(
        {
            "installed": engine(),
            "general": engine(**selected(fast_path=False)),
            "pages": engine(**selected()),
        },
        tmp_path / "installed",
    )
    answers = [(one["tokens"], one["logprobs"]) for one in (stock, *found.values())]
    assert answers[1] == answers[2] == answers[0]
    assert answers[3][0] == answers[0][0]
    for own, wanted in zip(answers[3][1][0], answers[0][1][0], strict=True):
        assert own == pytest.approx(wanted, abs=LOGPROB_ATOL)


def test_a_server_that_has_not_selected_it_says_so(serve) -> None:
    installed = serve(None)
    assert installed.complete("Hello", 4).token_ids
    assert installed.statistics().status_code == 404
    with pytest.raises(Exception, match="attention-backend CUSTOM; this one was not"):
        installed.complete("Hello", 4, sparse_attention="on")
    installed.server.stop()
