"""Packing the layers of a model in memory, and taking their weights back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from secateur.core.lay_out import arranged
from secateur.core.layouts import LAYOUTS, MOST_COLUMNS, Layout
from secateur.errors import BadInput, BadTensor, NotDefined, NothingChosen, SecateurWarning
from secateur.stores.base import filtered

from .layers import PackedConv, PackedLayer, become, give_back
from .mapped import Mappings, copy_out
from .sites import Site, survey
from .table import Choice, Given, decide, given

Globs = str | Sequence[str] | None


def pack(
    model: nn.Module,
    *,
    include: Globs = None,
    ignore: Globs = None,
    layout: Layout | None = None,
    rows: int | None = None,
    table: Given = None,
) -> nn.Module:
    """Replaces pruned layers by packed ones, in place: smaller in memory, faster, and for inference only.

    Linear layers, the ``Conv1D`` of transformers and 1×1 convolutions can be packed, in float32, bfloat16 and float16, on the
    CPU. A layer that would gain too little stays dense, and so does one whose weight is used by anything that does not call the
    layer; `secateur.runtime.inventory.packed_report` says which and why. A convolution is packed where it is named in full or a
    layout is given: what it gains depends on the size of its images, and large ones lose.

    Layers stay the objects that they are, with their hooks. The memory of a dense weight is free as soon as nothing else holds
    it; where weights lie in a mapped file, as transformers loads them, the model's other tensors are copied out of it, since
    the whole file stays as long as one of them is there. The results are those of the pruned model, to the accuracy of its
    dtype. If packing fails half way, what was packed is unpacked again.

    A packed model has another ``state_dict`` (see `secateur.runtime.layers`), and its layers refuse to be trained; the way
    back is `unpack`. Code that reads ``layer.weight`` finds the whole weight, made anew each time that it is read.

    Args:
        model: pruned, on the CPU.
        include, ignore: globs over names of weights or of the modules above them, as in `secateur.prune`. A layer that is
            named in full and cannot be packed is refused.
        layout: one layout for all layers, whatever they gain; by default each gets what ``table`` says, or stays dense.
        rows: the most rows of activations (samples times tokens) that matter. By default no layer may become slower at any number
            of rows; ``rows=1`` packs what is faster for a token at a time, though a long prompt may then take longer.
        table: what was measured, or the path of it; see `secateur.runtime.table`.

    Returns:
        The model.

    Raises:
        BadInput: not a module; no such layout; a layer named in full that cannot be packed.
        BadTensor: a layer on a GPU or on the meta device.
        NothingChosen: a filter matches nothing, or no layer of the model can be packed.
        NotDefined: ``layout="csr"`` and a layer of more than 65,536 inputs.

    Example:
        >>> import secateur
        >>> model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 8))
        >>> report = secateur.prune(model, 0.9, include="0")
        >>> pack(model, include="0", layout="csr")
        Sequential(
          (0): PackedLinear(256, 512, bias=True, sparsity=0.9, layout=csr, 5.07 bits a weight)
          (1): ReLU()
          (2): Linear(in_features=512, out_features=8, bias=True)
        )
        >>> unpack(model)[0]
        Linear(in_features=256, out_features=512, bias=True)
    """
    require_module(model, "pack")
    check_layout(layout)
    planned = _planned(model, include, ignore, layout, given(table).up_to(rows))
    done: list[PackedLayer] = []
    biases: dict[nn.Parameter, nn.Parameter] = {}
    mappings = Mappings()
    files = {file for one in planned if (file := mappings.file(one.site.weight)) is not None}
    try:
        while planned:  # a site holds its dense weight, so that none outlives its packing by more than one layer
            site, chosen = planned.pop(0)
            parts = arranged(site.matrix, chosen)
            done.extend(become(layer, site.kind, parts, chosen, biases) for layer in site.layers)
    except BaseException:
        _unpack(done)
        raise
    copy_out(model, files)
    return model


def unpack(model: nn.Module) -> nn.Module:
    """Takes the weights of packed layers back, in place: each is what it was before `pack`, to the bit.

    Classes, the order of parameters, ``requires_grad``, hooks and ties between layers are as before; parameters are new
    objects, so an optimizer has to be made anew. What was converted or loaded since is kept. A model without packed layers is
    left as it is.

    Args:
        model: with packed layers anywhere in it.

    Returns:
        The model.

    Raises:
        BadInput: not a module.

    Example:
        >>> layer = nn.Linear(64, 64)
        >>> before = layer.weight.detach().clone()
        >>> torch.equal(unpack(pack(layer, layout="bitmask")).weight, before)
        True
    """
    require_module(model, "unpack")
    _unpack([m for m in model.modules() if isinstance(m, PackedLayer)])
    return model


def require_module(model: object, verb: str) -> None:
    """Raises `BadInput` for what is no module."""
    if not isinstance(model, nn.Module):
        raise BadInput(f"{verb} takes an nn.Module and changes it in place; got a {type(model).__name__}.")


def check_layout(layout: object) -> None:
    """Raises `BadInput` for what is no layout, nor ``None``."""
    if layout not in (None, *LAYOUTS):
        raise BadInput(f"layout={layout!r}: give one of {', '.join(LAYOUTS)}, or nothing for what the table says.")


def warn_all_dense(count: int, first: str, level: int) -> None:
    """Says that nothing was packed, and of the first layer why."""
    warnings.warn(f"all {count} layers that could be packed stay dense. {first}.", SecateurWarning, level)


def count_stored(weight: Tensor) -> int:
    """How many of a weight's elements have other bits than +0.0."""
    return int(weight.detach().view({2: torch.int16, 4: torch.int32}[weight.dtype.itemsize]).count_nonzero())


