"""Packed files and folders: what is in them, that every bit comes back, and what is carried along."""

from __future__ import annotations

import json
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

import secateur
from secateur.core.packed import decode
from secateur.errors import BadInput, BadTensor, NothingChosen, OutputExists, SecateurError
from secateur.runtime import writing
from secateur.runtime.files import save_packed, unpack_file
from secateur.runtime.format import PackedSource
from tests.unit.hub import header_of, hub_folder, one_file, tree, write_raw
from tests.unit.packing import ENCODED, bits_of, codecs, facts_of, metadata_of, pruned, with_zstd

# ----------------------------------------------------------------------------------- files and back


@codecs
def test_a_file_comes_back_to_the_bit(tmp_path: Path, codec: str | None) -> None:
    source, packed, back = one_file(tmp_path, pruned()), tmp_path / "p.safetensors", tmp_path / "b.safetensors"
    before = source.read_bytes()
    report = save_packed(source, packed, codec=codec)
    again = unpack_file(packed, back)
    assert source.read_bytes() == before
    assert bits_of(load_file(back)) == bits_of(load_file(source))
    assert metadata_of(back) == {"format": "pt", "note": "kept"}
    assert set(ENCODED) <= set(facts_of(packed))
    if codec is None:
        assert {n: e["encoding"] for n, e in facts_of(packed).items()} == ENCODED
    assert (report.dense_bytes, report.packed_bytes) == (len(before), packed.stat().st_size)
    assert (again.dense_bytes, again.packed_bytes) == (back.stat().st_size, packed.stat().st_size)
    assert {r.name: r.encoding for r in report.rows} == {r.name: r.encoding for r in again.rows}
    assert report.packed_bytes < report.dense_bytes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.safetensors", "model.safetensors", "p.safetensors"]


