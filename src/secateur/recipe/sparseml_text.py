"""SparseML's dialect as a list of modifiers: YAML with tags, front matter in Markdown, stages, ``eval(...)``."""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import yaml

from secateur.errors import BadInput

from .load import LARGEST, Loader, parse

DEEPEST, MOST_NODES, LONGEST_SCALAR = 40, 100_000, 10_000
LONGEST_EXPRESSION, LARGEST_NUMBER = 200, 1e12

Number = int | float


@dataclass(frozen=True, eq=False)
class Modifier:
    """One entry of a recipe: its class in SparseML, its settings, and the stage it stands in.

    ``newer`` is the form of SparseML's last versions, where the class is a key and not a tag; some settings have other names
    there, and some mean something else.
    """

    kind: str
    settings: Mapping[str, Any]
    stage: str | None = None
    newer: bool = False

    def __str__(self) -> str:
        return self.kind if self.stage is None else f"{self.kind} in {self.stage}"

    def get(self, *names: str) -> Any:
        """The first of the settings that is there, or ``None``: the newer form has other names for some."""
        return next((self.settings[n] for n in names if self.settings.get(n) is not None), None)

    def number(self, *names: str, least: float = -1.0) -> float:
        """A setting that has to be a number.

        Raises:
            BadInput: it is missing, is none, or is below ``least``.
        """
        value = self.get(*names)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= LARGEST_NUMBER:
            found = "it is missing" if value is None else f"got {short(value)}"
            raise BadInput(f"{self}: {names[0]} is a number, {least:g} or more; {found}.")
        return float(value)


class _Dialect(Loader):
    """Tags become `Modifier`s, whatever their name. Aliases are read where they stand for a value or a list of values.

    SparseML's older recipes name each variable with an anchor. An alias of a list may not hold another, so that what is
    read stays of the size of what was written.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = self._nodes = 0
        self._whole: set[int] = set()

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As the base does, within the limits on depth, size and aliases."""
        line = self.peek_event().start_mark.line + 1
        self._depth += 1
        if self._depth > DEEPEST:
            raise BadInput(f"line {line}: more than {DEEPEST} levels of lists and mappings.")
        if self.check_event(yaml.AliasEvent):
            node = self._aliased(line)
        else:
            node = super().compose_node(parent, index)
        self._depth -= 1
        self._whole.add(id(node))
        self._nodes += len(node.value) if isinstance(node, yaml.SequenceNode) else 1
        if self._nodes > MOST_NODES:
            raise BadInput(f"line {line}: more than {MOST_NODES} values.")
        if isinstance(node, yaml.ScalarNode) and len(node.value) > LONGEST_SCALAR:
            raise BadInput(f"line {line}: a value of {len(node.value)} characters.")
        return node

    def _aliased(self, line: int) -> yaml.Node:
        name = self.get_event().anchor
        node = self.anchors.get(name)
        if node is None:
            raise BadInput(f"line {line}: *{name} is used, and &{name} is nowhere before it.")
        inner = node.value if isinstance(node, yaml.SequenceNode) and id(node) in self._whole else [node]
        if not all(isinstance(n, yaml.ScalarNode) for n in inner):
            raise BadInput(
                f"line {line}: an alias (*name) stands for a value or a list of values; write the rest again."
            )
        return node


def _construct(loader: _Dialect, suffix: str, node: yaml.Node) -> Modifier:
    kind = suffix.rstrip(":").rpartition(".")[2]  # "!pytorch.GMPruningModifier" is the same class
    if isinstance(node, yaml.MappingNode):
        return Modifier(kind, loader.construct_mapping(node, deep=True))
    if isinstance(node, yaml.ScalarNode) and not node.value:
        return Modifier(kind, {})
    raise BadInput(f"line {node.start_mark.line + 1}: !{suffix} should be followed by settings.")


_Dialect.add_multi_constructor("!", _construct)


def read(text: str, where: str) -> list[Modifier]:
    """The modifiers of a recipe in their order, with every ``eval(...)`` replaced by its value.

    Args:
        text: YAML, or Markdown with YAML between two lines ``---``.
        where: what errors call it.

    Raises:
        BadInput: not such a text, too large or too deep, or an expression that is more than arithmetic.
    """
    if len(text.encode("utf-8", "replace")) > LARGEST:
        raise BadInput(f"{where} is larger than {LARGEST} bytes.")
    found = parse(_front_matter(text), where, _Dialect)
    try:
        return list(_modifiers(found))
    except BadInput as e:
        raise BadInput(f"{where}, {e}") from None


def _front_matter(text: str) -> str:
    """What stands between the first two lines ``---``, at its line numbers; all of it where there are not two."""
    lines = text.splitlines()
    marks = [i for i, line in enumerate(lines) if line.rstrip() == "---"]
    if len(marks) < 2:
        return text
    return "\n" * (marks[0] + 1) + "\n".join(lines[marks[0] + 1 : marks[1]])


def _modifiers(container: Mapping[Any, Any]) -> Iterator[Modifier]:
    stages = {k: v for k, v in container.items() if isinstance(v, dict) and any("modifiers" in str(n) for n in v)}
    common = {k: v for k, v in container.items() if k not in stages}
    yield from _grouped(common, _Variables(common), None)
    for name, stage in stages.items():
        yield from _grouped(stage, _Variables({**common, **stage}), str(name))


