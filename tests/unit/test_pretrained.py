"""A folder of transformers pruned with data, from Python and from the command line: as the model in memory, or nothing."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import secateur
from secateur.errors import OutputExists, PlanMismatch
from secateur.evaluate.text import sequences
from tests.contract.disk import load
from tests.unit.conftest import Run, tree
from tests.unit.test_cli_process import process

transformers = pytest.importorskip("transformers")
LENGTH, SAMPLES = 16, 12
TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse. " * 8


def tokenizer() -> Any:
    """One token a character."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {c: i for i, c in enumerate(["<end>", *sorted(set(TEXT))])}
    made = Tokenizer(models.WordLevel(letters, unk_token="<end>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<end>")


def gpt2(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer()), n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0,
        dtype=dtype,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).to(dtype)


def saved(where: Path, model: nn.Module | None = None, **how: Any) -> Path:
    transformers.utils.logging.disable_progress_bar()
    (gpt2() if model is None else model).save_pretrained(where, **how)
    tokenizer().save_pretrained(where)
    return where


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def batches(seed: int = 0) -> list[Tensor]:
    quiet = partial(tokenizer(), add_special_tokens=False)
    return sequences(quiet, TEXT, length=LENGTH, count=SAMPLES, seed=seed)


def asked(folder: Path, text: Path, out: Path, *more: object) -> tuple[object, ...]:
    data = ("--calibration", text, "--length", LENGTH, "--samples", SAMPLES)
    return ("prune", folder, *data, "-o", out, *more)


WEIGHTS = [
    f"transformer.h.{i}.{n}.weight" for i in range(2) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]
HOWS: dict[str, tuple[dict[str, Any], tuple[object, ...]]] = {
    "wanda": ({"criterion": "wanda", "sparsity": 0.5}, ("--criterion", "wanda", "--sparsity", ".5")),
    "sparsegpt": ({"solver": "sparsegpt", "sparsity": 0.3}, ("--solver", "sparsegpt", "--sparsity", ".3")),
    "wanda, 2:4": ({"criterion": "wanda", "pattern": "2:4"}, ("--criterion", "wanda", "--pattern", "2:4")),
    "outliers": (
        {"criterion": "wanda", "sparsity": 0.5, "allocation": "owl", "ignore": "*h.0"},
        ("--criterion", "wanda", "--sparsity", ".5", "--allocation", "owl", "--ignore", "*h.0"),
    ),
}


@pytest.mark.filterwarnings("ignore:fewer inputs than features:secateur.SecateurWarning")
@pytest.mark.filterwarnings("ignore:4 tensors stay dense:secateur.SecateurWarning")
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("how", HOWS)
def test_as_the_model_in_memory(how: str, shards: bool, text: Path, tmp_path: Path, command: Run) -> None:
    choice, options = HOWS[how]
    folder = saved(tmp_path / "model", **({"max_shard_size": "20KB"} if shards else {}))
    assert len(list(folder.glob("*.safetensors"))) > 1 or not shards
    source, out, again = tree(folder), tmp_path / "out", tmp_path / "again"
    model = gpt2()
    expected = secateur.prune(model, **choice, calibration=batches())
    done = command(*asked(folder, text, out, *options))
    assert done.code == 0, done.err
    report = secateur.prune(folder, **choice, calibration=batches(), out=again)
    assert tree(out) == tree(again) and tree(folder) == source
    assert {r.name: r.zeros for r in report.chosen} == {r.name: r.zeros for r in expected.chosen}
    assert report.asked == expected.asked and report.out == str(again) and report.total == expected.total
    found, state, before = load(out), model.state_dict(), load(folder)
    assert found.keys() == before.keys()
    for name, t in found.items():
        assert torch.equal(t, state[name]), name
        chosen = name in {r.name for r in expected.chosen}
        assert chosen != torch.equal(t, before[name]), name
    loaded = transformers.GPT2LMHeadModel.from_pretrained(out)
    assert torch.equal(loaded(batches()[0]).logits, model.eval()(batches()[0]).logits)
    others = {n for n in source if not n.endswith(".safetensors")}
    assert all(tree(out)[n] == source[n] for n in others) and set(tree(out)) == set(source)


def test_what_is_printed(folder: Path, text: Path, tmp_path: Path, command: Run) -> None:
    """The layers by block with their time and error; what it took; as JSON the facts alone."""
    done = command(*asked(folder, text, tmp_path / "out", "--solver", "sparsegpt", "--sparsity", "0.25"))
    assert done.code == 0 and done.err == ""
    assert [n for n in WEIGHTS if n in done.out] == WEIGHTS
    words = ["transformer.h.0 (all", "transformer.h.1 (all", "sparsity 0.25, sparsegpt, uniform", "seconds", "damping"]
    for word in [*words, "error", "peak memory", f"written to {tmp_path / 'out'}"]:
        assert word in done.out, word
    facts = command(
        *asked(folder, text, tmp_path / "json", "--criterion", "wanda", "--sparsity", "0.25", "--json")
    ).facts
    assert facts["asked"] == {
        "sparsity": 0.25, "threshold": None, "criterion": "wanda", "allocation": "uniform", "pattern": "row",
    }  # fmt: skip
    assert facts["out"] == str(tmp_path / "json") and facts["sparsity"] == 0.25
    assert {r["name"] for r in facts["rows"] if r["skip"] is None} == set(WEIGHTS)


