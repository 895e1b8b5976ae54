"""What the published recipes name works on small files of the real kind: pictures in folders, GLUE's tables, models saved."""

from __future__ import annotations

import doctest
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.published import imagenet, loops, minilm, models, text
from secateur.recipe.load import read
from secateur.recipe.run import Cell, run
from secateur.train.engine import Run, order_of
from tests.guard.source import ROOT
from tests.integration.test_recipes import asked_count

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

SIZES = ((40, 30), (20, 90), (64, 64), (7, 7))
COLOURS = ((200, 30, 30), (30, 30, 200))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of each of two classes to train on and four to score, of many shapes; one is grey."""
    root = tmp_path_factory.mktemp("imagenet")
    draw = random.Random(0)
    for part, count in (("train", 12), ("val", 4)):
        for name, colour in zip(("n01", "n02"), COLOURS, strict=True):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                picture = Image.new("RGB", SIZES[i % 4], tuple(c + draw.randint(-20, 20) for c in colour))
                (picture.convert("L") if i == 11 else picture).save(root / part / name / f"{name}_{i}.JPEG")
    return root


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resnet")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=2)
    torch.manual_seed(0)
    transformers.ResNetForImageClassification(config).save_pretrained(root)
    return root


def small(name: str, root: Path, *settings: str) -> list[Cell]:
    """Runs the real form of a recipe with small settings."""
    return run(read(ROOT / "examples" / "recipes" / f"{name}.yaml", [f"folder={root}", "device=cpu", *settings]))


@pytest.mark.filterwarnings("ignore:.*left with nothing")  # the network is tiny
def test_resnet_prunes_gradually_on_a_folder_of_pictures(pictures: Path, resnet: Path, tmp_path: Path) -> None:
    cells = small(
        "resnet50-gmp", tmp_path / "r", f"data.args={{folder: {pictures}, batch: 8, size: 32, workers: 0}}",
        f"model.args.folder={resnet}", "train.epochs=2", "train.optimizer.args.lr=0.05",
        "methods.GMP, uniform.prune.schedule={begin: 0, end: 1, every: 0.3}",
        "methods.GMP, global.prune.schedule={begin: 0, end: 1, every: 0.3}",
    )  # fmt: skip
    sizes = {n: p.numel() for n, p in models.resnet50(str(resnet)).named_parameters()}
    for cell in cells[1:]:
        if cell.method == "GMP, uniform":
            assert all(s == asked_count(sizes[n], cell.asked) / sizes[n] for n, s in cell.layers.items())
            assert not any("embedder" in n for n in cell.layers)
        else:
            total = sum(sizes[n] for n in cell.layers)
            assert cell.sparsity == asked_count(total, cell.asked) / total
    assert cells[0].metrics["accuracy"] > 50  # red and blue: easy
    lines = (tmp_path / "r/seed-0/dense/0.jsonl").read_text().splitlines()
    assert len(lines) == 2 * (24 // 8) and all(json.loads(line)["loss"] > 0 for line in lines)


@pytest.mark.filterwarnings("ignore:.*left with nothing")
def test_resnet_prunes_iteratively_on_a_folder_of_pictures(pictures: Path, resnet: Path, tmp_path: Path) -> None:
    cells = small(
        "resnet50-imp", tmp_path / "r", f"data.args={{folder: {pictures}, batch: 8, size: 32, workers: 0}}",
        f"model.args.folder={resnet}", "train.epochs=2", "train.loop.args={warm_up: 0.5, milestones: [1]}",
        "methods.IMP, learning-rate rewinding.iterate.epochs=1", "sparsities=[0.5, 0.9]",
    )  # fmt: skip
    assert [(c.asked, c.epochs) for c in cells] == [(0.0, 2), (0.5, 5), (0.9, 12)]
    sizes = {n: p.numel() for n, p in models.resnet50(str(resnet)).named_parameters()}
    for cell in cells[1:]:
        total = sum(sizes[n] for n in cell.layers)
        assert cell.sparsity == asked_count(total, cell.asked) / total


def batches(data: Any, epoch: int) -> list[dict[str, Tensor]]:
    return list(data.train(order_of(0, epoch)))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_an_epoch_of_pictures_can_be_run_again(pictures: Path) -> None:
    data = imagenet.imagenet(0, str(pictures), batch=5, size=16, workers=0)
    state = torch.get_rng_state()
    first, again, other = batches(data, 3), batches(data, 3), batches(data, 4)
    assert torch.equal(torch.get_rng_state(), state)
    many = batches(imagenet.imagenet(0, str(pictures), batch=5, size=16, workers=2), 3)
    assert [b["pixel_values"].shape for b in first] == [(5, 3, 16, 16)] * 4
    for a, b, c, d in zip(first, again, many, other, strict=True):
        assert all(torch.equal(a[k], b[k]) and torch.equal(a[k], c[k]) for k in a)
        assert not torch.equal(a["pixel_values"], d["pixel_values"])


def test_a_picture_is_seen_as_it_is(tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
    picture = Image.new("RGB", (80, 64), (0, 0, 0))
    picture.paste((255, 128, 0), (12, 4, 68, 60))  # the middle 56 of 64, which a view of 56 shows without scaling
    for part in ("train", "val"):
        picture.save(tmp_path / part / "a" / "x.png")
    data = imagenet.imagenet(0, str(tmp_path), batch=1, size=56, workers=0)
    (scored,) = data.test
    expected = (torch.tensor([1.0, 128 / 255, 0.0]) - torch.tensor(imagenet.MEAN)) / torch.tensor(imagenet.DEVIATION)
    assert torch.allclose(scored["pixel_values"], expected.view(1, 3, 1, 1).expand(1, 3, 56, 56), atol=1e-6)
    assert scored["labels"].tolist() == [0]
    seen = torch.cat([batches(data, e)[0]["pixel_values"] for e in range(8)])
    assert len({tuple(s.flatten().tolist()) for s in seen}) == 8


def test_crops_lie_inside_and_are_as_large_as_they_should_be() -> None:
    areas = []
    for seed in range(300):
        left, upper, right, lower = imagenet.crop(500, 375, random.Random(seed))
        assert 0 <= left < right <= 500 and 0 <= upper < lower <= 375
        areas.append((right - left) * (lower - upper) / (500 * 375))
        assert 0.74 < (right - left) / (lower - upper) < 1.35
    assert min(areas) > 0.079 and min(areas) < 0.15 and max(areas) > 0.85
    assert imagenet.crop(1000, 10, random.Random(0))[2:] == pytest.approx(
        (506.6666, 10), abs=1e-3
    )  # none fits: the middle


def drop_class(root: Path) -> None:
    (root / "val" / "n02").rename(root / "val" / "n03")


def no_pictures(root: Path) -> None:
    for path in (root / "train" / "n01").iterdir():
        path.unlink()


def broken(root: Path) -> None:
    (root / "val" / "n01" / "n01_0.JPEG").write_bytes(b"\xff\xd8not a picture")


@pytest.mark.parametrize(("harm", "error", "says"), [
    (lambda root: (root / "val").rename(root / "test"), FileNotFoundError, "val: ImageNet's layout is train/<class>"),
    (drop_class, ValueError, r"not in both: \['n02', 'n03'\]"),
    (no_pictures, FileNotFoundError, "n01 holds no pictures"),
    (broken, ValueError, "n01_0.JPEG is not a picture that Pillow can read"),
], ids=["part", "class", "empty", "broken"])  # fmt: skip
def test_a_folder_that_is_not_imagenet(
    harm: Callable[[Path], Any], error: type[Exception], says: str, pictures: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(pictures, tmp_path / "copy")
    harm(root)
    with pytest.raises(error, match=says):
        list(imagenet.imagenet(0, str(root), batch=4, size=8, workers=0).test)


def test_without_pillow_the_way_to_it_is_told(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "PIL.Image", raising=False)
    with pytest.raises(ModuleNotFoundError, match="pip install pillow"):
        imagenet.imagenet(0, str(pictures))


def rates(loop: Callable[[Run], None], scheduled: bool = True) -> list[float]:
    """The learning rate of every step of four epochs of five, from 1."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0) if scheduled else None
    seen: list[float] = []
    optimizer.register_step_post_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    epoch = [(torch.ones(3, 2), torch.tensor([0, 1, 0]))] * 5
    loop(Run(model, optimizer, scheduler, None, 0, 20, lambda number: epoch, 5))
    return seen


