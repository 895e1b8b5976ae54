"""OpenVINO: weights in the layout that its sparse int8 products need, and a look at whether they were used."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import BadInput
from secateur.stores.staging import refuse_place, staged

from .running import Call, Shape, at_rest, first_line, outputs, quiet, tolerance_of, traced, variants, verify, words
from .target import Written, need, runnable

STEM = "openvino_model"
RATE = 0.5
"""Zeros a layer must have for OpenVINO to take its sparse product, as it is compiled here."""
RATE_KEY = "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"
MULTIPLE = 64
"""What both dims of a layer must be a multiple of for the sparse product."""
_PRODUCTS = ("MatMul", "Convolution", "GroupConvolution")
_BETWEEN = ("Convert", "Multiply", "Subtract", "FakeQuantize", "Reshape")


@dataclass(frozen=True)
class Layer:
    """A product with constant weights.

    Attributes:
        name: the module's (of another parameter than ``weight``, that one's), or OpenVINO's own where weights were folded.
        shape, dtype: of its weights, as the file holds them.
        zeros: how many of them are zero.
        primitive: what OpenVINO ran for it here.
        sparse: whether that was the sparse product, ``brgemm_avx512_amx_sparse_I8``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    zeros: int
    primitive: str
    sparse: bool

    @property
    def numel(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape))

    @property
    def why_not(self) -> str | None:
        """What keeps OpenVINO from its sparse product for this layer, as far as its weights tell."""
        if self.dtype != "i8":
            return f"its weights are {self.dtype}"
        if len(self.shape) != 2:
            return "its weights are no matrix"
        if any(n % MULTIPLE for n in self.shape):
            return f"its dims are not multiples of {MULTIPLE}"
        if self.zeros < RATE * self.numel:
            return f"less than {RATE:.0%} of its weights are zero"
        return None


def write(
    model: Any, folder: Path, example: Any, int8: bool, calibration: Iterable[Any] | None, overwrite: bool
) -> Written:
    """Writes a model as OpenVINO's IR, runs it on the example inputs, and looks at which products it ran.

    Args:
        model: left as it is.
        folder: a folder to be; it gets ``openvino_model.xml`` and ``openvino_model.bin``.
        example: what the model is called with.
        int8: whether weights and activations are quantised, by nncf.
        calibration: examples for the ranges of activations; ``None``: the example, which is then no test of them.
        overwrite: whether a model may be at ``folder``.

    Raises:
        BadInput: openvino (or nncf) is missing, or the model or an example cannot be used.
        SecateurError: the result gives other outputs than the model; nothing is written.
    """
    call, model = Call.of(example, "openvino").each(Tensor.cpu), runnable(model, "openvino")
    if folder.suffix in (".xml", ".bin"):
        raise BadInput(f"OpenVINO's IR is two files: name the folder they go to, not {str(folder)!r}.")
    with untold():
        ov = need("openvino", "openvino", "the format openvino")
        nncf = need("nncf", "openvino", "quantising to int8") if int8 else None
    given = [call] if calibration is None else [Call.of(c, "calibration").each(Tensor.cpu) for c in calibration]
    if not given:
        raise BadInput("calibration is empty: give some hundred real examples, in the form of example_inputs.")
    refuse_place(folder, overwrite)
    with at_rest(model):
        made, shapes = _converted(ov, model, call)
        calls = list(variants(call, shapes))
        wants, tolerance = partial(outputs, model), tolerance_of(model)
        if nncf is not None:  # what int8 moves is told apart from what would be a mistake
            verify(wants, _Compiled(ov, made).run, calls, tolerance)
            made = _quantised(nncf, made, given)
        with staged(folder, overwrite, sum(c.data.nbytes for c in _constants(made))) as stage:
            stage.mkdir()
            ov.save_model(made, stage / f"{STEM}.xml", compress_to_fp16=False)
            compiled = _Compiled(ov, ov.Core().read_model(stage / f"{STEM}.xml"))
            worst = verify(wants, compiled.run, calls, None if int8 else tolerance)
            layers = compiled.layers()
            size = sum(p.stat().st_size for p in stage.iterdir())
    return _described(layers, size, worst, shapes, int8, calibration is not None)


def _described(
    layers: list[Layer], size: int, worst: float, shapes: Sequence[Shape], int8: bool, apart: bool
) -> Written:
    facts = {
        "inputs": [words(s) for s in shapes],
        "difference": worst,
        "int8": int8,
        "amx": _has_amx(),
        "layers": [asdict(layer) for layer in layers],
    }
    zeros, total = sum(layer.zeros for layer in layers), sum(layer.numel for layer in layers)
    return Written(size, zeros, total, facts, tuple(_notes(layers, worst, int8, apart)))


