"""Packed files into models, without the dense weights of the layers that end up packed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from secateur.core.lay_out import arranged, lay_out
from secateur.core.layouts import DTYPES, Layout, Parts
from secateur.core.packed import Packed, decode
from secateur.errors import BadInput
from secateur.stores.architectures import class_of, transformers
from secateur.stores.safetensors_file import DTYPES as CODES

from .format import PackedSource
from .layers import PackedConv1D, become, refuse_packed
from .modules import check_layout, judged, pack, require_module, warn_all_dense
from .sites import Site, survey
from .slots import Slot, computed, matched, read, slots_of, some
from .table import Choice, Given, given
from .unfilled import unfilled


def load_packed(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    layout: Layout | None = None,
    rows: int | None = None,
    table: Given = None,
) -> nn.Module:
    """Fills a model, in place, from what `secateur.runtime.files.save_packed` wrote, and packs its layers as `pack` does.

    A layer that is packed gets the parts that are in the file, and its dense weight is never made. (That of a ``Conv1D`` of
    transformers, which lies the other way, is: one layer at a time.) The model may be without values, built in
    `secateur.runtime.unfilled.unfilled` or under ``torch.device("meta")``. It takes the dtypes of the file. Everything is read
    and checked before the model is touched.

    Args:
        path: a packed file, or a folder of them.
        model: with the same tensors, on the CPU or without values.
        layout: one layout for all layers, whatever they gain; by default each gets what ``table`` says, or stays dense.
        rows: the most rows of activations that matter; see `secateur.runtime.modules.pack`.
        table: what was measured, or the path of it; see `secateur.runtime.table`.

    Returns:
        The model.

    Raises:
        BadInput: not a packed file, or one that contradicts itself; other tensors than those of the model; a model that is
            packed already.
        BadTensor: a parameter on a GPU, or one that is no plain tensor; a buffer without values that is in no file and cannot
            be computed again.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from secateur.runtime.files import save_packed
        >>> pruned = nn.Linear(256, 256)
        >>> _ = pruned.weight.data[:, 64:].zero_()
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> _ = save_packed(pruned, path)
        >>> with torch.device("meta"):
        ...     empty = nn.Linear(256, 256)
        >>> load_packed(path, empty, layout="bitmask")
        PackedLinear(256, 256, bias=True, sparsity=0.75, layout=bitmask, 9.28 bits a weight)
    """
    require_module(model, "load_packed")
    check_layout(layout)
    refuse_packed(model, "a file fills a model that is not")
    source, slots = PackedSource(path), slots_of(model)
    taken = matched(source, slots, model)
    if isinstance(taken, str):
        raise BadInput(f"{source.path} and the model do not hold the same tensors: {taken}.")
    return _fill(model, source, slots, taken, layout, given(table).up_to(rows))


def from_packed(
    folder: str | os.PathLike[str],
    model_class: Any = None,
    *,
    layout: Layout | None = None,
    rows: int | None = None,
    table: Given = None,
) -> Any:
    """Builds the model of a packed Hugging Face folder, fills it as `load_packed` does, and leaves it in eval mode.

    Of some architectures transformers stores the weights under other names, or cut otherwise, than the model has them. These
    it loads itself, dense, and they are packed afterwards.

    Args:
        folder: a packed folder with a ``config.json``, on this machine.
        model_class: a class of transformers, or one of its ``Auto`` classes; by default the one that the config names.
        layout, rows, table: see `load_packed`.

    Returns:
        The model, of class ``model_class``.

    Raises:
        BadInput: not such a folder; a class that transformers does not have; transformers is missing.

    Example:
        >>> import tempfile, transformers
        >>> from pathlib import Path
        >>> from secateur.runtime.files import save_packed
        >>> small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        >>> pruned = transformers.BertModel(transformers.BertConfig(**small, vocab_size=100))
        >>> _ = pruned.encoder.layer[0].output.dense.weight.data[:, 8:].zero_()
        >>> folder = Path(tempfile.mkdtemp())
        >>> pruned.save_pretrained(folder / "dense")
        >>> _ = save_packed(folder / "dense", folder / "packed")
        >>> from_packed(folder / "packed", layout="csr").encoder.layer[0].output.dense
        PackedLinear(64, 64, bias=True, sparsity=0.875, layout=csr, 7.77 bits a weight)
    """
    source = PackedSource(folder)
    library = transformers(f"the model of {source.path}")
    made = class_of(source.path) if model_class is None else model_class
    try:
        config = library.AutoConfig.from_pretrained(str(source.path), local_files_only=True, trust_remote_code=False)
        with unfilled():
            model = (getattr(made, "_from_config", None) or made.from_config)(config)
    except Exception as e:  # of a library's own choice
        raise BadInput(f"transformers cannot build the model of {source.path}: {str(e) or repr(e)}") from e
    slots = slots_of(model)
    taken = matched(source, slots, model)
    if isinstance(taken, str):
        model = _converted(type(model), config, source)
        pack(model, layout=layout, rows=rows, table=table)
    else:
        _fill(model, source, slots, taken, layout, given(table).up_to(rows))
    if (source.path / "generation_config.json").is_file():
        model.generation_config = library.GenerationConfig.from_pretrained(str(source.path), local_files_only=True)
    return model.eval()


def _converted(made: Any, config: Any, source: PackedSource) -> nn.Module:
    """A model whose tensors have other names in files, as transformers itself loads it."""
    weights = {name: decode(packed) for name, packed in source}
    model, found = made.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    wrong = sorted({*found["missing_keys"], *found["unexpected_keys"]})
    if wrong:
        raise BadInput(
            f"{source.path} does not hold the tensors of a {made.__name__}: {some(wrong)} are missing or too many."
        )
    return model


def _fill(
    model: nn.Module,
    source: PackedSource,
    slots: Sequence[Slot],
    taken: Sequence[Sequence[str]],
    layout: Layout | None,
    table: Given,
) -> nn.Module:
    """Reads everything, and then fills the model."""
    buffers = computed(model)
    sites = _sites(model, source, slots, taken)
    dense: list[tuple[Slot, Tensor]] = []
    packed: list[tuple[Site, Parts, Layout]] = []
    why = ""
    for slot, stored in zip(slots, taken, strict=True):
        found, site = read(source, stored), sites.get(slot.names[0])
        choice = Choice(None, "") if site is None else judged(site, found.parts["values"], layout, table)
        if site is None or choice.layout is None:
            dense.append((slot, decode(found)))
            why = why or (choice.why and f"{slot.names[0]}: {choice.why}")
        else:
            packed.append((site, _parts(site, found, choice.layout), choice.layout))
    if sites and not packed:
        warn_all_dense(len(sites), why, 4)
    for module, leaf, value in buffers:
        module._buffers[leaf] = value
    for slot, value in dense:
        slot.fill(value)
    biases: dict[nn.Parameter, nn.Parameter] = {}
    for site, parts, chosen in packed:
        for layer in site.layers:
            become(layer, site.kind, parts, chosen, biases)
    return model


def _sites(
    model: nn.Module, source: PackedSource, slots: Sequence[Slot], taken: Sequence[Sequence[str]]
) -> dict[str, Site]:
    """The weights that can be packed, as the file has them: of a dtype that can be, which their biases share."""
    if next(model.parameters(), None) is None:
        return {}
    codes = {
        (id(m), leaf): source.entries[n[0]].code for s, n in zip(slots, taken, strict=True) for m, leaf in s.holders
    }
    return {
        name: site
        for name, site in survey(model)[1].items()
        if all(
            CODES.get(codes[id(layer), "weight"]) in DTYPES
            and codes.get((id(layer), "bias"), codes[id(layer), "weight"]) == codes[id(layer), "weight"]
            for layer in site.layers
        )
    }


def _parts(site: Site, found: Packed, layout: Layout) -> Parts:
    if site.kind is PackedConv1D:  # its rows in the file are its inputs
        return arranged(site.kind.as_matrix(decode(found)), layout)
    return lay_out(found, layout)
