"""Handing a pruned model to other runtimes: written, run, and described by what was found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from secateur.errors import BadInput, NotDefined

from .exporters import dense, onnx_file, openvino_ir, semi_structured
from .exporters.target import Written, check

Format = Literal["safetensors", "onnx", "openvino", "semi-structured"]
FORMATS: tuple[Format, ...] = get_args(Format)
OPTIONS = {"sparse": "onnx", "int8": "openvino", "calibration": "openvino", "include": "semi-structured"}
"""Which format an option is of."""


@dataclass(frozen=True)
class Exported:
    """What `export` made, as it was read back and run. Printed, it is a few lines of text.

    Attributes:
        format: which.
        path: where it is; ``None`` for ``"semi-structured"``, which is in the model itself.
        bytes: of the file or folder; for ``"semi-structured"``, of the converted weights.
        zeros, total: of the weights in it.
        facts: what else was found, by name, in plain values: how far outputs differ (``difference``), which dims of the inputs
            are open (``inputs``), what OpenVINO ran each layer with (``layers``), and so on.
        notes: sentences on what is gained with this format here, and what is not.
    """

    format: Format
    path: str | None
    bytes: int
    zeros: int
    total: int
    facts: Mapping[str, Any] = field(repr=False)
    notes: tuple[str, ...] = field(repr=False)

    @property
    def sparsity(self) -> float:
        """The share of its weights that is zero."""
        return self.zeros / self.total if self.total else 0.0

    def __str__(self) -> str:
        where = self.path or "in place"
        head = f"{self.format}, {where}: {self.bytes:,} bytes, {self.zeros:,} of {self.total:,} weights zero"
        if "difference" in self.facts:
            head += f"; outputs within {self.facts['difference']:.1e} of the model's"
        return "\n".join([head, *self.notes])


def export(
    model: nn.Module | Mapping[str, Tensor],
    path: str | PathLike[str] | None,
    format: Format,
    example_inputs: Any = None,
    *,
    sparse: bool = False,
    int8: bool = False,
    calibration: Iterable[Any] | None = None,
    include: str | Sequence[str] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes a pruned model for another runtime, runs what it wrote, and tells what that gains.

    The result is built beside its place, verified there, and renamed: it is whole or not there. The model is left as it
    was, except by ``"semi-structured"``.

    Args:
        model: an ``nn.Module`` with its zeros in place; for ``"safetensors"`` also a dict of tensors.
        path: a ``.safetensors`` or ``.onnx`` file to be, or for ``"openvino"`` a folder; ``None`` for ``"semi-structured"``.
        format: ``"safetensors"``: dense, for every tool. ``"onnx"``: run by ONNX Runtime; parameters keep their names.
            ``"openvino"``: IR with weights as ``(out, in)``, which its sparse int8 product needs. ``"semi-structured"``: not a
            file; weights of linear layers that hold 2:4 in torch's layout for CUDA, in place.
        example_inputs: what the model is called with: a tensor, a tuple of arguments, or a dict of keyword arguments. Needed
            but for ``"safetensors"``. The first dim of every input stays open, and of tokens the second too, where the model
            allows it; the result is run on the examples and on others made from them.
        sparse: of ``"onnx"``: leave zeros out of the file where that is smaller.
        int8: of ``"openvino"``: quantise weights and activations with nncf.
        calibration: with ``int8``: real examples, in the form of ``example_inputs``, for the ranges of activations. Without
            them the ranges are those of ``example_inputs``, which then do not show how other inputs are clipped.
        include: of ``"semi-structured"``: globs of the layers that must be converted.
        overwrite: replace what is at ``path``.

    Returns:
        An `Exported`: sizes, zeros and differences as found in the result, and sentences on what is gained.

    Raises:
        BadInput: a package is missing (the error names the extra), or the model or the examples cannot be used.
        NotDefined: an option of another format.
        OutputExists: something is at ``path``.
        SecateurError: the result gives other outputs than the model. Nothing is left behind.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> layer = torch.nn.Linear(4, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.0, 1.0, 0.0, 2.0], [3.0, 0.0, 0.0, 4.0]]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = export(layer, Path(folder) / "layer.safetensors", "safetensors")
        >>> made.zeros, made.total, made.facts["tensors"]
        (4, 8, 2)
    """
    _check_options(path, format, {"sparse": sparse, "int8": int8, "calibration": calibration, "include": include})
    if calibration is not None and not int8:
        raise NotDefined("calibration is what int8=True takes the ranges of activations from; say that too.")
    store = check(model)
    if format == "semi-structured":
        made = semi_structured.convert(model, store, example_inputs, include)
    else:
        made = _write(model, store, Path(str(path)), format, example_inputs, sparse, int8, calibration, overwrite)
    return Exported(
        format, None if path is None else str(path), made.bytes, made.zeros, made.total, made.facts, made.notes
    )


def _check_options(path: Any, format: Any, given: Mapping[str, Any]) -> None:
    if format not in FORMATS:
        raise BadInput(f"there is no format {format!r}; there are {', '.join(map(repr, FORMATS))}.")
    if (path is None) != (format == "semi-structured"):
        where = "changes the model in place: give path=None" if path is not None else "needs a path to write to"
        raise BadInput(f"{format} {where}.")
    for option, value in given.items():
        if value is not None and value is not False and OPTIONS[option] != format:
            raise NotDefined(f"{option}= is an option of {OPTIONS[option]!r}, not of {format!r}.")


def _write(
    model: Any,
    store: Any,
    path: Path,
    format: Format,
    example: Any,
    sparse: bool,
    int8: bool,
    more: Any,
    overwrite: bool,
) -> Written:
    if format == "safetensors":
        return dense.write(model, store, path, overwrite)
    if format == "onnx":
        return onnx_file.write(model, store, path, example, sparse, overwrite)
    return openvino_ir.write(model, path, example, int8, more, overwrite)
