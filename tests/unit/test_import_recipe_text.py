"""How SparseML's dialect is read: tags, front matter, stages, expressions; and what a hostile file comes to."""

from __future__ import annotations

import re
import time
from fnmatch import fnmatchcase

import pytest

from secateur.errors import BadInput
from secateur.recipe.load import LARGEST, parse
from secateur.recipe.sparseml import imported
from secateur.recipe.sparseml_names import globs_of
from secateur.recipe.sparseml_text import read

PRUNE = """
  - !GMPruningModifier
    params: [fc.weight]
    init_sparsity: 0.0
    final_sparsity: 0.5
    start_epoch: 0
    end_epoch: 4
    update_frequency: 0.5
"""
PLAIN = f"modifiers:{PRUNE}"


def value(text: str, head: str = "") -> object:
    """What one setting of a modifier is read as."""
    (found,) = read(f"{head}\nmodifiers:\n  - !A {{x: {text}}}\n", "old.yaml")
    return found.settings["x"]


# ------------------------------------------------------------------------------------------ the text


def test_front_matter() -> None:
    plain = imported(PLAIN, "old.md")
    assert imported(f"<!-- a licence -->\n\n---\n{PLAIN}---\n\n# A card\n\n---\nx: [1\n", "old.md") == plain
    assert imported(f"---\n{PLAIN}", "old.md") == plain
    with pytest.raises(BadInput, match=r"old.md is not YAML: .*line 5"):
        read("# A card\n---\na: 1\n\nb: [\n---\n", "old.md")


def test_groups_of_any_name() -> None:
    text = "a_modifiers:\n  - !A\n  - !B {x: 1}\nb: !C {}\nmodifiers_c: {D: {y: 2}, E: null}\nothers: [1]\nmodifiers: null\n"
    found = read(text, "old.yaml")
    assert [(m.kind, m.newer, dict(m.settings)) for m in found] == [
        ("A", False, {}), ("B", False, {"x": 1}), ("C", False, {}), ("D", True, {"y": 2}), ("E", True, {}),
    ]  # fmt: skip


def test_aliases_of_values() -> None:
    head = "a: &a 3\nb: &b [*a, 4]\nc: &c [x, *a]\n"
    assert value("*a", head) == 3
    assert value("*c", head) == ["x", 3]


def test_stages() -> None:
    text = """
    share: 0.7
    last: 5
    first_stage:
      last: 9
      pruning_modifiers:
        MagnitudePruningModifier:
          targets: [fc.weight]
          init_sparsity: 0.0
          final_sparsity: eval(share)
          start: 1
          end: eval(last)
          update: 0.5
          mask_structure: filter
          update_scheduler: polynomial_decay
          scheduler_args: {exponent: 5}
    second_stage:
      run_type: oneshot
      obcq_modifiers:
        SparseGPTModifier: {sparsity: 0.5, targets: ['re:.*']}
    """
    recipe, notes = imported(text, "old.yaml")
    prune = recipe["methods"]["gradual"]["prune"]
    assert (recipe["sparsities"], recipe["train"]["epochs"]) == ([0.7], 9)
    assert prune["pattern"] == "channel:in", "in the newer form filters are what inputs are elsewhere"
    assert prune["schedule"] == {
        "kind": "polynomial", "begin": 1.0, "end": 9.0, "every": 0.5, "initial": 0.0, "power": 5.0, "unit": "epochs",
    }  # fmt: skip
    said = "\n".join(notes)
    for part in ("The stages first_stage, second_stage are read as one run", "the last one batch before end",
                 "pruned all weights equal to its threshold", "SparseGPTModifier in second_stage was not"):  # fmt: skip
        assert part in said, part
    with pytest.raises(BadInput, match="without start and end, SparseML never begins to prune"):
        imported(re.sub(r"\n *start: 1", "", text), "old.yaml")
    with pytest.raises(BadInput, match="nothing in it prunes by magnitude"):
        imported("s:\n  modifiers: {ConstantPruningModifier: {targets: __ALL__, start: 0}}\n", "old.yaml")


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [
        ("update_scheduler: linear", "linear"),
        ("update_scheduler: polynomial, scheduler_args: {exponent: 1}", "linear"),
        ("update_scheduler: polynomial_decay, scheduler_args: {exponent: 3}", "cubic"),
        ("update_scheduler: polynomial_decay", None),
        ("update_scheduler: 'calc(math.sqrt(index))'", None),
        ("update_scheduler: multi_step, scheduler_args: {steps: [[1, 0.5]]}", None),
    ],
)
def test_curves_of_the_newer_form(scheduler: str, kind: str | None) -> None:
    settings = (
        f"targets: fc, init_sparsity: 0, final_sparsity: 0.5, start: 0, end: 4, apply_globally: true, {scheduler}"
    )
    recipe, notes = imported(f"s: {{modifiers: {{MagnitudePruningModifier: {{{settings}}}}}}}", "old.yaml")
    prune = recipe["methods"]["gradual"]["prune"]
    assert prune["schedule"]["kind"] == (kind or "cubic")
    assert prune["allocation"] == "global"
    assert any("has no counterpart; the schedule is cubic" in n for n in notes) == (kind is None)


