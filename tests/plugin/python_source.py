"""What Python source says about names, members and signatures, without importing it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Found:
    """A definition.

    Attributes:
        module: The module that holds it.
        node: What defines it; a module's tree for a module.
    """

    module: str
    node: ast.AST


class Sources:
    """Modules by name.

    Args:
        read: Gives a file's text by its path from the root of the packages; None: no such file.
        package: Imports from elsewhere are not followed.
    """

    def __init__(self, read: Callable[[str], str | None], package: str) -> None:
        self._read, self._package = read, package
        self._modules: dict[str, ast.Module | None] = {}
        self._is_package: set[str] = set()

    def module(self, name: str) -> ast.Module | None:
        """The tree of a module or package; None when there is none."""
        if name not in self._modules:
            path = name.replace(".", "/")
            text = self._read(f"{path}.py")
            if text is None:
                text = self._read(f"{path}/__init__.py")
                self._is_package.add(name)
            self._modules[name] = None if text is None else ast.parse(text)
        return self._modules[name]

    def find(self, module: str, name: str) -> Found | None:
        """What `from module import name` gives, wherever it comes from."""
        tree = self.module(module)
        if tree is None:
            return None
        for node in _statements(tree.body):
            if isinstance(node, ast.ClassDef | Function) and node.name == name:
                return Found(module, node)
            if isinstance(node, ast.Assign | ast.AnnAssign) and name in _assigned(node):
                return Found(module, node)
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        found = self._imported(module, node, alias.name)
                        if found is not None:
                            return found
        submodule = f"{module}.{name}"
        if module in self._is_package and (found_module := self.module(submodule)) is not None:
            return Found(submodule, found_module)
        return None

    def _imported(self, module: str, node: ast.ImportFrom, name: str) -> Found | None:
        base = node.module or ""
        if node.level:
            parts = module.split(".")
            kept = len(parts) - node.level + (module in self._is_package)
            base = ".".join([*parts[:kept], *([base] if base else [])])
        if base.partition(".")[0] != self._package:
            return Found(base, node)
        return self.find(base, name)

    def members(self, found: Found) -> Members:
        """The members of a class."""
        assert isinstance(found.node, ast.ClassDef), ast.unparse(found.node)
        return Members(self, found.module, found.node)


class Members:
    """What a class has, its own first, then what its bases inside the package have."""

    def __init__(self, sources: Sources, module: str, node: ast.ClassDef) -> None:
        self._sources, self._module, self._node = sources, module, node

    @cached_property
    def bases(self) -> tuple[Members, ...]:
        """The direct base classes that are in the package."""
        found = []
        for base in self._node.bases:
            name = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(name, ast.Name):
                place = self._sources.find(self._module, name.id)
                if place is not None and isinstance(place.node, ast.ClassDef):
                    found.append(Members(self._sources, place.module, place.node))
        return tuple(found)

    def base_names(self) -> Iterator[str]:
        """Of all bases, direct and not."""
        for base in self.bases:
            yield base._node.name
            yield from base.base_names()

    def get(self, name: str) -> ast.AST | None:
        """What defines a member; for one that only methods set, the statement that does."""
        for node in _statements(self._node.body):
            if isinstance(node, Function) and node.name == name:
                return node
            if isinstance(node, ast.Assign | ast.AnnAssign) and name in _assigned(node):
                return node
        for node in ast.walk(self._node):
            if isinstance(node, ast.Assign | ast.AnnAssign) and f"self.{name}" in _assigned(node):
                return node
        return next((found for base in self.bases if (found := base.get(name)) is not None), None)

    def fields(self) -> list[str]:
        """The names of annotated class variables: the fields of a dataclass or named tuple."""
        inherited = [name for base in self.bases for name in base.fields()]
        own = [
            name
            for node in _statements(self._node.body)
            if isinstance(node, ast.AnnAssign)
            for name in _assigned(node)
        ]
        return [*inherited, *own]


@dataclass(frozen=True)
class Parameter:
    """Of a function."""

    name: str
    is_required: bool


def parameters(function: Function) -> list[Parameter]:
    """In order, without `*args` and `**kwargs`."""
    positional = [*function.args.posonlyargs, *function.args.args]
    first_default = len(positional) - len(function.args.defaults)
    return [
        *(Parameter(a.arg, place < first_default) for place, a in enumerate(positional)),
        *(
            Parameter(a.arg, default is None)
            for a, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
        ),
    ]


def objections_to_call(function: Function, call: str) -> list[str]:
    """Why a call does not fit.

    Args:
        function: What is called; `self` or `cls` are bound.
        call: Names of what is passed by position, in order; after a `*`, of what is passed by
            name; a final `...` says that the caller hands over what else it got.
    """
    words = [word.strip() for word in call.split(",") if word.strip()]
    hands_over = words[-1:] == ["..."]
    words = words[:-1] if hands_over else words
    split = words.index("*") if "*" in words else len(words)
    by_position, by_name = words[:split], words[split + 1 :]
    known = parameters(function)
    if known and known[0].name in ("self", "cls"):
        known = known[1:]
    names = [parameter.name for parameter in known]
    objections = []
    if names[: len(by_position)] != by_position:
        objections.append(f"takes ({', '.join(names)}), is called with ({call})")
    if function.args.kwarg is None:
        objections += [f"takes no {name}" for name in by_name if name not in names]
    if not hands_over:
        objections += [
            f"requires {parameter.name}, which is not passed"
            for parameter in known
            if parameter.is_required and parameter.name not in (*by_position, *by_name)
        ]
    return objections


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a body, and of the branches in it."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            yield from _statements([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            handled = [inner for handler in node.handlers for inner in handler.body]
            yield from _statements([*node.body, *handled, *node.orelse, *node.finalbody])


def _assigned(node: ast.Assign | ast.AnnAssign) -> list[str]:
    """The names that a statement gives a value or a type, as written (`x`, `self.x`)."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    flat = [
        inner
        for target in targets
        for inner in (target.elts if isinstance(target, ast.Tuple) else [target])
    ]
    return [ast.unparse(target) for target in flat]