@codecs
def test_a_file_of_safetensors_own_comes_back_byte_by_byte(tmp_path: Path, codec: str | None) -> None:
    """Also its header, where it has no more than one key of metadata, whose order would be by chance."""
    source = tmp_path / "a.safetensors"
    save_file(pruned(), source, metadata={"format": "pt"})
    save_packed(source, tmp_path / "p.safetensors", codec=codec)
    unpack_file(tmp_path / "p.safetensors", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == source.read_bytes()


def test_what_a_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    save_packed(pruned(), path)
    header = header_of(path)[1]
    assert json.loads(header.pop("__metadata__")["secateur.packed"])["version"] == 1
    assert facts_of(path)["lean.weight"] == {"encoding": "csr-u16", "shape": [64, 200], "dtype": "BF16"}
    assert {n: (e["dtype"], e["shape"]) for n, e in header.items() if n.startswith(("mask.", "lean.", "pairs."))} == {
        "mask.weight.bits": ("U8", [64, 6]), "mask.weight.values": ("F32", [1376]),
        "lean.weight.columns": ("U16", [256]), "lean.weight.starts": ("I64", [65]), "lean.weight.values": ("BF16", [256]),
        "pairs.weight.places": ("U8", [32, 8]), "pairs.weight.values": ("F32", [32, 32]),
    }  # fmt: skip
    assert set(pruned()) - set(ENCODED) <= set(header)


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    save_packed(pruned(), path)
    unpack_file(path, tmp_path / "b.safetensors")
    for file in (path, tmp_path / "b.safetensors"):
        size, header = header_of(file)
        for name, entry in header.items():
            if name != "__metadata__" and entry["data_offsets"][1] > entry["data_offsets"][0]:
                a, b = entry["data_offsets"]
                assert (size + a) % ((b - a) // torch.Size(entry["shape"]).numel()) == 0, name


@codecs
def test_the_same_model_gives_the_same_bytes(tmp_path: Path, codec: str | None) -> None:
    for name in ("a", "b"):
        save_packed(pruned(), tmp_path / f"{name}.safetensors", codec=codec)
    header, data = zip(*((header_of(p)[1], p.read_bytes()[header_of(p)[0] :]) for p in tmp_path.iterdir()), strict=True)
    assert header[0] == header[1]
    assert data[0] == data[1]


@codecs
def test_tensors_are_read_one_at_a_time(tmp_path: Path, codec: str | None) -> None:
    path = tmp_path / "p.safetensors"
    save_packed(pruned(), path, codec=codec)
    source = PackedSource(path)
    found = {name: decode(packed) for name, packed in source}
    assert bits_of(found) == bits_of(pruned())
    assert list(found) == list(source.entries)
    assert source.read("pairs.weight").encoding == "2:4"
    assert source.metadata == {"p.safetensors": {"format": "pt"}}


@codecs
def test_the_default_device_does_not_matter(tmp_path: Path, codec: str | None) -> None:
    """As in a loader that makes a model without values first."""
    source, path = one_file(tmp_path, pruned()), tmp_path / "p.safetensors"
    with torch.device("meta"):
        save_packed(source, path, codec=codec)
        found = {name: decode(packed) for name, packed in PackedSource(path)}
        unpack_file(path, tmp_path / "b.safetensors")
    assert bits_of(found) == bits_of(pruned())


def test_what_gains_less_than_its_name_in_the_header_stays_plain(tmp_path: Path) -> None:
    weights = {"small": torch.zeros(8, 8), "large": torch.zeros(16, 16), "full": torch.ones(64, 64)}
    report = save_packed(weights, tmp_path / "p.safetensors")
    assert {r.name: r.encoding for r in report.rows} == {"small": "dense", "large": "bitmask", "full": "dense"}
    report = save_packed({"full": torch.ones(4, 4)}, tmp_path / "q.safetensors")
    assert "no tensor is packed: none has zeros enough" in str(report)


def test_a_tensor_whose_parts_would_have_the_name_of_another_stays_plain(tmp_path: Path) -> None:
    weights = {
        "x": torch.zeros(32, 32),
        "x.bits": torch.zeros(32, 32),
        "y": torch.zeros(32, 32),
        "y.places": torch.ones(2),
    }
    report = save_packed(weights, tmp_path / "p.safetensors")
    assert {r.name: r.encoding for r in report.rows} == {
        "x": "dense", "x.bits": "bitmask", "y": "dense", "y.places": "dense",
    }  # fmt: skip
    unpack_file(tmp_path / "p.safetensors", tmp_path / "b.safetensors")
    assert bits_of(load_file(tmp_path / "b.safetensors")) == bits_of(weights)


def test_it_stays_plain_for_a_name_in_another_shard_too(tmp_path: Path) -> None:
    weights = {"x": torch.zeros(32, 32), "x.bits": torch.zeros(32, 32)}
    save_packed(hub_folder(tmp_path / "in", weights), tmp_path / "p")
    assert {n: p.encoding for n, p in PackedSource(tmp_path / "p")} == {"x": "dense", "x.bits": "bitmask"}


def test_dtypes_that_torch_does_not_know_are_carried(tmp_path: Path) -> None:
    header = {
        "q": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]},
        "w": {"dtype": "F32", "shape": [32, 32], "data_offsets": [4, 4 + 4096]},
    }
    source = write_raw(tmp_path / "a.safetensors", header, b"\x12\x34\x56\x78" + bytes(4096))
    save_packed(source, tmp_path / "p.safetensors")
    unpack_file(tmp_path / "p.safetensors", tmp_path / "b.safetensors")
    size, found = header_of(tmp_path / "b.safetensors")
    a, b = found["q"]["data_offsets"]
    assert (found["q"]["dtype"], found["q"]["shape"]) == ("F4", [8])
    assert (tmp_path / "b.safetensors").read_bytes()[size + a : size + b] == b"\x12\x34\x56\x78"
    with pytest.raises(BadInput, match=r"p.safetensors: 'q': torch has no dtype for F4"):
        PackedSource(tmp_path / "p.safetensors").read("q")


def test_a_tensor_that_would_expand_too_far_is_stored_less_small(tmp_path: Path) -> None:
    """21 MB of zeros would be 648 bytes of starts; a reader refuses to make so much of so little."""
    report = save_packed({"w": torch.zeros(80, 1 << 16)}, tmp_path / "p.safetensors")
    assert [r.encoding for r in report.rows] == ["bitmask"]
    assert torch.equal(decode(PackedSource(tmp_path / "p.safetensors").read("w")), torch.zeros(80, 1 << 16))


# ------------------------------------------------------------------------------------------ folders


@codecs
def test_a_folder_stays_a_folder(tmp_path: Path, codec: str | None) -> None:
    source, packed, back = hub_folder(tmp_path / "in", pruned()), tmp_path / "p", tmp_path / "b"
    before = tree(source)
    save_packed(source, packed, codec=codec)
    assert tree(source) == before
    there = tree(packed)
    assert set(there) == {n.replace(".safetensors", ".packed.safetensors") for n in before}
    index = json.loads(there["model.packed.safetensors.index.json"])
    shards = {n for n in there if n.endswith(".safetensors")}
    assert index["weight_map"] == {n: s for s in shards for n in header_of(packed / s)[1] if n != "__metadata__"}
    assert index["metadata"] == {
        "x": 1,
        "total_size": sum((packed / s).stat().st_size - header_of(packed / s)[0] for s in shards),
    }
    assert bits_of({n: decode(p) for n, p in PackedSource(packed)}) == bits_of(pruned())
    report = unpack_file(packed, back)
    after = tree(back)
    assert set(after) == set(before)
    assert {n for n in after if after[n] != before[n]} <= {n for n in before if "safetensors" in n}
    table = json.loads(after["model.safetensors.index.json"])
    assert table["weight_map"] == json.loads(before["model.safetensors.index.json"])["weight_map"]
    assert table["metadata"] == {"x": 1, "total_size": sum(r.dense_bytes for r in report.rows)}
    for shard in (n for n in before if n.endswith(".safetensors")):
        assert bits_of(load_file(back / shard)) == bits_of(load_file(source / shard))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "in", "p"]


