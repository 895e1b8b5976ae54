"""`Pruner`: masks that live through training, outside the model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.core.criteria import Criterion
from secateur.core.heads import Head
from secateur.core.make import make
from secateur.core.patterns import Channel, Pattern
from secateur.core.plan import Plan
from secateur.core.request import Request
from secateur.core.schedules import Schedule
from secateur.core.spelling import Allocation
from secateur.core.types import Spec
from secateur.errors import BadInput, NotDefined, SecateurError, SecateurWarning
from secateur.stores.base import matches
from secateur.stores.dtensor import live

from .alike import check_alike, check_sharded, together
from .closures import before_use, with_loss
from .dynamic import SET, Rewiring, RigL, check_constant, check_rewiring, move_masks
from .held import Held, emptied, followers_of, may_be_held
from .movement import Movement
from .optimizers import bare, check_follows, drop_gradients, goes_last, listed, mixes, skipped, warn_of_waiting
from .parameters import Filter, can_carry, check_dtypes, check_schedule, trainable
from .scores import Memory, restored
from .state import check_state


class Pruner:
    """Holds zeros at zero while a model trains, and prunes more as a schedule says.

    ``Pruner(model, optimizer)`` after `secateur.prune` is the fine-tuning line. With a schedule it is gradual pruning:
    ``schedule(0)`` applies at once, ``schedule(t)`` right after update t. The masks, one bit a weight, are held here and
    nowhere in the model.

    Gradients of pruned weights are zeroed as they are accumulated, before any clipping, and those written since (by hand,
    with noise) once more before a step. For the elementwise optimizers of torch that alone keeps weights and state at zero;
    when a mask changes, the state of what it prunes is zeroed too. For any other the weights are masked after each step.

    Args:
        model: the module that is trained. Nothing is added to it but a hook a pruned parameter, which `close` removes.
        optimizer: one or several; their step is counted by a hook, and ``step()`` must not be called. ``None``: call
            ``step()`` after every ``optimizer.step()``, or `attach` one later.
        schedule: ``step -> sparsity`` (`secateur.schedules` or any function). ``None`` holds what is zero now; tensors that
            are wholly zero (LoRA's B) are not held. Frozen parameters are left alone: unfreeze them before, or make another.
        criterion, allocation, pattern, include, ignore, max_sparsity, min_keep, roles: as for `secateur.prune`.
        regrow: let all weights live again where the schedule falls to 0 (AC/DC).
        grad_mask: mask gradients; ``False`` for methods that look at the gradients of pruned weights. The weights are then
            masked after every step.
        state_keys: names of further optimizer state that belongs to single weights.
        rewire: let masks move, by one of `secateur.dynamic`: at a constant sparsity (``rigl``, ``random_growth``), under a
            schedule (``movement``) or without one (``soft_movement``). For one attached optimizer and single weights.

    Raises:
        BadInput, NothingChosen, NotDefined: as `secateur.prune`; a schedule that ends below what is zero already; an
            optimizer that holds none of the pruned parameters; a frozen parameter named in ``include``. Nothing is touched.

    Example:
        >>> import torch, secateur
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> pruner = secateur.Pruner(model, optimizer, secateur.schedules.cubic(0.75, begin=2, end=6))
        >>> for _ in range(8):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(16, 8)).square().mean().backward()
        ...     optimizer.step()
        >>> pruner.steps, pruner.sparsity, int((model.weight == 0).sum())
        (8, 0.75, 24)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any = None,
        schedule: Schedule | None = None,
        *,
        criterion: str | Criterion = "magnitude",
        allocation: Allocation = "global",
        pattern: str | Pattern = "unstructured",
        include: Filter = None,
        ignore: Filter = None,
        max_sparsity: float | Mapping[str, float] | None = None,
        min_keep: int = 0,
        roles: Mapping[str, str] | None = None,
        regrow: bool = False,
        grad_mask: bool = True,
        state_keys: Iterable[str] = (),
        rewire: Rewiring | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise BadInput(f"a Pruner trains a module, got {type(model).__name__}.")
        if schedule is not None and not callable(schedule):
            raise BadInput(f"schedule is a function step -> sparsity, or None; got {schedule!r}.")
        self._model, self._schedule, self._regrow, self._grad_mask = model, schedule, regrow, grad_mask
        self._ask = partial(
            Request.of, criterion=criterion, allocation=allocation, pattern=pattern, max_sparsity=max_sparsity,
            min_keep=min_keep, on_the_way=True,
        )  # fmt: skip
        asked = self._ask(0.0)
        check_rewiring(rewire, schedule, asked, regrow, grad_mask)
        self._pattern, self._rewire, self._roles = asked.pattern, rewire, roles
        self._store, self._state_keys = live(model, roles), frozenset(state_keys)
        self._steps, self._waiting, self._value, self._alike = 0, 0, 0.0, False
        self._optimizers, self._foreign = list[Optimizer](), list[Optimizer]()
        self._handles: list[Any] = []
        self._begin(asked, include, ignore, listed(optimizer))

    @together
    def _begin(self, asked: Request, include: Filter, ignore: Filter, optimizers: Sequence[Any]) -> None:
        schedule, rewire, store = self._schedule, self._rewire, self._store
        self._specs = trainable(can_carry(store, self._pattern, include, ignore), store, not (schedule or rewire))
        store.check(self._specs)
        check_sharded(store, asked, self._specs, rewire)
        if rewire is None or isinstance(rewire, Movement):
            check_schedule(schedule, self._specs, store, self._ask, self._regrow)
        self._held = Held(self._model, store, self._state_keys)
        self._memory = Memory(rewire, self._chosen, self._held) if isinstance(rewire, Movement) else None
        for o in optimizers:
            self._check_follows(bare(o), of=len(optimizers))
        if value := self._value_at(0):
            self._change(value)
        else:
            self._hold_zeros()
        self._hook_gradients()
        for o in optimizers:
            self.attach(o)

    # What is held

    @property
    def steps(self) -> int:
        """Updates of the optimizer so far."""
        return self._steps

    @property
    def asked(self) -> float | None:
        """The schedule's value now; ``None`` without a schedule."""
        return None if self._schedule is None else self._value

    @property
    def sparsity(self) -> float:
        """Share of the chosen weights that is held at zero."""
        total = sum(s.numel for s in self._chosen)
        kept = sum(self._held.kept(s) for s in self._chosen)
        return 1 - kept / total if kept < total else 0.0

    def masks(self) -> dict[str, Tensor]:
        """The keep-mask of every chosen tensor, bool, of its shape and on its device; all ``True`` where nothing is held."""
        chosen = {s.name for s in self._chosen}
        followers = [self._held.spec(n) for n in self._held.bits if n not in chosen]
        return {s.name: self._held.mask(s) for s in (*self._chosen, *followers)}

    def apply(self, model: nn.Module) -> None:
        """Writes zeros where this pruner holds them into another model of the same shape: an EMA or SWA copy.

        Raises:
            PlanMismatch: a tensor is missing or has another shape. Nothing has been written.
        """
        self._held.zero_other(live(model, self._roles))

    @together
    def plan(self, sparsity: float) -> Plan:
        """What would be pruned at a sparsity, as data; nothing is touched."""
        check_dtypes(self._specs, self._store)
        memory = self._memory
        if memory is None:
            return make(self._specs, self._store.parts, self._ask(sparsity), matches, self._store.sum)
        with memory.gathered(self._held):
            return make(self._specs, memory.parts, self._ask(sparsity, criterion=memory.movement), matches)

    # What happens

    def attach(self, optimizer: Any) -> None:
        """Counts an optimizer's steps from now on and keeps its state of pruned weights at zero. Several may be attached;
        the steps of the first are counted.

        Raises:
            BadInput: it holds none of the pruned parameters (with ``rewire``: not all), or is attached already, or the pruner
                was closed.
            NotDefined: a second one, with ``rewire``.
        """
        inner = bare(optimizer)
        if not self._handles:
            raise BadInput("this pruner was closed: make another.")
        if any(inner is o for o in self._optimizers):
            raise BadInput("this optimizer is attached already.")
        self._check_follows(inner, of=len(self._optimizers) + 1)
        self._optimizers.append(inner)
        self._handles.append(inner.register_step_post_hook(self._stepped))
        self._handles.append(inner.register_load_state_dict_post_hook(self._loaded))
        if self._grad_mask:
            self._handles.append(inner.register_step_pre_hook(self._before_step))
        self._held.zero_rest([inner], self._grad_mask)

    def hold(self, masks: Mapping[str, Tensor]) -> None:
        """Takes masks as they are, instead of what is zero now: those of a ticket, packed, or bool of a tensor's shape.

        Raises:
            PlanMismatch: a mask of no tensor here, of another shape, or of one that is not chosen (the bias of a channel may
                go along). Nothing has been touched.
            NotDefined: movement pruning, whose scores make the masks.
        """
        if self._memory is not None:
            raise NotDefined("movement pruning makes its masks by its scores: load a whole state instead.")
        self._take(masks)

    @together
    def _take(self, masks: Mapping[str, Tensor]) -> None:
        along = isinstance(self._pattern, Channel | Head)
        self._held.hold(self._held.checked(masks, None if along else {s.name for s in self._chosen}))
        self._held.zero_weights()
        self._held.zero_rest(self._optimizers, self._grad_mask)

    def step(self) -> None:
        """Call it after every ``optimizer.step()``, where no optimizer was given.

        Raises:
            BadInput: an optimizer is attached, whose steps are counted already.
            NotDefined: with ``rewire``.
        """
        if self._rewire is not None:
            raise NotDefined("rewire resets what the optimizer remembers: attach it, and leave pruner.step() out.")
        if self._optimizers:
            raise BadInput("the optimizer's steps are counted already: leave pruner.step() out, or the optimizer.")
        self._advance(again=True)

    def close(self) -> None:
        """Removes every hook. The zeros stay; nothing holds them any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._optimizers.clear()
        self._memory = None

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Masks gradients again that were written since. Where an update looks at dense ones, they say where RigL grows, and
        move nothing; or they move the scores."""
        how = self._rewire
        if not self._looks():
            return before_use(args, kwargs, self._held.zero_changed)
        if skipped(optimizer):
            return None
        given = with_loss(args, kwargs)
        if self._memory is not None:
            self._memory.score(self._held, self._steps, optimizer)
            self._held.zero_rest([], gradients=True)
        elif isinstance(how, RigL):
            move_masks(self._held, self._chosen, how, self._steps + 1, [optimizer])
            drop_gradients(optimizer)  # its step then moves nothing
        return given

    def _looks(self) -> bool:
        """Whether the next update looks at the gradients of weights that do not live."""
        return self._rewire is not None and bool(self._optimizers) and self._rewire.looks(self._steps + 1)

    def _loaded(self, optimizer: Optimizer) -> None:
        self._foreign.append(optimizer)

    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:
        if skipped(optimizer):
            return
        late = self._grad_mask and not goes_last(optimizer, self._before_step) and self._held.zero_changed()
        if late or optimizer in self._foreign:  # masks may be loaded after a state, so this is the first time to look
            self._foreign = [o for o in self._foreign if o is not optimizer]
            self._held.zero_weights()
            self._held.zero_rest([optimizer], self._grad_mask)
        if optimizer is self._optimizers[0]:
            self._advance(again=not self._grad_mask or any(mixes(o) for o in self._optimizers))
        elif mixes(optimizer) or not self._grad_mask:
            self._held.zero_weights()

    def _advance(self, again: bool) -> None:
        self._steps += 1
        self._waiting = 0
        value = self._value_at(self._steps)
        if again:
            self._held.zero_weights()
        if self._memory is not None:
            change = self._value, value
            self._memory = self._memory.advance(self._held, self._steps, change, self._planned, self._optimizers)
            self._value = value
        elif value != self._value:
            self._change(value)
        if isinstance(self._rewire, SET) and self._rewire.due(self._steps):
            move_masks(self._held, self._chosen, self._rewire, self._steps, self._optimizers)

    def _value_at(self, step: int) -> float:
        at = min(step, self._rewire.end) if isinstance(self._rewire, Movement) else step
        return 0.0 if self._schedule is None else self._schedule(at)

    @torch.no_grad()
    @together
    def _change(self, value: float) -> None:
        """Prunes to a sparsity, and takes what is zero then as the mask."""
        self._held.zero_weights()
        if self._regrow and not value:
            self._held.hold({})  # what is zero now is not held: it may grow again
            self._value = value
            return
        made = self._planned(value)
        self._held.carry_out(made)
        self._value = value
        if text := emptied(made, self._held):
            warnings.warn(f"at step {self._steps}: {text}", SecateurWarning, stacklevel=2)
        self._hold_zeros(followers_of(made))

    def _planned(self, value: float) -> Plan:
        try:
            return self.plan(value)
        except SecateurError as e:
            raise type(e)(f"at step {self._steps}: {e}") from e

    def _hold_zeros(self, followers: Sequence[str] = ()) -> None:
        self._held.take_zeros((*self._chosen, *(self._held.spec(n) for n in followers)), pruned=self._value > 0)
        self._held.zero_rest(self._optimizers, self._grad_mask)
        if not self._alike and (self._value or self._schedule is None):
            check_alike(self._model, self._held.bits)
            self._alike = True

    def _hook_gradients(self) -> None:
        along, chosen = isinstance(self._pattern, Channel | Head), {s.name for s in self._chosen}
        for name, parameters in self._held.parameters.items():
            for p in parameters if along or name in chosen else ():
                if p.requires_grad:
                    self._handles.append(p.register_post_accumulate_grad_hook(self._accumulated(name)))

    def _accumulated(self, name: str) -> Callable[[Tensor], None]:
        first = name == self._chosen[0].name

        def mask(parameter: Tensor) -> None:
            if first and not (self._schedule is None and self._rewire is None):
                self._waiting += 1
                warn_of_waiting(self._waiting, bool(self._optimizers))
            if self._grad_mask and not self._looks():
                self._held.zero_gradient(name, parameter)

        return mask

    @property
    def _chosen(self) -> list[Spec]:
        return [s for s in self._specs if s.skip is None]

    def _check_follows(self, optimizer: Optimizer, of: int) -> None:
        pruned = {s.name: self._held.parameters[s.name] for s in self._chosen}
        check_follows(optimizer, of, pruned, self._rewire is not None)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Steps done, masks, and what movement pruning remembers: with model's and optimizer's own all it takes to go on."""
        return {
            "version": 1, "steps": self._steps, "value": self._value,
            "shapes": {s.name: tuple(s.shape) for s in self._chosen},
            "held": sorted(self._held.bits),
            "masks": self._held.state(may_be_held(self._chosen, self._pattern)),
            **({} if self._memory is None else {"movement": self._memory.state()}),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up where `state_dict` left off, in any order with the model's and the optimizer's own state.

        Raises:
            BadInput: not such a state.
            PlanMismatch: it is of other tensors than those that are pruned here, or of other shapes, or a mask is missing.
                Nothing is touched.
        """
        check_state(state, {s.name: tuple(s.shape) for s in self._chosen})
        check_constant(self._rewire, state["value"], self._value)
        memory = restored(self._rewire, self._chosen, self._held, state)
        self._take({name: state["masks"][name] for name in state["held"]})
        self._memory = memory
        self._steps, self._value, self._waiting = state["steps"], state["value"], 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Pruner:
        """A pruner of the copied model and its optimizers, whichever is copied first; hooks of its own."""
        model = copy.deepcopy(self._model, memo)
        other = object.__new__(Pruner)
        memo[id(self)] = other
        skipped = ("_model", "_store", "_specs", "_held", "_optimizers", "_foreign", "_handles")
        for name, value in self.__dict__.items():
            if name not in skipped:
                setattr(other, name, copy.deepcopy(value, memo))
        other._model, other._store = model, live(model, self._roles)
        other._specs = self._specs
        other._held = self._held.over(model, other._store)
        other._optimizers, other._foreign, other._handles = [], [], []
        other._hook_gradients()
        for o in self._optimizers:
            other.attach(copy.deepcopy(o, memo))
        return other