def _notes(layers: list[Layer], worst: float, int8: bool, apart: bool) -> Iterator[str]:
    yield "On disk a zero takes as much room as any other weight."
    if not int8:
        yield "OpenVINO multiplies float weights as dense ones: zeros gain no time. Its sparse product is for int8=True."
        return
    seen = "" if apart else ", from which its ranges were taken (others may be clipped: give calibration=)"
    yield f"int8 moves the outputs on the example inputs{seen} by up to {worst:.1%} of their largest magnitude."
    used = [layer for layer in layers if layer.sparse]
    if used:
        yield (
            f"OpenVINO's sparse int8 product ran {len(used)} of {len(layers)} layers here. The file does not ask for it: "
            f'compile the model with {{"{RATE_KEY}": {RATE}}}.'
        )
    else:
        why = "this CPU has no AMX, which it needs" if not _has_amx() else "no layer of this model qualifies"
        yield f"OpenVINO's sparse int8 product was NOT used here: {why}. Zeros gain no time."
    reasons = Counter(layer.why_not for layer in layers if not layer.sparse and layer.why_not)
    for reason, count in reasons.items():
        first = next(layer for layer in layers if layer.why_not == reason)
        yield f"{count} of {len(layers)} layers cannot use the sparse product anywhere, as {first.name!r}: {reason}."


def _has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


@contextlib.contextmanager
def untold() -> Iterator[None]:
    """OpenVINO and nncf are imported without what tells their makers of every import and every call."""
    name = "openvino_telemetry"
    hidden = name not in sys.modules
    try:
        if hidden:
            sys.modules[name] = None  # type: ignore[assignment]  # Python's way to say: not installed
        yield
    finally:
        if hidden:
            del sys.modules[name]


def _converted(ov: Any, model: nn.Module, call: Call) -> tuple[Any, list[Shape]]:
    """The model as OpenVINO's, from its graph: weights stay (out, in), which ONNX's MatMul would transpose."""
    program, shapes = traced(model, call)
    try:
        with quiet():
            made = ov.convert_model(program)
    except Exception as e:
        why = next((line for line in str(e).splitlines() if line.startswith("--")), first_line(e))
        raise BadInput(f"OpenVINO cannot express the model: {why.lstrip('- ')}") from e
    _name(made, model)
    return made, shapes


def _name(made: Any, model: nn.Module) -> None:
    """Gives products whose weights are a parameter, bit for bit, the names that the model has for them."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    known: dict[object, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in tables and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding):
            continue
        array = p.detach().numpy()
        for form in {_print(array), _print(array.T)} if p.dim() == 2 else {_print(array)}:
            known.setdefault(form, []).append(name)
    given: set[str] = set()
    for product, constant in _products(made):
        names = [n for n in known.get(_print(constant.data), []) if n not in given]
        if not names:
            continue
        name = names[0]
        given.add(name)
        constant.set_friendly_name(name)
        layer = name.removesuffix(".weight")
        product.set_friendly_name(layer)
        for reader in product.output(0).get_target_inputs():  # a fused layer goes by the name of what adds its bias
            if reader.get_node().get_type_name() == "Add":
                reader.get_node().set_friendly_name(f"{layer}/bias")


def _print(array: Any) -> object:
    return array.shape, str(array.dtype), hash(array.tobytes())


def _constants(made: Any) -> list[Any]:
    return [op for op in made.get_ordered_ops() if op.get_type_name() == "Constant"]


def _products(made: Any) -> Iterator[tuple[Any, Any]]:
    """Every product of a model with a constant, and that constant."""
    for op in made.get_ordered_ops():
        if op.get_type_name() in _PRODUCTS:
            node = op.input_value(1).get_node()
            while node.get_type_name() in _BETWEEN:
                node = node.input_value(0).get_node()
            if node.get_type_name() == "Constant":
                yield op, node


def _quantised(nncf: Any, made: Any, samples: Sequence[Call]) -> Any:
    attends = any(op.get_type_name() == "ScaledDotProductAttention" for op in made.get_ordered_ops())
    data = nncf.Dataset([call.arrays() for call in samples])
    kind = nncf.ModelType.TRANSFORMER if attends else None
    try:
        with quiet():
            return nncf.quantize(made, data, model_type=kind)
    except Exception as e:
        raise BadInput(f"nncf cannot quantise the model: {first_line(e)}") from e


class _Compiled:
    """A model of OpenVINO, compiled for this CPU in a way that may use sparse products."""

    def __init__(self, ov: Any, made: Any) -> None:
        self._made = made
        self._compiled = ov.Core().compile_model(made, "CPU", {RATE_KEY: RATE, "INFERENCE_PRECISION_HINT": "f32"})

    def run(self, call: Call) -> list[Tensor]:
        """See `running.Run`."""
        found = self._compiled(call.arrays())
        return [torch.from_numpy(np.array(found[port])) for port in self._compiled.outputs]

    def layers(self) -> list[Layer]:
        """Every product with constant weights, and what ran it; known once the model has run."""
        ran: dict[str, str] = {}
        for op in self._compiled.get_runtime_model().get_ordered_ops():
            info = op.get_rt_info()
            for name in info["originalLayersNames"].astype(str).split(","):
                ran.setdefault(name, info["primitiveType"].astype(str))
        found = []
        for product, constant in _products(self._made):
            name = product.get_friendly_name()
            primitive = next((p for n, p in ran.items() if n == name or n.startswith(f"{name}/")), "unknown")
            shape, zeros = tuple(constant.shape), constant.data.size - int(np.count_nonzero(constant.data))
            dtype = constant.get_element_type().get_type_name()
            found.append(Layer(name, shape, dtype, zeros, primitive, "sparse" in primitive))
        return found