def test_a_folder_of_one_file(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    one_file(source, pruned())
    (source / "config.json").write_text("{}")
    save_packed(source, tmp_path / "p")
    unpack_file(tmp_path / "p", tmp_path / "b")
    assert sorted(tree(tmp_path / "p")) == ["config.json", "model.packed.safetensors"]
    assert sorted(tree(tmp_path / "b")) == ["config.json", "model.safetensors"]
    assert bits_of(load_file(tmp_path / "b" / "model.safetensors")) == bits_of(load_file(source / "model.safetensors"))


def test_names_that_would_be_the_same_are_left(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "in", {"a": torch.zeros(32, 32), "b": torch.zeros(32, 32)})
    save_packed(folder, tmp_path / "p")
    first, second = sorted((tmp_path / "p").glob("*.packed.safetensors"))
    odd = first.name.replace(".packed", "")
    index = tmp_path / "p" / "model.packed.safetensors.index.json"
    second.rename(tmp_path / "p" / odd)
    index.write_text(index.read_text().replace(second.name, odd))
    unpack_file(tmp_path / "p", tmp_path / "b")
    assert {p.name for p in (tmp_path / "b").glob("*.safetensors")} == {odd, first.name}


# ------------------------------------------------------------------------------------ from memory


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.body = nn.Linear(32, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(3))


def test_a_module_and_its_ties(tmp_path: Path) -> None:
    """Of tied weights one is stored, and `safetensors.torch.load_model` takes what comes back, as from `save_model`."""
    model = Tied()
    secateur.prune(model, 0.5, include=["body", "embed.weight"])
    report = save_packed(model, tmp_path / "p.safetensors")
    assert [r.name for r in report.rows] == ["body.bias", "body.weight", "embed.weight", "steps"]
    unpack_file(tmp_path / "p.safetensors", tmp_path / "b.safetensors")
    assert metadata_of(tmp_path / "b.safetensors") == {"format": "pt", "head.weight": "embed.weight"}
    fresh = Tied()
    assert load_model(fresh, tmp_path / "b.safetensors") == (set(), [])
    assert bits_of(fresh.state_dict()) == bits_of(model.state_dict())
    assert fresh.head.weight is fresh.embed.weight


def test_wrappers_are_no_part_of_a_name(tmp_path: Path) -> None:
    save_packed(nn.DataParallel(nn.Linear(32, 32)), tmp_path / "p.safetensors")
    assert list(PackedSource(tmp_path / "p.safetensors").entries) == ["bias", "weight"]


def test_a_dict_keeps_all_its_names(tmp_path: Path) -> None:
    one = torch.zeros(64, 64)
    save_packed({"a": one, "b": one, "c": one.t(), "d": one[:32]}, tmp_path / "p.safetensors")
    unpack_file(tmp_path / "p.safetensors", tmp_path / "b.safetensors")
    assert {n: tuple(t.shape) for n, t in load_file(tmp_path / "b.safetensors").items()} == {
        "a": (64, 64), "b": (64, 64), "c": (64, 64), "d": (32, 64),
    }  # fmt: skip


class WithExtra(nn.Linear):
    def get_extra_state(self) -> object:
        return {"calls": 3}


REFUSED: dict[str, tuple[object, type[Exception], str]] = {
    "a list": ([torch.ones(2)], BadInput, "a module, a dict of tensors or a path can be packed; got a list"),
    "an empty dict": ({}, NothingChosen, "this dict holds no tensors"),
    "no weights": (nn.ReLU(), NothingChosen, "this ReLU holds no tensors"),
    "a number": ({"a": 3}, BadInput, "'a' is a int"),
    "a name that is none": ({3: torch.ones(2)}, BadInput, "3 is a Tensor"),
    "a name that is taken": ({"__metadata__": torch.ones(2)}, BadInput, "cannot be called '__metadata__'"),
    "extra state": (WithExtra(4, 4), BadInput, "'_extra_state' is a dict"),
    "meta": ({"a": torch.ones(2, device="meta")}, BadTensor, "cannot pack 'a' .*meta"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, BadTensor, "cannot pack 'a' .*sparse_coo"),
    "lazy": (nn.LazyLinear(3), BadTensor, "cannot pack 'bias' .*Uninitialized"),
    "complex128": ({"a": torch.ones(2, dtype=torch.complex128)}, BadTensor, "complex128"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_packed_is_refused(tmp_path: Path, what: str) -> None:
    target, error, text = REFUSED[what]
    with pytest.raises(error, match=text) as e:
        save_packed(target, tmp_path / "p.safetensors")  # type: ignore[arg-type]
    assert type(e.value) is error
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ places, room, disks


def test_places(tmp_path: Path) -> None:
    source = one_file(tmp_path, pruned())
    packed = tmp_path / "p.safetensors"
    before = tree(tmp_path)
    with pytest.raises(BadInput, match=r"must be the name of a .safetensors file"):
        save_packed(source, tmp_path / "p")
    with pytest.raises(BadInput, match=r"path must be the name of a .safetensors file"):
        save_packed(pruned(), tmp_path / "p")
    with pytest.raises(BadInput, match="is the source"):
        save_packed(source, source, overwrite=True)
    with pytest.raises(BadInput, match="does not exist"):
        save_packed(tmp_path / "none.safetensors", packed)
    with pytest.raises(BadInput, match=r"codec must be one of zstd, or None; got 'gzip'"):
        save_packed(source, packed, codec="gzip")
    assert tree(tmp_path) == before
    save_packed(source, packed)
    with pytest.raises(OutputExists):
        save_packed(source, packed)
    with pytest.raises(BadInput, match=r"p.safetensors is packed already"):
        save_packed(packed, tmp_path / "q.safetensors")
    with pytest.raises(BadInput, match=r"p.safetensors is packed; unpack it first: secateur unpack p.safetensors"):
        secateur.inspect(packed)
    with pytest.raises(BadInput, match=r"model.safetensors is not packed: its metadata has no 'secateur.packed'"):
        unpack_file(source, tmp_path / "q.safetensors")
    save_packed(source, packed, overwrite=True)
    with pytest.raises(OutputExists):
        unpack_file(packed, source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "p.safetensors"]


def test_the_codec_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)  # as where it is not installed
    with pytest.raises(SecateurError, match=r'pip install "secateur\[zstd\]"'):
        save_packed(pruned(), tmp_path / "p.safetensors", codec="zstd")
    assert not list(tmp_path.iterdir())


@with_zstd
def test_reading_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_packed(pruned(), tmp_path / "p.safetensors", codec="zstd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(SecateurError, match=r'pip install "secateur\[zstd\]"'):
        unpack_file(tmp_path / "p.safetensors", tmp_path / "b.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


def test_what_does_not_read_back_is_not_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flip(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)

    save_packed(pruned(), tmp_path / "p.safetensors")
    monkeypatch.setattr(writing, "readable_by_all", flip)  # the last thing before it is read
    for call in (
        lambda: save_packed(pruned(), tmp_path / "q.safetensors"),
        lambda: unpack_file(tmp_path / "p.safetensors", tmp_path / "b.safetensors"),
    ):
        with pytest.raises(SecateurError, match="does not read back as it was written"):
            call()
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


NAMES = [f"{i}.weight" for i in range(12)]
ONE = 4 * 512 * 512


@codecs
def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, codec: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read of a file and compressed is Python's own memory, which it can measure; the spool is on disk."""
    monkeypatch.setattr(writing, "IN_MEMORY", 10)
    source = {n: torch.randn(512, 512) for n in NAMES}
    for t in source.values():
        secateur.prune(t, 0.5)
    save_file(source, tmp_path / "a.safetensors")
    tracemalloc.start()
    try:
        save_packed(tmp_path / "a.safetensors", tmp_path / "p.safetensors", codec=codec)
        packing = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        unpack_file(tmp_path / "p.safetensors", tmp_path / "b.safetensors")
        unpacking = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    for peak in (packing, unpacking):
        assert ONE < peak < 5 * ONE + (2 << 20) < sum(t.numel() * 4 for t in source.values())
    assert bits_of(load_file(tmp_path / "b.safetensors")) == bits_of(source)


def test_the_report_in_words_and_as_json(tmp_path: Path) -> None:
    weights: dict[str, Tensor] = {"a.weight": torch.zeros(64, 64), "b.weight": torch.ones(64, 64)}
    weights["a.weight"][:, :8] = 1
    report = save_packed(weights, tmp_path / "p.safetensors")
    row = report.rows[0]
    assert (row.dense_bytes, row.packed_bytes, row.bits_per_weight) == (16384, 64 * 8 + 4 * 512, 5.0)
    assert report.ratio == 32768 / (tmp_path / "p.safetensors").stat().st_size
    assert "2,560 and 16,384 (6.40x) in the 1 of 2 tensors that are packed: bitmask (1)" in str(report)
    facts = json.loads(report.to_json())
    assert facts["packed_bytes"] == (tmp_path / "p.safetensors").stat().st_size
    assert [r["bits_per_weight"] for r in facts["rows"]] == [5.0, 32.0]
