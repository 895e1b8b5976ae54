"""Checkpoints: what changes in a file and what does not, what is carried over, and files that are not what they say."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import secateur
from secateur.errors import BadInput, BadTensor, NothingChosen, OutputExists, SecateurError
from secateur.stores import safetensors_file, staging
from secateur.stores.base import Store
from secateur.stores.checkpoint import CheckpointStore

WEIGHTS = {"conv.weight": (8, 4, 3, 3), "fc.weight": (6, 8)}


def state() -> dict[str, Tensor]:
    """Weights, and everything else that lies in real files beside them."""
    g = torch.Generator().manual_seed(0)
    return {
        **{n: torch.randn(s, generator=g) for n, s in WEIGHTS.items()},
        "conv.bias": torch.randn(8, generator=g),
        "norm.weight": torch.randn(8, generator=g), "norm.running_mean": torch.zeros(8),
        "norm.num_batches_tracked": torch.tensor(7),
        "embed_tokens.weight": torch.randn(10, 8, generator=g).bfloat16(),
        "mask": torch.ones(3, dtype=torch.bool), "empty": torch.empty(0, 4), "scale": torch.tensor(2.0),
        "fft": torch.randn(2, 2, dtype=torch.complex64),
        "half.weight": torch.randn(4, 8, generator=g).half(),
        "tiny.weight": torch.randn(4, 4, generator=g).to(torch.float8_e4m3fn),
    }  # fmt: skip


def one_file(folder: Path, tensors: Mapping[str, Tensor] | None = None) -> Path:
    path = folder / "model.safetensors"
    save_file(dict(tensors or state()), path, metadata={"format": "pt", "note": "kept"})
    return path


def hub_folder(folder: Path, tensors: Mapping[str, Tensor] | None = None) -> Path:
    """A sharded model as hubs hold it, with everything that lies beside the weights."""
    folder.mkdir(parents=True)
    tensors = state() if tensors is None else tensors
    names = ["model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"]
    table = {n: names[i % 2] for i, n in enumerate(tensors)}
    for file in set(table.values()):
        save_file({n: t for n, t in tensors.items() if table[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"x": 1}, "weight_map": table}))
    for name in ("config.json", "tokenizer.json", "special_tokens_map.json", "README.md", "modeling_own.py"):
        (folder / name).write_text(f"content of {name}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    """(length of the header with its 8 bytes, the header)."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return 8 + size, json.loads(raw[8 : 8 + size])


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    """A file by hand, whatever its header says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ----------------------------------------------------------------------------------- what changes


def test_it_follows_the_protocol(tmp_path: Path) -> None:
    store = CheckpointStore(one_file(tmp_path))
    assert isinstance(store, Store)
    assert [s.name for s in store.specs()] == sorted(state())
    assert all(s.order is None for s in store.specs())
    counts = torch.tensor([1, 2])
    assert store.sum(counts) is counts
    for spec in store.specs():
        (part,) = store.parts(spec, "whole")
        want = state()[spec.name] if spec.name != "fft" else load_file(tmp_path / "model.safetensors")["fft"]
        assert part.whole
        assert part.tensor.dtype == want.dtype
        assert torch.equal(
            part.tensor.view(torch.uint8) if want.ndim else part.tensor, want.view(torch.uint8) if want.ndim else want
        )


def test_only_the_pruned_bytes_of_a_file_change(tmp_path: Path) -> None:
    source, out = one_file(tmp_path), tmp_path / "pruned.safetensors"
    before = source.read_bytes()
    report = secateur.prune(source, 0.5, out=out)
    after = out.read_bytes()
    assert source.read_bytes() == before
    assert len(after) == len(before)
    size, header = header_of(source)
    assert after[:size] == before[:size]
    assert header["__metadata__"] == {"format": "pt", "note": "kept"}
    chosen = {r.name for r in report.chosen}
    assert chosen == {*WEIGHTS, "half.weight", "tiny.weight"}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        a, b = (size + at for at in entry["data_offsets"])
        if name not in chosen:
            assert after[a:b] == before[a:b], name
            continue
        width = (b - a) // max(1, torch.Size(entry["shape"]).numel())
        for i in range(a, b, width):  # every weight is as it was, or zero
            assert after[i : i + width] in (before[i : i + width], bytes(width))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "pruned.safetensors"]


def test_a_folder_keeps_everything_but_zeros(tmp_path: Path) -> None:
    source, out = hub_folder(tmp_path / "in"), tmp_path / "out"
    before = tree(source)
    report = secateur.prune(source, 0.5, out=out)
    assert tree(source) == before
    after = tree(out)
    assert set(after) == set(before)
    changed = {n for n in after if after[n] != before[n]}
    assert changed == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert all(header_of(source / n) == header_of(out / n) for n in changed)
    loaded = {n: t for f in sorted(changed) for n, t in load_file(out / f).items()}
    assert sum(int((loaded[r.name].double() == 0).sum()) for r in report.chosen) == report.zeros
    assert report.zeros == round(0.5 * report.total)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_a_file_and_its_shards_give_the_same_weights(tmp_path: Path) -> None:
    one, shards = one_file(tmp_path), hub_folder(tmp_path / "in")
    for options in ({"sparsity": 0.7}, {"sparsity": 0.5, "allocation": "lamp"}, {"pattern": "2:4"}, {"threshold": 0.3}):
        a, b = tmp_path / "a.safetensors", tmp_path / "b"
        secateur.prune(one, out=a, overwrite=True, **options)  # type: ignore[arg-type]
        secateur.prune(shards, out=b, overwrite=True, **options)  # type: ignore[arg-type]
        left = load_file(a)
        right = {n: t for f in b.glob("*.safetensors") for n, t in load_file(f).items()}
        for name in (*WEIGHTS, "half.weight", "tiny.weight"):
            assert torch.equal(left[name].double(), right[name].double()), (name, options)


def test_two_of_four_is_seen_in_the_file(tmp_path: Path) -> None:
    """Of every four in a row along the input two are left, in linear and convolution weights alike."""
    out = tmp_path / "out"
    secateur.prune(hub_folder(tmp_path / "in"), pattern="2:4", out=out)
    loaded = {n: t for f in out.glob("*.safetensors") for n, t in load_file(f).items()}
    for name in ("fc.weight", "conv.weight", "half.weight"):
        w = loaded[name]
        groups = w.movedim(1, -1).reshape(-1, 4)
        assert ((groups != 0).sum(1) == 2).all(), name
        dense = state()[name].movedim(1, -1).reshape(-1, 4).abs().float()
        assert torch.equal((groups != 0).float() * dense, dense * (dense >= dense.sort(1).values[:, 2:3]))


def test_wrapped_names_of_a_file_are_kept_in_the_file(tmp_path: Path) -> None:
    source = one_file(tmp_path, {f"module._orig_mod.{n}": t for n, t in state().items() if n in WEIGHTS})
    out = tmp_path / "out.safetensors"
    report = secateur.prune(source, 0.5, out=out)
    plain = {n: t for n, t in state().items() if n in WEIGHTS}
    secateur.prune(plain, 0.5)
    assert [r.name for r in report.chosen] == sorted(WEIGHTS)
    found = load_file(out)
    assert all(torch.equal(found[f"module._orig_mod.{n}"], plain[n]) for n in WEIGHTS)


def test_dtypes_that_torch_does_not_know_are_left_alone(tmp_path: Path) -> None:
    header = {
        "q": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]},
        "w.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [4, 20]},
    }
    data = b"\x12\x34\x56\x78" + struct.pack("<4f", 1, -2, 3, -4)
    source, out = write_raw(tmp_path / "a.safetensors", header, data), tmp_path / "b.safetensors"
    report = secateur.prune(source, 0.5, out=out)
    assert [r.name for r in report.rows] == ["w.weight"]
    assert out.read_bytes()[-20:] == b"\x12\x34\x56\x78" + struct.pack("<4f", 0, 0, 3, -4)


def test_scalars_and_empty_tensors_of_a_file(tmp_path: Path) -> None:
    source, out = one_file(tmp_path), tmp_path / "out.safetensors"
    report = secateur.prune(source, 0.5, include=["scale", "empty", "fc"], out=out)
    assert [r.name for r in report.chosen] == ["empty", "fc.weight", "scale"]
    assert (report.total, report.zeros) == (49, 24)
    assert load_file(out)["scale"].shape == ()


def test_roles_may_be_given_for_a_file(tmp_path: Path) -> None:
    source, out = one_file(tmp_path), tmp_path / "out.safetensors"
    report = secateur.prune(source, 0.5, roles={"embed_tokens": "linear"}, include="embed_tokens", out=out)
    assert (report["embed_tokens.weight"].role, report.total) == ("linear", 80)


def test_masks_and_plans_of_a_file(tmp_path: Path) -> None:
    source, out = one_file(tmp_path), tmp_path / "out.safetensors"
    plan = secateur.plan(source, 0.5, criterion="random")
    report = secateur.apply(plan, source, out=out)
    assert (plan.prune, plan.total) == (report.zeros, report.total)
    masks = secateur.masks(out)
    assert sum(int((~m).sum()) for m in masks.values()) == report.zeros
    again = tmp_path / "again.safetensors"
    secateur.apply(masks, source, out=again)
    assert again.read_bytes() == out.read_bytes()


# ------------------------------------------------------------------------- what is carried, modes


def test_other_weights_are_not_carried_over(tmp_path: Path) -> None:
    """They are the same weights unpruned; a folder that held them would load them, or lie."""
    source = hub_folder(tmp_path / "in")
    for name in (
        "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5",
        "flax_model.msgpack", "model.gguf", "model.onnx", "consolidated.pth", "consolidated.safetensors", "rust_model.ot",
    ):  # fmt: skip
        (source / name).write_bytes(b"weights")
    for name in (".gitattributes", ".cache/huggingface/x.lock"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("hidden")
    out = tmp_path / "out"
    secateur.prune(source, 0.5, out=out)
    assert set(tree(out)) == set(tree(hub_folder(tmp_path / "clean")))


def test_other_parts_of_a_model_are_carried_over(tmp_path: Path) -> None:
    """The folders of a sentence encoder are modules of their own, whose weights are not those pruned."""
    source = hub_folder(tmp_path / "in")
    for folder, name in (
        ("2_Dense", "model.safetensors"),
        ("3_Dense", "pytorch_model.bin"),
        ("4_Own", "other.safetensors"),
    ):
        (source / folder).mkdir()
        (source / folder / name).write_bytes(b"own weights")
    out = tmp_path / "out"
    secateur.prune(source, 0.5, out=out)
    for path in ("2_Dense/model.safetensors", "3_Dense/pytorch_model.bin", "4_Own/other.safetensors"):
        assert (out / path).read_bytes() == b"own weights", path


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_modes_are_those_the_umask_asks_for(tmp_path: Path, mask: int) -> None:
    file, folder = one_file(tmp_path), hub_folder(tmp_path / "in")
    file.chmod(0o600)
    folder.chmod(0o700)
    for p in folder.iterdir():
        p.chmod(0o600 if p.is_file() else 0o700)
    with umask(mask):
        secateur.prune(file, 0.5, out=tmp_path / "out.safetensors")
        secateur.prune(folder, 0.5, out=tmp_path / "out")
        secateur.save_plan(secateur.plan(file, 0.5, criterion=lambda weight: weight), tmp_path / "plan.json")
    made = [
        tmp_path / "out.safetensors",
        tmp_path / "out",
        *(tmp_path / "out").rglob("*"),
        *tmp_path.glob("plan.json*"),
    ]
    assert len(made) > 10
    for path in made:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_a_read_only_source_is_no_hindrance(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "in")
    for p in (*folder.rglob("*"), folder):
        p.chmod(0o555 if p.is_dir() else 0o444)
    secateur.prune(folder, 0.5, out=tmp_path / "out")
    secateur.prune(folder, 0.9, out=tmp_path / "out", overwrite=True)
    assert all(p.stat().st_mode & 0o200 for p in (tmp_path / "out").rglob("*"))
    for p in (folder, *folder.rglob("*")):
        p.chmod(0o755 if p.is_dir() else 0o644)


# --------------------------------------------------------------------------- where the result goes


def refused(error: type[Exception], text: str, source: Path, out: Path, root: Path, **options: Any) -> None:
    """The call raises, and nothing below ``root`` has changed."""
    before = tree(root)
    with pytest.raises(error, match=text):
        secateur.prune(source, 0.5, out=out, **options)
    assert tree(root) == before


def test_an_output_that_is_there_is_left_alone(tmp_path: Path) -> None:
    file, folder = one_file(tmp_path), hub_folder(tmp_path / "in")
    mine, dangling = tmp_path / "mine.safetensors", tmp_path / "link.safetensors"
    mine.write_text("mine")
    dangling.symlink_to("nowhere")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    for source, out in ((file, mine), (file, dangling), (folder, taken), (folder, mine)):
        refused(
            OutputExists,
            r"already there; choose another path, or say overwrite=True \(--overwrite\)",
            source,
            out,
            tmp_path,
        )
    with pytest.raises(FileExistsError):
        secateur.apply(secateur.plan(file, 0.5), file, out=mine)


def test_overwrite_replaces_what_is_there(tmp_path: Path) -> None:
    file, folder = one_file(tmp_path), hub_folder(tmp_path / "in")
    kept = tmp_path / "kept.safetensors"
    kept.write_text("kept")
    link = tmp_path / "link.safetensors"
    link.symlink_to(kept)
    for source, out in ((file, tmp_path / "a.safetensors"), (file, link), (folder, tmp_path / "b")):
        for s in (0.5, 0.9):
            report = secateur.prune(source, s, out=out, overwrite=True)
            assert secateur.inspect(out).zeros == report.zeros
    assert kept.read_text() == "kept"
    assert not link.is_symlink()
    (tmp_path / "b" / "stale.txt").write_text("x")
    secateur.prune(folder, 0.5, out=tmp_path / "b", overwrite=True)
    assert set(tree(tmp_path / "b")) == set(tree(folder))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_source_is_never_the_output(tmp_path: Path) -> None:
    file, folder = one_file(tmp_path), hub_folder(tmp_path / "in")
    alias = tmp_path / "alias.safetensors"
    alias.symlink_to(file)
    around = tmp_path / "a" / "b"
    inner = hub_folder(around / "inner")
    (around / "precious.txt").write_text("mine")
    text = "is the source, or one lies inside the other; the source is never written"
    for source, out in (
        (file, file), (file, alias), (alias, file), (folder, folder), (folder, folder / "out"), (inner, around),
        (inner, tmp_path / "a"), (folder, tmp_path / "in" / ".." / "in"),
    ):  # fmt: skip
        refused(BadInput, text, source, out, tmp_path, overwrite=True)


def test_outputs_of_the_wrong_kind(tmp_path: Path) -> None:
    file = one_file(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    text = "the source is a file, so out must be the name of a .safetensors file; got"
    refused(BadInput, text, file, tmp_path / "out", tmp_path)
    refused(BadInput, text, file, tmp_path / "out.bin", tmp_path)
    refused(BadInput, text, file, tmp_path / "folder.safetensors", tmp_path, overwrite=True)
    refused(
        BadInput,
        "the folder .*no/such does not exist; make it first",
        file,
        tmp_path / "no/such/out.safetensors",
        tmp_path,
    )


def test_a_full_disk_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = one_file(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(BadInput, r"has 1000 bytes free, and the result needs \d+", file, tmp_path / "out.safetensors", tmp_path)


# -------------------------------------------------------------------- faults while it is written

OPERATIONS = [
    (os, "open"), (os, "fsync"), (os, "link"), (os, "close"), (shutil, "copyfile"), (Path, "open"), (Path, "rename"),
    (Path, "replace"), (Path, "mkdir"), (os, "mkdir"), (staging, "_exchange"),
]  # fmt: skip


def failing_at(n: int, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]) -> list[str]:
    """Makes the n-th file operation from now on fail, once; returns the list of operations seen."""
    seen: list[str] = []

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) == n:
                raise error()
            return real(*args, **kwargs)

        return operation

    for owner, name in OPERATIONS:
        monkeypatch.setattr(owner, name, wrap(name, getattr(owner, name)))
    return seen


@pytest.mark.parametrize(
    "error", [lambda: OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt], ids=["full", "^C"]
)
@pytest.mark.parametrize("old", [False, True], ids=["new", "over"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_at_any_moment_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, old: bool, error: Callable[[], BaseException]
) -> None:
    """The n-th file operation fails, for every n until none does: the old output or the new one is there, whole."""
    small = {"a.weight": torch.arange(1.0, 9).view(2, 4), "b.weight": torch.arange(1.0, 9).view(4, 2)}
    source = one_file(tmp_path, small) if kind == "file" else small_folder(tmp_path / "in", small)
    out = tmp_path / ("out.safetensors" if kind == "file" else "out")
    secateur.prune(source, 0.75, out=out)
    finished = tree(tmp_path)
    clear(tmp_path)
    if old:
        secateur.prune(source, 0.25, out=out)
    before = tree(tmp_path)
    for n in range(1, 300):
        with monkeypatch.context() as patch:
            seen = failing_at(n, patch, error)
            try:
                secateur.prune(source, 0.75, out=out, overwrite=old)
                failed = False
            except (OSError, SecateurError, KeyboardInterrupt):
                failed = True
        after = tree(tmp_path)
        if not failed and len(seen) < n:
            assert after == finished
            assert n > 5, "no operation of the writer was seen"
            return
        stray = {name for name in after if name.startswith(".")}
        assert {name: b for name, b in after.items() if name not in stray} in (before, finished), (n, seen[n - 1])
        if stray:  # only where clearing up failed, after the result was in place
            assert {**finished, **after} == after, (n, seen[n - 1], sorted(after))
        clear(tmp_path)
        for name, raw in before.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(raw)
    pytest.fail("it never came through")


def small_folder(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Two shards, an index, a config, and nothing else."""
    folder.mkdir()
    table = {n: f"model-{n[0]}.safetensors" for n in tensors}
    for name, file in table.items():
        save_file({name: tensors[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    (folder / "config.json").write_text("{}")
    return folder


def clear(folder: Path) -> None:
    """Removes outputs and whatever was left beside them."""
    for path in folder.iterdir():
        if path.name.startswith((".", "out")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_what_does_not_read_back_is_not_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = one_file(tmp_path), tmp_path / "out.safetensors"
    before = tree(tmp_path)
    real = CheckpointStore.write

    def flip(self: CheckpointStore, part: Any) -> None:
        real(self, part)
        stage = next(tmp_path.glob(".out.safetensors.partial-*"))
        raw = bytearray(stage.read_bytes())
        stored = self._stored[part.spec.name]
        raw[stored.start] ^= 1
        stage.write_bytes(raw)

    monkeypatch.setattr(CheckpointStore, "write", flip)
    with pytest.raises(SecateurError, match="does not read back as it was written"):
        secateur.prune(source, 0.5, out=out)
    assert tree(tmp_path) == before


def test_a_source_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    source = one_file(tmp_path)
    store = CheckpointStore(source)
    with source.open("r+b") as f:
        f.truncate(source.stat().st_size - 100)
    with pytest.raises(BadInput, match=r"ended inside .*changed while it was read"):
        for spec in store.specs():
            store.parts(spec, "whole")


# --------------------------------------------------------------------- files that are not whole


def test_a_file_that_ends_early_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole = one_file(tmp_path, {"a.weight": torch.ones(4, 8), "b": torch.ones(3)}).read_bytes()
    cut = tmp_path / "cut.safetensors"
    for size in range(len(whole)):
        cut.write_bytes(whole[:size])
        with pytest.raises(BadInput, match=r"cut.safetensors"):
            CheckpointStore(cut)
    cut.write_bytes(whole + b"\0")
    with pytest.raises(BadInput, match=rf"cut.safetensors \({len(whole) + 1} bytes\) is not a whole safetensors file"):
        secateur.inspect(cut)


def test_a_header_with_a_wrong_byte_is_refused_or_read(tmp_path: Path) -> None:
    """Never an error that is not ours, and never a byte outside the file."""
    source = one_file(tmp_path, {"a.weight": torch.ones(4, 8), "b": torch.ones(3)})
    whole, (size, _) = source.read_bytes(), header_of(source)
    flipped = tmp_path / "flipped.safetensors"
    refusals = 0
    for at in range(size):
        for bit in (0, 4, 7):
            raw = bytearray(whole)
            raw[at] ^= 1 << bit
            flipped.write_bytes(raw)
            try:
                for stored in CheckpointStore(flipped)._stored.values():
                    assert size <= stored.start <= stored.stop <= len(whole)
            except SecateurError:
                refusals += 1
    assert refusals > size


BROKEN: dict[str, tuple[object, bytes, str]] = {
    "empty header": (b"", b"", "not a whole safetensors file"),
    "no JSON": (b"{not json", b"", "not a whole safetensors file"),
    "a list": ([], b"", "not a whole safetensors file"),
    "beyond the end": ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"x" * 8, "not a whole"),
    "a hole": ({"w": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, b"xx", "not a whole"),
    "backwards": ({"w": {"dtype": "U8", "shape": [1], "data_offsets": [1, 0]}}, b"x", "not a whole"),
    "negative": ({"w": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}}, b"x", "not a whole"),
    "another size": ({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 16]}}, b"x" * 16, "not a whole"),
    "overflow": ({"w": {"dtype": "F64", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]}}, b"x" * 8, "not a whole"),
    "an unknown dtype": ({"w": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}, b"x" * 4, "not a whole"),
    "two of one name": (
        b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x", "'w' occurs twice",
    ),
    "overlap": (
        {"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}},
        b"xxx", "not a whole",
    ),
    "deep": (b'{"w":' + b"[" * 20000 + b"]" * 20000 + b"}", b"", "not a whole"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_headers_that_lie(tmp_path: Path, what: str) -> None:
    header, data, text = BROKEN[what]
    path = write_raw(tmp_path / "lies.safetensors", header, data)
    with pytest.raises(BadInput, match=rf"lies.safetensors.*{text}"):
        secateur.inspect(path)


def test_a_header_larger_than_the_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    for claim in (1 << 62, 100_000_001, 200):
        path.write_bytes(struct.pack("<Q", claim) + b"{}" * 20)
        with pytest.raises(BadInput, match=r"huge\.safetensors"):
            secateur.inspect(path)


def test_paths_that_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "only_bin").mkdir()
    (tmp_path / "only_bin" / "pytorch_model.bin").write_bytes(b"x")
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a", "b"):
        save_file({"w": torch.ones(2)}, two / f"{name}.safetensors")
    nothing = tmp_path / "nothing.safetensors"
    save_file({}, nothing)
    table = {
        tmp_path / "gone.safetensors": (BadInput, "gone.safetensors does not exist"),
        tmp_path / "weights.bin": (
            BadInput,
            r"weights.bin is not a .safetensors file.*--allow-pickle.*weights_only=True",
        ),
        tmp_path / "empty": (
            BadInput,
            r"empty must hold one safetensors file, or several with an index.*it holds nothing",
        ),
        tmp_path / "only_bin": (BadInput, "it holds pytorch_model.bin"),
        two: (BadInput, "it holds a.safetensors, b.safetensors"),
        nothing: (NothingChosen, "holds no tensors"),
    }
    for path, (error, text) in table.items():
        with pytest.raises(error, match=text):
            secateur.inspect(path)


# --------------------------------------------------------------------------------- shards, index


def reindexed(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    changed = change(table)
    index.write_text(json.dumps(table if changed is None else changed))
    return folder


FIRST = "model-00001-of-00002.safetensors"


def put(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda table: table["weight_map"].update({name: value})


INDICES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a list": (lambda t: [t], r"index.json is not an index with a weight_map"),
    "a string": (lambda t: "x", "is not an index with a weight_map"),
    "no map": (lambda t: {"metadata": {}}, "is not an index with a weight_map"),
    "a list of names": (lambda t: {"weight_map": list(t["weight_map"])}, "map names of tensors to names of files"),
    "numbers": (put("fc.weight", 1), "weight_map must map names"),
    "a tensor left out": (lambda t: t["weight_map"].pop("fc.weight"), ""),
    "a ghost": (put("ghost.weight", FIRST), r"lists tensors that no file holds: ghost.weight"),
    "a missing shard": (put("fc.weight", "model-00009-of-00002.safetensors"), "names files that are not there: model-00009"),
    "the parent": (put("fc.weight", "../secret.safetensors"), "names in an index are not paths"),
    "an absolute path": (put("fc.weight", "/secret.safetensors"), "names in an index are not paths"),
    "a Windows path": (put("fc.weight", "..\\secret.safetensors"), "names in an index are not paths"),
    "a drive": (put("fc.weight", "C:secret.safetensors"), "names in an index are not paths"),
    "a sub-folder": (put("fc.weight", "sub/secret.safetensors"), "names in an index are not paths"),
    "dots": (put("fc.weight", ".."), "names in an index are not paths"),
    "nothing": (put("fc.weight", ""), "names in an index are not paths"),
    "another format": (put("fc.weight", "pytorch_model.bin"), "is not the name of a safetensors file"),
    "a NUL": (put("fc.weight", "a\0.safetensors"), r"names files that are not there: .*a.*x00|a\0.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("what", INDICES)
def test_an_index_that_does_not_agree_with_the_files(tmp_path: Path, what: str) -> None:
    change, text = INDICES[what]
    save_file({"fc.weight": torch.full((6, 8), 7.0)}, tmp_path / "secret.safetensors")
    folder = hub_folder(tmp_path / "in")
    (folder / "sub").mkdir()
    shutil.copy(tmp_path / "secret.safetensors", folder / "sub")
    if what == "a tensor left out":
        reindexed(folder, lambda t: {"weight_map": {n: f for n, f in t["weight_map"].items() if n != "fc.weight"}})
        text = r"holds 'fc.weight', which model.safetensors.index.json places in None"
    else:
        reindexed(folder, change)
    for call in (lambda: secateur.inspect(folder), lambda: secateur.prune(folder, 0.5, out=tmp_path / "out")):
        with pytest.raises(BadInput, match=text):
            call()
    assert not (tmp_path / "out").exists()


def test_all_missing_shards_are_named(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "in")
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(BadInput, match=r"model-00001-of-00002.safetensors, model-00002-of-00002.safetensors"):
        secateur.inspect(folder)


def test_one_name_in_two_shards(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "in")
    table = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(f for f in sorted(set(table.values())) if f != table["fc.weight"])
    tensors = load_file(folder / other)
    save_file({**tensors, "fc.weight": torch.zeros(6, 8)}, folder / other)
    with pytest.raises(BadInput, match=r"'fc.weight'"):
        secateur.inspect(folder)


def test_a_truncated_shard_is_named_with_its_size(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "in")
    shard = folder / FIRST
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(BadInput, match=rf"{FIRST} \({shard.stat().st_size} bytes\) is not a whole safetensors file"):
        secateur.inspect(folder)


def test_indices_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub_folder(tmp_path / "in")
    index = folder / "model.safetensors.index.json"
    good = index.read_text()
    for raw in (b"", b"{", b"\xff\xfe", b"[" * 100_000, good.encode()[:-1]):
        index.write_bytes(raw)
        with pytest.raises(BadInput, match=r"index\.json"):
            secateur.inspect(folder)
    first = json.dumps(next(iter(json.loads(good)["weight_map"])))
    index.write_text(good.replace('"weight_map": {', f'"weight_map": {{{first}: "x.safetensors", '))
    with pytest.raises(BadInput, match="occurs twice"):
        secateur.inspect(folder)
    index.write_text(good)
    monkeypatch.setattr(safetensors_file, "MAX_INDEX", 10)
    with pytest.raises(BadInput, match=r"an index has at most 10"):
        secateur.inspect(folder)
    monkeypatch.undo()
    (folder / "other.safetensors.index.json").write_text(good)
    with pytest.raises(BadInput, match="has 2 indices"):
        secateur.inspect(folder)


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    """As a shard, and as a file that would be carried over."""
    folder = hub_folder(tmp_path / "in")
    secret = tmp_path / "secret.safetensors"
    shutil.move(folder / FIRST, secret)
    (folder / FIRST).symlink_to(secret)
    with pytest.raises(BadInput, match=rf"'{FIRST}' is a link to .*secret.safetensors, outside its folder"):
        secateur.inspect(folder)
    (folder / FIRST).unlink()
    shutil.move(secret, folder / FIRST)
    (tmp_path / "key.txt").write_text("secret")
    (folder / "notes.txt").symlink_to(tmp_path / "key.txt")
    with pytest.raises(BadInput, match=r"'notes.txt' is a link to .*key.txt, outside its folder"):
        secateur.prune(folder, 0.5, out=tmp_path / "out")
    (folder / "notes.txt").unlink()
    (folder / "sub").symlink_to(tmp_path)
    with pytest.raises(BadInput, match="sub"):
        secateur.prune(folder, 0.5, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    """snapshots/<revision>/ holds links into blobs/; the result holds files."""
    real = hub_folder(tmp_path / "real")
    cache = tmp_path / "models--x"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, p in enumerate(sorted(q for q in real.iterdir() if q.is_file())):
        shutil.copy(p, blobs / f"blob{i}")
        (snapshot / p.name).symlink_to(Path("../../blobs") / f"blob{i}")
    out = tmp_path / "out"
    report = secateur.prune(snapshot, 0.5, out=out)
    assert not any(p.is_symlink() for p in out.rglob("*"))
    assert secateur.inspect(out).zeros == report.zeros
    assert (out / "config.json").read_text() == "content of config.json"


@pytest.mark.parametrize("what", ["dangling", "pipe", "folder as a shard", "pipe as a shard"])
def test_what_is_no_file_is_refused(tmp_path: Path, what: str) -> None:
    folder = hub_folder(tmp_path / "in")
    if what == "dangling":
        (folder / "notes.txt").symlink_to("nowhere")
    elif what == "pipe":
        os.mkfifo(folder / "notes.txt")
    else:
        (folder / FIRST).unlink()
        (folder / FIRST).mkdir() if what == "folder as a shard" else os.mkfifo(folder / FIRST)
    with pytest.raises(BadInput, match=r"notes.txt|model-00001"):
        secateur.prune(folder, 0.5, out=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_names_in_a_file_are_only_names(tmp_path: Path) -> None:
    odd = [
        "../../etc/passwd",
        "/abs.weight",
        "a\nb.weight",
        "\x1b[31mred.weight",
        "<b>.weight",
        "ünï.weight",
        " ",
        ".",
        "..",
        "a" * 500,
    ]
    source, out = one_file(tmp_path, {n: torch.ones(2, 2) for n in odd}), tmp_path / "out.safetensors"
    report = secateur.prune(source, 0.5, allocation="uniform", include=odd, out=out)
    assert [r.name for r in report.chosen] == sorted(odd)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "out.safetensors"]
    shown = str(report) + report._repr_html_()
    assert "\x1b" not in shown
    assert "<b>" not in report._repr_html_().replace("<b>sparsity", "")
    assert json.loads(report.to_json())["rows"][0]["name"] == sorted(odd)[0]


def test_bad_tensors_of_a_file(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2, dtype=torch.int8)}
    source = one_file(tmp_path, tensors)
    refused(
        BadTensor,
        r"'b.weight' \(shape \(2, 2\), int8\): it holds integers",
        source,
        tmp_path / "o.safetensors",
        tmp_path,
    )
    scaled = {"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(1)}
    source = one_file(tmp_path, scaled)
    refused(BadTensor, r"scaled by 'a.weight_scale'.*dequantise", source, tmp_path / "o.safetensors", tmp_path)
    tensors = {"a.weight": torch.ones(2, 2), "b.weight": torch.tensor([[1.0, torch.nan]])}
    source = one_file(tmp_path, tensors)
    refused(
        BadTensor, r"'b.weight' \(shape \(1, 2\), float32\) holds 1 NaN", source, tmp_path / "o.safetensors", tmp_path
    )
