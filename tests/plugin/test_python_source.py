"""The reader of sources finds what is there, and objects to what is not."""

import ast

import pytest

from tests.plugin.python_source import Function, Sources, objections_to_call, parameters

FILES = {
    "lib/__init__.py": "from .shapes import Square as Box\nif TYPE_CHECKING:\n    size: int\n",
    "lib/shapes/__init__.py": "from lib.shapes.base import *\nfrom .square import Square\n",
    "lib/shapes/base.py": "class Shape(ABC):\n    name: str\n    def area(self, unit=None): ...\n",
    "lib/shapes/square.py": (
        "from .base import Shape\n"
        "class Square(Shape, Generic[T]):\n"
        "    sides = 4\n"
        "    def __init__(self, side):\n"
        "        self.side: int = side\n"
        "def measure(shape, unit, *, precise, rounded=False): ...\n"
    ),
}


@pytest.fixture
def sources() -> Sources:
    return Sources(FILES.get, "lib")


def test_names_are_followed_to_their_definition(sources: Sources) -> None:
    found = sources.find("lib", "Box")
    assert found is not None
    assert found.module == "lib.shapes.square"
    assert sources.find("lib", "size") is not None
    assert sources.find("lib.shapes", "base") is not None  # a module
    assert sources.find("lib", "Square") is None
    assert sources.find("lib.absent", "Square") is None


def test_members_are_own_inherited_or_set_by_methods(sources: Sources) -> None:
    found = sources.find("lib", "Box")
    assert found is not None
    square = sources.members(found)
    assert all(square.get(name) for name in ("sides", "side", "name", "area"))
    assert square.get("corners") is None
    assert list(square.base_names()) == ["Shape"]
    assert square.fields() == ["name"]


@pytest.mark.parametrize(
    ("call", "objection"),
    [
        ("shape, unit, *, precise", None),
        ("shape, *, unit, precise, rounded", None),
        ("...", None),
        ("shape, unit", "requires precise"),
        ("unit, shape, *, precise", "is called with"),
        ("shape, unit, *, precise, coarse", "takes no coarse"),
    ],
)
def test_calls_that_do_not_fit_are_objected_to(
    sources: Sources, call: str, objection: str | None
) -> None:
    found = sources.find("lib.shapes.square", "measure")
    assert found is not None
    assert isinstance(found.node, Function)
    objections = objections_to_call(found.node, call)
    assert (objection is None) == (not objections)
    assert objection is None or objection in objections[0]


def test_parameters_with_defaults_are_not_required() -> None:
    (function,) = ast.parse("def f(a, b=1, *c, d, e=2, **f): ...").body
    assert isinstance(function, Function)
    required = {parameter.name: parameter.is_required for parameter in parameters(function)}
    assert required == {"a": True, "b": False, "d": True, "e": False}
