"""Splitting a step's queries by mode, against a per-token loop."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_sparse_plugin.request_parameters import RequestParameters
from vllm_sparse_plugin.row_table import Row
from vllm_sparse_plugin.step_plan import dense_part, split_rows

SPARSE = RequestParameters('{"maskers": []}', "f", None, None)
TAGGED_DENSE = RequestParameters(None, "", None, "t")


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[int], dict[int, Row]]:
    """Rows of any query length (0 = padding) and history, plain, tagged or sparse."""
    starts, seq_lens, rows = [0], [], {}
    for index in range(draw(st.integers(1, 6))):
        count = draw(st.sampled_from([0, 1, 1, 2, 7]))
        starts.append(starts[-1] + count)
        seq_lens.append(count + draw(st.integers(0, 9)))
        kind = draw(st.sampled_from(["plain", "tagged", "sparse"]))
        if kind == "tagged":
            rows[index] = Row(TAGGED_DENSE, 3, 3)
        elif kind == "sparse":
            rows[index] = Row(SPARSE, draw(st.integers(0, 12)), 0)
    return starts, seq_lens, rows


@given(steps())
@settings(max_examples=300, deadline=None)
def test_every_query_is_in_the_part_of_its_position(step) -> None:
    starts, seq_lens, rows = step
    dense, sparse = split_rows(starts, seq_lens, rows)
    expected = {}
    for index, seq_len in enumerate(seq_lens):
        count = starts[index + 1] - starts[index]
        for offset in range(count):
            position = seq_len - count + offset
            row = rows.get(index)
            is_sparse = (
                row is not None
                and row.parameters.config_json is not None
                and position >= row.dense_prefix_tokens
            )
            expected[starts[index] + offset] = (index, position, is_sparse)
    found = {}
    for parts, is_sparse in ((dense, False), (sparse, True)):
        for part in parts:
            for query in range(part.query_start, part.query_end):
                assert query not in found
                position = part.seq_len - (part.query_end - query)
                found[query] = (part.row, position, is_sparse)
    assert found == expected


def test_dense_part_is_the_metadata_of_the_dense_queries_alone() -> None:
    # A 5-token prefill chunk that leaves its dense prefix after 3; a sparse and a dense decode.
    starts, seq_lens = [0, 5, 6, 7], [9, 40, 33]
    rows = {0: Row(SPARSE, 7, 7), 1: Row(SPARSE, 20, 20)}
    common = CommonAttentionMetadata(
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        query_start_loc_cpu=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=3,
        num_actual_tokens=7,
        max_query_len=5,
        max_seq_len=40,
        block_table_tensor=torch.arange(6, dtype=torch.int32).view(3, 2),
        slot_mapping=torch.arange(100, 107),
        positions=torch.tensor([4, 5, 6, 7, 8, 39, 32]),
        is_prefilling=torch.tensor([True, False, False]),
        req_idx=np.array([4, 2, 9]),
    )
    dense, sparse = split_rows(starts, seq_lens, rows)
    part, tokens = dense_part(common, dense)
    assert tokens.tolist() == [0, 1, 2, 6]
    assert part.query_start_loc.tolist() == [0, 3, 4] == part.query_start_loc_cpu.tolist()
    assert part.seq_lens.tolist() == [7, 33]
    assert part.num_reqs == 2
    assert part.num_actual_tokens == 4
    assert part.max_query_len == 3
    assert part.max_seq_len == 33
    assert part.block_table_tensor.tolist() == [[0, 1], [4, 5]]
    assert part.slot_mapping.tolist() == [100, 101, 102, 106]
    assert part.positions.tolist() == [4, 5, 6, 32]
    assert part.is_prefilling.tolist() == [True, False]
    assert part.req_idx.tolist() == [4, 9]
    assert [(row.row, row.query_start, row.query_end, row.seq_len) for row in sparse] == [
        (0, 3, 5, 9),
        (1, 5, 6, 40),
    ]


@pytest.mark.parametrize("prefix", [0, 8, 9, 100])
def test_whole_row_modes(prefix: int) -> None:
    dense, sparse = split_rows([0, 1], [9], {0: Row(SPARSE, prefix, prefix)})
    assert (len(dense), len(sparse)) == ((1, 0) if prefix >= 9 else (0, 1))