def judged(site: Site, values: Tensor, layout: Layout | None, table: Given, named: bool = False) -> Choice:
    """The layout that a site gets, or dense, and why.

    Args:
        site: the weight.
        values: all that it stores, and zeros or not.
        layout, table: see `pack`.
        named: whether it was asked for by its full name.
    """
    if layout is not None:
        return Choice(layout, "asked for")
    if site.kind is PackedConv and not named:
        return Choice(
            None, "what a convolution gains depends on the size of its images: name it in full, or give a layout"
        )
    rows, columns = site.matrix.shape
    return decide(rows, columns, count_stored(values) / (rows * columns), values.dtype, table)


class _Planned(NamedTuple):
    site: Site
    layout: Layout


def _planned(model: nn.Module, include: Globs, ignore: Globs, layout: Layout | None, table: Given) -> list[_Planned]:
    """What is to be packed and how; everything that can be refused is refused here."""
    already = any(isinstance(m, PackedLayer) for m in model.modules())
    specs, sites = survey(model)
    chosen = filtered(specs, include, ignore)
    for spec in chosen:
        if spec.named and spec.name not in sites:
            reason = next(s.skip for s in specs if s.name == spec.name)
            raise BadInput(f"cannot pack {spec}: {reason}.")
    wanted = [(sites[s.name], s.named) for s in chosen if s.skip is None]
    if not wanted and not already:
        reasons = "; ".join(f"{s.name}: {s.skip}" for s in chosen[:6]) + ("; …" if len(chosen) > 6 else "")
        raise NothingChosen(f"there is nothing to pack ({reasons}).")
    for site, _ in wanted:
        _check(site, layout)
    judgements = [(site, judged(site, site.weight, layout, table, named)) for site, named in wanted]
    out = [_Planned(site, choice.layout) for site, choice in judgements if choice.layout is not None]
    if wanted and not out:
        warn_all_dense(len(wanted), f"{judgements[0][0].spec.name}: {judgements[0][1].why}", 4)
    return out


def _check(site: Site, layout: Layout | None) -> None:
    device = site.weight.device
    if device.type == "meta":
        raise BadTensor(f"cannot pack {site.spec}: it is on the meta device and has no values; load the weights first.")
    if device.type != "cpu":
        raise BadTensor(
            f"cannot pack {site.spec}: it is on {device}, and packed layers run on the CPU; call model.cpu()."
        )
    if layout == "csr" and site.matrix.shape[1] > MOST_COLUMNS:
        raise NotDefined(f"cannot pack {site.spec} as csr: it has more than {MOST_COLUMNS:,} inputs; use bitmask.")


def _unpack(layers: Sequence[PackedLayer]) -> None:
    """Gives layers their weights back; those that share their parts, or their bias, share it again."""
    sharing: dict[int, list[PackedLayer]] = {}
    for layer in layers:
        sharing.setdefault(id(layer.parts[1]), []).append(layer)
    biases: dict[nn.Parameter, nn.Parameter] = {}
    for group in sharing.values():
        weight = nn.Parameter(group[0].dense(), "weight" in group[0].packed_trained)
        for layer in group:
            bias = layer._parameters["bias"]
            if bias is not None:
                fresh = nn.Parameter(bias.detach(), "bias" in layer.packed_trained)
                bias = biases.setdefault(bias, fresh)
            give_back(layer, weight, bias)
