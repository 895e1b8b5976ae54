"""Tables small enough to check by eye: every number here was worked out by hand."""

from __future__ import annotations

from textwrap import dedent

import pytest
import torch

import secateur
from secateur.core.allocate import Bounds, level_counts, prune_count
from secateur.core.keys import magnitude_key

# A toy of three layers with 4, 6 and 2 weights.
#
#   |w|   in     1  2  4  7
#         mid    5  6  7  8  9 10
#         out    1  9
TOY = {
    "in": torch.tensor([[1.0, -2.0], [4.0, 7.0]]),
    "mid": torch.tensor([[-5.0, 6.0, 7.0], [8.0, -9.0, 10.0]]),
    "out": torch.tensor([[-1.0, 9.0]]),
}


def toy() -> dict[str, torch.Tensor]:
    return {f"{name}.weight": t.clone() for name, t in TOY.items()}


COUNTS = {
    # Sparsity 0.5 of 12 weights: 6 go.
    "global": [3, 2, 1],  #  1 1 2 4 5 6
    "uniform": [2, 3, 1],  # half of 4, 6 and 2
    # Keep 6 as the sums of dims 4 : 5 : 3, that is 2, 2.5 and 1.5; of the two halves the earlier layer loses first.
    "er": [2, 4, 0],
    "erk": [2, 4, 0],
    # LAMP: in    1/70  4/69   16/65  1            = .014 .058 .246 1
    #       mid  25/355 36/330 49/294 64/245 81/181 1 = .070 .109 .167 .261 .448 1
    #       out   1/82  1                          = .012 1
    "lamp": [2, 3, 1],  #    .012 .014 .058 .070 .109 .167
}


@pytest.mark.parametrize("allocation", COUNTS)
def test_counts_of_each_allocation(allocation: str) -> None:
    plan = secateur.plan(toy(), 0.5, allocation=allocation)
    assert [r.prune for r in plan.rows] == COUNTS[allocation]


def test_the_global_mask() -> None:
    w = toy()
    report = secateur.prune(w, 0.5)
    assert w["in.weight"].tolist() == [[0, 0], [0, 7]]
    assert w["mid.weight"].tolist() == [[0, 0, 7], [8, -9, 10]]
    assert w["out.weight"].tolist() == [[0, 9]]
    assert [(r.zeros, r.threshold) for r in report] == [(3, 7.0), (2, 7.0), (1, 9.0)]


def test_kernels_count_in_erk_and_not_in_er() -> None:
    """A convolution of 2 x 1 x 3 x 3 and a layer of 2 x 4; 13 of 26 stay.

    ERK as 2+1+3+3 = 9 to 2+4 = 6: 7.8 and 5.2. ER as 9 x (2+1) = 27 to 6: 10.6 and 2.4.
    """
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, bias=False), torch.nn.Linear(4, 2, bias=False))
    for allocation, counts in (("erk", [10, 3]), ("er", [7, 6])):
        assert [r.prune for r in secateur.plan(model, 0.5, allocation=allocation).rows] == counts


def test_uniform_plus() -> None:
    """The convolution stays dense. 0.7 of 18 + 20 + 10 is 34 (33.6), but the last layer loses 8 at most: 20 + 8 is too few."""
    model = torch.nn.Sequential(*(torch.nn.Conv2d(1, 2, 3, bias=False), *map(linear, ((4, 5), (5, 2)))))
    with pytest.raises(secateur.Infeasible, match=r"34 of 48 weights are to go, but .* allow only 28"):
        secateur.plan(model, 0.7, allocation="uniform_plus")
    # 24 of 48: 24 = 0.8 x 30, so 16 of 20 and 8 of 10, which the cap just allows.
    assert [r.prune for r in secateur.plan(model, 0.5, allocation="uniform_plus").rows] == [0, 16, 8]
    # 12 of 48: 12 = 0.4 x 30, so 8 of 20 and 4 of 10.
    assert [r.prune for r in secateur.plan(model, 0.25, allocation="uniform_plus").rows] == [0, 8, 4]


def linear(sizes: tuple[int, int]) -> torch.nn.Module:
    return torch.nn.Linear(*sizes, bias=False)


def test_ties_go_to_the_earlier_name_then_the_lower_index() -> None:
    w = {"b.weight": torch.ones(1, 3), "a.weight": -torch.ones(2, 2)}
    for sparsity, a, b in ((2 / 7, [0, 0, -1, -1], [1, 1, 1]), (5 / 7, [0, 0, 0, 0], [0, 1, 1])):
        copy = {n: t.clone() for n, t in w.items()}
        if not any(a):
            with pytest.warns(secateur.SecateurWarning, match="left with nothing: a.weight"):
                secateur.prune(copy, sparsity)
        else:
            secateur.prune(copy, sparsity)
        assert copy["a.weight"].reshape(-1).tolist() == a and copy["b.weight"].reshape(-1).tolist() == b


