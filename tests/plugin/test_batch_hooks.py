"""Which requests a batch has, where runner V2 does not say it: the hook, on stand-ins."""

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm_sparse_plugin.backend import SparseAttentionMetadataBuilder
from vllm_sparse_plugin.compat.batch_hooks import _tell_requests
from vllm_sparse_plugin.request_parameters import RequestParameters
from vllm_sparse_plugin.row_table import GraphState, Row, RowTable

BATCH = SimpleNamespace(idx_mapping_np=np.array([2, 0]))


def module_of(build: Any) -> ModuleType:
    module = ModuleType("mamba_hybrid")
    module.build_attn_metadata = build
    return module


def test_metadata_is_told_the_slots_of_its_requests() -> None:
    module = module_of(lambda **named: named)

    def prepare(state: Any, batch: Any, mode: str, for_capture: bool = False) -> Any:
        return module.build_attn_metadata(mode=mode, for_capture=for_capture)

    before = module.build_attn_metadata
    found = _tell_requests(prepare, module)("state", BATCH, "full", for_capture=True)
    assert found.pop("req_idx") is BATCH.idx_mapping_np
    assert found == {"mode": "full", "for_capture": True}
    assert module.build_attn_metadata is before


def test_what_vllm_says_itself_is_left() -> None:
    module = module_of(lambda **named: named)

    def prepare(state: Any, batch: Any) -> Any:
        return module.build_attn_metadata(req_idx="its own")

    assert _tell_requests(prepare, module)("state", BATCH) == {"req_idx": "its own"}


def test_nothing_is_left_of_a_step_that_fails() -> None:
    module = module_of(lambda **named: named)
    before = module.build_attn_metadata

    def prepare(state: Any, batch: Any) -> Any:
        raise ValueError("no blocks")

    with pytest.raises(ValueError, match="no blocks"):
        _tell_requests(prepare, module)("state", BATCH)
    assert module.build_attn_metadata is before


ROWS = {slot: Row(RequestParameters(None, "", None, str(slot)), 0, 0) for slot in (0, 1, 2)}


def rows_of(table: RowTable, slots: np.ndarray | None) -> dict[int, Row]:
    builder = object.__new__(SparseAttentionMetadataBuilder)
    builder._table = table
    return builder._rows_of_batch(SimpleNamespace(req_idx=slots))


def test_rows_are_those_of_the_requests_in_the_batch() -> None:
    slots = RowTable(rows=ROWS, has_slots=True)
    assert rows_of(slots, np.array([2, 5, 0])) == {0: ROWS[2], 2: ROWS[0]}
    assert rows_of(RowTable(rows=ROWS), None) == ROWS  # runner V1
    drafts = RowTable(rows=ROWS, has_slots=True, graphs=GraphState(is_always_dense=True))
    assert rows_of(drafts, None) == {}


def test_no_request_gets_the_parameters_of_another_one() -> None:
    with pytest.raises(RuntimeError, match="does not say which requests"):
        rows_of(RowTable(rows=ROWS, has_slots=True), None)
