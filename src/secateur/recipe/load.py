"""Recipes as YAML: safe, without duplicates, with numbers such as ``1e-4`` read as numbers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from secateur.errors import BadInput

from .schema import Recipe

LARGEST = 1 << 20
"""Bytes a recipe may have."""


class Loader(yaml.SafeLoader):
    """No duplicate keys, no aliases (a few of them make a text of a kilobyte into gigabytes), floats without a dot."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise BadInput(f"line {mark.line + 1}: aliases (*name) are not read; write the value again.")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """As the base does, where every key is there once and can be one."""
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, Hashable):
                raise BadInput(f"line {key.start_mark.line + 1}: a key is one word or number, not a list or a mapping.")
            if name in seen:
                raise BadInput(f"line {key.start_mark.line + 1}: {name!r} is there twice.")
            seen.add(name)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def parse(text: str, where: str = "the recipe", loader: type[Loader] = Loader) -> dict[str, Any]:
    """A YAML text as a mapping.

    Raises:
        BadInput: not YAML, not a mapping, a key twice, an alias.
    """
    try:
        found = yaml.load(text, loader)
    except yaml.YAMLError as e:
        raise BadInput(f"{where} is not YAML: {' '.join(str(e).split())}") from None
    except BadInput as e:
        raise BadInput(f"{where}, {e}") from None
    except (
        ValueError,
        RecursionError,
    ) as e:  # a date that is none, a number of ten thousand digits, a thousand brackets
        raise BadInput(f"{where} cannot be read: {e}.") from None
    if not isinstance(found, dict):
        raise BadInput(f"{where} should be a mapping of settings; got {type(found).__name__}.")
    return found


def in_form(raw: dict[str, Any], form: str | None) -> dict[str, Any]:
    """The recipe in its ``quick`` or ``full`` form, whose settings take the place of the others.

    It goes to a folder of its own, by the name of the form, unless the form names one.

    Raises:
        BadInput: the recipe has no such form.
    """
    if form is None:
        return raw
    settings = raw.get(form)
    if not isinstance(settings, dict):
        raise BadInput(f"this recipe has no {form!r} form: a mapping of settings by their dotted names.")
    if isinstance(raw.get("folder"), str):
        raw["folder"] = f"{raw['folder']}-{form}"
    for path, value in settings.items():
        _put(raw, str(path), value, f"{form}: {path}")
    return raw


def with_settings(raw: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """``--set a.b=value``: values are YAML, dots go down; a place that does not exist is made, and then checked.

    Raises:
        BadInput: not of that form, or a step into something that is not a mapping.
    """
    for setting in settings:
        path, sign, text = setting.partition("=")
        if not sign or not path:
            raise BadInput(f"--set takes key=value, such as train.epochs=3; got {setting!r}.")
        _put(raw, path, parse(f"value: {text}", f"--set {setting}")["value"], f"--set {setting}")
    return raw


def _put(raw: dict[str, Any], path: str, value: Any, where: str) -> None:
    place, steps = raw, path.split(".")
    for step in steps[:-1]:
        place = place.setdefault(step, {})
        if not isinstance(place, dict):
            raise BadInput(f"{where}: {step!r} holds {place!r}, which has no settings of its own.")
    place[steps[-1]] = value


def check(raw: Mapping[str, Any], where: str = "the recipe") -> Recipe:
    """A mapping as a `Recipe`.

    Raises:
        BadInput: every problem found, each with its place; an unknown key with the nearest right one.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as e:
        told = [_told(problem, raw) for problem in e.errors(include_url=False)]
        raise BadInput(f"{where}:\n" + "\n".join(f"  {t}" for t in told)) from None


def _told(problem: Any, raw: Mapping[str, Any]) -> str:
    place = ".".join(str(p) for p in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = problem.get("ctx", {}).get("known") or _known(problem["loc"])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, 1, 0.5)
        return f"{place}: there is no such setting" + (
            f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}."
        )
    return f"{place}: {problem['msg']}; got {problem['input']!r}."


def _known(loc: Sequence[Any]) -> list[str]:
    """The settings there are at the place of an unknown one."""
    model: Any = Recipe
    for step in loc[:-1]:
        field = getattr(model, "model_fields", {}).get(step)
        model = _inner(field.annotation) if field is not None else model
    return sorted(getattr(model, "model_fields", {}))


def _inner(annotation: Any) -> Any:
    """The model inside ``Model | None`` or ``dict[str, Model]``."""
    if hasattr(annotation, "model_fields"):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        found = _inner(part)
        if found is not None:
            return found
    return None


def text_of(path: Path) -> str:
    """The text of a recipe file.

    Raises:
        BadInput: it cannot be read, or is too large.
    """
    try:
        size = path.stat().st_size
        text = path.read_text("utf-8") if size <= LARGEST else ""
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"cannot read the recipe {path}: {e}.") from None
    if size > LARGEST:
        raise BadInput(f"{path} has {size} bytes: a recipe has {LARGEST} at most.")
    return text


def read(path: Path, settings: Sequence[str] = (), form: str | None = None) -> Recipe:
    """Reads and checks a recipe file, in one of its forms.

    Raises:
        BadInput: it cannot be read, is too large, or says something that cannot be meant.
    """
    return check(with_settings(in_form(parse(text_of(path), str(path)), form), settings), str(path))
