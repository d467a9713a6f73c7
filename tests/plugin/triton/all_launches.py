"""Every launcher with everything it wants, on tensors without memory."""

from collections.abc import Callable

import torch

from vllm_sparse_plugin.paged.triton_kernels import (
    adaptive_sampling,
    attention,
    cache_rows,
    channel_labels,
    flags,
    key_lists,
    key_numbers,
    label_numbers,
    label_products,
    label_scores,
    lists,
    mass_selection,
    page_lists,
    pooling,
    radix_workspace,
    read_counts,
    sampling,
    selected_mass,
    selection,
)

QUERIES, KV_HEADS, CAPACITY, DEVICE = 2, 2, 1 << 17, "meta"


def _tensor(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def launches(
    heads: int, head_size: int, dtype: torch.dtype, by_head: bool, is_split: bool
) -> dict[str, Callable[[], None]]:
    """By name; what they need besides launching is done before.

    Args:
        heads: Query heads of a KV head.
        head_size: Channels of a key.
        dtype: Of queries and cache.
        by_head: Whether units are query heads, not KV heads.
        is_split: Whether rows of a radix selection are.
    """
    num_heads = heads * KV_HEADS
    units = num_heads if by_head else KV_HEADS
    lengths = _tensor(QUERIES)
    scores = _tensor(QUERIES, num_heads, CAPACITY, dtype=torch.float32)
    query = _tensor(QUERIES, num_heads, head_size, dtype=dtype)
    output = torch.empty_like(query)
    cache = _tensor(9, KV_HEADS, 16, 3 * head_size, dtype=dtype)
    batch = cache_rows.DeviceBatch(_tensor(QUERIES, CAPACITY // 16), lengths, lengths)
    radix = radix_workspace.RadixWorkspace.of(
        DEVICE, long_row=1 if is_split else CAPACITY + 1, short_row=0
    )
    in_chunks = radix_workspace.RadixWorkspace.of(DEVICE)
    marks = _tensor(QUERIES * units, CAPACITY, dtype=torch.uint8)
    of_heads = _tensor(QUERIES * num_heads, CAPACITY, dtype=torch.uint8)
    of_groups = _tensor(QUERIES * KV_HEADS, CAPACITY, dtype=torch.uint8)
    share = _tensor(QUERIES * units, dtype=torch.float32)
    own = _tensor(*marks.shape, dtype=torch.float32)
    order = _tensor(*marks.shape)
    pools = pooling.PoolingWorkspace.of(QUERIES, num_heads, CAPACITY, DEVICE)
    work = adaptive_sampling.AdaptiveWorkspace.of(
        QUERIES, num_heads, KV_HEADS, units, CAPACITY, DEVICE
    )
    found = lists.DeviceLists.of(QUERIES, KV_HEADS, units // KV_HEADS, CAPACITY, True, DEVICE)
    plain = lists.DeviceLists.of(QUERIES, KV_HEADS, 1, 16 * CAPACITY, False, DEVICE)
    parts = attention.AttentionWorkspace.of(QUERIES, num_heads, KV_HEADS, head_size, DEVICE)
    ranges = _tensor(4, QUERIES)
    reads = _tensor(QUERIES, 3, dtype=torch.int64)
    mass = mass_selection.MassWorkspace.of(QUERIES, num_heads, CAPACITY, DEVICE)

    def select(page_size: int, work: radix_workspace.RadixWorkspace = radix) -> None:
        selection.flag_largest(scores, page_size, units, lengths, 1.0, lengths, marks, work, pools)

    def list_best(page_size: int) -> None:
        page_lists.list_pages(
            scores, page_size, KV_HEADS, lengths, 0.1, lengths, ranges, lengths, plain, reads
        )

    places = key_numbers.KeyListsWorkspace.of(QUERIES * KV_HEADS, DEVICE)
    rows = key_numbers.KeyRows(lengths, lengths, ranges, lengths, KV_HEADS, max(2, heads), places)
    own_labels = channel_labels.QueryLabels.of(QUERIES, num_heads, 8, 4, DEVICE)
    labels = label_products.KeyLabels(cache, (0, 128), 128, 4, 8, 1)
    channels = _tensor(KV_HEADS, 8)
    compared = (own_labels, labels, batch.block_table, lengths)

    sink_logits = _tensor(num_heads, dtype=dtype)

    def attend(weights: torch.Tensor | None, sinks: torch.Tensor | None = None) -> None:
        listed = (found.tokens, weights, found.counts)
        attention.attend_lists(query, cache, batch, *listed, 0.1, output, parts, lengths, sinks)

    return {
        "start_flags": lambda: flags.start_flags(marks, lengths, ranges),
        "flag_range": lambda: flags.flag_range(marks, lengths, lengths, lengths),
        "pool_flags": lambda: flags.pool_flags(of_heads, lengths, of_groups),
        "spread_flags": lambda: flags.spread_flags(of_groups, lengths, of_heads),
        "flag_largest, keys": lambda: select(1),
        "flag_largest, pages": lambda: select(16),
        "flag_largest, keys, in chunks": lambda: select(1, in_chunks),
        "flag_largest, pages, in chunks": lambda: select(16, in_chunks),
        "list_pages": lambda: list_best(16),
        "list_pages, keys": lambda: list_best(1),
        "number_scores": lambda: key_numbers.number_scores(scores, rows, 0.1, pools),
        "list_numbered": lambda: key_lists.list_numbered(scores, rows, plain, reads),
        "label_queries": lambda: channel_labels.label_queries(query, channels, 4, 1.0, own_labels),
        "score_labels": lambda: label_scores.score_labels(*compared, lengths, scores),
        "weigh_labels": lambda: label_scores.weigh_labels(*compared, lengths, 0.1, pools),
        "number_labels": lambda: label_numbers.number_labels(*compared, rows, 0.1, pools, scores),
        "flag_mass": lambda: mass_selection.flag_mass(scores, 0.9, 1.0, lengths, of_heads, mass),
        "sample_share": lambda: sampling.sample_share(
            0.1, 7, 3, num_heads, lengths, marks, share, order, radix
        ),
        "sample_adaptively": lambda: adaptive_sampling.sample_adaptively(
            query, cache, batch, 0.1, 0, 0.05, 0.1, 1.2, 7, 3, marks, share, work, radix
        ),
        "list_tokens": lambda: lists.list_tokens(
            marks, lengths, found, share, own, reads=reads, readers=heads
        ),
        "sum_selected_mass": lambda: selected_mass.sum_selected_mass(
            query, cache, batch, found, 0.1, work.static
        ),
        "add_scored": lambda: read_counts.add_scored(
            found.counts, found.counts, KV_HEADS, lengths, reads
        ),
        "attend_lists, weights": lambda: attend(found.log_weights),
        "attend_lists": lambda: attend(None),
        "attend_lists, sinks": lambda: attend(None, sink_logits),
    }
