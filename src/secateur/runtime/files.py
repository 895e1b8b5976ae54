"""Models to packed files and back: `save_packed`, `unpack_file`. One tensor is in memory at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.core.packed import Encoding, Packed, decode, encode, misfit, packable
from secateur.errors import BadInput
from secateur.stores import disk
from secateur.stores.safetensors_file import INDEX_SUFFIX, PACKED, SUFFIX, carry_over, read_raw
from secateur.stores.staging import refuse_place, refuse_result, refuse_suffix, staged

from .codec import FLOATS, compress, zstd
from .facts import PackedReport, PackedRow
from .format import CODECS, CODES, PARTS, PackedSource, described, expands_too_far, fact
from .items import Source, in_memory, on_disk
from .layers import refuse_packed
from .writing import Described, raw_bytes, spool, write_file

MARK = ".packed"
"""Before the suffix of a packed folder's files, so that a loader that knows nothing of packing finds none and says so."""
LEAST_GAIN = 256
"""Bytes that a tensor must gain: about what the header grows by."""


def save_packed(
    target: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    codec: str | None = None,
    overwrite: bool = False,
) -> PackedReport:
    """Writes a model so that its zeros take next to no room. Every bit of it comes back with `unpack_file`.

    Each tensor is stored in the encoding that takes the fewest bytes, and stays plain where none gains. See ``docs/format.md``.

    Args:
        target: a module, a dict of tensors, a ``.safetensors`` file, or a folder as ``save_pretrained`` writes it, sharded
            or not. Of tied weights of a module one is stored, and the metadata names the others, as
            ``safetensors.torch.save_model`` does.
        path: a ``.safetensors`` file to be; of a folder a folder, whose weight files end in ``.packed.safetensors``, and
            to which everything else is carried over.
        codec: ``"zstd"`` to compress what is stored, without loss; reading it needs the package ``zstandard``.
        overwrite: replace what is there.

    Returns:
        Bytes before and after, in all and of each tensor.

    Raises:
        BadInput: a target, path or codec that cannot be meant; a source or a model that is packed already.
        BadTensor: a tensor without plain values in memory.
        OutputExists: something is there already.

    Example:
        >>> import tempfile, torch
        >>> model = nn.Linear(64, 64)
        >>> with torch.no_grad():
        ...     _ = model.weight[:, 8:].zero_()
        >>> report = save_packed(model, Path(tempfile.mkdtemp()) / "model.safetensors")
        >>> [(row.name, row.encoding, row.bits_per_weight) for row in report.rows]
        [('bias', 'dense', 32.0), ('weight', 'bitmask', 5.0)]
    """
    if codec is not None and codec not in CODECS:
        raise BadInput(f"codec must be one of {', '.join(CODECS)}, or None; got {codec!r:.60}.")
    if codec is not None:
        zstd()  # refused before anything is read
    if isinstance(target, nn.Module):
        refuse_packed(target, "a file holds the weights themselves, in encodings of its own")
    out, rows = Path(path), list[PackedRow]()
    if isinstance(target, (str, os.PathLike)):
        source = Path(target)
        files, place = on_disk(source), refuse_result(source, out, overwrite)
        folder = source if source.is_dir() else None
        sizes = [(source if folder is None else folder / f.file).stat().st_size for f in files]
    else:
        refuse_suffix(out, "path")
        folder, files, place = None, [in_memory(target, out.name)], refuse_place(out, overwrite)
        sizes = [sum(i.nbytes for i in files[0].items)]
    by_name, taken = {f.file: f for f in files}, {i.name for f in files for i in f.items}
    with staged(place, overwrite, sum(sizes) + max(sizes)) as stage:  # what is spooled lies beside what is written
        after = _written(folder, stage, list(by_name), _marked, lambda f, at: _pack(by_name[f], at, codec, taken, rows))
    return PackedReport(str(out), sum(sizes), after, tuple(rows))


def unpack_file(path: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool = False) -> PackedReport:
    """Turns what `save_packed` wrote into plain safetensors again: the same tensors to the bit, the same metadata.

    Args:
        path: a packed file, or a folder of them; each size and number in it is checked before it is used.
        out: a file for a file, a folder for a folder, which loads as the one that was packed.
        overwrite: replace what is there.

    Returns:
        Bytes before and after, in all and of each tensor.

    Raises:
        BadInput: not a packed file, one of another version, or one that contradicts itself.
        OutputExists: something is there already.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import load_file
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = save_packed({"w": torch.eye(32)}, folder / "packed.safetensors")
        >>> _ = unpack_file(folder / "packed.safetensors", folder / "plain.safetensors")
        >>> torch.equal(load_file(folder / "plain.safetensors")["w"], torch.eye(32))
        True
    """
    packed, target = PackedSource(path), Path(out)
    place = refuse_result(packed.path, target, overwrite)
    before = sum((packed.folder / file).stat().st_size for file in packed.metadata)
    rows = [
        PackedRow(e.name, e.shape, e.code, e.encoding, e.codec, e.dense_bytes, e.nbytes)
        for e in packed.entries.values()
    ]
    plain = {_unmarked(file) for file in packed.metadata}
    renamed = _unmarked if len(plain) == len(packed.metadata) else str
    folder = packed.path if packed.path.is_dir() else None
    with staged(place, overwrite, sum(r.dense_bytes for r in rows)) as stage:
        after = _written(folder, stage, list(packed.metadata), renamed, lambda f, at: _unpack(packed, f, at))
    return PackedReport(str(out), after, before, tuple(rows))


