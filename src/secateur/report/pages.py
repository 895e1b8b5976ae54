"""Pages: one self-contained HTML document each, from a template beside this file."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def filled(template: str, **facts: Any) -> str:
    """A template with its facts, all of them escaped but for what it marks as safe; a fact that is missing is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # for those who make pages

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template(template).render(**facts)
