"""What packing does, measured: facts are those of the files and tensors, times are there, and what gains nothing says so."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import secateur
from secateur.core.layouts import LAYOUTS, arrange
from secateur.core.packed import encode
from secateur.errors import BadInput, NothingChosen
from secateur.report import bench_words
from secateur.report.bench_text import as_text
from secateur.runtime import bench_layers
from secateur.runtime.bench import Bench, Layer, Total, bench
from secateur.runtime.bench_memory import resident
from secateur.runtime.bench_sources import opened
from secateur.runtime.candidates import BY, activations, dense, int8, packed, sparse
from secateur.runtime.files import save_packed
from secateur.runtime.machine import Machine, resident_bytes
from secateur.runtime.modules import pack
from secateur.runtime.table import Table, using
from secateur.runtime.timing import Ratio
from secateur.runtime.tune import Size, tune
from tests.unit.conftest import Run
from tests.unit.tables_of import constant, table_of

FAST = table_of((constant(2.0), constant(1.0)))
SLOW = table_of((constant(0.9), constant(0.8)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(256, 192), nn.LayerNorm(192), nn.Linear(192, 256, bias=False), nn.Linear(8, 8))
    secateur.prune(made, 0.9, ignore="3")
    return made


@pytest.fixture(scope="module")
def file(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "model.safetensors"
    save_file(model.state_dict(), path)
    return path


# ------------------------------------------------------------------------------------------ facts


@pytest.fixture(scope="module")
def found(file: Path) -> Bench:
    return bench(file, rows=(1, 4), turns=3, table=FAST, memory=False)


def test_facts_are_those_of_the_file(found: Bench, file: Path, model: nn.Module) -> None:
    assert (found.target, found.file_bytes) == (str(file), file.stat().st_size)
    assert [(x.name, x.shape, x.dtype) for x in found.layers] == [
        ("0.weight", (192, 256), "float32"), ("2.weight", (256, 192), "float32"), ("3.weight", (8, 8), "float32"),
    ]  # fmt: skip
    for x in found.layers:
        weight = model.state_dict()[x.name]
        assert x.density == float((weight != 0).double().mean())
        assert x.dense_bytes == weight.nbytes
        held = weight.nbytes if x.layout is None else sum(p.nbytes for p in arrange(weight, "bitmask"))
        assert x.held_bytes == held
        assert x.file_bytes == weight.nbytes
        assert x.packed_bytes == encode(weight).nbytes
    assert [x.layout for x in found.layers] == ["bitmask", "bitmask", None]
    assert found.weights == 2 * 192 * 256 + 64
    assert found.bits == 8 * found.held_bytes / found.weights
    assert found.dense == {"8 x 8 is smaller than what was measured, 128 x 128": 1}


def test_times_are_there(found: Bench) -> None:
    names = {"packed", "float32", "bfloat16"} | ({"int8"} if int8(torch.eye(4)) else set())
    for t, rows in zip(found.totals, (1, 4), strict=True):
        assert t.rows == rows
        assert set(t.seconds) == names
        assert all(s > 0 for s in t.seconds.values())
        assert set(t.ratios) == names - {"packed"}
        assert all(0 < r.low <= r.median <= r.high for r in t.ratios.values())
        assert t.faster == min(("float32", "bfloat16"), key=lambda c: t.seconds[c])
        assert t.throughput["packed"] == rows / t.seconds["packed"]
    assert all(set(x.seconds[n]) == names and min(x.seconds[n].values()) > 0 for x in found.layers for n in (1, 4))


def test_memory_was_measured(tmp_path: Path) -> None:
    """In a process of its own: about the bytes of the tensors that it holds."""
    weight = sparse(2048, 4096, 0.1, torch.float32)
    path = tmp_path / "model.safetensors"
    save_file({"fc.weight": weight, "norm.weight": torch.ones(4)}, path)
    found = resident(str(path), {"fc.weight": "csr"})
    if resident_bytes() is None:
        assert found is None
        return
    assert found is not None
    want = sum(p.nbytes for p in arrange(weight, "csr"))
    assert abs(found.dense / weight.nbytes - 1) < 0.2
    assert abs(found.packed - want) < 0.2 * weight.nbytes


def test_json_and_text(found: Bench) -> None:
    facts = json.loads(found.to_json())
    assert facts["weights"] == found.weights
    assert facts["machine"]["torch"] == torch.__version__
    assert facts["layers"][0]["seconds"]["1"]["packed"] > 0
    assert facts["totals"][1]["throughput"]["packed"] == found.totals[1].throughput["packed"]
    assert facts["said"] == list(bench_words.sentences(found))
    text = as_text(found)
    for said in (str(found.machine), "0.weight", "192x256", "bitmask", "not end to end", "1 layer of 3 stays dense: 8 x 8",
                 f"{found.bits:.2f} bits a weight", "the faster dense one"):  # fmt: skip
        assert said in text, said
    assert str(found) == text


def test_a_model_and_a_dict(model: nn.Module) -> None:
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for target in (model, model.state_dict()):
        found = bench(target, rows=(1,), turns=3, table=FAST)
        assert [x.layout for x in found.layers] == ["bitmask", "bitmask", None]
        assert (found.file_bytes, found.memory) == (None, None)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert found.target == "OrderedDict"


def test_a_packed_file_and_a_packed_model(model: nn.Module, tmp_path: Path) -> None:
    """The same layers and layouts as of the plain ones; bytes on disk are those of the file."""
    path = tmp_path / "packed.safetensors"
    report = save_packed(model, path)
    found = bench(path, rows=(1,), turns=3, table=FAST, memory=False)
    plain = bench(model, rows=(1,), turns=3, table=FAST)
    assert [(x.name, x.layout, x.held_bytes) for x in found.layers] == [
        (x.name, x.layout, x.held_bytes) for x in plain.layers
    ]
    assert found.file_bytes == path.stat().st_size
    sizes = {r.name: r.packed_bytes for r in report.rows}
    assert [x.file_bytes for x in found.layers] == [sizes[x.name] for x in found.layers]
    laid = bench(pack(copy.deepcopy(model), include="0", layout="csr"), rows=(1,), turns=3, table=FAST)
    assert [(x.name, x.layout) for x in laid.layers] == [
        ("0.weight", "csr"),
        ("2.weight", "bitmask"),
        ("3.weight", None),
    ]
    assert laid.layers[0].density == plain.layers[0].density
    both = resident(str(path), {x.name: x.layout for x in found.layers})
    assert (both is None) == (resident_bytes() is None)


@pytest.mark.parametrize("kind", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_a_whole_model(kind: torch.dtype) -> None:
    """Its time, the share outside linear layers, and its bytes; the model is left as it was."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 128)).to(kind).train()
    secateur.prune(model, 0.9)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    table = table_of((constant(2.0), constant(1.0)), dtype=str(kind).removeprefix("torch."))
    x = torch.randn(2, 256)
    for inputs in (x, (x,), {"input": x}):
        w = bench(model, inputs, rows=(1,), turns=3, table=table).whole
        assert w is not None
        assert {"packed", "float32", "bfloat16"} <= set(w.seconds)
        assert all(s > 0 for s in w.seconds.values())
        assert all(0 <= s < 1 for s in w.outside.values())
        assert w.bytes["float32"] == 2 * w.bytes["bfloat16"] == 4 * sum(p.numel() for p in model.parameters())
        assert w.bytes["packed"] < 0.4 * w.bytes[str(kind).removeprefix("torch.")]
        assert w.bytes.get("int8", 0) < 0.3 * w.bytes["float32"]
    assert all(type(m) in (nn.Sequential, nn.Linear, nn.GELU) and m.training for m in model.modules())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    text = as_text(bench(model, x, rows=(1,), turns=3, table=table))
    assert "End to end the packed model is" in text
    assert "outside its linear layers" in text


