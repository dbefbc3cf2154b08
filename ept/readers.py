"""Which modules read a child's ``weight`` themselves, so that an adapter around the child would silently do nothing.

Fused kernels take the weights of several linears at once (Mamba's ``out_proj``, ``nn.MultiheadAttention``, a loss that
takes the head's weight). The source of ``forward`` tells: the module's methods that it calls, and functions that get
the module or a child. ``self.fc.weight.dtype`` and the like read no values and do not count, nor does a branch that the
module's settings rule out.
"""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType, MethodType
from typing import Any

from torch import nn

#: Names of submodules from a module down to the one that is read; "*" is any member of a container.
Path = tuple[str, ...]

_HARMLESS_ATTRIBUTES = {
    "dtype",
    "device",
    "shape",
    "ndim",
    "dim",
    "size",
    "numel",
    "requires_grad",
    "is_cuda",
    "is_meta",
}
_HARMLESS_FUNCTIONS = {"isinstance", "hasattr", "type", "id", "print"}
_HARMLESS_METHODS = {"to", "type_as"}  # of another tensor: x.to(weight)
_UNKNOWN = object()
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_ITERATORS = {"enumerate", "reversed", "list", "tuple", "iter"}

#: Its fast path reads weights too, but asks first whether anybody has hooked them, as every layer here is.
_ASKS_FOR_HOOKS = "torch.nn.modules.transformer"


@dataclass(frozen=True)
class Reads:
    """Submodules whose ``weight`` a forward pass reads itself.

    Attributes:
        always: refused as targets. perhaps: also called by the other branch of an ``if`` on an argument.
    """

    always: frozenset[Path] = frozenset()
    perhaps: frozenset[Path] = frozenset()


def find_reader(model: nn.Module, name: str) -> tuple[str, bool] | None:
    """Who around the module ``name`` of ``model`` reads its weight, for a message, and whether that is certain."""
    parts = tuple(name.split("."))
    found = None
    for depth in range(len(parts)):
        path = ".".join(parts[:depth])
        module = model.get_submodule(path)
        reads, inner = weights_read_by(module), parts[depth:]
        for certain, paths in ((True, reads.always), (False, reads.perhaps)):
            if any(_fits(read, inner) for read in paths):
                found = f"{type(module).__name__} ({path or 'the model'})", certain
                if certain:
                    return found
    return found


def weights_read_by(module: nn.Module) -> Reads:
    """What the forward pass of ``module`` reads, with the settings that the module has."""
    own = module.__dict__.get("forward")  # as patched on this one
    own = inspect.unwrap(own) if callable(own) else None
    own = own.__func__ if isinstance(own, MethodType) else own
    kind: Any = type(module)
    reads = _read_by_class(kind)
    if (reads.always or reads.perhaps) and inspect.isfunction(type(module).forward):
        reads = _Search(type(module), module).run(kind.forward)
    if isinstance(own, FunctionType):
        more = _Search(type(module), module).run(own)
        reads = Reads(reads.always | more.always, reads.perhaps | more.perhaps)
    return reads


def _fits(read: Path, parts: Path) -> bool:
    return len(read) == len(parts) and all(step in ("*", part) for step, part in zip(read, parts, strict=True))


@lru_cache(maxsize=1024)
def _read_by_class(kind: type[nn.Module]) -> Reads:
    forward = kind.forward
    return _Search(kind, None).run(forward) if inspect.isfunction(forward) else Reads()


