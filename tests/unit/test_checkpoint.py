"""Checkpoints: what changes in a file and what does not, and what is carried over."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import secateur
from secateur.stores.base import Store
from secateur.stores.checkpoint import CheckpointStore
from secateur.stores.stage import MANIFEST
from tests.unit.hub import WEIGHTS, header_of, hub_folder, one_file, state, tree, write_raw

# ------------------------------------------------------------------------------------- what changes


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
    assert after.pop(MANIFEST)
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


# --------------------------------------------------------------------------- what is carried, modes


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
    assert set(tree(out)) == {*tree(hub_folder(tmp_path / "clean")), MANIFEST}


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