def test_inputs_that_cannot_be(model: nn.Module) -> None:
    with pytest.raises(BadInput, match="a tensor, a tuple of arguments or a mapping"):
        bench(model, [1, 2], rows=(1,), turns=3)
    with pytest.raises(BadInput, match="inputs go with a model"):
        bench(model.state_dict(), torch.ones(1), rows=(1,), turns=3)


def test_chunks(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    """A model larger than the cache is measured piece by piece, with the same facts; the last piece is not a small one."""
    whole = bench(model, rows=(1,), turns=3, table=FAST)
    monkeypatch.setattr(bench_layers, "cache_bytes", lambda: 192 * 256 * 2)
    assert [len(c) for c in bench_layers._chunks(opened(model).matrices)] == [1, 2]
    pieces = bench(model, rows=(1,), turns=3, table=FAST)
    assert [(x.name, x.layout, x.held_bytes) for x in pieces.layers] == [
        (x.name, x.layout, x.held_bytes) for x in whole.layers
    ]


def test_what_layers_there_are() -> None:
    """Linear ones, transposed ones, and convolutions of a single point; no head, embedding or norm."""
    tensors = {
        "embed_tokens.weight": torch.ones(8, 4), "lm_head.weight": torch.ones(8, 4), "norm.weight": torch.ones(4),
        "h.0.attn.c_attn.weight": torch.ones(4, 12), "h.0.attn.c_attn.bias": torch.ones(12),
        "conv.weight": torch.ones(6, 4, 1, 1), "conv3.weight": torch.ones(6, 4, 3, 3),
        "fc.weight": torch.ones(5, 4), "double.weight": torch.ones(5, 4, dtype=torch.float64),
    }  # fmt: skip
    found = opened(tensors).matrices
    assert {m.name: m.shape for m in found} == {
        "conv.weight": (6, 4), "fc.weight": (5, 4), "h.0.attn.c_attn.weight": (12, 4),
    }  # fmt: skip
    assert all(tuple(m.load().shape) == m.shape and m.load().is_contiguous() for m in found)


@pytest.mark.parametrize(
    ("more", "said"),
    [({"rows": ()}, "rows"), ({"rows": (0,)}, "rows"), ({"rows": (1.5,)}, "rows"), ({"turns": 2}, "turns")],
)
def test_what_cannot_be_meant(model: nn.Module, more: dict[str, object], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        bench(model, **more)  # type: ignore[arg-type]


def test_nothing_to_measure(tmp_path: Path) -> None:
    with pytest.raises(NothingChosen):
        bench({"norm.weight": torch.ones(4)})
    with pytest.raises(BadInput, match="does not exist"):
        bench(tmp_path / "none.safetensors")


# ------------------------------------------------------------------------------------------ sentences


def of_times(
    seconds: dict[int, dict[str, float]],
    *,
    layout: str | None = "bitmask",
    dtype: str = "bfloat16",
    why: str = "because",
) -> Bench:
    """A report of given times, of one layer."""
    layer = Layer("fc", (4, 4), dtype, 0.1, layout, why, 32, 8, 8, None, seconds)
    totals = []
    for rows, found in seconds.items():
        ratios = {c: Ratio(s / found["packed"], 0.0, 9.0) for c, s in found.items() if c != "packed"}
        totals.append(Total(rows, found, ratios, min(("float32", "bfloat16"), key=lambda c: found[c])))
    return Bench("x", Machine("cpu", 2, 1, "avx2", "2.13"), 1, None, (layer,), tuple(totals), None)


def said(b: Bench) -> str:
    return "\n".join(bench_words.sentences(b))


def test_what_is_faster_says_so() -> None:
    text = said(of_times({1: {"packed": 1.0, "float32": 3.0, "bfloat16": 2.0}}))
    assert (
        text
        == "At 1 row the linear layers are 2.00 (0.00–9.00) times as fast as torch's dense bfloat16, the faster of its two."
    )


def test_what_gains_nothing_says_so() -> None:
    times = {
        1: {"packed": 1.0, "float32": 3.0, "bfloat16": 2.0},
        128: {"packed": 20.0, "float32": 90.0, "bfloat16": 20.2},
    }
    text = said(of_times(times))
    assert "At 128 rows this will be no faster here: 1.01" in text
    assert "time goes into arithmetic, and not into reading weights: dense takes 10 times as long as for 1 row" in text


def test_float32_that_should_be_cast() -> None:
    times = {16: {"packed": 2.0, "float32": 4.0, "bfloat16": 1.0}}
    text = said(of_times(times, dtype="float32"))
    assert "At 16 rows this will be slower here: 0.50" in text
    assert "cast it to bfloat16 before it is packed" in text


def test_int8_that_is_faster_is_told() -> None:
    text = said(of_times({1: {"packed": 2.0, "float32": 9.0, "bfloat16": 4.0, "int8": 1.0}}))
    assert "torch's dynamic int8, another precision, is faster than this: 2.00 times as fast at 1 row." in text


def test_what_stays_dense_says_why() -> None:
    text = said(of_times({1: {"packed": 2.0, "float32": 9.0, "bfloat16": 2.1}}, layout=None, why="nothing is gained"))
    assert "At 1 row nothing changes here: every layer stays dense bfloat16." in text
    assert "1 layer of 1 stays dense: nothing is gained." in text


def test_a_table_that_knows_of_no_gain(model: nn.Module) -> None:
    """The whole way: what would be slow stays dense, and the report says at which rows and by how much."""
    found = bench(model, rows=(1,), turns=3, table=SLOW)
    assert all(x.layout is None for x in found.layers)
    assert "bitmask would be 0.90 times as fast as dense at 1 row" in as_text(found)


# ------------------------------------------------------------------------------------------ candidates and tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_candidates_multiply_the_same_matrix(dtype: torch.dtype) -> None:
    weight, x = sparse(40, 96, 0.2, dtype), activations(5, 96, dtype)
    want = x.double() @ weight.double().t()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(dense(weight)(x).double(), want, rtol=tolerance, atol=tolerance)
    for layout in LAYOUTS:
        layer = packed(arrange(weight, layout), layout, 96)
        for table in BY.values():
            with using(table):
                got = layer(x)
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_int8_multiplies_about_the_same() -> None:
    weight, x = sparse(40, 96, 0.5, torch.float32), activations(5, 96, torch.float32)
    run = int8(weight)
    if run is not None:
        error = (run(x) - x @ weight.t()).norm() / (x @ weight.t()).norm()
        assert error < 0.05


def test_a_sparse_matrix_is_as_sparse_as_asked() -> None:
    before: Tensor = torch.random.get_rng_state()
    found = sparse(300, 200, 0.1, torch.bfloat16)
    assert abs(float((found != 0).double().mean()) - 0.1) < 0.01
    assert torch.equal(torch.random.get_rng_state(), before)


TINY = Size((16,), (0.1, 0.5), (1, 128), 3)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few copies of a matrix, for tests that do not look at what was measured."""
    monkeypatch.setattr("secateur.runtime.candidates.MOST_COPIES", 4)


@pytest.mark.usefixtures("few")
@pytest.mark.slow
def test_a_measured_table_can_be_read() -> None:
    told: list[tuple[int, int, str]] = []
    found = tune(dtypes=("float32",), size=TINY, progress=lambda *a: told.append(a))
    (grid,) = found.grids
    assert (grid.out, grid.columns, grid.densities, grid.rows) == ((16,), (16,), (0.1, 0.5), (1, 128))
    assert Table.from_json(found.to_json()).grid(torch.float32) is not None
    for layout in LAYOUTS:
        assert grid.ratio(layout, "kernel", 16, 16, 0.1, 1) > 0
        assert grid.ratio(layout, "expand", 16, 16, 0.1, 1) == 0  # hopeless, and not measured
        assert grid.ratio(layout, "expand", 16, 16, 0.1, 128) > 0
    assert [t[:2] for t in told] == [(i, 2) for i in range(2)]


def test_a_dtype_that_no_table_is_for() -> None:
    for wrong in (("float64",), ()):
        with pytest.raises(BadInput, match="float32, bfloat16, float16"):
            tune(dtypes=wrong, size=TINY)


# ------------------------------------------------------------------------------------------ commands


def test_bench_command(command: Run, file: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    table.write_text(FAST.to_json(), encoding="utf-8")
    done = command("bench", file, "--rows", "1", "--threads", 1, "--table", table)
    assert resident_bytes() is None or "memory of a process that holds all tensors, measured:" in done.out
    assert (done.code, done.err) == (0, "")
    assert "At 1 row the linear layers are" in done.out or "At 1 row this will be" in done.out
    done = command("bench", file, "--rows", "1,2", "--json", "--no-memory")
    assert [t["rows"] for t in done.facts["totals"]] == [1, 2]
    done = command("bench", file, "--rows", "one")
    assert (done.code, "whole numbers, such as 1,16,128" in done.err) == (3, True)


@pytest.mark.usefixtures("few")
def test_tune_command(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.runtime.tune.QUICK", TINY)
    out = tmp_path / "table.json"
    done = command("tune", "--quick", "-o", out, "--dtype", "float32")
    assert (done.code, done.err) == (0, "")
    assert f"SECATEUR_TABLE={out} uses it" in done.out.replace("\n", "")
    assert "float32" in done.out
    assert Table.read(out).grid(torch.float32) is not None
    assert command("tune", "--quick", "-o", out).code == 4
    assert command("tune", "--quick", "-o", out, "--overwrite", "--dtype", "int8").code == 3
