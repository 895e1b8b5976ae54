"""Whole channels and whole heads, by every criterion that scores them: which of them beats magnitude, which beats chance?

*Channels.* A plain convolutional network (`benchmarks.evidence.channels.Plain`) learns 20,000 pictures in 10 epochs, with the
learning rates of the study ``cnn``. Then the same share of output channels goes from each of its six convolutions, the first
included; the classifier stays. What criteria look at is 2,048 of the training pictures, in 64 batches. A norm behind a
pruned channel would make it a constant: its factor and shift become zero too (`secateur.evaluate.norms.silence_norms`), and
BatchNorm's statistics are measured again on 6,400 training pictures. The test pictures are scored

- *at once*: then, without any training;
- *tuned*: after 2 epochs more, for all with the learning rates of the dense network's last 2. A `Pruner` holds the zeros,
  those in the norms too. The dense network is trained on in the same way.

BatchNorm scale comes without the L1 penalty on it that network slimming trains with. Random channels are drawn by the seed.
All this was settled before anything was scored. The table that prunes only some of the convolutions was added afterwards, to see
where what came out comes from.

*Heads.* Of MiniLM's 72 heads, 12 in each of 6 layers, a share goes at once, without training: over all layers (``global``) or
from each (``uniform``); counts are rounded down to whole heads. The scores are those of the study ``encoder``. Mean activation,
APoZ and BatchNorm scale mean nothing here: a head's output goes into a sum, without a nonlinearity or a norm of its own. Head
importance needs a loss that has a gradient where the network is. The distance from the dense network's embeddings has none at the
dense network itself, where it is at its least. So the loss is the kind that the encoder was trained with: to find, for the
definition of each of 32 nouns, its own noun among them, by cosines times 20. It is measured on 512 nouns of WordNet that are not
tested. WordNet's test is of the same kind; the other two are not.

Intervals above magnitude are over what is tested, by the bootstrap of the study ``encoder``; those above random heads are over
the seeds, for which heads to draw matters more than which nouns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence import channels, heads
from benchmarks.result import Bar, Table

NAME = "structures"
TITLE = "Channels and heads, by every criterion that scores them"
SEEDS = (0, 1, 2, 3, 4)


def run_seed(seed: int, folder: Path, quick: bool) -> dict[str, Any]:
    """Makes, or reads, the cells of a seed."""
    first = seed == SEEDS[0]
    return {**channels.run_seed(seed, folder, quick), **heads.run_seed(seed, folder, quick, first)}


def summary(results: Sequence[Mapping[str, Any]]) -> tuple[list[Table], list[Bar]]:
    """Tables of both; no bars were set."""
    return [*channels.tables(results), *heads.tables(results)], []
