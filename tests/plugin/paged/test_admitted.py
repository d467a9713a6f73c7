"""What is admitted runs: an error in the middle of a step would end the engine of all requests."""

import itertools
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_attention_hub.sparse_attention.serialization import config_from_dict, config_to_json
from tests.plugin.paged.paged_rows import make_rows, shape_of
from vllm_sparse_plugin.masked_attention import attend_row, attention_of
from vllm_sparse_plugin.paged.attention import PagedAttention
from vllm_sparse_plugin.paged.layout import BlockLayout
from vllm_sparse_plugin.paged.maskers.base import Unsupported
from vllm_sparse_plugin.trial import AttentionShape, try_maskers

SHAPE = shape_of(4, 2, 32, 32)
MODEL = AttentionShape(num_layers=1, num_heads=4, num_kv_heads=2, head_size=32)
LENGTHS = (1, 33, 70)

sizes = st.one_of(st.integers(-1, 90), st.floats(0, 1), st.sampled_from([2**31 - 1, 2**31, 10**30]))
granularities = st.sampled_from(["query_head", "kv_head", "head"])
small = st.one_of(st.integers(0, 17), st.sampled_from([32, 33, 64, 10**30]))
shares = st.one_of(st.floats(0, 1), st.sampled_from([1e-300, 1.0, 0]))


def masker(name: str, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"type": st.just(name), **fields})


top_k = {"heavy_size": sizes, "head_granularity": granularities}
fixed = st.one_of(
    masker("sink", sink_size=sizes),
    masker("local", window_size=sizes),
    masker("oracle_top_k", **top_k),
    masker("oracle_top_p", top_p=shares),
    masker("quest_top_k", **top_k, page_size=small, label_bits=st.integers(0, 17)),
    masker("pq_cache", **top_k, pq_sub_dim=small, pq_bits=st.integers(0, 9)),
    masker("socket", **top_k, K=st.integers(0, 13), L=small),
)
samplers = st.one_of(
    masker("random_sampling", sampling_rate=shares, head_granularity=granularities),
    masker(
        "adaptive_sampling",
        base_rate_sampling=sizes,
        epsilon=shares,
        delta=shares,
        init_offset=sizes,
        local_offset=sizes,
        head_granularity=granularities,
    ),
    masker("magic_pig", lsh_l=small, lsh_k=small, center=st.booleans()),
)
lists = st.tuples(st.lists(fixed, max_size=2), st.lists(samplers, max_size=1)).map(
    lambda parts: list(itertools.chain(*parts))
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lists)
def test_admitted_maskers_run(maskers: list[dict[str, Any]]) -> None:
    """On gathered keys and, where they can, on pages."""
    try:
        config = config_from_dict({"maskers": maskers})
        config_json = config_to_json(config)
        try_maskers(config_json, MODEL)
    except ValueError:
        return  # refused: HTTP 400
    scaling = SHAPE.head_size**-0.5
    indices: dict[Any, None] = {}
    paged = None
    try:
        if maskers:
            paged = PagedAttention(config.masker_configs, SHAPE)
            indices = dict.fromkeys(index for one in paged.maskers for index in one.indices)
    except Unsupported:
        pass
    rows = make_rows(BlockLayout(SHAPE, tuple(indices)), LENGTHS, exact=False)
    for query, key, value in zip(rows.query, rows.keys, rows.values, strict=True):
        attend_row(attention_of(config_json), query[None], key, value, scaling, 0)
    if paged is not None:
        paged.attend(rows.query.float().numpy(), rows.cache, rows.batch, scaling)