@lru_cache(maxsize=4096)
def _parse(function: FunctionType) -> ast.FunctionDef | None:
    """The syntax tree of a function, every node with its ``parent``; None where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    if not isinstance(tree, ast.FunctionDef):
        return None
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]
    return tree


class _Search:
    """All reads of a class, through the methods and functions that its forward pass may run."""

    def __init__(self, kind: type[nn.Module], module: nn.Module | None) -> None:
        self.kind, self.module = kind, module
        self.always: set[Path] = set()
        self.perhaps: set[Path] = set()
        self._seen: set[tuple[FunctionType, tuple[tuple[str, Path], ...]]] = set()

    def run(self, forward: FunctionType) -> Reads:
        self.enter(forward, [()], {})
        return Reads(frozenset(self.always), frozenset(self.perhaps - self.always))

    def enter(self, function: Any, arguments: list[Path | None], keywords: dict[str, Path | None]) -> None:
        """Read a function that gets submodules, or the module itself (an empty path), as arguments."""
        function = inspect.unwrap(function)
        if not isinstance(function, FunctionType) or function.__module__ == _ASKS_FOR_HOOKS:
            return
        tree = _parse(function)
        if tree is None:
            return
        names = [argument.arg for argument in (*tree.args.posonlyargs, *tree.args.args)]
        given = {**dict(zip(names, arguments, strict=False)), **keywords}
        paths = {name: path for name, path in given.items() if path is not None}
        key = (function, tuple(sorted(paths.items())))
        if key not in self._seen:
            self._seen.add(key)
            _Reader(self, function, paths).visit(tree)

    def method(self, name: str, after: FunctionType | None = None) -> Any:
        """A method of the class, or the one that ``super()`` means in the function ``after``."""
        kinds = self.kind.__mro__
        if after is not None:
            owner = after.__qualname__.rpartition(".")[0]
            places = [place for place, kind in enumerate(kinds) if kind.__qualname__ == owner]
            kinds = kinds[places[0] + 1 :] if places else ()
        found = next((kind.__dict__[name] for kind in kinds if name in kind.__dict__), None)
        if isinstance(found, property):
            return found.fget
        return found if callable(found) else None


class _Reader(ast.NodeVisitor):
    """One function: which local names are submodules, and where their weights are read."""

    def __init__(self, search: _Search, function: FunctionType, paths: dict[str, Path]) -> None:
        self.search, self.function, self.paths = search, function, paths

    def path(self, node: ast.AST) -> Path | None:
        """The submodule that an expression is, as far as its form tells."""
        if isinstance(node, ast.Name):
            return self.paths.get(node.id)
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            base = self.path(node.value)
            return None if base is None else (*base, node.attr if isinstance(node, ast.Attribute) else _index(node))
        return None

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self.path(node.value)
        if owner == ():
            method = self.search.method(node.attr)
            if method is not None:
                self.search.enter(method, [()], {})
        elif owner and node.attr == "weight" and isinstance(node.ctx, ast.Load) and not _is_harmless(node):
            (self.search.perhaps if self._has_called_instead(node, owner) else self.search.always).add(owner)
        if _is_super(node.value):
            self.search.enter(self.search.method(node.attr, self.function), [()], {})
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        arguments = [self.path(argument) for argument in node.args]
        keywords = {word.arg: self.path(word.value) for word in node.keywords if word.arg}
        if any(path is not None for path in (*arguments, *keywords.values())):
            if isinstance(node.func, ast.Name):
                self.search.enter(self.function.__globals__.get(node.func.id), arguments, keywords)
            elif isinstance(node.func, ast.Attribute) and self.path(node.func.value) == ():
                self.search.enter(self.search.method(node.func.attr), [(), *arguments], keywords)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._bind(target, node.value)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._bind_members(node.target, node.iter)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        verdict = self._value(node.test)
        if verdict is _UNKNOWN:
            self.generic_visit(node)
            return
        for statement in node.body if verdict else node.orelse:
            self.visit(statement)

    def _visit_with_generators(self, node: Any) -> None:
        for generator in node.generators:
            self._bind_members(generator.target, generator.iter)
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _visit_with_generators

    def _value(self, node: ast.AST) -> Any:
        """What a condition on the module's settings comes to; ``training`` is none."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            value = self._value(node.operand)
            return value if value is _UNKNOWN else not value
        if isinstance(node, ast.BoolOp):
            values, decisive = [self._value(value) for value in node.values], isinstance(node.op, ast.Or)
            if any(value is not _UNKNOWN and bool(value) is decisive for value in values):
                return decisive
            return _UNKNOWN if _UNKNOWN in values else not decisive
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
            left, right = self._value(node.left), self._value(node.comparators[0])
            unknown = left is _UNKNOWN or right is _UNKNOWN
            return _UNKNOWN if unknown else _COMPARISONS[type(node.ops[0])](left, right)
        path = self.path(node)
        if not path or self.search.module is None or "training" in path or "*" in path:
            return _UNKNOWN
        value = self.search.module
        for step in path:
            value = getattr(value, step, _UNKNOWN)
        return value if value is None or isinstance(value, (bool, int, float, str)) else _UNKNOWN

    def _has_called_instead(self, node: ast.AST, owner: Path) -> bool:
        """Whether an ``if`` on arguments alone decides between this read of ``owner`` and a call of it."""
        while (parent := getattr(node, "parent", None)) is not None:
            if isinstance(parent, ast.If) and node is not parent.test:
                other = _otherwise(parent) if node in parent.body else parent.body
                names = {name.id for name in ast.walk(parent.test) if isinstance(name, ast.Name)}
                calls = (call for branch in other for call in ast.walk(branch) if isinstance(call, ast.Call))
                if not names & self.paths.keys() and any(self.path(call.func) == owner for call in calls):
                    return True
            node = parent
        return False

    def _bind(self, target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, other in zip(target.elts, value.elts, strict=True):
                self._bind(one, other)
        elif isinstance(target, ast.Name):
            path = self.path(value)
            if path is not None:
                self.paths[target.id] = path

    def _bind_members(self, target: ast.AST, iterable: ast.AST) -> None:
        """Names that run over the members of a container: ``for i, layer in enumerate(self.layers[:n])``."""
        for name, values in _members(target, iterable):
            while isinstance(values, ast.Subscript) and isinstance(values.slice, ast.Slice):
                values = values.value
            path = self.path(values)
            if path is not None and isinstance(name, ast.Name):
                self.paths[name.id] = (*path, "*")


def _members(target: ast.AST, iterable: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Targets of a loop, each with what it runs over."""
    if isinstance(iterable, ast.Call) and isinstance(iterable.func, ast.Name) and iterable.args:
        name = iterable.func.id
        if name == "zip" and isinstance(target, ast.Tuple):
            yield from zip(target.elts, iterable.args, strict=False)
            return
        if name in _ITERATORS:
            inner = target.elts[-1] if name == "enumerate" and isinstance(target, ast.Tuple) else target
            yield from _members(inner, iterable.args[0])
            return
    yield target, iterable


def _otherwise(node: Any) -> list[ast.stmt]:
    """What runs where the condition of an ``if`` does not hold."""
    if node.orelse or not isinstance(node.body[-1], ast.Return):
        return node.orelse
    blocks = [getattr(node.parent, field, None) for field in ("body", "orelse")]
    block = next((block for block in blocks if isinstance(block, list) and node in block), [node])
    return block[block.index(node) + 1 :]


def _index(node: ast.Subscript) -> str:
    """The name of a container's member, where it is written out."""
    return str(node.slice.value) if isinstance(node.slice, ast.Constant) else "*"


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _is_harmless(node: ast.Attribute) -> bool:
    """Whether what surrounds ``child.weight`` reads none of its values."""
    parent: Any = node.parent  # type: ignore[attr-defined]
    if isinstance(parent, ast.Attribute):
        return parent.attr in _HARMLESS_ATTRIBUTES
    if isinstance(parent, ast.Compare):
        return all(isinstance(operator, (ast.Is, ast.IsNot)) for operator in parent.ops)
    if isinstance(parent, ast.Call):
        function = parent.func
        if isinstance(function, ast.Name):
            return function.id in _HARMLESS_FUNCTIONS
        return isinstance(function, ast.Attribute) and function.attr in _HARMLESS_METHODS
    return False
