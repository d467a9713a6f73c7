"""The code blocks of the documentation that need a server, run as written."""

import pytest

from tests.documentation import Block, documented_blocks
from tests.e2e.conftest import ENVIRONMENT

BLOCKS = [block for block in documented_blocks() if block.needs_a_server]


@pytest.mark.parametrize("block", [pytest.param(block, id=block.place) for block in BLOCKS])
def test_python_with_a_server(
    block: Block, sparse, model_path: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", sparse.server.base_url)
    # For the block that starts a server of its own.
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    block.run_python(model_path)
    assert capsys.readouterr().out.strip()
