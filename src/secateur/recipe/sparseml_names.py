"""SparseML's regular expressions over parameter names as globs. No expression of a file is ever run."""

from __future__ import annotations

from dataclasses import dataclass

LONGEST, MOST_GLOBS, DEEPEST = 500, 64, 5


@dataclass(frozen=True)
class Globs:
    """What an expression became; ``wider`` where the globs may match names that the expression does not."""

    globs: list[str]
    wider: bool


class _Plain(Exception):
    """The expression says something that no glob can."""


def globs_of(regex: str) -> Globs | None:
    """A regular expression, which SparseML holds against the *beginning* of a full parameter name, as globs.

    A single dot is read as a dot of the name, which is what recipes mean by it. Groups of alternatives become several globs.

    Returns:
        The globs, or ``None`` where there are none: a look-ahead, a back reference, a counted repetition, too many
        alternatives.

    >>> globs_of(r"layer1.*.conv1.weight")
    Globs(globs=['layer1*.conv1.weight'], wider=False)
    >>> globs_of(r"encoder\\.layer\\.\\d+\\.(query|key)\\.weight$")
    Globs(globs=['encoder.layer.[0-9]*.query.weight', 'encoder.layer.[0-9]*.key.weight'], wider=True)
    >>> globs_of(r".*conv*")
    Globs(globs=['*con*'], wider=False)
    >>> globs_of(r"^((?!dfl).)*$") is None
    True
    """
    if len(regex) > LONGEST:
        return None
    reader = _Reader(regex)
    try:
        found = reader.alternatives(0)
        if reader.left():
            return None
    except _Plain:
        return None
    out = list(dict.fromkeys(_tidy(glob) for glob in found))
    return Globs(out, reader.wider)


def _tidy(glob: str) -> str:
    while "**" in glob:
        glob = glob.replace("**", "*")
    return glob


class _Reader:
    """Reads one expression from left to right."""

    def __init__(self, regex: str) -> None:
        self._text, self._at, self.wider = regex, 0, False

    def left(self) -> bool:
        """Whether something is left to read."""
        return self._at < len(self._text)

    def alternatives(self, depth: int) -> list[str]:
        """Branches between ``|``, up to the end or a closing bracket; at depth 0 each holds for the beginning of a name."""
        found = self._branch(depth)
        while self._take("|"):
            found = found + self._branch(depth)
        return _few(found)

    def _branch(self, depth: int) -> list[str]:
        found = [""]
        if depth == 0:
            self._take("^")
        while self.left() and self._text[self._at] not in "|)":
            if self._text[self._at] == "$":
                self._at += 1
                if depth or (self.left() and self._text[self._at] != "|"):
                    raise _Plain
                return found
            parts = self._repeated(self._item(depth))
            found = _few([f + p for f in found for p in parts])
        # SparseML matches the beginning of a name; one that ends in a parameter's own name is meant whole
        return found if depth else [f if f.endswith(("weight", "bias")) else f"{f}*" for f in found]

    def _item(self, depth: int) -> list[str]:
        """The next thing that a repetition may follow, as alternatives; ``?`` stands for any character."""
        c = self._next()
        if c == "(":
            if depth == DEEPEST or (self._take("?") and not self._take(":")):
                raise _Plain
            found = self.alternatives(depth + 1)
            if not self._take(")"):
                raise _Plain
            return found
        if c == "[":
            return [self._set()]
        if c == "\\":
            return [self._escaped()]
        if c in "*+?{}^":
            raise _Plain
        return ["?" if c == "." else c]

    def _repeated(self, item: list[str]) -> list[str]:
        """An item with what follows it: nothing, ``*``, ``+`` or ``?``."""
        c = self._text[self._at] if self.left() else ""
        if c == "{":
            raise _Plain
        if not c or c not in "*+?":
            return ["." if i == "?" else i for i in item]
        self._at += 1
        self._take("?")  # how greedy it is makes no difference to whether a name matches
        if c == "?":
            return [*item, ""]
        if item != ["?"] and self.left():
            self.wider = True  # only at the end, where anything may follow, is "*" as good as "x*"
        return ["*"] if c == "*" else [f"{i}*" for i in item]

    def _set(self) -> str:
        inner = "!" if self._take("^") else ""
        while (c := self._next()) != "]":
            if c in "\\[!":
                raise _Plain
            inner += c
        if inner in ("", "!"):
            raise _Plain
        return f"[{inner}]"

    def _escaped(self) -> str:
        c = self._next()
        if c == "d":
            return "[0-9]"
        if c == "w":
            return "[!.]"  # what stands between two dots of a name
        if c.isalnum():
            raise _Plain
        return f"[{c}]" if c in "*?[" else c

    def _next(self) -> str:
        if not self.left():
            raise _Plain
        self._at += 1
        return self._text[self._at - 1]

    def _take(self, c: str) -> bool:
        if self.left() and self._text[self._at] == c:
            self._at += 1
            return True
        return False


def _few(globs: list[str]) -> list[str]:
    if len(globs) > MOST_GLOBS:
        raise _Plain
    return globs