# ------------------------------------------------------------------------------------------ expressions

HEAD = "n: 30\nshare: 0.5\nlate: eval(n - half)\nhalf: eval(n * share)\nname: block4\nnames: [a, b]\n"


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("n", 30), ("n + 1", 31), ("n * share", 15.0), ("late / 3", 5.0), ("-n // 4 % 5", 2), ("2 ** 3", 8), ("2 ** -1", 0.5),
        ("max(n, 2 * n, 1)", 60), ("min(n, 4)", 4), ("round(share * 5)", 2), ("int(late)", 15), ("float(n)", 30.0),
        ("abs(-n)", 30), ("name", "block4"), ("names", ["a", "b"]), (" ( n ) ", 30), ("1e3", 1000.0),
    ],
)  # fmt: skip
def test_arithmetic(expression: str, result: object) -> None:
    found = value(f'"eval({expression})"', HEAD)
    assert found == result
    assert type(found) is type(result)
    assert value(f'[{{y: "eval({expression})"}}]', HEAD) == [{"y": result}]


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("__import__('os').system('true')", "is more than numbers"),
        ("n.real", "is more than numbers"),
        ("names[0]", "is more than numbers"),
        ("(lambda: 1)()", "is more than numbers"),
        ("[x for x in names]", "is more than numbers"),
        ("open(n)", "is more than numbers"),
        ("n if n else 1", "is more than numbers"),
        ("n << 99", "is more than numbers"),
        ("max(*names)", "is more than numbers"),
        ("round(n, -9)", "round takes one number"),
        ("max()", "max takes numbers"),
        ("max(n, key=n)", "max takes numbers"),
        ("'a' * 9", "is not a number"),
        ("True + 1", "is not a number"),
        ("names * 2", "is not a number"),
        ("(-8) ** 0.5", "is not a number"),
        ("9**9**9", "a number beyond|too large"),
        ("9.0**9**9", "a number beyond|too large"),
        ("10**12*10", "a number beyond"),
        ("1e999", "a number beyond"),
        ("9" * 150, "a number beyond"),
        ("n / 0", "a division by zero"),
        ("n % 0", "a division by zero"),
        ("0 ** -1", "a division by zero"),
        ("nowhere + 1", "there is no variable 'nowhere'"),
        ("circle", "goes in a circle"),
        ("n +", "cannot be evaluated"),
        ("1 + " * 60 + "1", "more than 200 characters"),
        ("(" * 90 + "n" + ")" * 90, None),
        ("-" * 190 + "n", None),
    ],
)
def test_an_expression_is_no_more_than_arithmetic(expression: str, why: str | None) -> None:
    head = HEAD + "circle: eval(other)\nother: eval(circle + 1)\n"
    if why is None:
        assert value(f'"eval({expression})"', head) == 30
        return
    start = time.perf_counter()
    with pytest.raises(BadInput, match=why):
        value(f'"eval({expression})"', head)
    assert time.perf_counter() - start < 2


def test_variables_are_evaluated_once() -> None:
    """Each is twice the one before: evaluated anew at every use, the last would take a billion steps."""
    chain = "".join(f"v{i}: eval((v{i - 1} + v{i - 1}) / 2)\n" for i in range(1, 31))
    assert value("eval(v30)", f"v0: 7\n{chain}") == 7
    long = "".join(f"v{i}: eval(v{i - 1})\n" for i in range(1, 2000))
    with pytest.raises(BadInput, match="too deep"):
        value("eval(v1999)", f"v0: 7\n{long}")


