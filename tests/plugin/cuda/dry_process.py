"""Processes that believe in a GPU that is not there: one imports what engines need, others are its
forks.

Importing takes far longer than most of the engines here.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from tests.plugin.cuda.dry_cuda import install

_MODE: Any = install()
_MODE.__enter__()
for _name in (
    "tests.plugin.cuda.engines",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.model_executor.models.llama",
    "vllm_sparse_plugin.device_backend",
):
    importlib.import_module(_name)


def run_job(job: Path, result: Path, output: Path, variables: dict[str, str]) -> None:
    """Runs engines; see `tests.plugin.cuda.engines`.

    Args:
        job: Its file.
        result: Likewise.
        output: Gets what is printed.
        variables: Of its environment.
    """
    from tests.plugin.cuda import engines

    sys.stdout.flush()
    with open(output, "w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ.update(variables)
    engines.main(job, result)