def test_the_seed_draws_the_sequences(folder: Path, text: Path, tmp_path: Path, command: Run) -> None:
    for i, seed in enumerate((0, 0, 5)):
        options = ("--criterion", "wanda", "--sparsity", ".5", "--seed", seed)
        assert command(*asked(folder, text, tmp_path / str(i), *options)).code == 0
    trees = [tree(tmp_path / str(i)) for i in range(3)]
    assert trees[0] == trees[1] != trees[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_16_bits_stay_what_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also where the config names another dtype than the file holds."""
    folder = saved(tmp_path / "model", gpt2(dtype))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    report = secateur.prune(folder, 0.5, criterion="wanda", calibration=batches(), out=tmp_path / "out")
    found, before = load(tmp_path / "out"), load(folder)
    for n in before:
        left = found[n] != 0
        assert found[n].dtype == dtype and torch.equal(found[n][left], before[n][left])
    assert report.sparsity == 0.5 and sum(int((found[n] == 0).sum()) for n in WEIGHTS) == report.zeros


def without(folder: Path, *names: str) -> Path:
    for n in names:
        (folder / n).unlink()
    return folder


def with_config(folder: Path, **more: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    return folder


def with_tensors(folder: Path, change: Any) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors), path, metadata={"format": "pt"})
    return folder


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2 as its authors name it, without the prefix: transformers loads it, under other names."""
    return {n.removeprefix("transformer."): t for n, t in tensors.items()}


def torn(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if n != "transformer.h.1.ln_2.weight"}


def mixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.bfloat16() if "h.1.mlp" in n else t for n, t in tensors.items()}