def test_two_of_four() -> None:
    w = torch.tensor([[0.9, -0.1, 0.5, 0.3, -0.2, 0.2, 0.2, -0.2]])
    secateur.prune(w, pattern="2:4")
    assert w.tolist() == torch.tensor([[0.9, 0, 0.5, 0, 0, 0, 0.2, -0.2]]).tolist()


def test_two_of_four_input_channels_at_each_kernel_position() -> None:
    """One output, four input channels, a kernel of 1 x 2: columns are kernel positions."""
    w = torch.tensor([[1.0, 8.0], [2.0, 7.0], [3.0, 6.0], [4.0, 5.0]]).view(1, 4, 1, 2)
    conv = torch.nn.Conv2d(4, 1, (1, 2), bias=False)
    conv.weight.data = w
    secateur.prune(conv, pattern="2:4")
    assert conv.weight.view(4, 2).tolist() == [[0, 8], [0, 7], [3, 0], [4, 0]]


def test_a_block_of_two_by_two() -> None:
    """Means of the blocks: 2.5, 1.0, 4.0 and 2.0."""
    w = {"a.weight": torch.tensor([[1.0, 2, 1, 1], [3, 4, 1, -1], [4, 4, 0, 0], [4, -4, 0, 8]])}
    secateur.prune(w, 0.5, pattern="2x2")
    assert w["a.weight"].tolist() == [[1, 2, 0, 0], [3, 4, 0, 0], [4, 4, 0, 0], [4, -4, 0, 0]]


def test_a_channel_with_its_bias() -> None:
    """Means of the rows: 2, 1 and 3. 4 of 9 weights are asked, so one row of three fits."""
    layer = torch.nn.Linear(3, 3)
    layer.weight.data = torch.tensor([[2.0, 2, 2], [1, -1, 1], [3, 3, 3]])
    layer.bias.data = torch.tensor([10.0, 20.0, 30.0])
    report = secateur.prune(layer, 0.45, pattern="channel")
    assert layer.weight.tolist() == [[2, 2, 2], [0, 0, 0], [3, 3, 3]]
    assert layer.bias.tolist() == [10, 0, 30]
    assert (report.zeros, report.total) == (3, 9)


ROUNDED = [  # n, sparsity, count: half to even of the decimal that was written
    (10, 0.25, 2),
    (10, 0.35, 4),
    (10, 0.45, 4),
    (10, 0.55, 6),
    (1, 0.5, 0),
    (3, 0.5, 2),
    (5, 0.5, 2),
    (7, 0.5, 4),
    (1000, 0.3, 300),
    (10, 0.1 + 0.2, 3),
    (100, 0.145, 14),
    (100, 0.155, 16),
    (100, 0.575, 58),  # in floats 57.49999999999999
    (1000, 0.0345, 34),  # in floats 34.5 as well
    (10**18 + 1, 0.9, 900_000_000_000_000_001),  # in floats the 1 is lost
    (3, 0.9, 3),
    (0, 0.9, 0),
    (10**9, 0.9, 900_000_000),
    (8, 0.0, 0),
]


@pytest.mark.parametrize(("n", "sparsity", "count"), ROUNDED)
def test_counts_are_rounded_half_to_even(n: int, sparsity: float, count: int) -> None:
    assert prune_count(n, sparsity) == count


LEVELS = """\
     0   0 0 0
     1   0 1 0
     2   0 1 1
     3   1 1 1
     4   1 2 1
     5   1 2 2
     6   2 2 2
     7   2 3 2
     8   2 3 3
     9   2 4 3
    10   2 4 4
    11   3 4 4
    12   3 5 4
    13   3 5 5
"""


def test_one_level_over_sizes_three_five_and_five() -> None:
    """Steps of a tensor of n lie at the levels 1/2n, 3/2n, …: of 3 at .17 .5 .83, of 5 at .1 .3 .5 .7 .9."""
    limits = [Bounds(0, 3), Bounds(0, 5), Bounds(0, 5)]
    rows = [(total, level_counts([3, 5, 5], limits, total)) for total in range(14)]
    text = "".join(f"{total:6}   {' '.join(map(str, counts))}\n" for total, counts in rows)
    assert text == LEVELS


