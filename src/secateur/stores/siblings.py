"""What the names and shapes beside a tensor tell of it, where no module does.

For dicts and files, and for modules of classes that `secateur.stores.roles` does not know. The names are
those of the models in use: transformers, timm and torchvision, GPT-2 and its descendants.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property

_TABLE = re.compile(
    r"(^|_|[a-z](?=Emb))(emb|[Ee]mbedders?|[Ee]mbeddings?|embeds?|wte|wpe|tokens?|codebook|"
    r"relative_attention_bias|reference_points|queries_features|bias_values|pe_[kv])(_|\d|$)|^shared$"
)
_NO_TABLE = re.compile(r"patch|proj|linear|dense|mlp|mapping|transform|head|gate|expert")
_HEADS = frozenset(
    "lm_head lm_heads embed_out codebooks_head vocab_projector lm_loss lm_head.decoder lm_head.out_proj "
    "predictions.decoder mlm_score.decoder pred_layer.proj".split()
)
_HEADS_BY_ROWS = frozenset("decoder head output proj_out output_projection to_logits".split())
_GATES = frozenset("gate wg gating moe_gate shared_expert_gate".split())
_ROUTERS = ("gate.weight", "router.weight", "router.layer.weight", "router.classifier.weight", "wg.weight")
_CONV1D = frozenset("c_attn q_attn c_fc c_proj".split())
_UP = ("gate_up_proj", "up_proj", "gate_proj", "w13", "w1", "w3", "wi", "fc1")
_DOWN = ("down_proj", "w2", "wo", "fc2")


def join(path: str, leaf: str) -> str:
    """A name from its module's and its own."""
    return f"{path}.{leaf}" if path else leaf


def last_step(path: str) -> str:
    """The last step of a path that is not a number.

    >>> last_step("decoder.embed_tokens.0")
    'embed_tokens'
    """
    while path:
        path, _, step = path.rpartition(".")
        if not step.isdigit():
            return step
    return ""


class Siblings:
    """The names and shapes of a whole model, and what they tell of one tensor. A path is a module's name."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def is_head(self, path: str, shape: tuple[int, ...]) -> bool:
        """Whether a weight is a language model's head.

        By a name that only heads have; or by one they share with others, and a row for each word of the
        vocabulary.
        """
        last = last_step(path)
        if last in _HEADS or last.endswith("_lm_head") or ".".join(path.rsplit(".", 2)[-2:]) in _HEADS:
            return True
        return last in _HEADS_BY_ROWS and len(shape) == 2 and shape[0] == self._vocabulary

    @cached_property
    def _vocabulary(self) -> int | None:
        """Rows of the largest table of tokens, by name; a handful (of mask tokens, say) is no vocabulary."""
        tables = (
            shape[0]
            for name, shape in self.shapes.items()
            if len(shape) == 2 and shape[0] >= 100 and name.endswith(".weight")
            if self.is_table(name.removesuffix(".weight"))
        )
        return max(tables, default=None)

    def is_table(self, path: str) -> bool:
        """Whether the name is an embedding's and nothing beside it speaks against: tables have no bias."""
        last = last_step(path)
        if _TABLE.search(last) is None or _NO_TABLE.search(last) is not None:
            return False
        return join(path, "bias") not in self.shapes

    def is_router(self, path: str) -> bool:
        """Whether the module is in one called router, or is a gate beside experts."""
        if "router" in path:
            return any(step.endswith("router") for step in path.split("."))
        parent, _, last = path.rpartition(".")
        return last in _GATES and parent in self._moes

    @cached_property
    def _moes(self) -> frozenset[str]:
        """The modules that hold experts."""
        paths = [name.split(".")[:-1] for name in self.shapes if "experts" in name]
        return frozenset(
            ".".join(steps[:i]) for steps in paths for i, step in enumerate(steps) if step.endswith("experts")
        )

    def is_transposed(self, path: str, shape: tuple[int, ...]) -> bool:
        """Whether a 2-D weight is stored (in, out): its bias tells, or GPT-2's names and layers beside it."""
        told = self._told(path, shape)
        if told is None and last_step(path) in _CONV1D:
            told = self._conv1d.get(path.rpartition(".")[0], self._conv1d.get(None, False))
        return bool(told)

    def _told(self, path: str, shape: tuple[int, ...]) -> bool | None:
        """What shapes alone tell: nothing of a square weight; without bias, only that c_attn is (H, 3H)."""
        rows, columns = shape
        if rows == columns:
            return None
        bias = self.shapes.get(join(path, "bias"))
        if bias in ((rows,), (columns,)):
            return bias == (columns,)
        if last_step(path) == "c_attn" and 3 in (rows / columns, columns / rows):
            return columns > rows
        return None

    @cached_property
    def _conv1d(self) -> dict[str | None, bool]:
        """Whether layers named as GPT-2's are stored (in, out), by the module above them; ``None``: any."""
        found: dict[str | None, bool] = {}
        for name, shape in self.shapes.items():
            path = name.removesuffix(".weight")
            if path != name and len(shape) == 2 and min(shape) > 0 and last_step(path) in _CONV1D:
                told = self._told(path, shape)
                if told is not None:
                    found[path.rpartition(".")[0]] = told
        return found | {None: any(found.values())}

    def layout(self, container: str, token: str, suffix: str) -> bool | None:
        """How stacked experts are stored: ``True`` for (experts, out, in), ``False`` for (experts, in, out).

        The projections up and down of one container are a pair whose shapes fit one way only, if the gate is
        fused with the projection up. Otherwise the bias tells, or the width of the router. ``None`` where
        nothing tells.
        """
        up_name, up = self._first(container, _UP, suffix)
        _, down = self._first(container, _DOWN, suffix)
        if up is None or token not in (*_UP, *_DOWN):
            return None
        _, rows, columns = up
        if down is not None:
            inner = rows in (down[2], 2 * down[2]) and columns == down[1]
            outer = columns in (down[1], 2 * down[1]) and rows == down[2]
            if inner != outer:
                return inner
        bias = self.shapes.get(join(container, f"{up_name}_bias"), ())
        if rows != columns and bias[-1:] in ((rows,), (columns,)):
            return bias[-1] == rows
        widths = [self.shapes.get(join(container.rpartition(".")[0], r), (0,))[-1] for r in _ROUTERS]
        width = max(widths)
        return width == columns if rows != columns and width in (rows, columns) else None

    def _first(self, container: str, tokens: Iterable[str], suffix: str) -> tuple[str, tuple[int, ...] | None]:
        for token in tokens:
            shape = self.shapes.get(join(container, token + suffix))
            if shape is not None and len(shape) == 3:
                return token, shape
        return "", None
