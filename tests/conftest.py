"""What all tests share: the small real model, and a tiny one."""

import os
from pathlib import Path
from typing import Any

# Before torch and vLLM are imported: CI has two cores, and nothing may be downloaded.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
# By default each server's threads are bound to the same core.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
# By default threads that wait for work turn in circles, for milliseconds, also in servers and also
# when another process needs the core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from xdist.scheduler import LoadFileScheduling

from examples.small_model import ensure_small_model
from tests.e2e.tiny_models import write_tiny_model

ONE_SERVER = "tests/e2e/one_server/"


@pytest.fixture(scope="session")
def model_path() -> str:
    return str(ensure_small_model())


@pytest.fixture(scope="session")
def tiny_path(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of random weights that answers in milliseconds; it has no chat template."""
    return str(write_tiny_model("llama", tmp_path_factory.mktemp("models"), model_path))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first: a plain mistake should not wait behind a server's start.

    Then those of one server, which together take longest.
    """
    for item in items:
        if "e2e" in Path(item.fspath).parts:
            item.add_marker(pytest.mark.e2e)
    items.sort(
        key=lambda item: (
            item.get_closest_marker("e2e") is not None,
            not item.nodeid.startswith(ONE_SERVER),
        )
    )


class WholeFiles(LoadFileScheduling):
    """A process of tests gets whole files, and all those that ask one server."""

    def _split_scope(self, nodeid: str) -> str:
        return ONE_SERVER if nodeid.startswith(ONE_SERVER) else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> WholeFiles:
    return WholeFiles(config, log)
