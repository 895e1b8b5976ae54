"""Packed files changed at random: each is refused, or gives tensors of the shapes it claims, in bounded time and memory."""

from __future__ import annotations

import importlib.util
import json
import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secateur.core.packed import decode
from secateur.errors import BadInput
from secateur.runtime.format import PackedSource
from secateur.stores.safetensors_file import PACKED
from tests.unit.packing import valid

SECONDS_OF_ONE, MOST_MEMORY = 5.0, 400 << 20
NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    8,
    255,
    256,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
    0.5,
)
ODD: tuple[Any, ...] = (
    *NUMBERS,
    None,
    True,
    "",
    "F32",
    "U8",
    "bitmask",
    "csr-u16",
    "2:4",
    "dense",
    "zstd",
    [],
    {},
    [1 << 40] * 3,
)

Mutation = Callable[[random.Random, bytes], bytes]


def bytes_flipped(r: random.Random, raw: bytes) -> bytes:
    out = bytearray(raw)
    for _ in range(r.choice([1, 1, 2, 8, 64])):
        out[r.randrange(len(out))] = r.choice([0, 255, r.randrange(256)])
    return bytes(out)


def data_flipped(r: random.Random, raw: bytes) -> bytes:
    """Past the header, so that what is wrong is in the parts."""
    size = 8 + struct.unpack("<Q", raw[:8])[0]
    return raw[:size] + bytes_flipped(r, raw[size:])


def cut(r: random.Random, raw: bytes) -> bytes:
    a, b = sorted(r.randrange(len(raw) + 1) for _ in range(2))
    return r.choice([raw[:a], raw[:a] + raw[b:], raw[:b] + raw[a:], raw[a:b]])


def changed(r: random.Random, node: Any) -> Any:
    """JSON with one thing in it changed, dropped or doubled."""
    if not isinstance(node, (dict, list)) or not node or r.random() < 0.1:
        return r.choice(ODD) if r.random() < 0.7 or not isinstance(node, int) else node + r.choice([-8, -1, 1, 8, 4096])
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    out, key = node.copy(), r.choice(keys)
    if r.random() < 0.1:
        del out[key]
    elif r.random() < 0.1 and isinstance(out, dict):
        out[r.choice(keys)] = out.pop(key)
    else:
        out[key] = changed(r, node[key])
    return out


def header_changed(r: random.Random, raw: bytes) -> bytes:
    """The header of safetensors, or the description inside it."""
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    if r.random() < 0.7:
        facts = changed(r, json.loads(header["__metadata__"][PACKED]))
        header["__metadata__"][PACKED] = json.dumps(facts)
    else:
        header = changed(r, header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + raw[8 + size :]


MUTATIONS: tuple[Mutation, ...] = (bytes_flipped, data_flipped, data_flipped, cut, header_changed, header_changed)


def fuzzed(folder: Path, seconds: float, seed: int) -> tuple[int, int]:
    """How many changed files were refused, and how many were read."""
    codecs = [None, "zstd"] if importlib.util.find_spec("zstandard") else [None]
    originals = []
    for codec in codecs:
        home = folder / str(codec)
        home.mkdir()
        originals.append(valid(home, codec).read_bytes())
    r, path = random.Random(seed), folder / "fuzzed.safetensors"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = read = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        raw = r.choice(originals)
        for _ in range(r.choice([1, 1, 1, 2])):
            try:
                raw = r.choice(MUTATIONS)(r, raw)
            except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error):
                break  # too broken already for another change
        path.write_bytes(raw)
        start = time.monotonic()
        try:
            source = PackedSource(path)
            for name, packed in source:
                assert decode(packed).shape == source.entries[name].shape
            read += 1
        except BadInput as e:
            assert str(e).startswith(("fuzzed.safetensors", "its ", "the ")), e
            refused += 1
        assert time.monotonic() - start < SECONDS_OF_ONE
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < MOST_MEMORY, f"{grown:,} bytes more than before"
    return refused, read


def test_a_little_fuzz(tmp_path: Path) -> None:
    refused, read = fuzzed(tmp_path, 1.5, seed=1)
    assert refused > 50
    assert read > 5  # a changed value is a value


@pytest.mark.slow
def test_a_minute_of_fuzz(tmp_path: Path) -> None:
    refused, read = fuzzed(tmp_path, 60, seed=random.SystemRandom().randrange(2**32))
    assert refused > 1000
    assert read > 100
