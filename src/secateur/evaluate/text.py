"""Texts for language models: read from files, cut into sequences of tokens, and scored by perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import BadInput

from .mode import only_training

Tokenizer = Callable[[str], Any]
"""A text to its tokens: numbers, or a mapping that has them as ``"input_ids"``, as tokenizers of transformers return."""
Progress = Callable[[int, int], object]
"""Told how much is done, and of how much."""


def read_text(paths: str | PathLike[str] | Iterable[str | PathLike[str]]) -> str:
    r"""The text of one or several UTF-8 files, in the order given, two line breaks between any two.

    Args:
        paths: a file; a folder, which stands for the ``*.txt`` in it, sorted by name; or several of either.

    Returns:
        The text. Line ends are ``\n``, and a byte order mark is left out.

    Raises:
        BadInput: a path that is not there, a folder without ``*.txt``, a file that is not UTF-8, nothing but white space.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from secateur.evaluate.text import read_text
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "b.txt").write_text("and the sea.")
        >>> _ = (folder / "a.txt").write_text("The ship")
        >>> read_text(folder)
        'The ship\n\nand the sea.'
    """
    given = [paths] if isinstance(paths, str | PathLike) else list(paths)
    files = [f for path in given for f in _files(Path(path))]
    texts = [_read(f) for f in files]
    text = "\n\n".join(texts)
    if not text.strip():
        what = f"{', '.join(map(str, files))}: there is nothing but white space" if files else "no path was given"
        raise BadInput(f"{what}; a text is needed.")
    return text


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("*.txt"))
    if not found:
        raise BadInput(f"the folder {path} holds no *.txt: name the files, or another folder.")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise BadInput(
            f"{path} is not UTF-8 (byte {e.start}): convert it first, for instance with iconv -t utf-8."
        ) from None
    except OSError as e:
        raise BadInput(f"{path} cannot be read: {e.strerror}.") from None


def sequences(
    tokenizer: Tokenizer, text: str, *, length: int, count: int | None = None, seed: int | None = 0, start: int = 0
) -> list[Tensor]:
    """Cuts a text into sequences of tokens that do not overlap, and draws some of them.

    The whole text is tokenized at once. From token ``start`` on, chunk ``i`` holds the tokens ``start + i * length`` up
    to ``start + (i + 1) * length``; what is left at the end is not used. The seed draws which chunks are taken and in
    which order: a larger ``count`` begins with the same sequences.

    Args:
        tokenizer: called with the text. To leave out special tokens:
            ``functools.partial(tokenizer, add_special_tokens=False)``.
        text: long enough for ``start + count * length`` tokens.
        length: tokens of a sequence, at least 2.
        count: how many sequences; ``None`` for all there are.
        seed: draws the chunks; ``None`` takes them from the start, in the text's order.
        start: the token at which the first chunk begins.

    Returns:
        ``count`` tensors ``(1, length)`` int64, on the CPU: batches of one, as calibration takes them.

    Raises:
        BadInput: the text is empty or too short (the message says how many tokens there are and are needed); a number
            that cannot be meant; a tokenizer that returns something else than tokens.

    Example:
        >>> from secateur.evaluate.text import sequences
        >>> letters = lambda text: [ord(c) - ord("a") for c in text]
        >>> [s.tolist() for s in sequences(letters, "abcdefghijk", length=3, seed=None)]
        [[[0, 1, 2]], [[3, 4, 5]], [[6, 7, 8]]]
        >>> [s.tolist() for s in sequences(letters, "abcdefghijk", length=3, count=2, seed=1)]
        [[[3, 4, 5]], [[6, 7, 8]]]

    Reference:
        SparseGPT's code (arXiv:2301.00774) takes windows at random places, of documents that are long enough, with
        replacement: windows may overlap, and shorter documents are never seen.
    """
    _check_numbers(length, count, seed, start)
    if not isinstance(text, str):
        raise BadInput(f"text is a {type(text).__name__}: give one string (read_text makes one of files).")
    if not text.strip():
        raise BadInput("the text is empty: there is nothing to cut sequences out of.")
    tokens = _tokens(tokenizer(text))
    there = max(0, len(tokens) - start) // length
    wanted = 1 if count is None else count
    if there < wanted:
        after = f" from token {start} on" if start else ""
        raise BadInput(
            f"the text is too short: {wanted} sequences of {length} tokens{after} need {start + wanted * length} "
            f"tokens, and it has {len(tokens)}. Give a longer text, or ask for {_fewer(len(tokens) - start, length)}."
        )
    chunks = tokens[start : start + there * length].view(there, length)
    if seed is not None:
        chunks = chunks[torch.randperm(there, generator=torch.Generator().manual_seed(seed))]
    return list(chunks[:count].clone().split(1))


def _fewer(tokens: int, length: int) -> str:
    return f"at most {tokens // length} sequences" if tokens >= length else "shorter sequences"


def _check_numbers(length: object, count: object, seed: object, start: object) -> None:
    for name, value, least in (("length", length, 2), ("count", count, 1), ("start", start, 0), ("seed", seed, None)):
        if value is None and name in ("count", "seed"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
            at_least = f" of at least {least}" if least is not None else ""
            raise BadInput(f"{name}={value!r}: give a whole number{at_least}.")


def _tokens(found: Any) -> Tensor:
    """What a tokenizer returned, as ``(tokens,)`` int64."""
    ids = found["input_ids"] if isinstance(found, Mapping) else found
    try:
        tensor = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    if tensor is not None and tensor.dim() == 2 and len(tensor) == 1:
        tensor = tensor[0]
    whole = tensor is not None and not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)
    if tensor is None or tensor.dim() != 1 or (len(tensor) and not whole):
        what = type(ids).__name__ if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        raise BadInput(
            f"the tokenizer returned {what}: expected whole numbers, one a token, or a mapping that has them as "
            "'input_ids'."
        )
    return tensor.to("cpu", torch.int64)


def perplexity(
    model: nn.Module, sequences: Sequence[Tensor] | Tensor, *, batch: int = 1, progress: Progress | None = None
) -> float:
    """How unexpected a text is to a causal language model: the exponential of the mean negative log-likelihood.

    Over all sequences ``x`` and all their tokens but the first::

        perplexity = exp( mean over x, t >= 1 of -log p(x[t] | x[0] … x[t-1]) )

    Every sequence starts anew, so the context of a token is what stands before it in its own sequence, up to ``length -
    1`` tokens: longer sequences give lower numbers, and only numbers of one length compare. The loss is taken in float32
    from the logits, whatever the model's dtype, and summed in float64. The model runs in eval mode, without gradients,
    and every flag is put back.

    Args:
        model: called with token numbers ``(n, length)`` int64; returns logits ``(n, length, vocabulary)`` as a tensor, as
            the first of a tuple, or as ``.logits``. Those of the token at ``t`` predict the token at ``t + 1``.
        sequences: tensors ``(1, length)`` or ``(k, length)`` of one length, or all as one ``(n, length)``.
        batch: sequences run at once; the number changes the result by rounding alone.
        progress: called with the sequences done and all of them, after each batch.

    Returns:
        The perplexity; infinite where it is beyond a float's range, NaN where a logit is.

    Raises:
        BadInput: no sequence, a length below 2 or beyond the model's context, tensors that do not hold token numbers of
            one length, numbers beyond the vocabulary of the config or the logits, a model that returns no logits.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from secateur.evaluate.text import perplexity
        >>> class Uniform(nn.Module):
        ...     def forward(self, tokens):
        ...         return torch.zeros(*tokens.shape, 50)
        >>> round(perplexity(Uniform(), torch.arange(20).view(2, 10)), 4)
        50.0
    """
    ids = _all(sequences)
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise BadInput(f"batch={batch!r}: give a whole number of at least 1.")
    _check_config(ids, getattr(model, "config", None))
    place = next(model.parameters(), ids).device
    total, done = 0.0, 0
    with torch.no_grad(), only_training(model):
        for part in ids.split(batch):
            part = part.to(place)
            logits = _logits(model(part), part)
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), part[:, 1:].flatten(), reduction="none")
            total += float(loss.double().sum())
            done += len(part)
            if progress is not None:
                progress(done, len(ids))
    mean = total / (ids.shape[0] * (ids.shape[1] - 1))
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """The mean negative log-likelihood of every token but the first, for criteria made of gradients; see `perplexity`.

    Args:
        model: a causal language model, called as in `perplexity`.
        tokens: ``(n, length)`` int64.

    Returns:
        A scalar with a graph, float32.

    Raises:
        BadInput: a model that returns no logits for every token.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
        >>> next_token_loss(net, torch.tensor([[0, 1, 2]])).requires_grad
        True
    """
    logits = _logits(model(tokens), tokens)
    loss: Tensor = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())
    return loss


def _all(sequences: Sequence[Tensor] | Tensor) -> Tensor:
    """The sequences as one ``(n, length)``."""
    parts = [sequences] if isinstance(sequences, Tensor) else list(sequences)
    shapes = [tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__ for p in parts]
    if not parts or any(isinstance(s, tuple) and 0 in s for s in shapes):
        raise BadInput("there is no sequence to score.")
    for part, shape in zip(parts, shapes, strict=True):
        if not isinstance(part, Tensor) or part.dim() != 2 or part.dtype not in (torch.int64, torch.int32):
            kind = f" of {part.dtype}" if isinstance(part, Tensor) else ""
            raise BadInput(
                f"a sequence is {shape}{kind}: give token numbers (k, length) of int64, as `sequences` cuts them."
            )
    lengths = sorted({p.shape[1] for p in parts})
    if len(lengths) > 1 or lengths[0] < 2:
        raise BadInput(f"the sequences have lengths {lengths}: give one length of at least 2.")
    return torch.cat(list(parts)).long()


def _logits(out: Any, tokens: Tensor) -> Tensor:
    """The logits in what a model returned for token numbers."""
    found = getattr(out, "logits", out[0] if isinstance(out, tuple) else out)
    if not isinstance(found, Tensor) or found.dim() != 3 or found.shape[:2] != tokens.shape:
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(out).__name__
        raise BadInput(
            f"the model returned {what} for tokens of shape {tuple(tokens.shape)}: perplexity needs logits for every "
            "token (n, length, vocabulary), those of a causal language model."
        )
    _check_vocabulary(tokens, found.shape[2])
    return found


def _check_config(tokens: Tensor, config: Any) -> None:
    """What a model of transformers says of itself, before it is run."""
    longest, vocabulary = (getattr(config, n, None) for n in ("max_position_embeddings", "vocab_size"))
    if isinstance(longest, int) and tokens.shape[1] > longest:
        raise BadInput(
            f"the sequences have {tokens.shape[1]} tokens, and the model's context ends at {longest}: cut shorter ones."
        )
    if isinstance(vocabulary, int):
        _check_vocabulary(tokens, vocabulary)


def _check_vocabulary(tokens: Tensor, size: int) -> None:
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= size:
        raise BadInput(
            f"the tokens run from {lowest} to {highest}, and the model's vocabulary from 0 to {size - 1}: they are "
            "another tokenizer's."
        )
