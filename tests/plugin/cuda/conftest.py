"""Nothing is to be emulated where there is a GPU."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        for item in items:
            if "plugin/cuda" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="a GPU is there"))