Write = Callable[[str, Path], Mapping[str, int]]
"""Writes what becomes of one file to a path; the names in it, and the bytes of each."""


def _written(folder: Path | None, stage: Path, files: list[str], renamed: Callable[[str], str], write: Write) -> int:
    """Writes each file; of a folder also everything else that is in it, and an index of the new files. All their bytes."""
    if folder is None:
        write(files[0], stage)
        return stage.stat().st_size
    carry_over(folder, stage, set())
    names: dict[str, str] = {}
    size = 0
    for file in files:
        held = write(file, stage / renamed(file))
        names |= dict.fromkeys(held, renamed(file))
        size += sum(held.values())
    for index in stage.glob(f"*{INDEX_SUFFIX}"):  # one at the most, and readable: the source was read by it
        facts = json.loads(disk.read_text(index))
        about = facts.get("metadata")
        facts = {
            **facts,
            "metadata": {**(about if isinstance(about, dict) else {}), "total_size": size},
            "weight_map": names,
        }
        disk.remove(index)
        disk.write_new(stage / renamed(index.name), json.dumps(facts, indent=2, sort_keys=True) + "\n")
    return sum((stage / renamed(file)).stat().st_size for file in files)


def _marked(file: str) -> str:
    """``model.safetensors`` -> ``model.packed.safetensors``, and an index likewise."""
    suffix = INDEX_SUFFIX if file.endswith(INDEX_SUFFIX) else SUFFIX
    return file.removesuffix(suffix) + MARK + suffix


def _unmarked(file: str) -> str:
    suffix = INDEX_SUFFIX if file.endswith(INDEX_SUFFIX) else SUFFIX
    return file.removesuffix(suffix).removesuffix(MARK) + suffix


def _pack(source: Source, path: Path, codec: str | None, taken: set[str], rows: list[PackedRow]) -> dict[str, int]:
    """Writes one packed file; ``taken`` are the names of all tensors, in any file."""
    known: dict[str, dict[str, Any]] = {}
    with spool(path.parent) as room:
        for item in source.items:
            packed, used = None, None
            values = item.read()
            if values.dtype in FLOATS and not _collides(item.name, taken):
                packed, used = smallest(values, codec)
            if packed is None or _is_plain(packed, used):
                room.add(item.name, item.code, item.shape, raw_bytes(values), values.element_size())
                rows.append(PackedRow(item.name, item.shape, item.code, "dense", None, item.nbytes, item.nbytes))
                continue
            for part, t in packed.parts.items():
                room.add(f"{item.name}.{part}", CODES[t.dtype], t.shape, raw_bytes(t), t.element_size())
            known[item.name] = fact(packed, used)
            rows.append(PackedRow(item.name, item.shape, item.code, packed.encoding, used, item.nbytes, packed.nbytes))
        return room.finish(path, {**source.metadata, PACKED: described(known)})


def _collides(name: str, taken: set[str]) -> bool:
    """Whether a part would have the name of another tensor; the tensor then stays plain."""
    return any(f"{name}.{part}" in taken for part in PARTS)


def smallest(t: Tensor, codec: str | None = None) -> tuple[Packed, str | None]:
    """How a float tensor takes the fewest bytes in a file, its share of the header counted, and whether coded so."""
    dense = t.numel() * t.element_size()
    best = encode(t)
    if expands_too_far(dense, best.nbytes):
        best = encode(t, "bitmask")
    if best.nbytes + LEAST_GAIN > dense:
        best = encode(t, "dense")
    found: list[tuple[Packed, str | None]] = [(best, None)]
    for encoding in _worth_coding(t, best) if codec else ():
        one = encode(t, encoding)
        coded = Packed(one.encoding, one.shape, one.dtype, compress(one))
        if not expands_too_far(dense, coded.nbytes):
            found.append((coded, codec))
    return min(found, key=lambda f: f[0].nbytes + (0 if _is_plain(*f) else LEAST_GAIN))


def _is_plain(packed: Packed, codec: str | None) -> bool:
    """Whether a tensor lies in a file under its own name."""
    return packed.encoding == "dense" and codec is None


def _worth_coding(t: Tensor, best: Packed) -> tuple[Encoding, ...]:
    """Encodings to compress and compare. Distances of columns compress better than bits where few are stored."""
    if best.encoding == "dense":
        return ("dense", "bitmask") if packable(t) else ("dense",)
    if misfit("csr-u16", best.shape, best.dtype) or 4 * best.count > t.numel():
        return (best.encoding,)
    return ("bitmask", "csr-u16")


def _unpack(packed: PackedSource, file: str, path: Path) -> dict[str, int]:
    """Writes one plain file."""
    entries = {e.name: e for e in packed.entries.values() if e.file == file}

    def read(name: str) -> Tensor:
        plain = entries[name].parts["values"] if entries[name].plain else None
        return raw_bytes(decode(packed.read(name))) if plain is None else read_raw(packed.folder / file, plain)

    tensors = [Described(e.name, e.code, e.shape, e.dense_bytes) for e in entries.values()]
    write_file(path, tensors, read, packed.metadata[file])
    return {t.name: t.nbytes for t in tensors}
