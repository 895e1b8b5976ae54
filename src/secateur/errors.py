"""Every error secateur raises on purpose, one small tree.

::

    SecateurError
    ├── BadInput (ValueError)          what was asked cannot be meant: a sparsity of 90, an unknown pattern
    │   ├── BadTensor                  a tensor that cannot be pruned as it is: NaN, integer, meta, expanded …
    │   ├── NothingChosen              a filter that matches nothing, or a target with nothing to prune
    │   ├── Infeasible                 caps and floors that leave too few weights to prune
    │   └── NotDefined                 two choices that have no meaning together (see docs/combinations.md)
    ├── PlanMismatch (ValueError)      a plan or masks made for other tensors than the ones at hand
    └── OutputExists (FileExistsError) an output path that is already there, without ``overwrite``

    SecateurWarning (UserWarning)      done as asked, but look: a layer left with nothing, a tensor left out

``BadInput`` and ``PlanMismatch`` are ``ValueError``s and ``OutputExists`` is a ``FileExistsError``, so code that knows
nothing of secateur catches them as usual. All are raised before anything is touched.
"""

from __future__ import annotations


class SecateurError(Exception):
    """Base of every error secateur raises on purpose."""


class BadInput(SecateurError, ValueError):
    """What was asked cannot be meant, or the target cannot be pruned as it is."""


class BadTensor(BadInput):
    """A tensor that cannot be pruned as it is; the message names it, its shape, and the way out."""


class NothingChosen(BadInput):
    """A filter that matches nothing, or a target that holds nothing to prune."""


class Infeasible(BadInput):
    """``max_sparsity`` and ``min_keep`` leave fewer weights to prune than the sparsity asks for."""


class NotDefined(BadInput):
    """Two choices that have no meaning together; ``docs/combinations.md`` lists them all."""


class PlanMismatch(SecateurError, ValueError):
    """A plan or masks that were made for other tensors than the ones at hand."""


class OutputExists(SecateurError, FileExistsError):
    """The output path is already there and ``overwrite`` was not asked for."""


class SecateurWarning(UserWarning):
    """Something was done as asked, but deserves a look; the report's ``warnings`` say the same."""
