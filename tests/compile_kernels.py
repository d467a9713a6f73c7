"""Compiles the CPU's kernels: `python -m tests.compile_kernels`.

The tests run in many processes, of which each would compile them for itself if it found none.
"""

import logging
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from sparse_attention_hub.sparse_attention.research_attention import ResearchAttentionConfig
from sparse_attention_hub.sparse_attention.research_attention.maskers.base import MaskerConfig
from sparse_attention_hub.sparse_attention.serialization import config_from_dict
from sparse_attention_hub.sparse_attention.utils.hashattention_utils import save_hat_weights
from tests.hub.top_k_maskers import HEAD_SIZE, hash_weights, top_k_configs
from tests.plugin.paged.paged_rows import shape_of
from vllm_sparse_plugin.paged.attention import paged_maskers
from vllm_sparse_plugin.paged.layout import BlockLayout
from vllm_sparse_plugin.paged.maskers.base import has_counterpart
from vllm_sparse_plugin.paged.warm_up import warm_up

OTHERS = [
    {"type": "sink", "sink_size": 4},
    {"type": "local", "window_size": 4},
    {"type": "quest_top_k", "heavy_size": 4, "page_size": 4},
    {"type": "oracle_top_p", "top_p": 0.5},
    {"type": "random_sampling", "sampling_rate": 0.5},
    {
        "type": "adaptive_sampling",
        "base_rate_sampling": 0.3,
        "epsilon": 0.2,
        "delta": 0.2,
        "init_offset": 0,
        "local_offset": 0,
    },
    {"type": "magic_pig", "lsh_l": 8, "lsh_k": 5},
]


def _top_k(folder: Path, heads: int, granularity: str) -> list[MaskerConfig]:
    configs = top_k_configs(folder, heads, 4, granularity)
    path = folder / "weights.safetensors"
    save_hat_weights(hash_weights(heads), path)
    configs["hash"] = replace(configs["hash"], hat_weights=None, hat_weight_file=str(path))
    return list(configs.values())


def compile_kernels(dtype: torch.dtype, half: int) -> None:
    """Runs maskers that have a counterpart on a cache of a type.

    Args:
        dtype: Of the cache.
        half: Of the maskers, 0 or 1.
    """
    logging.basicConfig(level=logging.INFO)
    shape = shape_of(heads=8, kv_heads=2, head_size=HEAD_SIZE, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        maskers: list[MaskerConfig] = [
            config_from_dict({"maskers": [other]}).masker_configs[0] for other in OTHERS
        ]
        granularities = ("query_head", "kv_head")
        # One masker's two, which have most kernels in common, side by side.
        for pair in zip(
            *(_top_k(Path(folder), shape.num_heads, one) for one in granularities), strict=True
        ):
            maskers += pair
        middle = len(maskers) // 2
        for masker in (maskers[:middle], maskers[middle:])[half]:
            if has_counterpart(type(masker)):
                [paged] = paged_maskers([masker], shape)
                layout = BlockLayout(shape, tuple(paged.indices))
                warm_up([ResearchAttentionConfig([masker])], layout)


def main() -> None:
    """Caches of float32, of the two half-precision types, which the same code reads, and of 8 bits.

    What two processes do at the same time has few kernels in common: other types, other maskers.
    """
    dtypes = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_kernels, dtypes * 2, (0, 1) * len(dtypes)))


if __name__ == "__main__":
    main()
