"""Compiling the kernels before the first request waits for them."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm

from sparse_attention_hub.sparse_attention.research_attention import ResearchAttentionConfig
from vllm_sparse_plugin.paged.attention import PagedAttention, attend_dense
from vllm_sparse_plugin.paged.layout import BlockLayout
from vllm_sparse_plugin.paged.maskers.base import Unsupported
from vllm_sparse_plugin.paged.prefill import stored_rows
from vllm_sparse_plugin.paged.random_row import random_row

logger = logging.getLogger(__name__)

_NUM_KEYS = 40
_SLOW_S = 5.0


def warm_up(configs: Iterable[ResearchAttentionConfig], layout: BlockLayout) -> None:
    """Runs every kernel that some configurations need on a few random keys.

    numba compiles a kernel when it is first called, some seconds for each, and keeps the result
    in the user's cache folder for the next process.

    Args:
        configs: Of the server.
        layout: Of its blocks.
    """
    lists = [
        (layer, maskers)
        for config in configs
        for layer, maskers in (
            (first_layer(config), config.masker_configs),
            *config.layer_masker_configs.items(),
        )
    ]
    with compiling():
        for layer, maskers in tqdm(lists, desc="sparse attention: compiling kernels", disable=None):
            row = random_row(layout, _NUM_KEYS, layer)
            attend_dense(row.query, row.cache, row.batch, 1.0)
            dtype = layout.shape.dtype
            stored_rows(row.cache, torch.from_numpy(row.batch.block_table[0]), 1, 0, 1, dtype)
            try:
                attention = PagedAttention(maskers, layout.shape)
                attention.attend(row.query, row.cache, row.batch, 1.0)
            except Unsupported:
                continue  # the general path, which is not compiled
            except ValueError as error:  # a file that knows other layers than this one
                logger.warning(
                    "sparse attention: kernels of %s not compiled yet: %s", maskers, error
                )


@contextmanager
def compiling() -> Iterator[None]:
    """Says how long what is done inside has taken, if it was long."""
    started = time.monotonic()
    yield
    seconds = time.monotonic() - started
    if seconds > _SLOW_S:
        logger.info(
            "sparse attention: compiled kernels in %.0f s; next time they are kept", seconds
        )


def first_layer(config: ResearchAttentionConfig) -> int:
    """The first layer that has the maskers of most layers: files may know no others."""
    special = {*config.dense_layers, *config.layer_masker_configs}
    return next(layer for layer in itertools.count() if layer not in special)
