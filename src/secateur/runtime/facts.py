"""What became of each tensor when a model was packed or unpacked: bytes before and after."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PackedRow:
    """One tensor.

    Attributes:
        name, shape: its own.
        dtype: as safetensors calls it, such as ``"BF16"``.
        encoding, codec: how it lies in the packed file.
        dense_bytes, packed_bytes: its bytes as a plain tensor, and in the packed file, without its share of the header.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    encoding: str
    codec: str | None
    dense_bytes: int
    packed_bytes: int

    @property
    def plain(self) -> bool:
        """Whether the tensor lies in the packed file as in any other."""
        return self.encoding == "dense" and self.codec is None

    @property
    def bits_per_weight(self) -> float:
        """Bits in the packed file for each element; 0 of none."""
        elements = math.prod(self.shape)
        return 8 * self.packed_bytes / elements if elements else 0.0


@dataclass(frozen=True)
class PackedReport:
    """What `save_packed` or `unpack_file` did.

    Attributes:
        out: what was written.
        dense_bytes, packed_bytes: the weight files whole, headers included; of a model in memory, the bytes of its tensors.
        rows: every tensor, in the order of the files.

    Example:
        >>> row = PackedRow("fc.weight", (8, 16), "F32", "bitmask", None, 512, 144)
        >>> report = PackedReport("model.safetensors", 600, 400, (row,))
        >>> print(report)
        400 bytes packed, 600 dense (1.50x); 144 and 512 (3.56x) in the 1 of 1 tensors that are packed: bitmask (1)
        >>> row.bits_per_weight
        9.0
    """

    out: str
    dense_bytes: int
    packed_bytes: int
    rows: tuple[PackedRow, ...]

    @property
    def packed(self) -> tuple[PackedRow, ...]:
        """The tensors that are not plain."""
        return tuple(r for r in self.rows if not r.plain)

    @property
    def ratio(self) -> float:
        """How many times smaller the packed files are than the dense ones; 0 where there are none."""
        return self.dense_bytes / self.packed_bytes if self.packed_bytes else 0.0

    def __str__(self) -> str:
        before, after = sum(r.dense_bytes for r in self.packed), sum(r.packed_bytes for r in self.packed)
        whole = f"{self.packed_bytes:,} bytes packed, {self.dense_bytes:,} dense ({self.ratio:.2f}x)"
        if not self.packed:
            return f"{whole}; no tensor is packed: none has zeros enough to gain by it"
        ways = Counter(r.encoding if r.codec is None else f"{r.encoding} + {r.codec}" for r in self.packed)
        return (
            f"{whole}; {after:,} and {before:,} ({before / after:.2f}x) in the {len(self.packed)} of {len(self.rows)} "
            f"tensors that are packed: {', '.join(f'{way} ({n})' for way, n in ways.most_common())}"
        )

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(self.facts(), indent=1)

    def facts(self) -> dict[str, Any]:
        """Everything, as plain data."""
        rows = [{**vars(r), "bits_per_weight": r.bits_per_weight} for r in self.rows]
        return {
            "out": self.out, "dense_bytes": self.dense_bytes, "packed_bytes": self.packed_bytes, "ratio": self.ratio,
            "rows": rows,
        }  # fmt: skip
