"""Files and folders that are not what they say are refused before a size or a name in them is used."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur
from secateur.errors import BadInput, BadTensor, NothingChosen, SecateurError
from secateur.stores import safetensors_file
from secateur.stores.checkpoint import CheckpointStore
from tests.unit.hub import header_of, hub_folder, one_file, refused, write_raw

# ------------------------------------------------------------------------- files that are not whole


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


# --------------------------------------------------------------------------- shards and their index


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


@pytest.mark.timeout(60)
def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match="is not a regular file"):
        secateur.inspect(tmp_path / "x.safetensors")
