"""The table of `vllm_symbols` holds in the sources of the installed vLLM and of a later release.

Nothing is imported: the later release has no CPU build, and its CUDA build loads on no CPU.
"""

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.documentation import REPOSITORY
from tests.plugin import vllm_cuda_symbols, vllm_symbols
from tests.plugin.python_source import (
    Found,
    Function,
    Members,
    Sources,
    objections_to_call,
    parameters,
)
from tests.plugin.remote_wheel import NoIndex, WheelSources

INSTALLED = "installed"
CACHE = REPOSITORY / ".cache" / "vllm-sources"


@pytest.fixture(scope="module", params=[INSTALLED, vllm_symbols.READ_RELEASE])
def sources(request: pytest.FixtureRequest) -> Sources:
    if request.param == INSTALLED:
        spec = importlib.util.find_spec("vllm")
        assert spec is not None
        root = Path(spec.origin or "").parent.parent
        return Sources(lambda path: _text(root / path), "vllm")
    wheel = WheelSources("vllm", request.param, CACHE)

    def read(path: str) -> str | None:
        try:
            return wheel.read(path)
        except NoIndex as reason:
            pytest.skip(f"vLLM {request.param} was not read: {reason}")

    return Sources(read, "vllm")


def _text(file: Path) -> str | None:
    return file.read_text() if file.is_file() else None


def entries(name: str) -> pytest.MarkDecorator:
    """Of both tables."""
    found = [
        (place, expected)
        for module in (vllm_symbols, vllm_cuda_symbols)
        for place, expected in getattr(module, name, {}).items()
    ]
    return pytest.mark.parametrize(("place", "expected"), found)


def find(sources: Sources, place: str) -> Found:
    """What a `module:name` of the table is."""
    module, _, name = place.partition(":")
    found = sources.find(module, name)
    assert found is not None, f"no {name} in {module}"
    return found


def members(sources: Sources, place: str) -> Members:
    return sources.members(find(sources, place))


def function(sources: Sources, place: str) -> Function:
    """What a `module:function` or `module:Class.method` of the table is."""
    owner, _, method = place.rpartition(".") if "." in place.partition(":")[2] else (place, "", "")
    node = members(sources, owner).get(method) if method else find(sources, owner).node
    assert isinstance(node, Function), f"{place} is no function"
    return node


@entries("NAMES")
def test_names(sources: Sources, place: str, expected: Any) -> None:
    missing = [name for name in expected if sources.find(place, name) is None]
    assert not missing


@entries("MEMBERS")
def test_members(sources: Sources, place: str, expected: Any) -> None:
    found = members(sources, place)
    assert not [name for name in expected if found.get(name) is None]


@entries("CALLED")
def test_called(sources: Sources, place: str, expected: Any) -> None:
    assert not objections_to_call(function(sources, place), expected)


@entries("REPLACED")
def test_replaced(sources: Sources, place: str, expected: Any) -> None:
    names = [parameter.name for parameter in parameters(function(sources, place))]
    assert ", ".join(names) == expected


@entries("BASES")
def test_bases(sources: Sources, place: str, expected: Any) -> None:
    assert expected in members(sources, place).base_names()


@entries("VALUES")
def test_values(sources: Sources, place: str, expected: Any) -> None:
    owner, _, name = place.rpartition(".")
    node = members(sources, owner).get(name)
    assert isinstance(node, ast.Assign | ast.AnnAssign)
    assert node.value is not None
    assert ast.unparse(node.value) == expected


@entries("PASSAGES")
def test_passages(sources: Sources, place: str, expected: Any) -> None:
    text = ast.unparse(function(sources, place))
    at = 0
    for passage in expected:
        at = text.find(passage, at)
        assert at >= 0, passage


def test_selector_asks_what_a_backend_validates(sources: Sources) -> None:
    asked = members(sources, "vllm.v1.attention.selector:AttentionSelectorConfig").fields()
    validate = "vllm.v1.attention.backend:AttentionBackend.validate_configuration"
    names = {parameter.name for parameter in parameters(function(sources, validate))}
    assert {"cls", "device_capability", *asked} == names


def imports_of_vllm(file: Path) -> list[tuple[str, str]]:
    """The (module, name) pairs that a file imports from vLLM; name "" for `import module`."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found += [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
    return [(module, name) for module, name in found if module.partition(".")[0] == "vllm"]


def test_every_import_of_the_plugin_is_in_the_table() -> None:
    imported = {
        (module, name)
        for file in sorted((REPOSITORY / "vllm_sparse_plugin").rglob("*.py"))
        for module, name in imports_of_vllm(file)
    }
    assert imported, "the plugin imports nothing?"
    known = {
        (module, name)
        for table in (vllm_symbols.NAMES, vllm_cuda_symbols.NAMES)
        for module, names in table.items()
        for name in names
    }
    assert not sorted(imported - known)
