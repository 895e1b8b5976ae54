"""What a packed file is, and reading one with distrust. ``docs/format.md`` says the same to someone who has only the file.

A packed file is a safetensors file. A tensor that is packed has a tensor ``<name>.<part>`` for each part of its encoding
(`secateur.core.packed`); every other tensor is there under its own name. The metadata has the key ``secateur.packed``:
JSON with the version and, for each packed tensor, encoding, shape, dtype and codec. A folder is packed shard by shard, and
its index lists the names that are in the files.

Everything that a header can tell is checked before any value is read, and of a tensor no more is allocated than its bytes
in the file allow (`MOST_EXPANSION`), whatever its shape claims.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from secateur.core import packed as core
from secateur.core.packed import ENCODINGS, Encoding, Packed
from secateur.errors import BadInput
from secateur.stores.safetensors_file import (
    DTYPES,
    PACKED,
    Stored,
    read_metadata,
    read_source,
    read_tensor,
)  # fmt: skip

from . import codec as codecs

VERSION = 1
CODECS = ("zstd",)
MOST_EXPANSION, SPARE = 1024, 16 << 20
"""A tensor has at most so many times its bytes in the file, and so many bytes more."""
MOST_JSON = 32 << 20
"""Bytes of the description; a hundred thousand tensors have about a third of that."""
CODES = {dtype: code for code, dtype in DTYPES.items()}
PARTS = frozenset({"bits", "values", "columns", "starts", "places"})


@dataclass(frozen=True)
class Entry:
    """How one tensor lies in a packed file.

    Attributes:
        name: what it is called in the model.
        encoding: one of `ENCODINGS`.
        shape: its own.
        code: the name of its dtype in the file, such as ``"BF16"``.
        codec: ``"zstd"``, or ``None``.
        parts: where each part is.
    """

    name: str
    encoding: Encoding
    shape: tuple[int, ...]
    code: str
    codec: str | None
    parts: Mapping[str, Stored]

    @property
    def file(self) -> str:
        """The file that it is in."""
        return self.parts["values"].file

    @property
    def plain(self) -> bool:
        """Whether it is in the file under its own name, as in any safetensors file."""
        return self.encoding == "dense" and self.codec is None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(p.stop - p.start for p in self.parts.values())

    @property
    def dense_bytes(self) -> int:
        """Bytes of the tensor itself."""
        return self.nbytes if self.plain else math.prod(self.shape) * DTYPES[self.code].itemsize


class PackedSource:
    """A packed file or a folder of them, whose tensors are read one at a time.

    Args:
        path: what `secateur.runtime.files.save_packed` wrote, or someone else.

    Attributes:
        entries: how each tensor lies, by name, in the order of the files.
        metadata: what else the metadata of each file holds, by the name of the file.

    Raises:
        BadInput: not a packed file, or of another version; a header that contradicts itself. The message names the file,
            and the tensor where it is one.

    Example:
        >>> import tempfile, torch
        >>> from secateur.runtime.files import save_packed
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> _ = save_packed({"fc.weight": torch.eye(16)}, path)
        >>> [(name, packed.encoding, packed.count) for name, packed in PackedSource(path)]
        [('fc.weight', 'bitmask', 16)]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.folder, stored = read_source(self.path)
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        for file in sorted({s.file for s in stored.values()}):
            here = {name: s for name, s in stored.items() if s.file == file}
            metadata = read_metadata(self.folder / file)
            for entry in _entries(file, here, metadata.pop(PACKED, None)):
                if entry.name in self.entries:
                    raise BadInput(f"{file}: {entry.name!r} is in {self.entries[entry.name].file} too.")
                self.entries[entry.name] = entry
            self.metadata[file] = metadata
        if both := set(self.entries) & {n for n in stored if not (n in self.entries and self.entries[n].plain)}:
            raise BadInput(f"{self.path.name}: {min(both)!r} is both a packed tensor and a part of one.")
        if not stored:
            raise BadInput(f"{self.path.name} holds no tensors.")

    def __iter__(self) -> Iterator[tuple[str, Packed]]:
        """Each tensor, checked; one is in memory at a time."""
        for name in self.entries:
            yield name, self.read(name)

    def read(self, name: str) -> Packed:
        """One tensor, checked.

        Raises:
            BadInput: its parts are not what an encoder makes; or torch does not know its dtype.
            SecateurError: a codec that is not installed.
        """
        entry = self.entries[name]
        try:
            if entry.code not in DTYPES:
                raise BadInput(f"torch has no dtype for {entry.code}.")
            parts = {part: read_tensor(self.folder / s.file, s) for part, s in entry.parts.items()}
            packed = Packed(entry.encoding, entry.shape, DTYPES[entry.code], parts)
            if entry.codec is not None:
                packed = codecs.expand(packed)
            core.check(packed)
            return packed
        except BadInput as e:
            raise BadInput(f"{entry.file}: {name!r}: {e}") from e


