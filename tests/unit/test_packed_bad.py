"""Packed files that lie: each is refused by name, and nothing is left where the result should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.core.packed import Packed, check, encode
from secateur.errors import BadInput
from secateur.runtime import format as file_format
from secateur.runtime.files import save_packed, unpack_file
from secateur.runtime.format import PackedSource
from secateur.stores.safetensors_file import PACKED
from tests.unit.hub import header_of, hub_folder, tree, write_raw
from tests.unit.packing import Change, changed, metadata_of, pruned, valid, with_zstd

Facts = dict[str, Any]
Tensors = dict[str, Tensor]


def put(name: str, at: object, value: object) -> Change:
    """Writes a value into a tensor."""

    def change(tensors: Tensors, facts: Facts) -> None:
        t = tensors[name].clone()
        (t.view(torch.int16) if t.dtype == torch.uint16 else t)[at] = value
        tensors[name] = t

    return change


def given(name: str, make: Callable[[Tensor], Tensor]) -> Change:
    """Puts another tensor in the place of one."""

    def change(tensors: Tensors, facts: Facts) -> None:
        tensors[name] = make(tensors[name]).contiguous()

    return change


def said(name: str, **what: object) -> Change:
    """Says something else of a tensor."""
    return lambda tensors, facts: facts["tensors"][name].update(what)


def unsaid(name: str, key: str) -> Change:
    return lambda tensors, facts: facts["tensors"][name].pop(key)


def whole(**what: object) -> Change:
    """Says something else of the file."""
    return lambda tensors, facts: facts.update(what)


def added(name: str, t: Tensor) -> Change:
    return lambda tensors, facts: tensors.update({name: t})


def dropped(name: str) -> Change:
    def change(tensors: Tensors, facts: Facts) -> None:
        del tensors[name]

    return change


def swapped(t: Tensor) -> Tensor:
    """Two columns of the first row that has two, in the wrong order."""
    t = t.clone().view(torch.int16)
    t[[0, 1]] = t[[1, 0]]
    return t.view(torch.uint16)


def shifted(by: int) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.cat([t[:3], t[3:4] + by, t[4:]])


MASK, LEAN, PAIRS = "mask.weight", "lean.weight", "pairs.weight"

# What is changed in a valid file, and what the refusal says after the names of file and tensor.
VALUES: dict[str, tuple[Change, str]] = {
    "a bit more than values": (put(f"{MASK}.bits", (0, 0), 0xFF), r"1,3\d\d elements are stored, and values has 1,376"),
    "a bit less than values": (put(f"{MASK}.bits", (0, 0), 0), r"1,3\d\d elements are stored, and values has 1,376"),
    "bits past the last column": (put(f"{MASK}.bits", (3, 5), 0x80), "bits are set past the last column"),
    "a shape of fewer columns": (said(MASK, shape=[64, 42]), "bits are set past the last column"),
    "a value more": (given(f"{MASK}.values", lambda v: torch.cat([v, v[:1]])), "1,376 elements are stored, and values has 1,377"),
    "a value less": (given(f"{MASK}.values", lambda v: v[1:]), "1,376 elements are stored, and values has 1,375"),
    "a stored zero": (put(f"{MASK}.values", 5, 0.0), r"a value is \+0.0"),
    "a stored zero of csr": (put(f"{LEAN}.values", 5, 0.0), r"a value is \+0.0"),
    "a column out of range": (put(f"{LEAN}.columns", 255, 200), "a column is 200, and there are 200"),
    "a column far out of range": (put(f"{LEAN}.columns", 255, -1), "a column is 65,535, and there are 200"),
    "columns that fall": (given(f"{LEAN}.columns", swapped), "the columns of a row must ascend"),
    "columns that stand": (put(f"{LEAN}.columns", slice(0, 2), 7), "the columns of a row must ascend"),
    "starts that fall": (given(f"{LEAN}.starts", shifted(100)), r"starts must rise by 0 to 200 a row; found -\d+ to 1\d\d"),
    "starts below zero": (given(f"{LEAN}.starts", shifted(-(2**62))), "starts must rise from 0 to the number of values"),
    "starts that overflow": (given(f"{LEAN}.starts", shifted(2**62)), "starts must rise from 0 to the number of values"),
    "starts not from 0": (put(f"{LEAN}.starts", 0, 1), "starts must rise from 0 to the number of values; they go from 1"),
    "starts past the values": (put(f"{LEAN}.starts", -1, 300), "300 elements are stored, and columns has 256"),
    "starts past everything": (put(f"{LEAN}.starts", -1, 2**62), "starts must rise from 0 to the number of values"),
    "one place twice": (put(f"{PAIRS}.places", (0, 0), 0x55), "a group of 2:4 must name two different places, the lower first"),
    "places that fall": (put(f"{PAIRS}.places", (0, 0), 0x41), "a group of 2:4 must name two different places, the lower first"),
}  # fmt: skip

HEADERS: dict[str, tuple[Change, str]] = {
    "bits of another size": (given(f"{MASK}.bits", lambda b: b[:-1]), r"'bits' must be U8 \[64, 6\]; it is U8 \[63, 6\]"),
    "bits of another dtype": (given(f"{MASK}.bits", lambda b: b.to(torch.int8)), r"its part 'bits' must be U8"),
    "values of two dims": (given(f"{MASK}.values", lambda v: v.view(2, -1)), r"must be F32 of one dim; it is F32 \[2, 688\]"),
    "values of another dtype": (given(f"{MASK}.values", lambda v: v.half()), "'values' must be F32 of one dim; it is F16"),
    "starts of 32 bits": (given(f"{LEAN}.starts", lambda s: s.int()), r"'starts' must be I64 \[65\]; it is I32"),
    "a part that is not there": (dropped(f"{MASK}.values"), "its part 'mask.weight.values' is not in the file"),
    "another dtype": (said(MASK, dtype="F16"), "'values' must be F16 of one dim; it is F32"),
    "a dtype that is none": (said(MASK, dtype="I64"), "the dtype 'I64' is none of those that are packed"),
    "no string for a dtype": (said(MASK, dtype=["F32"]), r"the dtype \['F32'\] is none"),
    "a shape of other rows": (said(MASK, shape=[63, 43]), r"'bits' must be U8 \[63, 6\]; it is U8 \[64, 6\]"),
    "a shape of one dim": (said(MASK, shape=[2752]), "cannot be bitmask: it needs two dims or more"),
    "a shape with nothing in it": (said(MASK, shape=[64, 0]), "cannot be bitmask: it needs two dims or more, none of them 0"),
    "a negative shape": (said(MASK, shape=[-64, -43]), r"the shape \[-64, -43\] is not a list of sizes"),
    "a shape of fractions": (said(MASK, shape=[64, 43.0]), "is not a list of sizes"),
    "a shape of booleans": (said(MASK, shape=[True, 43]), "is not a list of sizes"),
    "a shape that overflows": (said(MASK, shape=[2**40, 2**40]), r"it claims 4,835,703,278,458,516,698,824,704 bytes, and has"),
    "a shape past 64 bits": (said(MASK, shape=[2**70, 1]), "is not a list of sizes"),
    "a shape that is a bomb": (said(LEAN, shape=[1 << 20, 200]), r"it claims 419,430,400 bytes, and has 1,544 in the file"),
    "no shape": (unsaid(MASK, "shape"), "it must have encoding, shape and dtype, and may have a codec"),
    "something more": (said(MASK, pickle="x"), "it must have encoding, shape and dtype, and may have a codec"),
    "an unknown encoding": (said(MASK, encoding="bitmask2"), "the encoding 'bitmask2' is none of dense, 2:4, bitmask, csr-u16"),
    "no string for an encoding": (said(MASK, encoding=None), "the encoding None is none of"),
    "another encoding": (said(MASK, encoding="csr-u16"), "its part 'mask.weight.starts' is not in the file"),
    "dense": (said(MASK, encoding="dense"), "so it must be there under its own name"),
    "an unknown codec": (said(MASK, codec="gzip"), "the codec 'gzip' is none of zstd"),
    "no codec": (said(MASK, codec=None), "the codec None is none of zstd"),
    "2:4 of an odd width": (said(PAIRS, shape=[32, 63]), "cannot be 2:4: it needs a multiple of 8 columns, and has 63"),
    "too many columns": (said(LEAN, shape=[1, 1 << 17]), "columns are numbered in 16 bits, at most 65,536, and it has 131,072"),
    "a name twice": (added(MASK, torch.ones(2)), "is there twice, packed and under its own name"),
}  # fmt: skip

FILES: dict[str, tuple[Change, str]] = {
    "another version": (whole(version=2), "is packed by version 2 of the format, and this secateur reads 1"),
    "no version": (lambda t, f: f.pop("version"), "names no version"),
    "a version that is none": (whole(version="1"), "names no version"),
    "a version that is true": (whole(version=True), "names no version"),
    "something beside the tensors": (whole(more={}), "must hold a version and tensors; it holds more, tensors, version"),
    "a list of tensors": (whole(tensors=[]), "must hold a version and tensors"),
    "a tensor that is no object": (whole(tensors={"a": 3}), "'a': it must have encoding, shape and dtype"),
    "a tensor and a part of it": (
        lambda t, f: (
            f["tensors"].update({"mask.weight.bits": f["tensors"].pop("pairs.weight")}),
            t.update({f"mask.weight.bits.{p}": t.pop(f"pairs.weight.{p}") for p in ("places", "values")}),
        ),
        "'mask.weight.bits' is there twice",
    ),
}  # fmt: skip


def refused(path: Path, text: str) -> None:
    """Reading and unpacking both refuse it, and leave nothing behind."""
    before = tree(path.parent)
    with pytest.raises(BadInput, match=text):
        list(PackedSource(path))
    with pytest.raises(BadInput, match=text):
        unpack_file(path, path.parent / "out.safetensors")
    assert tree(path.parent) == before


@pytest.mark.parametrize("what", VALUES)
def test_values_that_lie(tmp_path: Path, what: str) -> None:
    change, text = VALUES[what]
    refused(changed(valid(tmp_path), change), rf"bad.safetensors: '(mask|lean|pairs).weight': {text}")


@pytest.mark.parametrize("what", HEADERS)
def test_headers_that_lie(tmp_path: Path, what: str) -> None:
    change, text = HEADERS[what]
    refused(changed(valid(tmp_path), change), rf"bad.safetensors: '(mask|lean|pairs).weight'.*({text})")


@pytest.mark.parametrize("what", FILES)
def test_files_that_lie(tmp_path: Path, what: str) -> None:
    change, text = FILES[what]
    refused(changed(valid(tmp_path), change), rf"bad.safetensors.*({text})")


def with_json(path: Path, text: str) -> Path:
    """A packed file whose description is another text."""
    bad = path.with_name("bad.safetensors")
    save_file(load_file(path), bad, metadata={PACKED: text})
    return bad


JSON: dict[str, tuple[str, str]] = {
    "nothing": ("", "is not JSON"), "half": ('{"version": 1, ', "is not JSON"), "a list": ("[1]", "names no version"),
    "deep": ("[" * 200_000, "is not JSON"), "deep, whole": ("[" * 200_000 + "]" * 200_000, "is not JSON"),
    "a name twice": ('{"version": 1, "version": 1, "tensors": {}}', "is not JSON: a name occurs twice"),
    "a tensor twice": ('{"version": 1, "tensors": {"a": {}, "a": {}}}', "is not JSON: a name occurs twice"),
    "a huge number": (f'{{"version": 1{"0" * 5000}, "tensors": {{}}}}', "is not JSON"),
    "NaN": ('{"version": NaN, "tensors": {}}', "names no version"),
}  # fmt: skip


@pytest.mark.parametrize("what", JSON)
def test_json_that_cannot_be_meant(tmp_path: Path, what: str) -> None:
    text, said = JSON[what]
    refused(with_json(valid(tmp_path), text), rf"bad.safetensors: its 'secateur.packed' {said}")


def test_json_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = valid(tmp_path)
    monkeypatch.setattr(file_format, "MOST_JSON", 100)
    refused(path, r"its 'secateur.packed' has [\d,]+ characters; at most 100 are read")


# ------------------------------------------------------------------------------- the file around it


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    raw = valid(tmp_path).read_bytes()
    bad = tmp_path / "bad.safetensors"
    for size in (0, 7, 8, 100, len(raw) // 2, len(raw) - 1):
        bad.write_bytes(raw[:size])
        refused(bad, "bad.safetensors .*is not a whole safetensors file")
    bad.write_bytes(raw + b"x")
    refused(bad, "bad.safetensors .*is not a whole safetensors file")


def test_offsets_that_overlap_or_leave_holes(tmp_path: Path) -> None:
    path = valid(tmp_path)
    size, header = header_of(path)
    data = path.read_bytes()[size:]
    for by in (-4, 4, 2**60, -(2**60)):
        moved = json.loads(json.dumps(header))
        entry = moved["mask.weight.values"]
        entry["data_offsets"] = [at + by for at in entry["data_offsets"]]
        refused(
            write_raw(tmp_path / "bad.safetensors", moved, data), "bad.safetensors .*is not a whole safetensors file"
        )


def test_nothing_to_unpack(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors")
    refused(tmp_path / "plain.safetensors", "plain.safetensors is not packed: its metadata has no 'secateur.packed'")
    save_file({}, tmp_path / "empty.safetensors", metadata={PACKED: '{"version": 1, "tensors": {}}'})
    refused(tmp_path / "empty.safetensors", "empty.safetensors holds no tensors")


def test_a_shard_that_is_not_packed_or_not_there(tmp_path: Path) -> None:
    save_packed(hub_folder(tmp_path / "in", pruned()), tmp_path / "p")
    shard = sorted((tmp_path / "p").glob("*.safetensors"))[0]
    tensors, metadata = load_file(shard), metadata_of(shard)
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=f"{shard.name} is not packed"):
        unpack_file(tmp_path / "p", tmp_path / "b")
    save_file(tensors, shard, metadata=metadata)
    unpack_file(tmp_path / "p", tmp_path / "b")
    shard.unlink()
    with pytest.raises(BadInput, match="names files that are not there"):
        PackedSource(tmp_path / "p")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "in", "p"]


def test_one_name_in_two_shards(tmp_path: Path) -> None:
    save_packed(hub_folder(tmp_path / "in", {"a": torch.zeros(32, 32), "b": torch.zeros(32, 32)}), tmp_path / "p")
    shards = sorted((tmp_path / "p").glob("*.safetensors"))
    index = tmp_path / "p" / "model.packed.safetensors.index.json"
    for shard in shards:
        if "b.bits" in load_file(shard):
            plain = {"a": torch.ones(2)}
            save_file(plain, shard, metadata={PACKED: '{"version": 1, "tensors": {}}'})
            table = json.loads(index.read_text())
            table["weight_map"] = {n: f for n, f in table["weight_map"].items() if not n.startswith("b.")} | {
                "a": shard.name
            }
            index.write_text(json.dumps(table))
    with pytest.raises(BadInput, match=r"packed.safetensors: 'a' is in model-.* too"):
        PackedSource(tmp_path / "p")


def test_a_tensor_that_is_a_part_of_one_in_another_shard(tmp_path: Path) -> None:
    save_packed(hub_folder(tmp_path / "in", {"x": torch.zeros(32, 32), "y": torch.zeros(32, 32)}), tmp_path / "p")
    shard = next(p for p in (tmp_path / "p").glob("*.safetensors") if "y.bits" in load_file(p))
    tensors = {f"x.{name}": t for name, t in load_file(shard).items()}
    facts = json.loads(metadata_of(shard)[PACKED])
    facts["tensors"] = {"x.bits": facts["tensors"]["y"]}
    save_file({n.replace("x.y", "x.bits"): t for n, t in tensors.items()}, shard, metadata={PACKED: json.dumps(facts)})
    index = tmp_path / "p" / "model.packed.safetensors.index.json"
    index.write_text(index.read_text().replace('"y.', '"x.bits.'))
    with pytest.raises(BadInput, match=r"p: 'x.bits' is both a packed tensor and a part of one"):
        PackedSource(tmp_path / "p")


# ------------------------------------------------------------------------------------- in memory


def test_parts_that_are_not_those_of_the_encoding() -> None:
    good = encode(torch.eye(16), "bitmask")
    check(good)
    bits, values = good.parts["bits"], good.parts["values"]
    table: list[tuple[Packed, str]] = [
        (Packed("zip", (16, 16), torch.float32, good.parts), "the encoding 'zip' is none of"),  # type: ignore[arg-type]
        (Packed("bitmask", (16, 16), torch.float64, good.parts), "cannot be bitmask: only float32"),
        (Packed("bitmask", (256,), torch.float32, good.parts), "cannot be bitmask: it needs two dims"),
        (Packed("bitmask", (16, 16), torch.float32, {"bits": bits}), "has the parts bits, values; found bits"),
        (Packed("bitmask", (16, 16), torch.float32, {**good.parts, "x": bits}), "found bits, values, x"),
        (Packed("bitmask", (16, 16), torch.float16, good.parts), r"values must be torch.float16 \(stored,\); found"),
        (Packed("bitmask", (16, 17), torch.float32, good.parts), r"bits must be torch.uint8 \(16, 3\); found"),
        (Packed("dense", (16, 17), torch.float32, {"values": torch.eye(16)}), r"values must be .* \(16, 17\); found"),
        (Packed("bitmask", (16, 16), torch.float32, {"bits": bits, "values": values[1:]}), "16 elements are stored"),
    ]  # fmt: skip
    for bad, text in table:
        with pytest.raises(BadInput, match=text):
            check(bad)


@with_zstd
def test_a_codec_that_is_not_there(tmp_path: Path) -> None:
    """Parts that are said to be compressed, and are not."""
    path = valid(tmp_path)
    refused(changed(path, said("mask.weight", codec="zstd")), r"'mask.weight': its part 'bits' must be U8 of one dim")
    flat = given("mask.weight.bits", lambda b: b.view(-1))

    def both(tensors: Tensors, facts: Facts) -> None:
        flat(tensors, facts)
        tensors["mask.weight.values"] = tensors["mask.weight.values"].view(torch.uint8)
        said("mask.weight", codec="zstd")(tensors, facts)

    refused(changed(path, both), r"bad.safetensors: 'mask.weight': bits is not 1 frames of zstd")


@with_zstd
def test_a_compressed_bomb(tmp_path: Path) -> None:
    """A shape that its frames would fill, were they read: 64 GB of zeros in a few KB."""
    path = valid(tmp_path, "zstd")
    claim = said("none.weight", shape=[1 << 20, 1 << 14])
    refused(changed(path, claim), r"'none.weight': it claims 68,719,476,736 bytes, and has \d+ in the file")
