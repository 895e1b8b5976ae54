"""The class of transformers that a Hugging Face folder's config names."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from secateur.errors import BadInput

EXTRA = 'it needs the package transformers: pip install "secateur[hf]".'


def class_of(folder: Path) -> Any:
    """The class that a folder's ``config.json`` names.

    Raises:
        BadInput: no such file, a class that transformers does not have, or transformers is missing.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise BadInput(
            f"{folder} has no config.json, so its model cannot be built and run. Give a Hugging Face folder, or load the model "
            "yourself and pass the nn.Module."
        )
    try:
        names = json.loads(config.read_text("utf-8")).get("architectures") or []
    except (ValueError, AttributeError) as e:
        raise BadInput(f"{config} is not a config of transformers: {e}.") from e
    library = transformers(f"the model of {folder}")
    made = getattr(library, names[0], None) if names and isinstance(names[0], str) else None
    if not (isinstance(made, type) and issubclass(made, library.PreTrainedModel)):
        raise BadInput(
            f"{config} names the architecture {names!r}, which transformers {library.__version__} does not have."
        )
    return made


def transformers(purpose: str) -> Any:
    """The package, imported now; `BadInput` where it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError:
        raise BadInput(f"{purpose} cannot be built: {EXTRA}") from None
