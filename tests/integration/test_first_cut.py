"""The first cut runs on real data, its counts are exact, and its page says what its numbers say."""

from __future__ import annotations

import doctest
import json
import math
import os
import re
import subprocess
import sys
from fractions import Fraction
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.first_cut import answer, words
from examples.first_cut.data import mnist_5k, split
from examples.first_cut.settings import FULL, METHODS, QUICK

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    """A quick run: the JSON, the page, and what it printed."""
    out = tmp_path_factory.mktemp("first-cut")
    command = [sys.executable, "-m", "examples.first_cut", "--quick", "--out", str(out)]
    # One thread: the networks are tiny, and threads that wait for each other on a busy machine are slower.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    page = (out / "report.html").read_text(encoding="utf-8")
    return json.loads((out / "report.json").read_text(encoding="utf-8")), page, done.stdout


def asked_count(n: int, sparsity: float) -> int:
    return round(Fraction(str(sparsity)) * n)


def runs_of(report: dict[str, Any], *keys: str) -> list[dict[str, Any]]:
    return [run for key in keys for run in report["measured"][key]["runs"]]


def test_every_combination_was_run_once(finished: tuple[dict[str, Any], str, str]) -> None:
    report, _, _ = finished
    for key in ("lenet", "cnn"):
        found = sorted((r["seed"], r["method"], r["asked"]) for r in runs_of(report, key))
        assert found == sorted((s, m, a) for s in QUICK.seeds for m in METHODS for a in QUICK.sparsities)
    found = sorted((r["asked"], r["method"]) for r in runs_of(report, "encoder"))
    assert found == sorted((a, m) for a in QUICK.encoder_sparsities for m in ("global", "uniform"))


def test_counts_are_exact(finished: tuple[dict[str, Any], str, str]) -> None:
    report, _, _ = finished
    totals = {"lenet": 266_200, "cnn": 60_688, "encoder": 10_616_832}
    for key, total in totals.items():
        for run in runs_of(report, key):
            layers, asked = run["layers"], run["asked"]
            assert run["total"] == sum(layer["numel"] for layer in layers) == total
            assert run["zeros"] == sum(layer["zeros"] for layer in layers)
            assert run["sparsity"] == run["zeros"] / total
            if run["method"] in ("uniform", "random"):
                assert [r["zeros"] for r in layers] == [asked_count(r["numel"], asked) for r in layers]
            else:
                assert run["zeros"] == asked_count(total, asked)


def test_flops_of_a_fully_connected_network_are_two_a_surviving_weight(
    finished: tuple[dict[str, Any], str, str],
) -> None:
    for run in runs_of(finished[0], "lenet"):
        assert run["flops_dense"] == 2 * run["total"]
        assert run["flops"] == 2 * (run["total"] - run["zeros"])


def test_accuracies_are_counts_of_test_images(finished: tuple[dict[str, Any], str, str]) -> None:
    report, images = finished[0], 10 * QUICK.test
    for run in runs_of(report, "lenet", "cnn"):
        for value in (run["before"], run["after"]):
            assert value is None or math.isclose(value * images, round(value * images), abs_tol=1e-9)
    assert all(r["after"] is None for r in runs_of(report, "lenet"))
    assert all(r["after"] is not None for r in runs_of(report, "cnn"))


def test_paired_differences_are_over_seeds(finished: tuple[dict[str, Any], str, str]) -> None:
    report, _, _ = finished
    by = {(r["method"], r["asked"], r["seed"]): r["after"] for r in runs_of(report, "cnn")}
    for method, row in report["summary"]["cnn"]["points"].items():
        for p in row:
            at = p["sparsity"]
            differences = [by[method, at, s] - by["global", at, s] for s in QUICK.seeds]
            assert p["minus_global"]["mean"] == pytest.approx(sum(differences) / len(differences))
            # n = 2: the half width is t(0.975, 1) times half the difference of the two.
            half = 12.7062 * abs(differences[0] - differences[1]) / 2
            assert p["minus_global"]["half"] == pytest.approx(half, abs=1e-4)


def test_the_encoder_scores_as_it_is_known_to(finished: tuple[dict[str, Any], str, str]) -> None:
    encoder = finished[0]["measured"]["encoder"]
    assert encoder["dense"]["wordsim"]["score"] == pytest.approx(0.729, abs=0.002)
    assert encoder["dense"]["lee50"]["score"] == pytest.approx(0.656, abs=0.002)
    (uniform,) = (r for r in encoder["runs"] if r["method"] == "uniform")
    assert uniform["scores"]["wordsim"]["score"] == pytest.approx(0.726, abs=0.004)
    assert uniform["scores"]["lee50"]["score"] == pytest.approx(0.585, abs=0.004)


