"""Small decode steps of every masker, compared with the reference: to run under a checking tool.

They launch all kernels.

compute-sanitizer --tool memcheck python -m benchmarks.gpu.small_cases memcheck --output FOLDER
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.command import run_stage
from benchmarks.gpu.device_step import DeviceStep, relative_error
from benchmarks.gpu.sparse_configs import (
    QUEST_10,
    TOKENS_10,
    Maskers,
    quest,
    sink_and_window,
    sparse_cases,
)
from sparse_attention_hub.sparse_attention.utils.hashattention_utils import save_hat_weights
from vllm_sparse_plugin.paged.layout import BlockShape
from vllm_sparse_plugin.paged.triton_kernels import row_selection

logger = logging.getLogger(__name__)
TOOLS = ("plain", "memcheck", "racecheck")
KEYS = 300
MANY_KEYS = row_selection.MOST_NUMBERS + 100
"""So many scores are selected from by several programs, not by one."""
MANY_SEQUENCES = 17
"""But not where there are so many: their query heads are more rows than are split."""
_SEVERAL = 0.4
"""Of the keys: a few pages."""
_HASH_BITS = 32
_SAMPLE = {"type": "random_sampling", "sampling_rate": 0.1, "seed": 3}
_ORACLE = {"type": "oracle_top_k", "heavy_size": 0.05}
_BY_GROUP = {"head_granularity": "kv_head"}


def small_cases(folder: Path, shape: BlockShape, keys: int) -> dict[str, Maskers]:
    """Masker lists by name.

    Args:
        folder: For files of maskers.
        shape: Of the layer.
        keys: That they are applied to.
    """
    sizes = keys, folder, shape.num_kv_heads, shape.head_size
    of_steps = sparse_cases(*sizes)
    # 10 % of so few keys are the one page that 5 % are.
    cases = {case.name: case.maskers for case in of_steps if not case.name.startswith(QUEST_10)}
    cases["Quest, several pages"] = quest(keys, _SEVERAL)
    cases["Quest, several pages, per query head"] = quest(keys, _SEVERAL, "query_head")
    fixed = sink_and_window(keys)
    cases["random sample"] = [*fixed, _SAMPLE]
    cases["oracle top-p"] = [*fixed, {"type": "oracle_top_p", "top_p": 0.7}]
    cases["MagicPIG"] = [*fixed, {"type": "magic_pig", "lsh_l": 12, "lsh_k": 4}]
    hashes = {
        "type": "hash_attention_top_k",
        "heavy_size": 0.1,
        "hat_bits": _HASH_BITS,
        "hat_mlp_layers": 2,
        "hat_mlp_hidden_size": shape.head_size,
        "hat_mlp_activation": "relu",
        "hat_weight_file": _hash_weights(folder, shape),
    }
    cases["HashAttention"] = [*fixed, hashes]
    of_groups = {**_SAMPLE, **_BY_GROUP}
    cases["oracle per query head, a sample per KV head"] = [*fixed, _ORACLE, of_groups]
    return cases


def _hash_weights(folder: Path, shape: BlockShape) -> str:
    """A file of networks of the first layer, of small integers: few sums depend on their order."""
    generator = torch.Generator().manual_seed(5)

    def numbers(*size: int) -> torch.Tensor:
        return torch.randint(-1, 2, size, generator=generator).float()

    layer = {}
    for side, heads in (("query", shape.num_heads), ("key", shape.num_kv_heads)):
        sizes = [(shape.head_size, shape.head_size), (shape.head_size, _HASH_BITS)]
        layer[f"{side}_matrix"] = [numbers(heads, *size) for size in sizes]
        layer[f"{side}_bias"] = [numbers(heads, size[1]) for size in sizes]
    path = folder / "hashes.safetensors"
    save_hat_weights({0: layer}, path)
    return str(path)


def cases_of_many(folder: Path, shape: BlockShape, keys: int) -> dict[str, Maskers]:
    """Masker lists by name that select from many keys in other ways than from a few.

    Args:
        folder: For files of maskers.
        shape: Of the layer.
        keys: That they are applied to.
    """
    fixed = sink_and_window(keys)
    of_groups = {**_ORACLE, **_BY_GROUP}
    of_all = sparse_cases(keys, folder, shape.num_kv_heads, shape.head_size)
    return {
        "oracle top-k of many, and a sample": [*fixed, _ORACLE, _SAMPLE],
        "oracle top-k of many, per KV head": [*fixed, of_groups],
        "oracle top-k of many, per KV head, and a sample": [*fixed, of_groups, _SAMPLE],
        "Double Sparsity of many": next(case.maskers for case in of_all if case.name == TOKENS_10),
    }


def measure(
    device: torch.device,
    only: int | None = None,
    keys: int = KEYS,
    many_keys: int = MANY_KEYS,
    many_sequences: int = MANY_SEQUENCES,
) -> dict[str, Any]:
    """Runs and compares all of them.

    Args:
        device: Of the kernels.
        only: So many of them; None: all.
        keys: Of the sequences of `small_cases`.
        many_keys: Of that of `cases_of_many`, and of many sequences.
        many_sequences: How many those are.
    """
    is_gpu = device.type == "cuda"
    shape = (
        BlockShape(16, 8, 2, 64, torch.bfloat16)
        if is_gpu
        else BlockShape(16, 4, 2, 16, torch.float32)
    )
    tolerance = 0.03 if is_gpu else 1e-4
    records: list[dict[str, Any]] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        cases = [
            (case, maskers, count, number)
            for made, count, number in ((small_cases, 2, keys), (cases_of_many, 1, many_keys))
            for case, maskers in made(Path(name), shape, number).items()
        ]
        of_many = [*sink_and_window(many_keys), _ORACLE]
        cases.append(("oracle top-k of many, for many", of_many, many_sequences, many_keys))
        for case, maskers, count, number in cases[:only]:
            step = DeviceStep.of(maskers, shape, count, number, 1, device)
            error = relative_error(step)
            records.append({"name": case, "keys": number, "relative_error": error})
            logger.info("%s, %d keys: relative error %.5f", case, number, error)
            if not error < tolerance:
                failures.append(f"{case}, {number} keys: its output is off by {error:.4f}")
    return {"records": records, "failures": failures}


@torch.inference_mode()
def stage(device: str, is_quick: bool, variant: str) -> dict[str, Any]:
    """The stage's result; see `command.run_stage`."""
    return measure(torch.device(device), only=2 if device == "cpu" else 4 if is_quick else None)


if __name__ == "__main__":
    run_stage("small", __doc__ or "", stage, TOOLS)
