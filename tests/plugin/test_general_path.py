"""The general path: what it does where maskers want more memory than there is."""

import json
import logging
import weakref

import pytest
import torch

from tests.plugin.paged.paged_rows import shape_of
from vllm_sparse_plugin import general_path
from vllm_sparse_plugin.general_path import COSTLY_MASKERS
from vllm_sparse_plugin.masked_attention import attend_row
from vllm_sparse_plugin.paged.group_counts import GroupCounts
from vllm_sparse_plugin.request_parameters import RequestParameters
from vllm_sparse_plugin.step_plan import SparseRow

SHAPE = shape_of(4, 2, 16, 16)
SINK = json.dumps({"maskers": [{"type": "sink", "sink_size": 3}]})


def attended(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, GroupCounts]:
    rows = [SparseRow(0, 0, 2, key.shape[2], RequestParameters(SINK, "f", None, "tag"))]
    counts, output = GroupCounts.of(rows), torch.empty_like(query)
    general_path.attend_generally(
        rows, lambda row: (key, key), SINK, query, 0.25, 0, SHAPE, output, counts
    )
    return output, counts


def test_a_row_without_the_memory_for_its_maskers_is_dense(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 16), torch.randn(1, 2, 40, 16)
    sparse, sparse_counts = attended(query, key)
    scores = torch.einsum("qhd,hkd->hqk", query, key[0].repeat_interleave(2, 0)) * 0.25
    scores[:, 0, -1] = -torch.inf
    dense = torch.einsum("hqk,hkd->qhd", scores.softmax(-1), key[0].repeat_interleave(2, 0))
    assert not torch.allclose(sparse, dense, atol=1e-3)

    held = []

    def attend(attention, *arguments):
        if attention.maskers:
            of_the_first_try = torch.empty(4)
            held.append(weakref.ref(of_the_first_try))
            raise torch.OutOfMemoryError("too much")
        assert held[0]() is None  # its memory is free for the second
        return attend_row(attention, *arguments)

    monkeypatch.setattr(general_path, "attend_row", attend)
    with caplog.at_level(logging.WARNING):
        found, counts = attended(query, key)
    assert torch.allclose(found, dense, atol=1e-5)  # a few roundings of float32
    assert counts.keys.tolist() == counts.visible.tolist() == sparse_counts.visible.tolist()
    assert "not enough memory" in caplog.text


def test_more_memory_than_a_cpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(2, 4, 16), torch.randn(1, 2, 40, 16)

    def attend(attention, *arguments):
        if attention.maskers:
            torch.empty(1 << 60)
        return attend_row(attention, *arguments)

    monkeypatch.setattr(general_path, "attend_row", attend)
    _, counts = attended(query, key)
    assert counts.keys.tolist() == counts.visible.tolist()

    def fails(*arguments):
        raise RuntimeError("another one")

    monkeypatch.setattr(general_path, "attend_row", fails)
    with pytest.raises(RuntimeError, match="another one"):
        attended(query, key)


def test_the_longest_row_is_attended_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def attend(attention, query, key, value, scaling, layer):
        seen.append((tuple(query.shape), tuple(key.shape), len(attention.maskers), layer))
        return attend_row(attention, query, key, value, scaling, layer)

    monkeypatch.setattr(general_path, "attend_row", attend)
    general_path.take_memory(COSTLY_MASKERS, 3, SHAPE, 96, 5, torch.device("cpu"))
    assert seen == [((5, 4, 16), (1, 2, 96, 16), 2, 3)]


def test_a_server_starts_without_that_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def attend(*arguments):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(general_path, "attend_row", attend)
    with caplog.at_level(logging.WARNING):
        general_path.take_memory(SINK, 0, SHAPE, 1 << 16, 5, torch.device("cpu"))
    assert "on the general path over 65536 keys" in caplog.text
    assert "do not fit (16 MiB)" in caplog.text  # 2 KV heads of 16 channels in float32, twice