def test_the_answer_follows_from_the_measured_layers(finished: tuple[dict[str, Any], str, str]) -> None:
    report, page, printed = finished
    places = {"lenet": 0.9, "cnn": 0.9, "encoder": 0.5}
    for (key, at), given in zip(places.items(), report["answer"]["networks"], strict=True):
        differences = []
        for run in runs_of(report, key):
            if run["method"] == "global" and run["asked"] == at:
                shares = [layer["zeros"] / layer["numel"] for layer in run["layers"]]
                half = len(shares) // 2
                differences.append(sum(shares[-half:]) / half - sum(shares[:half]) / half)
        less, more = min(differences) >= 0.02, max(differences) <= -0.02
        assert given["verdict"] == ("yes" if less else "no" if more else "unclear")
        assert given["late_minus_early"]["mean"] == pytest.approx(sum(differences) / len(differences))
    for said in (report["answer"]["headline"], *report["answer"]["sentences"]):
        assert said in unescape(page)
        assert said in printed


def test_the_page_loads_nothing(finished: tuple[dict[str, Any], str, str]) -> None:
    page = finished[1]
    loads = r"https?:|//[a-z]|\b(src|href|srcset|action|data)\s*=|url\(|@import|<script|<link|<iframe"
    assert re.findall(loads, page, re.IGNORECASE) == []
    assert page.count("<svg") == page.count("</svg>") == 11


def test_the_output_is_plain_lines_where_there_is_no_terminal(
    finished: tuple[dict[str, Any], str, str],
) -> None:
    printed = finished[2]
    assert "\x1b" not in printed and "\r" not in printed
    assert "report.html" in printed.splitlines()[-1]


def test_the_split_is_stratified_and_disjoint() -> None:
    data = mnist_5k()
    data.images[:, 0, 0, 0] = torch.arange(5000)
    seen = []
    for seed in (0, 0, 1):
        parts = split(data, seed, FULL)
        ids = torch.cat([p.images[:, 0, 0, 0] for p in (parts.train, parts.validation, parts.test)])
        assert len(ids.unique()) == len(ids) == 5000
        assert parts.train.labels.bincount().tolist() == [FULL.train] * 10
        assert parts.test.labels.bincount().tolist() == [FULL.test] * 10
        seen.append(ids)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("module", [answer, words])
def test_examples_in_docstrings(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


def measured(title: str, *shares: tuple[float, ...]) -> dict[str, Any]:
    """Runs under global, one a seed, with layers of the given shares."""
    return {
        "title": title,
        "runs": [
            {
                "method": "global",
                "asked": 0.5,
                "layers": [{"name": f"l{i}", "fan_in": 9 - i, "sparsity": s} for i, s in enumerate(seed)],
            }
            for seed in shares
        ],
    }


@pytest.mark.parametrize(
    ("seeds", "verdict", "words_"),
    [
        (((0.1, 0.5, 0.9), (0.2, 0.5, 0.8)), "yes", "prunes the early layers less"),
        (((0.9, 0.5, 0.1), (0.8, 0.5, 0.2)), "no", "prunes the early layers more"),
        (((0.1, 0.5, 0.9), (0.9, 0.5, 0.1)), "unclear", "do not differ clearly"),
        (((0.5, 0.5, 0.51), (0.5, 0.5, 0.51)), "unclear", "do not differ clearly"),
    ],
)
def test_the_answer_can_go_every_way(seeds: Any, verdict: str, words_: str) -> None:
    found = answer.early(measured("Net", *seeds), 0.5, [0.5])
    assert found.verdict == verdict and found.same_verdict == (1, 1)
    assert words_ in answer.headline([found])
    assert found.early_layers == ["l0"] and found.late_layers == ["l2"]


def test_networks_that_disagree_are_named_apart() -> None:
    less = answer.early(measured("A", (0.1, 0.9)), 0.5, [0.5])
    more = answer.early(measured("B", (0.9, 0.1)), 0.5, [0.5])
    said = answer.headline([less, more])
    assert said.startswith("It depends on the network: in A it prunes the early layers less;")
    assert said.endswith("; in B it prunes the early layers more.")
    assert answer.headline([less]) == "Yes: in A it prunes the early layers less."
