"""A language model of transformers, pruned, packed and unpacked: what loads afterwards is what was there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from secateur.runtime.files import save_packed, unpack_file
from tests.unit.hub import tree
from tests.unit.packing import codecs

transformers = pytest.importorskip("transformers")


def saved(folder: Path, **how: Any) -> nn.Module:
    """A tiny GPT-2, its blocks pruned to 0.8, as `save_pretrained` leaves it."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=97, n_embd=64, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config).eval()
    secateur.prune(model, 0.8)
    model.save_pretrained(folder, **how)  # type: ignore[operator]
    return model


def loaded(folder: Path) -> nn.Module:
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    return model


@codecs
@pytest.mark.parametrize("how", [{}, {"max_shard_size": "150KB"}], ids=["one file", "shards"])
def test_a_language_model_comes_back(tmp_path: Path, codec: str | None, how: dict[str, Any]) -> None:
    model = saved(tmp_path / "model", **how)
    report = save_packed(tmp_path / "model", tmp_path / "packed", codec=codec)
    unpack_file(tmp_path / "packed", tmp_path / "plain")
    assert report.ratio > 2
    assert {r.name for r in report.packed} >= {
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.1.mlp.c_proj.weight",
    }
    assert bool(how) == (tmp_path / "plain" / "model.safetensors.index.json").exists()
    before, after = tree(tmp_path / "model"), tree(tmp_path / "plain")
    assert set(before) == set(after)
    if how:  # written by transformers, and again here: the same index but for what it counts
        tables = [json.loads(t.pop("model.safetensors.index.json"))["weight_map"] for t in (before, after)]
        assert tables[0] == tables[1]
    assert before == after
    tokens = torch.arange(20).view(1, -1)
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "plain")(tokens).logits, model(tokens).logits)


def test_transformers_does_not_take_a_packed_folder_for_a_model(tmp_path: Path) -> None:
    """It would fill in weights of its own for those it does not find; so it must find none."""
    saved(tmp_path / "model")
    save_packed(tmp_path / "model", tmp_path / "packed")
    with pytest.raises(OSError, match=r"no file named .*model.safetensors"):
        loaded(tmp_path / "packed")
