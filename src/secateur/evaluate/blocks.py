"""The blocks of a network: modules that run one after another, each on what the one before it gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.errors import BadInput
from secateur.stores.names import walk

HOW = (
    'Name them, in the order they run, with secateur.Calibration(batches, blocks="encoder.layers") (a module whose children '
    'are the blocks) or blocks=["stem", "layer1", …]. For a network of any form say blocks="layers", which runs it anew for '
    'every layer, or blocks="whole", which observes all layers of the dense network in one go.'
)
STACKS = {nn.ModuleList: 0.5, nn.Sequential: 0.9}
"""Modules that may hold the blocks, and the share of the weights that they must hold: a stage of a convolutional network is no
stack."""


@dataclass(frozen=True)
class Block:
    """A module of the network that gets hidden states and gives them on; or a single layer, which holds its own weights alone."""

    name: str
    module: nn.Module
    single: bool = False

    def holds(self, tensor: str) -> bool:
        """Whether a tensor of this name lies in the block."""
        if self.single:
            return tensor.rpartition(".")[0] == self.name
        return tensor.startswith(f"{self.name}.") or not self.name


def find_blocks(model: nn.Module, asked: str | Sequence[str], weights: Mapping[str, int]) -> list[Block]:
    """The blocks of a model.

    Args:
        model: the network, in any wrapper.
        asked: ``"auto"``; ``"layers"``: every layer by itself; the name of a module whose children are the blocks; or the
            blocks' names.
        weights: sizes of the tensors to prune, by name.

    Raises:
        BadInput: no blocks where they were asked for, or ``"auto"`` finds none.
    """
    modules = walk(model).modules
    if asked == "layers":
        owners = dict.fromkeys(t.rpartition(".")[0] for t in weights)
        return [Block(name, modules[name], single=True) for name in owners]
    if isinstance(asked, str) and asked != "auto":
        return _children(asked, _named(asked, modules))
    if not isinstance(asked, str):
        return [Block(name, _named(name, modules)) for name in asked]
    if isinstance(modules[""], nn.Sequential):
        return _children("", modules[""])
    total = sum(weights.values())
    for name, module in modules.items():
        share = STACKS.get(type(module))
        inside = sum(n for t, n in weights.items() if t.startswith(f"{name}."))
        if share is not None and inside > share * total and len({type(m) for m in module.children()}) == 1:
            return _children(name, module)
    raise BadInput(
        f"the blocks of this {type(modules['']).__name__} cannot be found: no list of layers of one kind holds most of its "
        f"weights. {HOW}"
    )


def _children(name: str, module: nn.Module) -> list[Block]:
    """The children as blocks, one that is there twice (an activation) as two."""
    children = [(n, m) for n, m in module._modules.items() if m is not None]
    if not children:
        raise BadInput(f"blocks={name!r}: this {type(module).__name__} has no children that could be blocks. {HOW}")
    return [Block(f"{name}.{n}" if name else n, m) for n, m in children]


def _named(name: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    if not isinstance(name, str) or name not in modules:
        some = ", ".join([n for n in modules if n.count(".") < 2 and n][:12])
        raise BadInput(f"blocks: {name!r} is no module of this model; it has {some}, …")
    return modules[name]


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """A language model's cache of keys and values is off: it would grow with every run of a block."""
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = [(c, c.use_cache) for c in configs.values() if hasattr(c, "use_cache")]
    try:
        for c, _ in before:
            c.use_cache = False
        yield
    finally:
        for c, was in before:
            c.use_cache = was