def described(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The value of the metadata's key."""
    return json.dumps({"version": VERSION, "tensors": entries}, separators=(",", ":"))


def fact(packed: Packed, codec: str | None) -> dict[str, Any]:
    """What the metadata says of one tensor."""
    known = {"encoding": packed.encoding, "shape": list(packed.shape), "dtype": CODES[packed.dtype]}
    return known if codec is None else {**known, "codec": codec}


def expands_too_far(dense_bytes: int, stored_bytes: int) -> bool:
    """Whether a tensor is so much larger than its bytes in the file that a reader refuses it, and a writer must not do so."""
    return dense_bytes > MOST_EXPANSION * stored_bytes + SPARE


def _entries(file: str, stored: Mapping[str, Stored], text: str | None) -> Iterator[Entry]:
    """How the tensors of one file lie, by its header alone."""
    if text is None:
        raise BadInput(f"{file} is not packed: its metadata has no {PACKED!r}. Any safetensors library reads it.")
    taken = set()
    for name, facts in _tensors(file, text).items():
        try:
            entry = _entry(name, facts, stored)
        except BadInput as e:
            raise BadInput(f"{file}: {name!r}: {e}") from e
        if name in stored:
            raise BadInput(f"{file}: {name!r} is there twice, packed and under its own name.")
        taken |= {f"{name}.{part}" for part in entry.parts}
        yield entry
    for name, s in stored.items():
        if name not in taken:
            yield Entry(name, "dense", s.shape, s.code, None, {"values": s})


def _tensors(file: str, text: str) -> dict[str, Any]:
    """The JSON of the metadata, as far as its version."""
    if len(text) > MOST_JSON:
        raise BadInput(f"{file}: its {PACKED!r} has {len(text):,} characters; at most {MOST_JSON:,} are read.")
    try:
        found = json.loads(text, object_pairs_hook=_no_doubles)
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{file}: its {PACKED!r} is not JSON: {e}") from e
    if not isinstance(found, dict) or type(found.get("version")) is not int:
        raise BadInput(f"{file}: its {PACKED!r} names no version.")
    if found["version"] != VERSION:
        raise BadInput(
            f"{file} is packed by version {found['version']} of the format, and this secateur reads {VERSION}; update it."
        )
    if set(found) != {"version", "tensors"} or not isinstance(found["tensors"], dict):
        raise BadInput(f"{file}: its {PACKED!r} must hold a version and tensors; it holds {', '.join(sorted(found))}.")
    return found["tensors"]


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name occurs twice")
    return out


def _entry(name: str, facts: Any, stored: Mapping[str, Stored]) -> Entry:
    """One tensor as the metadata describes it, checked against the header."""
    if not isinstance(facts, dict) or set(facts) - {"codec"} != {"encoding", "shape", "dtype"}:
        raise BadInput("it must have encoding, shape and dtype, and may have a codec.")
    encoding: Any
    encoding, shape, code, codec = (facts.get(k) for k in ("encoding", "shape", "dtype", "codec"))
    if encoding not in get_args(Encoding):
        raise BadInput(f"the encoding {encoding!r:.40} is none of {', '.join(ENCODINGS)}.")
    if "codec" in facts and codec not in CODECS:
        raise BadInput(f"the codec {codec!r:.40} is none of {', '.join(CODECS)}.")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in shape):
        raise BadInput(f"the shape {shape!r:.60} is not a list of sizes.")
    if code not in [CODES[d] for d in core.DTYPES]:
        raise BadInput(f"the dtype {code!r:.40} is none of those that are packed.")
    if encoding == "dense" and codec is None:
        raise BadInput("it is dense and has no codec, so it must be there under its own name.")
    dtype = DTYPES[code]
    if why := core.misfit(encoding, tuple(shape), dtype):
        raise BadInput(f"shape {shape} cannot be {encoding}: {why}.")
    wanted = core.forms(encoding, tuple(shape), dtype)
    missing = [part for part in wanted if f"{name}.{part}" not in stored]
    if missing:
        raise BadInput(f"its part {f'{name}.{missing[0]}'!r} is not in the file.")
    parts = {part: stored[f"{name}.{part}"] for part in wanted}
    entry = Entry(name, encoding, tuple(shape), code, codec, parts)
    if expands_too_far(entry.dense_bytes, entry.nbytes):
        raise BadInput(
            f"it claims {entry.dense_bytes:,} bytes, and has {entry.nbytes:,} in the file; at most "
            f"{MOST_EXPANSION:,} times as many and {SPARE:,} more are read."
        )
    for part, (part_dtype, part_shape) in wanted.items():
        _check_part(part, parts[part], codec, part_dtype, part_shape)
    return entry


def _check_part(part: str, s: Stored, codec: str | None, dtype: Any, shape: tuple[int, ...] | None) -> None:
    """Refuses a part of another dtype or shape than its encoding has."""
    if codec is not None:
        dtype, shape = DTYPES["U8"], None
    if s.dtype != dtype or (len(s.shape) != 1 if shape is None else s.shape != shape):
        wanted = f"{CODES[dtype]} {'of one dim' if shape is None else list(shape)}"
        raise BadInput(f"its part {part!r} must be {wanted}; it is {s.code} {list(s.shape)}.")