KEYS = [  # dtype, then the keys of 0, -0, the smallest subnormal, 1, -1.5, infinity
    (torch.float64, 0, 1, 0x3FF0000000000000, 0x3FF8000000000000, 0x7FF0000000000000),
    (torch.float32, 0, 1, 0x3F800000, 0x3FC00000, 0x7F800000),
    (torch.float16, 0, 1, 0x3C00, 0x3E00, 0x7C00),
    (torch.bfloat16, 0, 1, 0x3F80, 0x3FC0, 0x7F80),
    (torch.float8_e5m2, 0, 1, 0x3C, 0x3E, 0x7C),
    (torch.float8_e4m3fn, 0, 1, 0x38, 0x3C, None),
    (torch.float8_e5m2fnuz, 0, 1, 0x40, 0x42, None),
    (torch.float8_e4m3fnuz, 0, 1, 0x40, 0x44, None),
]
SUBNORMALS = {
    torch.float64: 5e-324,
    torch.float32: 2.0**-149,
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-133,
    torch.float8_e5m2: 2.0**-16,
    torch.float8_e4m3fn: 2.0**-9,
    torch.float8_e5m2fnuz: 2.0**-17,
    torch.float8_e4m3fnuz: 2.0**-10,
}


@pytest.mark.parametrize("row", KEYS, ids=lambda r: str(r[0]).removeprefix("torch."))
def test_keys_of_a_few_magnitudes(row: tuple[torch.dtype, int, int, int, int, int | None]) -> None:
    dtype, zero, least, one, more, infinity = row
    t = torch.tensor([0.0, -0.0, -SUBNORMALS[dtype], 1.0, -1.5], dtype=torch.float64).to(dtype)
    assert magnitude_key(t).tolist() == [zero, zero, least, one, more]
    if infinity is not None:
        assert magnitude_key(torch.tensor([-torch.inf]).to(dtype)).tolist() == [infinity]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_below_a_threshold_goes_and_at_it_stays(dtype: torch.dtype) -> None:
    w = torch.tensor([0.25, -0.5, 0.5, -0.75, 0.0, 0.499], dtype=dtype)
    report = secateur.prune(w, threshold=0.5)
    assert w.tolist() == [0, -0.5, 0.5, -0.75, 0, 0]
    assert report.rows[0].threshold == 0.5 and report.zeros == 3


def test_a_threshold_between_the_numbers_of_bfloat16() -> None:
    """0.3 lies between 0.298828125 and 0.30078125. The first is below it, although 0.3 rounds to the second."""
    w = torch.tensor([0.298828125, 0.30078125, -0.298828125, -0.30078125], dtype=torch.bfloat16)
    report = secateur.prune(w, threshold=0.3)
    assert w.tolist() == [0, 0.30078125, 0, -0.30078125]
    assert report.rows[0].threshold == 0.30078125
    w = torch.tensor([0.099609375, 0.10009765625], dtype=torch.bfloat16)
    secateur.prune(w, threshold=0.1)  # here 0.1 rounds up as well, to 0.10009765625
    assert w.tolist() == [0, 0.10009765625]
    w = torch.tensor([0.69921875, 0.703125], dtype=torch.bfloat16)
    secateur.prune(w, threshold=0.7)  # and 0.7 rounds down, to 0.69921875, which is below 0.7 and goes
    assert w.tolist() == [0, 0.703125]


PLAN = """\
    {
     "secateur_plan": 1,
     "sparsity": 0.5,
     "threshold": null,
     "criterion": "magnitude",
     "allocation": "global",
     "pattern": "unstructured",
     "reduce": null,
     "nonfinite": "error",
     "carries_masks": false,
     "warnings": [],
     "rows": [
      {
       "name": "fc.bias",
       "shape": [
        1
       ],
       "dtype": "float32",
       "role": "bias",
       "out_dim": null,
       "in_dim": null,
       "batch_dims": [],
       "groups": 1,
       "aliases": [],
       "zeros": null,
       "asked": null,
       "prune": null,
       "threshold": null,
       "cut": null,
       "followers": [],
       "skip": "a bias"
      },
      {
       "name": "fc.weight",
       "shape": [
        1,
        4
       ],
       "dtype": "float32",
       "role": "linear",
       "out_dim": 0,
       "in_dim": 1,
       "batch_dims": [],
       "groups": 1,
       "aliases": [],
       "zeros": 1,
       "asked": null,
       "prune": 2,
       "threshold": 1.0,
       "cut": {
        "key": 1065353216,
        "index": 1,
        "level": null
       },
       "followers": [],
       "skip": null
      }
     ]
    }"""


def test_the_text_of_a_plan() -> None:
    """Two go: the zero, and the first of the ones, whose key is 0x3F800000; index 1 of it is the first that stays."""
    w = {"fc.weight": torch.tensor([[1.0, 0.0, -1.0, 2.0]]), "fc.bias": torch.tensor([1.0])}
    plan = secateur.plan(w, 0.5)
    assert plan.to_json() == dedent(PLAN)
    assert secateur.Plan.from_json(dedent(PLAN)) == plan
    assert str(plan) == dedent("""\
        sparsity 0.5, magnitude, global, unstructured: 2 of 4 weights
          fc.weight [1, 4] linear: 2 of 4 (50.00%)""")