BROKEN: dict[str, tuple[Any, int, str]] = {
    "no tokenizer": (lambda f: without(f, "tokenizer.json", "tokenizer_config.json"), 3, "has no (usable )?tokenizer"),
    "no config": (lambda f: without(f, "config.json"), 3, "has no (config.json|tokenizer)"),
    "a config that is none": (lambda f: f / "config.json", 3, "is not a config of transformers|has no tokenizer"),
    "an unknown architecture": (lambda f: with_config(f, architectures=["Gpt9"]), 3, r"names the architecture \['Gpt9'\]"),
    "no architecture": (lambda f: with_config(f, architectures=None), 3, r"names the architecture \[\]"),
    "an architecture that is none": (lambda f: with_config(f, architectures=["GPT2Config"]), 3, "names the architecture"),
    "another size": (lambda f: with_config(f, n_embd=32), 3, "transformers cannot load"),
    "weights that are missing": (lambda f: with_tensors(f, torn), 3, "not hold all weights of a GPT2LMHeadModel.*ln_2.weight"),
    "other names": (lambda f: with_tensors(f, renamed), 3, "it names or cuts its tensors otherwise than the model does"),
    "several dtypes": (lambda f: with_tensors(f, mixed), 3, "stores the weights of its layers in bfloat16, float32"),
    "no weights": (lambda f: without(f, "model.safetensors"), 3, "must hold one safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_folders_that_cannot_be_pruned_so(case: str, folder: Path, text: Path, tmp_path: Path, command: Run) -> None:
    change, code, message = BROKEN[case]
    found = change(folder)
    if found.is_file():
        found.write_text("{")
    before = tree(tmp_path)
    done = command(*asked(folder, text, tmp_path / "out", "--criterion", "wanda", "--sparsity", ".5"))
    assert done.code == code and not done.out
    assert re.search(message, done.err.replace("\n", " ")), done.err
    assert tree(tmp_path) == before


TEXTS = {
    "too short": ("Call me", "the text is too short: 12 sequences of 16 tokens need 192 tokens, and it has 7"),
    "empty": (" \n", "there is nothing but white space"),
    "not UTF-8": (b"\xff\xfe\x00", "is not UTF-8"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts_that_will_not_do(case: str, folder: Path, tmp_path: Path, command: Run) -> None:
    content, message = TEXTS[case]
    path = tmp_path / "bad.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = tree(tmp_path)
    for source in (path, tmp_path / "nowhere.txt"):
        done = command(*asked(folder, source, tmp_path / "out", "--criterion", "wanda", "--sparsity", ".5"))
        assert done.code == 3 and (message in done.err or "cannot be read" in done.err)
    assert tree(tmp_path) == before


def test_an_output_that_is_there_is_refused_before_anything_is_read(folder: Path, tmp_path: Path, command: Run) -> None:
    """Neither the text nor the tokenizer nor the weights are looked at."""
    (tmp_path / "out").mkdir()
    without(folder, "tokenizer.json", "config.json", "model.safetensors")
    done = command(*asked(folder, tmp_path / "no.txt", tmp_path / "out", "--criterion", "wanda", "--sparsity", ".5"))
    assert done.code == 4 and "is already there" in done.err


def test_places_that_no_result_can_have(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out before the model is loaded, let alone run."""
    monkeypatch.setattr(transformers.GPT2LMHeadModel, "from_pretrained", None)
    for out, error, message in (
        (folder / "inside", secateur.BadInput, "one lies inside the other"),
        (folder, OutputExists, "is already there"),
        (tmp_path / "no" / "out", secateur.BadInput, "does not exist; make it first"),
    ):
        with pytest.raises(error, match=message):
            secateur.prune(folder, 0.5, criterion="wanda", calibration=batches(), out=out)


def test_an_output_is_replaced_if_asked(folder: Path, text: Path, tmp_path: Path, command: Run) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    options = ("--criterion", "wanda", "--sparsity", ".5", "--overwrite")
    assert command(*asked(folder, text, out, *options)).code == 0
    assert load(out)[WEIGHTS[0]].eq(0).float().mean() == 0.5


USAGE: dict[str, tuple[tuple[object, ...], str]] = {
    "a solver without a text": (("--solver", "sparsegpt", "--sparsity", ".5"), "--solver needs --calibration TEXT"),
    "samples without a text": (("--samples", 4, "--sparsity", ".5"), "--samples needs --calibration TEXT"),
    "a length without a text": (("--length", 4, "--sparsity", ".5"), "--length needs --calibration TEXT"),
    "a seed without a text": (("--seed", 4, "--sparsity", ".5"), "--seed needs --calibration TEXT"),
    "a dry run": (
        ("--dry-run", "--criterion", "wanda", "--calibration", "x.txt"),
        "--dry-run does not go with --calibration",
    ),
    "pickles": (
        ("--allow-pickle", "--criterion", "wanda", "--calibration", "x.txt"),
        "--allow-pickle does not go with",
    ),
}


@pytest.mark.parametrize("case", USAGE)
def test_options_that_do_not_go_together(case: str, folder: Path, tmp_path: Path, command: Run) -> None:
    options, message = USAGE[case]
    done = command("prune", folder, "-o", tmp_path / "out", *options)
    assert done.code == 2 and message in " ".join(done.err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_refusals_of_the_command(folder: Path, text: Path, tmp_path: Path, command: Run) -> None:
    out = tmp_path / "out"
    for options, message in (
        (("--criterion", "magnitude", "--sparsity", ".5"), "nothing that was asked for needs data"),
        (("--criterion", "wanda"), "say how much to prune"),
        (("--solver", "sparse", "--sparsity", ".5"), "solver must be one of sparsegpt"),
        (("--criterion", "wanda", "--sparsity", "50"), "sparsity"),
        (("--solver", "sparsegpt", "--sparsity", ".5", "--pattern", "channel"), "prunes single weights and N:M"),
        (("--criterion", "wanda", "--sparsity", ".5", "--include", "*nothing*"), "matches nothing"),
    ):
        done = command(*asked(folder, text, out, *options))
        assert done.code == 3 and message in done.err.replace("\n", " "), done.err
    done = command(
        "prune",
        folder / "model.safetensors",
        "-o",
        out,
        "--criterion",
        "wanda",
        "--sparsity",
        ".5",
        "--calibration",
        text,
    )
    assert done.code == 3 and "is not a folder" in done.err
    done = command("prune", folder, "-o", out, "--criterion", "wanda", "--sparsity", ".5")
    assert done.code == 3 and "pass calibration=" in done.err
    assert not out.exists()


def test_an_error_on_the_way_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)

    def stop(step: Any) -> None:
        raise KeyboardInterrupt

    calibration = secateur.Calibration(batches(), progress=stop)
    with pytest.raises(KeyboardInterrupt):
        secateur.prune(folder, 0.5, criterion="wanda", calibration=calibration, out=tmp_path / "out")
    assert tree(tmp_path) == before
    with_tensors(folder, renamed)
    before = tree(tmp_path)
    with pytest.raises(PlanMismatch, match="names or cuts its tensors otherwise"):
        secateur.prune(folder, 0.5, criterion="wanda", calibration=batches(), out=tmp_path / "out")
    assert tree(tmp_path) == before


SLOW = """
import time
from secateur.cli import language, main
told = language.bars
from contextlib import contextmanager
@contextmanager
def slowly(state):
    with told(state) as done:
        def step(s):
            done(s)
            print("step", s.block, flush=True)
            time.sleep(60)
        yield step
language.bars = slowly
main()
"""


SIGNALS = [signal.SIGTERM, *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGINT, signal.SIGKILL))]


@pytest.mark.parametrize("how", SIGNALS, ids=["SIGTERM", "SIGINT", "SIGKILL"])
def test_a_killed_command_leaves_no_stage(how: signal.Signals, folder: Path, text: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    running = process(
        *asked(folder, text, tmp_path / "out", "--criterion", "wanda", "--sparsity", ".5"),
        code=SLOW,
        stdout=-1,
        stderr=-1,
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "step transformer.h.0\n"
    running.send_signal(how)
    began = time.monotonic()
    running.communicate(timeout=30)
    assert time.monotonic() - began < 20
    assert running.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[how]
    assert tree(tmp_path) == before
