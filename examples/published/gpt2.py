"""GPT-2 pruned with data: perplexity of local folders, and a small stand-in of the same kind that is trained in minutes.

::

    python -m examples.published.gpt2 split BOOK.txt most.txt rest.txt   # the last tenth of it is the rest
    python -m examples.published.gpt2 make FOLDER --text most.txt        # the stand-in: 0.8 M weights, on characters
    secateur prune FOLDER --solver sparsegpt --calibration most.txt --length 128 --sparsity 0.5 -o HALF
    python -m examples.published.gpt2 score FOLDER HALF --text rest.txt --length 128
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from examples.published.models import pretrained
from secateur.evaluate.text import perplexity, read_text, sequences

REST = 0.1
"""The share of a text, at its end, that `split` leaves for the score."""
END = "<|endoftext|>"


def split(text: str) -> tuple[str, str]:
    """Most of a text, and its end.

    >>> split("0123456789")
    ('012345678', '9')
    """
    at = len(text) - round(REST * len(text))
    return text[:at], text[at:]


def characters() -> Any:
    """A tokenizer of GPT-2's kind that has learnt nothing: every byte is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, END])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=END, eos_token=END, unk_token=END)


def make(
    folder: Path,
    text: str,
    steps: int = 900,
    batch: int = 32,
    length: int = 128,
    width: int = 128,
    layers: int = 4,
    seed: int = 0,
) -> float:
    """Trains a GPT-2 on the characters of a text and saves it with its tokenizer, as a folder of transformers.

    Args:
        folder: where it goes.
        text: what it learns on.
        steps, batch, length: updates, sequences of each, and their tokens, which are the network's context, too.
        seed: draws the first weights and the sequences.

    Returns:
        The loss of the last step, in bits a token.
    """
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = characters()
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    end = tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=length, n_embd=128, n_layer=4, n_head=4, bos_token_id=end, eos_token_id=end,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    loss = _train(model, tokens, steps, batch, length, torch.Generator().manual_seed(seed))
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss / math.log(2)


def _train(model: nn.Module, tokens: Tensor, steps: int, batch: int, length: int, generator: torch.Generator) -> float:
    optimizer = AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    schedule = OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    loss = torch.tensor(math.nan)
    for _ in range(steps):
        first = torch.randint(len(tokens) - length, (batch, 1), generator=generator)
        ids = tokens[first + torch.arange(length)]
        loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return float(loss.detach())


def score(folder: Path, text: str, length: int, count: int | None = None) -> tuple[float, int]:
    """Perplexity of a local folder's language model on a text.

    Args:
        folder: with config, weights and tokenizer.
        text: scored in sequences that follow one another.
        length: tokens of a sequence; a number compares only with those of the same length.
        count: sequences at most, as they come; all if none is given.

    Returns:
        The perplexity, and the sequences it was measured on.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    found = sequences(tokenizer, text, length=length, count=count, seed=None)
    return perplexity(pretrained(AutoModelForCausalLM, str(folder)), found, batch=8), len(found)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    asked = _parser().parse_args(arguments)
    text = read_text(asked.text)
    if asked.command == "split":
        for path, part in zip((asked.most, asked.rest), split(text), strict=True):
            path.write_text(part, "utf-8")
    elif asked.command == "make":
        print(f"{asked.folder}: {make(asked.folder, text, asked.steps):.2f} bits a character in the last step")
    else:
        for folder in asked.folders:
            value, count = score(folder, text, asked.length, asked.count)
            print(
                f"{folder}: perplexity {value:.2f} ({math.log2(value):.3f} bits a token) in {count} × {asked.length} tokens"
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.published.gpt2")
    commands = parser.add_subparsers(dest="command", required=True)
    splitting = commands.add_parser("split", help="cut a text into most of it and its end")
    for name in ("text", "most", "rest"):
        splitting.add_argument(name, type=Path)
    making = commands.add_parser("make", help="train the stand-in and save it as a folder")
    making.add_argument("folder", type=Path)
    making.add_argument("--steps", type=int, default=600, help="updates (%(default)s: a minute or two)")
    scoring = commands.add_parser("score", help="perplexity of folders on a text")
    scoring.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    scoring.add_argument("--length", type=int, default=1024, help="tokens of a sequence (%(default)s)")
    scoring.add_argument("--count", type=int, help="sequences at most, as they come")
    for command in (making, scoring):
        command.add_argument("--text", type=Path, nargs="+", required=True, help="UTF-8 files, or folders of *.txt")
    return parser


if __name__ == "__main__":
    main()
