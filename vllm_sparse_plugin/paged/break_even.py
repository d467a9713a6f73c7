"""From how many keys on maskers are worth their cost on this machine: measured once, and kept.

It is measured in a process of its own: whoever asks serves requests, and must not start kernels'
threads. This module imports no kernels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from sparse_attention_hub.sparse_attention.research_attention import ResearchAttentionConfig
from sparse_attention_hub.sparse_attention.serialization import config_to_json
from vllm_sparse_plugin.trial import AttentionShape

logger = logging.getLogger(__name__)

NEVER = 1 << 30
"""More keys than any model takes: maskers never pay."""
_VERSION = 4
"""Of the kernels: raised when what was measured before no longer holds."""


def break_even_of(
    config: ResearchAttentionConfig,
    shape: AttentionShape,
    block_size: int,
    dtype: torch.dtype,
    imports: Sequence[str] = (),
) -> int:
    """Keys that a query must see for maskers to cost less than dense attention.

    Args:
        config: The maskers; the list of most layers decides.
        shape: Of the model's attention.
        block_size: Tokens of a block.
        dtype: Of the cache.
        imports: Modules that register the maskers, see `ServingConfig.imports`.

    Returns:
        0 when the general path serves them (whoever asks for such maskers wants to see them run),
        or when it could not be measured; the log says so.
    """
    measured = {
        "config": config_to_json(config),
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_size": shape.head_size,
        "block_size": block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "imports": list(imports),
    }
    file = _cache_file(measured)
    if file.exists():
        known: int = json.loads(file.read_text())["keys"]
        _say(known)
        return known
    logger.info("sparse attention: measuring from how many keys on maskers pay (once per machine)")
    process = subprocess.run(
        [sys.executable, "-m", "vllm_sparse_plugin.paged.measure_break_even"],
        input=json.dumps(measured),
        capture_output=True,
        text=True,
    )
    if process.returncode != 0:
        logger.warning("sparse attention: break-even not measured: %s", process.stderr[-2000:])
        return 0
    keys = int(process.stdout.splitlines()[-1])
    _say(keys)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps({**measured, "keys": keys}))
        unfinished.replace(file)
    except OSError as error:
        logger.warning("sparse attention: cannot keep the measured break-even: %s", error)
    return keys


def _say(keys: int) -> None:
    if keys >= NEVER:
        logger.warning(
            "sparse attention: on this machine the server's maskers never cost less than dense "
            "attention: every query of requests without maskers of their own is dense (see "
            "min_sparse_keys)"
        )
    else:
        logger.info("sparse attention: queries that see fewer than %d keys are dense", keys)


def _cache_file(measured: dict[str, object]) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    threads = os.environ.get("OMP_NUM_THREADS") or os.cpu_count()
    text = json.dumps([_VERSION, measured, platform.node(), threads], sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return folder / "vllm_sparse_plugin" / f"break_even_{name}.json"