def test_the_rates_of_the_loops() -> None:
    found = rates(
        lambda r: loops.stepwise(r, milestones=[2, 3], warm_up=1, loss="examples.published.imagenet:smoothed")
    )
    assert found == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9, *[1.0] * 5, *[0.1] * 5, *[0.01] * 5])
    assert rates(lambda r: loops.stepwise(r, milestones=[2]), scheduled=False) == [1.0] * 20
    found = rates(lambda r: loops.cycles(r, restarts=[0, 1, 4], last=0.1))
    assert found[:6] == pytest.approx([0.91, 0.73, 0.55, 0.37, 0.19, 1 - 0.9 * 0.5 / 15])
    assert found[-1] == pytest.approx(0.1 + 0.9 * 0.5 / 15)


HEAD = ("index", "sentence1", "sentence2", "label1", "gold_label")
PAIRS = [("The ship \" sank.", "A vessel went down.", "entailment"), ("It rained.", "The sun shone.", "contradiction"),
         ("She sings.", "She is famous.", "neutral"), ("He left.", "Nobody agreed.", "-")]  # fmt: skip


@pytest.fixture
def mnli(tmp_path: Path) -> Path:
    root = tmp_path / "mnli"
    root.mkdir()
    rows = ["\t".join((str(i), a, b, label, label)) for i, (a, b, label) in enumerate(PAIRS * 3)]
    for name in ("train.tsv", "dev_matched.tsv"):
        (root / name).write_text("\n".join(["\t".join(HEAD), *rows]) + "\n", "utf-8")
    return root


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with a head and the tokenizer of the real encoder."""
    root = tmp_path_factory.mktemp("bert")
    transformers.AutoTokenizer.from_pretrained(minilm.folder()).save_pretrained(root)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(root)
    return root


def test_bert_prunes_gradually_on_mnli(mnli: Path, bert: Path, tmp_path: Path) -> None:
    cells = small(
        "bert-gmp", tmp_path / "r", f"data.args={{folder: {mnli}, tokenizer: {bert}, batch: 4}}",
        f"model.args.folder={bert}", "train.epochs=1", "methods.one-shot + fine-tune.finetune.epochs=1",
        "methods.GMP.train.epochs=2", "methods.GMP.train.loop.args.restarts=[0, 1, 2]",
        f"methods.GMP.train.loop.args.loss.args.teacher={bert}",
        "methods.GMP.prune.schedule={initial: 0.7, begin: 1, end: 1.7, every: 0.3}",
    )  # fmt: skip
    total = 2 * (4 * 16 * 16 + 2 * 16 * 32)
    assert [c.method for c in cells[1:]] == [m for m in ("one-shot", "one-shot + fine-tune", "GMP") for _ in (0.8, 0.9)]
    for cell in cells[1:]:
        assert len(cell.layers) == 12 and cell.sparsity == asked_count(total, cell.asked) / total
    lines = (tmp_path / "r/seed-0/GMP/0.9.jsonl").read_text().splitlines()
    assert [json.loads(line)["asked"] for line in lines][:4] == pytest.approx([0, 0, 0.7, 0.7 + 0.2 * (1 - 0.5**3)])


def test_mnli_as_its_authors_distribute_it(mnli: Path, bert: Path, tmp_path: Path) -> None:
    keys = ("sentence1", "sentence2", "gold_label")
    rows = [json.dumps(dict(zip(keys, pair, strict=True))) for pair in PAIRS * 3]
    for part in ("train", "dev_matched"):
        (tmp_path / f"multinli_1.0_{part}.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    a, b = text.mnli(0, str(tmp_path), str(bert), batch=4), text.mnli(0, str(mnli), str(bert), batch=4)
    assert a.pairs == b.pairs == a.scored and [p.label for p in a.pairs] == [0, 2, 1] * 3
    assert a.pairs[0].premise == 'The ship " sank.'
    for x, y in zip(batches(a, 2), batches(b, 2), strict=True):
        assert all(torch.equal(x[k], y[k]) for k in x)
    assert [len(x["labels"]) for x in a.test] == [4, 4, 1]
    (mnli / "train.tsv").write_text("sentence1\tsentence2\tgold_label\na\tb\tperhaps\n")
    with pytest.raises(ValueError, match=r"train\.tsv should have sentence1, sentence2 and gold_label"):
        text.mnli(0, str(mnli), str(bert))
    (mnli / "train.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither train\.tsv nor multinli_1\.0_train\.jsonl"):
        text.mnli(0, str(mnli), str(bert))


def test_what_is_distilled(mnli: Path, bert: Path) -> None:
    batch = batches(text.mnli(0, str(mnli), str(bert), batch=4), 0)[0]
    model = models.classifier(str(bert))
    own = model(**batch).loss.detach()

    def value(**how: float) -> float:
        return float(text.distilled(model, batch, str(bert), **how).detach())

    assert value() == pytest.approx(0, abs=1e-6)
    assert value(hardness=0.0) == float(own)
    with torch.no_grad():
        model.get_parameter("classifier.bias")[0] += 1
    a, b = (torch.log_softmax(m(**batch).logits / 3, 1) for m in (model, models.classifier(str(bert))))
    expected = 9 * (b.exp() * (b - a)).sum(1).mean().detach()
    assert value(temperature=3.0) == pytest.approx(float(expected), abs=1e-6)


def test_the_stand_in_learns_from_the_dense_encoder_on_other_texts() -> None:
    data = minilm.sentences(0, count=8, batch=4, length=32)
    model = minilm.encoder().eval()
    for batch in batches(data, 0):
        assert float(minilm.distance(model, batch).detach()) == pytest.approx(0, abs=1e-5)
    scores = minilm.similarity(model, data)
    assert scores == pytest.approx({"wordsim": 72.9, "lee50": 65.6}, abs=0.2)
    learnt = set(minilm.wikipedia())
    assert len(learnt) > 15_000
    assert not [s for lee in data.test.lee.texts for s in minilm.split(lee) if s in learnt]


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(minilm)
    assert result.attempted > 0 and result.failed == 0