def _grouped(container: Mapping[Any, Any], variables: _Variables, stage: str | None) -> Iterator[Modifier]:
    """The modifiers of one container: a tagged value, or a list or mapping of them under a name with "modifiers"."""
    for name, value in container.items():
        if isinstance(value, Modifier):
            group: list[Any] = [value]
        elif "modifiers" not in str(name) or value is None:
            continue
        else:
            group = value if isinstance(value, list) else [value]
        for entry in group:
            for m in _named(entry, str(name)):
                yield replace(m, settings=variables.filled(m.settings), stage=stage)


def _named(entry: Any, group: str) -> Iterator[Modifier]:
    if isinstance(entry, Modifier):
        yield entry
        return
    if not isinstance(entry, dict) or not all(isinstance(v, dict) or v is None for v in entry.values()):
        raise BadInput(f"{group}: a modifier has a class and settings, as !GMPruningModifier; got {short(entry)}.")
    yield from (Modifier(str(kind), settings or {}, newer=True) for kind, settings in entry.items())


def short(value: Any) -> str:
    """A value of a file, as messages show it."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 60 else f"{text[:60]} …"


class _Variables:
    """The variables of a recipe, each evaluated once, when it is asked for."""

    def __init__(self, raw: Mapping[Any, Any]) -> None:
        self._raw = raw
        self._known: dict[str, Any] = {}
        self._open: list[str] = []

    def filled(self, value: Any) -> Any:
        """A value with every ``eval(...)`` inside it replaced."""
        if isinstance(value, Mapping):
            return {k: self.filled(v) for k, v in value.items()}
        if isinstance(value, list):
            return [self.filled(v) for v in value]
        if isinstance(value, str) and value.startswith("eval(") and value.endswith(")"):
            return self._evaluated(value[5:-1].strip())
        return value

    def _evaluated(self, expression: str) -> Any:
        if expression in self._raw:  # a variable by itself may be a text or a list
            return self._variable(expression)
        try:
            if len(expression) > LONGEST_EXPRESSION:
                raise BadInput(f"it has more than {LONGEST_EXPRESSION} characters")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what Python thinks of "1if x else 2" is no concern of the user's
                tree = ast.parse(expression, mode="eval")
            return self._number(tree.body)
        except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
            raise BadInput(f"eval({short(expression)}) cannot be evaluated: {e}.") from None

    def _variable(self, name: str) -> Any:
        if name not in self._known:
            if name in self._open or len(self._open) > DEEPEST:
                raise BadInput(f"{' -> '.join([*self._open[-5:], name])} goes in a circle, or too deep")
            if name not in self._raw:
                raise BadInput(f"there is no variable {name!r}")
            self._open.append(name)
            self._known[name] = self.filled(self._raw[name])
            self._open.pop()
        return self._known[name]

    def _number(self, node: ast.expr) -> Number:
        """The value of an expression of numbers, variables and arithmetic; everything else is refused."""
        if isinstance(node, ast.Constant):
            found: Any = node.value
        elif isinstance(node, ast.Name):
            found = self._variable(node.id)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            inner = self._number(node.operand)
            found = -inner if isinstance(node.op, ast.USub) else inner
        elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            found = _OPERATORS[type(node.op)](self._number(node.left), self._number(node.right))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
            found = _called(node.func.id, [self._number(a) for a in node.args], bool(node.keywords))
        else:
            raise BadInput(
                f"{ast.unparse(node)[:60]} is more than numbers, variables of the recipe, + - * / // % ** and "
                f"{', '.join(_FUNCTIONS)}"
            )
        return _checked(found)


def _called(name: str, values: list[Number], keywords: bool) -> Any:
    several = name in ("min", "max")
    if not values or keywords or (len(values) > 1 and not several):
        raise BadInput(f"{name} takes {'numbers' if several else 'one number'}")
    return _FUNCTIONS[name](values if several else values[0])


def _checked(value: Any) -> Number:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadInput(f"{short(value)} is not a number")
    if not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
        raise BadInput(f"a number beyond {LARGEST_NUMBER:g}")
    return value


def _guarded(of: Callable[[Any, Any], Any]) -> Callable[[Number, Number], Any]:
    def guarded(a: Number, b: Number) -> Any:
        try:
            return of(a, b)
        except ArithmeticError:
            raise BadInput("a division by zero, or a number too large") from None

    return guarded


def _power(a: Number, b: Number) -> Any:
    """In floats, which overflow at once where integers would grow for hours."""
    found = float(a) ** float(b)
    whole = isinstance(a, int) and isinstance(b, int) and b >= 0
    return int(found) if whole and abs(found) <= LARGEST_NUMBER else found


_OPERATORS: dict[type[ast.operator], Callable[[Number, Number], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: _guarded(operator.truediv),
    ast.FloorDiv: _guarded(operator.floordiv), ast.Mod: _guarded(operator.mod), ast.Pow: _guarded(_power),
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "abs": abs, "float": float, "int": int, "round": round, "min": min, "max": max,
}  # fmt: skip
