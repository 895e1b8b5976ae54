"""FLOPs against formulas worked out by hand, and against the same network written as plain matrix
products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from secateur.evaluate.flops import Flops, count_flops
from secateur.evaluate.operators import pieces


class Seen(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(op._schema.name)
        return op(*args, **(kwargs or {}))


def operators(model: nn.Module, *args: Any, **kwargs: Any) -> set[str]:
    with torch.no_grad(), Seen() as seen:
        model.eval()(*args, **kwargs)
    return seen.names


class Calls(nn.Module):
    """A function of tensors as a network."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, m in modules.items():
            self.add_module(name, m)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, *self.children(), **kwargs)


def zero_half(weight: Tensor) -> None:
    """Zeros in the first half of the elements."""
    with torch.no_grad():
        weight.view(-1)[: weight.numel() // 2] = 0


# --- linear and convolution
# -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (7, 4), (2, 7, 4)])
def test_linear(shape: tuple[int, ...], bias: bool) -> None:
    rows = torch.zeros(shape)[..., 0].numel()
    assert count_flops(nn.Linear(4, 3, bias=bias), torch.zeros(shape)) == Flops(
        2 * rows * 4 * 3, {"": 2 * rows * 12}, 2 * rows * 12
    )


CONVOLUTIONS = [
    (nn.Conv2d(6, 8, 3), (2, 6, 9, 7), 2 * (7 * 5) * 8 * 6 * 9),
    (nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 7), 2 * (5 * 4) * 8 * 6 * 9),
    (nn.Conv2d(6, 8, 3, groups=2), (2, 6, 9, 7), 2 * (7 * 5) * 8 * 3 * 9),
    (nn.Conv2d(6, 6, 3, groups=6), (2, 6, 9, 7), 2 * (7 * 5) * 6 * 9),
    (nn.Conv2d(6, 8, 3, dilation=2), (2, 6, 9, 7), 2 * (5 * 3) * 8 * 6 * 9),
    (nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), (6, 9, 7), 9 * 7 * 8 * 6 * 9),
    (nn.Conv1d(6, 8, 5, bias=False), (2, 6, 9), 2 * 5 * 8 * 6 * 5),
    (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), 27 * 3 * 2 * 8),
    # every input position meets every weight of its group once
    (nn.ConvTranspose2d(6, 8, 3, stride=2), (2, 6, 5, 4), 2 * (5 * 4) * 6 * 8 * 9),
    (nn.ConvTranspose1d(6, 8, 3, groups=2), (2, 6, 5), 2 * 5 * 6 * 4 * 3),
]


