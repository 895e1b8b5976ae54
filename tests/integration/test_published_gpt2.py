"""GPT-2 from a local folder, pruned with data from the command line: on a small one trained on the characters of real prose."""

from __future__ import annotations

import doctest
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from benchmarks.evidence import sources
from benchmarks.evidence.common import Setup, using
from examples.published import gpt2
from secateur.cli.app import app
from tests.guard.source import ROOT

transformers = pytest.importorskip("transformers")

WEIGHTS = 4 * 12 * 128 * 128
LAYERS = 4 * 4


def written(folder: Path, most: int | None = None) -> Path:
    """Moby-Dick where it is unpacked, else as much of Wikipedia; beside it most of it, and the rest."""
    unpacked = next((p for p in (ROOT / sources.DATASETS, ROOT / ".dev" / "package") if p.is_dir()), None)
    if unpacked is None and importlib.util.find_spec("gensim") is None:
        pytest.skip("gensim is not installed (make test installs it)")
    with using(Setup(datasets=str(unpacked) if unpacked else None)):
        text = sources.moby_dick() if unpacked else sources.wikipedia(0)[:1_200_000]
    (folder / "book.txt").write_text(text[:most], "utf-8")
    gpt2.main(["split", *(str(folder / f"{name}.txt") for name in ("book", "most", "rest"))])
    return folder


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("book"), 150_000)


def trained(book: Path, steps: int, folder: Path) -> Path:
    torch.set_num_threads(1)
    gpt2.main(["make", str(folder), "--text", str(book / "most.txt"), "--steps", str(steps)])
    return folder


@pytest.fixture(scope="module")
def folder(book: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(book, 12, tmp_path_factory.mktemp("gpt2") / "dense")


def prune(folder: Path, out: Path, *more: object) -> str:
    """What ``secateur prune`` prints."""
    arguments = ["prune", folder, "-o", out, "--sparsity", "0.5", *more]
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def data(book: Path, samples: int) -> tuple[object, ...]:
    return ("--calibration", book / "most.txt", "--length", 128, "--samples", samples)


def test_a_text_is_split_once(book: Path) -> None:
    whole, most, rest = ((book / f"{n}.txt").read_text("utf-8") for n in ("book", "most", "rest"))
    assert most + rest == whole and len(rest) == round(len(whole) / 10)


def test_every_byte_is_a_token() -> None:
    tokenizer = gpt2.characters()
    said = "“Whale-ship”, naïve: 9 £\n\tAhoy <|endoftext|>"
    ids = tokenizer(said)["input_ids"]
    assert len(ids) == len(said.replace(gpt2.END, "").encode()) + 1 and ids[-1] == tokenizer.eos_token_id == 256
    assert tokenizer.decode(ids) == said


def test_the_folder_is_one_of_transformers(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder))
    assert sum(p.numel() for p in model.parameters()) == 842_624
    assert model.lm_head.weight is model.transformer.wte.weight
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    ids = tokenizer("Call me Ishmael.", return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 16) and torch.isfinite(model(ids).logits).all()


def test_sparsegpt_from_the_command_line(folder: Path, book: Path, tmp_path: Path) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    said = prune(folder, tmp_path / "half", "--solver", "sparsegpt", *data(book, 24))
    assert f"{WEIGHTS // 2:,} of {WEIGHTS:,} chosen weights are zero (50.0000%)" in said
    assert len(re.findall(r"^transformer\.h\.\d\.\S+\.weight", said, re.M)) == LAYERS and "peak memory" in said
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert {p.name for p in (tmp_path / "half").iterdir()} == set(before)

    dense, half = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "half"))
    pruned = {n for n, w in half.items() if int((w == 0).sum()) == w.numel() // 2 and w.dim() == 2}
    assert len(pruned) == LAYERS and all(n.startswith("transformer.h.") for n in pruned)
    assert all(torch.equal(half[n], dense[n]) for n in half.keys() - pruned)
    assert all(not torch.equal(half[n][half[n] != 0], dense[n][half[n] != 0]) for n in pruned)  # what stays was moved

    rest = (book / "rest.txt").read_text("utf-8")
    scores = [gpt2.score(f, rest, 128, 8) for f in (folder, tmp_path / "half")]
    assert [count for _, count in scores] == [8, 8]
    assert 0.9 < scores[1][0] / scores[0][0] < 1.5

    again = prune(folder, tmp_path / "again", "--solver", "sparsegpt", *data(book, 24))
    assert said.splitlines()[0] == again.splitlines()[0]
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "half" / "model.safetensors"
    ).read_bytes()


def test_scores_are_told(folder: Path, book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpt2.main(["score", str(folder), str(folder), "--text", str(book / "rest.txt"), "--length", "64", "--count", "4"])
    lines = capsys.readouterr().out.splitlines()
    value, _ = gpt2.score(folder, (book / "rest.txt").read_text("utf-8"), 64, 4)
    assert (
        lines
        == [f"{folder}: perplexity {value:.2f} ({lines[0].split('(')[1].split()[0]} bits a token) in 4 × 64 tokens"] * 2
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_data_saves_of_a_trained_one(tmp_path: Path) -> None:
    """SparseGPT stays nearest to the dense network, random masks furthest, on text that neither training nor pruning saw."""
    book = written(tmp_path)
    dense = trained(book, 600, tmp_path / "dense")
    prune(dense, tmp_path / "random", "--criterion", "random", "--allocation", "uniform")
    prune(dense, tmp_path / "uniform", "--allocation", "uniform")
    prune(dense, tmp_path / "sparsegpt", "--solver", "sparsegpt", *data(book, 128))
    rest = (book / "rest.txt").read_text("utf-8")
    found = {n: gpt2.score(tmp_path / n, rest, 128, 128)[0] for n in ("dense", "sparsegpt", "uniform", "random")}
    assert sorted(found, key=found.__getitem__) == list(found), found


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(gpt2).failed == 0
