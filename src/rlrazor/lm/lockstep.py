"""Work on a model that is spread over processes: each calls it as often, and none waits for one that has failed.

A sharded model gathers its weights as it is called, from all processes, so a process that calls it waits until all do.
What is measured takes another number of calls in each: sampling ends when the last sequence has, and prompts do not
divide evenly. So before each call the processes say what they are about to do. One that is done with its work makes
calls of one token for the others until all are done. Where one has failed, all end. Where it fails within a call (no
memory for the activations of its rows), it goes on through the parts that are still to come without computing, so that
the others' weights arrive, and says so before the next call.

What cannot be caught is a failure to gather itself. Hooks and methods of the model are as before afterwards.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from rlrazor.errors import RazorError
from rlrazor.lm import compute, shards
from rlrazor.lm.adapters import adapter_disabled, base_parameters, is_adapted, is_adapter_off

T = TypeVar("T")
CALLS, GATHERS, DONE, FAILED = "calls", "gathers", "done", "failed"
_APART = "The processes have come apart: they are at different places of the same work."


class _State(NamedTuple):
    """What a process is about to do; with its adapter off or on, and why it has failed."""

    does: str
    without_adapter: bool = False
    said: str = ""


_at_work: "list[Lockstep]" = []
_orders: "weakref.WeakKeyDictionary[Any, dict[bool, list[int]]]" = weakref.WeakKeyDictionary()


def run(model: Any, work: Callable[[], T]) -> T:
    """What `work` returns, which calls `model`; all processes have to be here, each with work of its own.

    Raises what `work` does, and RazorError where that of another process has failed first. Of a model that each process
    has whole it is `work` alone, which may take as many calls as it likes.
    """
    if not shards.is_sharded(model) or torch.distributed.get_world_size() == 1:
        return work()
    steps = Lockstep(model)
    with steps.installed():
        return steps.run(work)


def meet() -> None:
    """Wait until all processes are about to gather weights, which takes part of all; of a whole model, nothing."""
    if _at_work:
        _at_work[-1].meet()


def each_whole(model: Any, named: shards.Named, use: Callable[[str, Tensor], None]) -> None:
    """Call `use` with the name and the whole of each of the parameters that `named` finds in the model.

    All processes have to call it alike: what `use` raises is raised when all have been gathered. A weight is there
    until `use` returns.
    """
    meet()
    failure: Exception | None = None
    for name, weight in shards.whole(model, named):
        if failure is None:
            try:
                use(name, weight)
            except Exception as error:
                failure = error
    if failure is not None:
        raise failure


def whole_state(model: Any, *, here: bool) -> dict[str, Tensor] | None:
    """All parameters and the buffers that are saved, in this process's memory; None where not `here`. In all alike.

    Of a model with an adapter without what is frozen of the base, but for embeddings, which PEFT may save.
    """
    state: dict[str, Tensor] = {}

    def keep(name: str, weight: Tensor) -> None:
        if here:
            state[name] = weight.detach().to("cpu", copy=True)

    each_whole(model, _saved, keep)
    for prefix, module in model.named_modules() if here else ():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                state[shards.plain(f"{prefix}.{name}" if prefix else name)] = buffer.detach().to("cpu", copy=True)
    return state if here else None


def _saved(model: Any) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    if not is_adapted(model):
        return named
    tables = [table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None]
    frozen = {id(weight) for weight in base_parameters(model).values() if not weight.requires_grad}
    frozen -= {id(weight) for table in tables for weight in table.parameters()}
    return {name: weight for name, weight in named.items() if id(weight) not in frozen}


class Lockstep:
    """One piece of work on one model. `entered`: the parts of it that this call has come to, by their numbers."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.units = shards.units(model)
        self.orders = _orders.setdefault(model, {})
        self.entered: list[int] = []
        self.failure: Exception | None = None  # within a call
        self.elsewhere: RazorError | None = None
        self.is_over = self.is_for_others = self.without_adapter = False
        number = {id(unit): at for at, (unit, _) in enumerate(self.units)}
        self.within = [
            {number[id(one)] for one in module.modules() if one is not module and id(one) in number}
            for _, module in self.units
        ]

    def run(self, work: Callable[[], T]) -> T:
        """It, then as many calls as the others still need."""
        own: Exception | None = None
        value: Any = None
        try:
            value = work()
        except Exception as error:
            own = error
        own = self._go_along(own)
        if self.elsewhere is not None:
            raise self.elsewhere
        if own is not None:
            raise own
        return value  # type: ignore[no-any-return]

    def meet(self) -> None:
        """Make calls for the others until all are about to gather. Raises RazorError where one never will be."""
        while True:
            states = self._agree(_State(GATHERS))
            if all(state.does == GATHERS for state in states):
                return
            self._call_for(states)

    def _go_along(self, own: Exception | None) -> Exception | None:
        """After the work: until all are done, or one has failed; returns this process's failure, if any."""
        while not self.is_over:
            said = "" if own is None else f"{'' if isinstance(own, RazorError) else type(own).__name__ + ': '}{own}"
            try:
                states = self._agree(_State(DONE) if own is None else _State(FAILED, said=said))
                if all(state.does == DONE for state in states):
                    break
                self._call_for(states)
            except Exception as error:
                own = own or error
        return own

    def _agree(self, own: _State) -> list[_State]:
        """What all are about to do. Raises RazorError where one has failed, or they do not belong together."""
        if self.is_over:
            raise self.elsewhere or RazorError(_APART)
        states: list[Any] = [own] * torch.distributed.get_world_size()
        try:
            torch.distributed.all_gather_object(states, own)
        except Exception:
            self.is_over = True
            raise
        for number, state in enumerate(states):
            if state.does == FAILED:
                self.is_over = True
                error = RazorError(f"Process {number} has failed, and all end with it. {state.said}")
                if own.does != FAILED:
                    self.elsewhere = error
                raise error
        kinds = {state.does for state in states}
        if kinds == {DONE, GATHERS} or len({state.without_adapter for state in states if state.does == CALLS}) > 1:
            self.is_over, self.elsewhere = True, RazorError(_APART)
            raise self.elsewhere
        return states

    @torch.no_grad()
    def _call_for(self, states: list[_State]) -> None:
        """A call of one token, for those of the others that are about to call; with an adapter where they have one."""
        calling = [state for state in states if state.does == CALLS]
        off = bool(calling) and calling[0].without_adapter
        ids_11 = torch.zeros(1, 1, dtype=torch.long, device=compute.device_of(self.model))
        self.is_for_others = True
        try:
            with compute.eval_mode(self.model), adapter_disabled(self.model) if off else nullcontext():
                self.model(input_ids=ids_11, use_cache=False)
        finally:
            self.is_for_others = False

    # What is put on the model

    @contextmanager
    def installed(self) -> Iterator[None]:
        """With all that keeps calls in step put on the model."""
        taken: list[tuple[Any, str, Any]] = []
        _at_work.append(self)
        hooks = [
            self.model.register_forward_pre_hook(self._before, prepend=True),
            self.model.register_forward_hook(self._after),
        ]
        try:
            for number, (_, module) in enumerate(self.units):
                # The second is what accelerate has put its autocast around, and what is measured without it calls.
                for name in ("forward", "_original_forward"):
                    if name == "forward" or name in vars(module):
                        taken.append((module, name, vars(module).get(name)))
                        setattr(module, name, self._kept_in_step(number, getattr(module, name)))
            yield
        finally:
            for module, name, before in reversed(taken):
                if before is None:
                    delattr(module, name)
                else:
                    setattr(module, name, before)
            for hook in hooks:
                hook.remove()
            _at_work.remove(self)
            shards.let_go(self.model)

    def _before(self, *_: Any) -> None:
        """A call begins: as soon as all are about to call."""
        self.without_adapter = is_adapter_off(self.model)
        if not self.is_for_others:
            self._agree(_State(CALLS, self.without_adapter))
        self.entered, self.failure = [], None

    def _after(self, *_: Any) -> None:
        """A call ends: what failed in it is raised now, when all its parts have been called."""
        if self.failure is not None:
            raise self.failure
        self.orders[self.without_adapter] = self.entered

    def _kept_in_step(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A part's `forward`, which once something has failed only calls the parts in it that are still to come."""

        @functools.wraps(forward)
        def kept(*args: Any, **kwargs: Any) -> Any:
            self.entered.append(number)
            if self.failure is None:
                try:
                    return forward(*args, **kwargs)
                except Exception as error:
                    # What its frames refer to may be all of the memory that there was.
                    self.failure = self.failure or error.with_traceback(None)
            nothing = torch.zeros(1, 1, 1, device=compute.device_of(self.model))
            self._call_rest_of(number, nothing)
            return nothing

        return kept

    def _call_rest_of(self, number: int, nothing: Tensor) -> None:
        while (part := self._next_in(number)) is not None:
            before = len(self.entered)
            with suppress(Exception):  # a hook of somebody else's, after the part has gathered
                self.units[part][0](nothing)
            if len(self.entered) == before:
                self.entered.append(part)

    def _next_in(self, number: int) -> int | None:
        """The first part within another that this call has not come to; None where it has come to all."""
        come_to = Counter(self.entered)
        # Before any call has come through, in the order in which the model has its parts.
        for part in self.orders.get(self.without_adapter) or range(len(self.units)):
            if come_to[part]:
                come_to[part] -= 1
            elif part in self.within[number]:
                return part
        return None