@pytest.mark.parametrize(
    ("conv", "shape", "macs"), CONVOLUTIONS, ids=lambda v: str(v) if isinstance(v, nn.Module) else ""
)
def test_convolution(conv: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    flops = count_flops(conv, torch.randn(shape))
    assert (flops.total, flops.macs, flops.effective) == (2 * macs, macs, 2 * macs)
    conv.weight.data.view(-1)[::3] = 0
    left = int((conv.weight != 0).sum())
    assert count_flops(conv, torch.randn(shape)).effective == 2 * macs * left // conv.weight.numel()


def test_bilinear_and_matrix_vector() -> None:
    assert count_flops(nn.Bilinear(3, 4, 5), (torch.randn(6, 3), torch.randn(6, 4))).macs == 6 * 5 * 3 * 4
    assert count_flops(Calls(lambda x, fc: torch.mv(fc.weight, x), fc=nn.Linear(4, 3)), torch.randn(4)).macs == 12
    added = Calls(lambda x, fc: torch.addmv(fc.bias, fc.weight, x), fc=nn.Linear(4, 3))
    assert count_flops(added, torch.randn(4)).macs == 12


# --- recurrent
# --------------------------------------------------------------------------------------------------------


class Loop(nn.Module):
    """A recurrent layer written as a loop over sequences, layers, directions and steps, with nothing but
    ``mm``."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, sequences: list[Tensor]) -> list[Tensor]:
        return [self.sequence(s) for s in sequences]

    def sequence(self, x: Tensor) -> Tensor:
        for layer in range(self.rnn.num_layers):
            ends = ["", "_reverse"] if self.rnn.bidirectional else [""]
            x = torch.cat([self.direction(x, f"_l{layer}{end}") for end in ends], 1)
        return x

    def direction(self, x: Tensor, end: str) -> Tensor:
        w_ih, w_hh, b_ih, b_hh = (getattr(self.rnn, n + end) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        h, c = torch.zeros(1, w_hh.shape[1]), torch.zeros(1, self.rnn.hidden_size)
        out = []
        for t in reversed(range(len(x))) if end.endswith("reverse") else range(len(x)):
            gi, gh = x[t : t + 1].mm(w_ih.t()) + b_ih, h.mm(w_hh.t()) + b_hh
            if self.rnn.mode == "LSTM":
                i, f, g, o = (gi + gh).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                h = h.mm(getattr(self.rnn, "weight_hr" + end).t()) if self.rnn.proj_size else h
            elif self.rnn.mode == "GRU":
                (ri, zi, ni), (rh, zh, nh) = gi.chunk(3, 1), gh.chunk(3, 1)
                z = (zi + zh).sigmoid()
                h = (1 - z) * (ni + (ri + rh).sigmoid() * nh).tanh() + z * h
            else:
                h = (gi + gh).tanh()
            out.append(h)
        return torch.cat(out[::-1] if end.endswith("reverse") else out)


RECURRENT = [
    nn.LSTM(5, 4),
    nn.LSTM(5, 4, num_layers=2, bidirectional=True),
    nn.LSTM(5, 4, num_layers=2, bidirectional=True, proj_size=3),
    nn.GRU(5, 4, num_layers=2),
    nn.GRU(5, 4, bidirectional=True),
    nn.RNN(5, 4, num_layers=3),
]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("rnn", RECURRENT, ids=str)
def test_recurrent_is_a_loop_of_matrix_products(rnn: nn.RNNBase, packed: bool) -> None:
    lengths = [6, 4, 1] if packed else [6, 6, 6]
    sequences = [torch.randn(n, 5) for n in lengths]
    batch = pack_sequence(sequences) if packed else torch.stack(sequences, 1)
    loop = Loop(rnn.eval())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        expected = loop(sequences)

    out = rnn(batch)[0]
    got = torch.nn.utils.rnn.pad_packed_sequence(out)[0] if isinstance(out, PackedSequence) else out
    for i, e in enumerate(expected):  # it is the same network
        assert torch.allclose(got[: len(e), i], e, atol=1e-5)

    flops = count_flops(rnn, batch)
    assert flops.total == counter.get_total_flops() > 0
    assert flops.by_module == {"": flops.total}
    weights = sum(w.numel() for w in rnn.parameters() if w.dim() > 1)
    assert flops.macs == sum(lengths) * weights

    assert flops.by_weight == {n: 2 * sum(lengths) * w.numel() for n, w in rnn.named_parameters() if w.dim() > 1}
    zero_half(rnn.weight_hh_l0)
    assert count_flops(rnn, batch).effective == flops.total - sum(lengths) * rnn.weight_hh_l0.numel()


def test_the_fused_lstm_is_what_runs_here() -> None:
    """Else the formula for it is not tested."""
    assert "aten::mkldnn_rnn_layer" in operators(nn.LSTM(5, 4), torch.randn(6, 2, 5))


def test_recurrent_cells() -> None:
    for cell, gates in ((nn.LSTMCell(5, 4), 4), (nn.GRUCell(5, 4), 3), (nn.RNNCell(5, 4), 1)):
        assert count_flops(cell, torch.randn(3, 5)).macs == 3 * gates * 4 * (5 + 4)


def test_cudnn_formula_counts_rows_times_weights() -> None:
    """The fused operator of CUDA, on its own arguments: every weight meets every step of every sequence,
    biases do not."""
    rnn = nn.LSTM(5, 4, num_layers=2, bidirectional=True)
    found = pieces(torch.ops.aten._cudnn_rnn.default, (torch.randn(6, 3, 5), list(rnn.parameters()), 4), {})
    assert found is not None
    assert sum(f for f, _ in found) == count_flops(rnn, torch.randn(6, 3, 5)).total


# --- attention
# --------------------------------------------------------------------------------------------------------


def encoder(**kwargs: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **kwargs)


@pytest.fixture
def slow_attention() -> Any:
    """Attention and encoder layers as separate operators."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def encoder_macs(rows: int, scores: int) -> dict[str, int]:
    return {
        "self_attn": rows * 3 * 8 * 8 + 2 * scores * 8,
        "self_attn.out_proj": rows * 8 * 8,
        "linear1": rows * 8 * 16,
        "linear2": rows * 16 * 8,
    }


def test_fused_encoder_layer() -> None:
    layer, x = encoder(), torch.randn(3, 5, 8)
    zero_half(layer.linear1.weight)
    assert "aten::_transformer_encoder_layer_fwd" in operators(layer, x)
    flops = count_flops(layer.train(), x)
    macs = encoder_macs(rows=15, scores=3 * 5 * 5)
    assert flops.by_module == {name: 2 * m for name, m in macs.items()}
    assert flops.effective == flops.total - macs["linear1"]


@pytest.mark.usefixtures("slow_attention")
def test_encoder_layer_in_parts_counts_the_same() -> None:
    layer, x = encoder(), torch.randn(3, 5, 8)
    assert "aten::_transformer_encoder_layer_fwd" not in operators(layer, x)
    assert count_flops(layer, x).by_module == {n: 2 * m for n, m in encoder_macs(15, 75).items()}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_fused_encoder_skips_padding_as_the_operator_does() -> None:
    model, x = nn.TransformerEncoder(encoder(), 2), torch.randn(3, 5, 8)
    lengths = torch.tensor([5, 3, 2])
    padding = torch.arange(5)[None] >= lengths[:, None]
    assert "aten::_nested_tensor_from_mask" in operators(model, x, src_key_padding_mask=padding)
    flops = count_flops(model, {"src": x, "src_key_padding_mask": padding})
    macs = encoder_macs(rows=10, scores=25 + 9 + 4)
    assert flops.by_module == {f"layers.{i}.{n}": 2 * m for i in range(2) for n, m in macs.items()}


@pytest.mark.parametrize("need_weights", [True, False])
def test_self_attention_fused_and_in_parts(need_weights: bool, request: pytest.FixtureRequest) -> None:
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
    inputs = {"query": x, "key": x, "value": x, "need_weights": need_weights}
    assert "aten::_native_multi_head_attention" in operators(layer, **inputs)
    fused = count_flops(layer, inputs)
    request.getfixturevalue("slow_attention")
    assert "aten::_native_multi_head_attention" not in operators(layer, **inputs)
    assert fused == count_flops(layer, inputs)
    assert fused.macs == 15 * 4 * 64 + 2 * 75 * 8


def test_cross_attention() -> None:
    q, k, v = torch.randn(3, 5, 8), torch.randn(3, 7, 6), torch.randn(3, 7, 4)
    layer = nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=4)
    flops = count_flops(layer, (q, k, v))
    attention = 2 * 3 * 5 * 7 * 8
    assert flops.macs == 15 * 64 + 21 * 6 * 8 + 21 * 4 * 8 + attention + 15 * 64
    assert flops.by_module["out_proj"] == 2 * 15 * 64
    zero_half(layer.k_proj_weight)
    assert count_flops(layer, (q, k, v)).effective == flops.total - 21 * 48

    packed = nn.MultiheadAttention(8, 2, batch_first=True)  # one weight, cut in two
    packed.in_proj_weight.data[:8] = 0  # the queries' rows
    kv = torch.randn(3, 7, 8)
    flops = count_flops(packed, (q, kv, kv))
    assert flops.macs == (15 + 21 + 21 + 15) * 64 + attention
    assert flops.effective == flops.total - 2 * 15 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"attn_mask": torch.ones(5, 5, dtype=torch.bool)}], ids=str
)
def test_scaled_dot_product_attention(options: dict[str, Any], dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 4, n, d, dtype=dtype) for n, d in ((5, 8), (5, 8), (5, 6)))
    model = Calls(F.scaled_dot_product_attention)
    assert count_flops(model, {"query": q, "key": k, "value": k, **options}).macs == 2 * 4 * 5 * 5 * 16
    assert count_flops(model, {"query": q, "key": k, "value": v, **options}).macs == 2 * 4 * 5 * 5 * 14


def test_grouped_query_attention() -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    model = Calls(F.scaled_dot_product_attention)
    assert count_flops(model, {"query": q, "key": k, "value": k, "enable_gqa": True}).macs == 2 * 4 * 5 * 7 * 16