# ------------------------------------------------------------------------------------------ hostile files

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (BOMB, "line 3: an alias"),
        ("a: &a [x, *a]\n", "line 1: an alias"),
        ("a: &a {b: 1}\nc: *a\n", "line 2: an alias"),
        ("a: *b\n", r"\*b is used, and &b is nowhere"),
        ("a: &a [" + "x, " * 900 + "x]\nb: [" + "*a, " * 900 + "*a]\n", "more than 100000 values"),
        ("a: &a [" + "x, " * 900 + "x]\n" + "".join(f"b{i}: *a\n" for i in range(200)), "more than 100000 values"),
        ("a: !!python/object/apply:os.system ['true']\n", "is not YAML.*python/object"),
        ("a: !!python/name:os.system\n", "is not YAML.*python/name"),
        ("modifiers: [!GMPruningModifier [1]]\n", "should be followed by settings"),
        ("modifiers: [!GMPruningModifier text]\n", "should be followed by settings"),
        ("modifiers: [1]\n", "a modifier has a class and settings"),
        ("modifiers: [{A: 1}]\n", "a modifier has a class and settings"),
        ("a: " + "[" * 3000 + "]" * 3000, "more than 40 levels"),
        ("".join(f"{' ' * i}a:\n" for i in range(60)), "more than 40 levels"),
        ("a: " + "x" * 20_000, "a value of 20000 characters"),
        ("a: 1" + ":59" * 5000, "a value of 15001 characters"),
        ("x" * (LARGEST + 1), f"is larger than {LARGEST} bytes"),
        ("a: 2020-99-99\n", "cannot be read"),
        ("? [1]\n: 2\n", "a key is one word or number"),
        ("? !A {x: 1}\n: 2\n", "nothing in it prunes"),
        ("a: 1\na: 2\n", "'a' is there twice"),
        ("modifiers:\n  - !A {x: 1, x: 2}\n", "'x' is there twice"),
        ("just words", "should be a mapping"),
        ("a: 1\n---\nb: 2\n", "is not YAML"),
        ("\x00", "is not YAML"),
        ("", "should be a mapping"),
    ],
    ids=lambda v: v[:24] if isinstance(v, str) else None,
)
def test_hostile_files_are_refused_at_once(text: str, why: str) -> None:
    start = time.perf_counter()
    with pytest.raises(BadInput, match=why):
        imported(text, "old.yaml")
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("text", ["{a: {b: 1}, a: 2}", "? [1]\n: 2\n", "a: 2020-99-99\n", "[" * 3000])
def test_recipes_of_secateur_are_read_no_less_carefully(text: str) -> None:
    with pytest.raises(BadInput):
        parse(text)


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("final_sparsity", "80"), ("final_sparsity", "1.0"), ("final_sparsity", "'0.5'"), ("final_sparsity", "null"),
        ("init_sparsity", "-0.1"), ("init_sparsity", "null"), ("start_epoch", "soon"), ("start_epoch", "null"),
        ("end_epoch", "true"), ("end_epoch", "1.0e+9"), ("end_epoch", ".nan"), ("update_frequency", "[1]"),
        ("update_frequency", "null"), ("params", "null"), ("params", "[]"), ("params", "[1]"), ("params", "{a: b}"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant(key: str, bad: str) -> None:
    with pytest.raises(BadInput, match=r"^old.yaml: ") as refused:
        imported(re.sub(rf"{key}: .*", f"{key}: {bad}", PLAIN), "old.yaml")
    assert key.split("_")[0] in str(refused.value) or "epoch" in str(refused.value)


# ------------------------------------------------------------------------------------------ names

NAMES = [
    "conv1.weight", "layer1.0.conv1.weight", "layer1.1.conv2.weight", "layer10.conv1.weight", "fc.weight", "fc.bias",
    "encoder.layer.0.query.weight", "encoder.layer.11.key.weight", "encoder.layer.3.output.dense.weight", "dfl.conv.weight",
]  # fmt: skip
PLAIN_ENOUGH = [
    r".*", r".*weight", r"layer1.*.conv1.weight", r"layer1\.\d\.conv[12]\.weight", r"^layer.*conv", r"fc.weight$",
    r"fc\.(weight|bias)", r"(conv1|fc).weight", r".*conv*", r".*[^s].weight", r"encoder.layer.([0,2,4]|11).(query|key).weight",
    r"(?:layer1|fc).*", r"fc|conv1", r"la?yer.*", r"encoder\.layer\.(0|11)?\.?query.weight",
]  # fmt: skip
WIDER = [r"encoder.layer.\d+.*weight", r"encoder.layer.[0-9]+.query.weight", r"laye*r1.0", r"(layer|fc)+1.*"]


@pytest.mark.parametrize("regex", PLAIN_ENOUGH)
def test_plain_expressions_match_the_same_names(regex: str) -> None:
    found = globs_of(regex)
    assert found is not None
    assert not found.wider
    meant = {n for n in NAMES if re.match(regex, n)}
    assert meant
    assert {n for n in NAMES if any(fnmatchcase(n, g) for g in found.globs)} == meant


@pytest.mark.parametrize("regex", WIDER)
def test_wider_ones_match_no_less(regex: str) -> None:
    found = globs_of(regex)
    assert found is not None
    assert found.wider
    meant = {n for n in NAMES if re.match(regex, n)}
    assert meant <= {n for n in NAMES if any(fnmatchcase(n, g) for g in found.globs)}


@pytest.mark.parametrize(
    "regex",
    [r"^((?!dfl).)*$", r"(?=a)b", r"(a)\1", r"a{2}", r"a$b", r"(a$)b", r"(a", r"a)", r"[a", r"*a", r"a\b", r"[\d]", r"[]",
     "a\\", "(a|b|c|d)" * 8, "(" * 9 + "a" + ")" * 9, "a" * 600, r"x(?P<n>a)", r"a^b"],
)  # fmt: skip
def test_others_have_no_globs(regex: str) -> None:
    assert globs_of(regex) is None


def test_an_expression_is_never_run() -> None:
    """One that takes a backtracking engine for ever is read like any other."""
    start = time.perf_counter()
    found = globs_of(r"(a+)+(a+)+(a+)+$")
    assert time.perf_counter() - start < 1
    assert found is not None
    assert found.wider
