"""The general path on one row, against float64 and against itself in other slices."""

import pytest
import torch

from sparse_attention_hub.sparse_attention.serialization import config_from_dict, config_to_json
from tests.tolerances import ATTENTION_ATOL
from vllm_sparse_plugin import masked_attention
from vllm_sparse_plugin.masked_attention import attend_row, attention_of, causal_mask

SINK_LOCAL = [{"type": "sink", "sink_size": 4}, {"type": "local", "window_size": 9}]
CONFIGS = {
    "sink-local": SINK_LOCAL,
    "oracle-count": [*SINK_LOCAL, {"type": "oracle_top_k", "heavy_size": 5}],
    "oracle-share": [*SINK_LOCAL, {"type": "oracle_top_k", "heavy_size": 0.2}],
    "everything": [{"type": "sink", "sink_size": 1.0}],
}


def attention(name: str):
    return attention_of(config_to_json(config_from_dict({"maskers": CONFIGS[name]})))


def tensors(queries: int, keys: int, heads: int, kv_heads: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    return (
        torch.randn(queries, heads, 16, generator=generator).to(dtype),
        torch.randn(1, kv_heads, keys, 16, generator=generator).to(dtype),
        torch.randn(1, kv_heads, keys, 16, generator=generator).to(dtype),
    )


def brute_force(maskers: list[dict], query, key, value, scaling: float, sinks=None):
    """One query and head at a time, with sets, in float64."""
    num_queries, num_heads, _ = query.shape
    num_keys = key.shape[2]
    group = num_heads // key.shape[1]
    output = torch.zeros(num_queries, num_heads, value.shape[-1], dtype=torch.float64)
    read = visible = 0
    for i in range(num_queries):
        last = num_keys - num_queries + i
        for head in range(num_heads):
            scores = (key[0, head // group, : last + 1].double() @ query[i, head].double()).tolist()
            chosen: set[int] = set()
            for masker in maskers:
                size = next(value for name, value in masker.items() if name != "type")
                count = int(size * (last + 1)) if isinstance(size, float) else size
                if masker["type"] == "sink":
                    chosen |= set(range(min(count, last + 1)))
                elif masker["type"] == "local":
                    chosen |= set(range(max(0, last - count + 1), last + 1))
                else:
                    rest = [k for k in range(last + 1) if k not in chosen]
                    chosen |= set(sorted(rest, key=lambda k: -scores[k])[:count])
            keys = sorted(chosen)
            own = [] if sinks is None else [float(sinks[head])]
            logits = [*[scores[k] * scaling for k in keys], *own]
            weights = torch.softmax(torch.tensor(logits, dtype=torch.float64), 0)[: len(keys)]
            output[i, head] = weights @ value[0, head // group, keys].double()
            read, visible = read + len(keys), visible + last + 1
    return output, read, visible


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "kv_heads"),
    [(1, 1, 1, 1), (1, 63, 9, 3), (1, 40, 4, 4), (7, 7, 2, 1), (5, 40, 8, 2), (17, 64, 3, 3)],
)
def test_against_float64_loop(name: str, queries, keys, heads, kv_heads) -> None:
    query, key, value = tensors(queries, keys, heads, kv_heads)
    expected, read, visible = brute_force(CONFIGS[name], query, key, value, 0.25)
    result = attend_row(attention(name), query, key, value, 0.25, layer_index=0)
    assert (result.output.double() - expected).abs().max() <= ATTENTION_ATOL[torch.float32]
    assert (result.read_keys, result.visible_keys) == (read, visible)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("queries", [1, 5])
def test_learned_sinks_take_part_in_attention_alone(name: str, queries: int) -> None:
    query, key, value = tensors(queries, 40, 8, 2)
    sinks = torch.linspace(-2, 4, 8)
    expected, read, _ = brute_force(CONFIGS[name], query, key, value, 0.25, sinks)
    result = attend_row(attention(name), query, key, value, 0.25, 0, sinks)
    assert (result.output.double() - expected).abs().max() <= ATTENTION_ATOL[torch.float32]
    assert result.read_keys == read


@pytest.mark.parametrize("name", CONFIGS)
def test_slices_do_not_change_the_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = tensors(13, 50, 6, 2)
    whole = attend_row(attention(name), query, key, value, 0.25, layer_index=0)
    monkeypatch.setattr(masked_attention, "MAX_SCORES", 6 * 50 * 3)
    sliced = attend_row(attention(name), query, key, value, 0.25, layer_index=0)
    # Same keys and formula; only the order of float32 sums inside a matrix product may differ.
    assert (sliced.output - whole.output).abs().max() <= ATTENTION_ATOL[torch.float32]
    assert (sliced.read_keys, sliced.visible_keys) == (whole.read_keys, whole.visible_keys)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    query, key, value = tensors(3, 40, 4, 2, dtype)
    expected, _, _ = brute_force(CONFIGS["sink-local"], query, key, value, 0.25)
    result = attend_row(attention("sink-local"), query, key, value, 0.25, layer_index=0)
    assert result.output.dtype == dtype
    assert (result.output.double() - expected).abs().max() <= ATTENTION_ATOL[dtype]


@pytest.mark.parametrize(("queries", "keys"), [(2, 2), (3, 7), (1, 5)])
def test_causal_mask(queries: int, keys: int) -> None:
    mask = causal_mask(queries, keys, torch.zeros(1))
    if queries == 1:
        assert mask is None
        return
    for i in range(queries):
        allowed = (mask[0, 0, i] == 0).tolist()
        assert allowed == [k <= keys - queries + i for k in range(keys)]
