"""Watches every tensor storage of a region and enters it in the account.

A dispatch mode sees each operator's inputs and outputs, and a weak reference to each storage reports its end: PyTorch
keeps one Python object per storage for as long as the storage lives, whoever holds it. A tensor in a layout of oneDNN's
shows no storage: it is entered itself, in a storage's place. Which line a storage is on is claimed here for parameters,
gradients and optimizer states, as they become known; the account works out the rest.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter
from types import CodeType
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.ledger.account import BACKWARD, FORWARD, GRADIENTS, OPTIMIZER, START, STEP, WEIGHTS, Account, Entry
from memfit.ledger.onednn import hidden_bytes, reserve
from memfit.ledger.phases import Position
from memfit.ledger.source import user_place
from memfit.ledger.tensors import Memory, reachable, shape, size, storages, tensors_in

_aten = torch.ops.aten

# What the autograd engine does with a parameter's gradient: keep it, copy it, or add it to the one that is there. A
# user's hook that runs at the same place (an update fused into backward) mostly uses other operators.
_ACCUMULATES = frozenset({_aten.detach.default, _aten.clone.default, _aten.add_.Tensor, _aten.add.Tensor})

# torch.tensor and torch.from_numpy make a tensor that no operator has seen and then hand it to one of these.
_FRESH = frozenset({_aten.lift_fresh.default, _aten.lift_fresh_copy.default})


class _Reference(weakref.ref[Memory]):
    """A weak reference to a storage that knows its entry (None for one that is not counted) and its size when seen."""

    __slots__ = ("address", "entry", "size")

    address: int
    entry: Entry | None
    size: int


class _Mode(TorchDispatchMode):
    """Hands each operator to the tracker."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise the first operator imports the compiler: 70 MB and two seconds inside of what is measured.
        return False

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self._tracker = tracker

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if types and any(hasattr(kind, "__tensor_flatten__") for kind in types):
            # A tensor that is made of others goes first: what it does with those comes back here.
            return NotImplemented
        tracker = self._tracker
        tracker.position.advance(func)
        if func not in _FRESH:
            tracker.look(args)
            if kwargs:
                tracker.look(kwargs.values())
        result = func(*args, **kwargs) if kwargs else func(*args)
        tracker.enter_all(func, args, result)
        if tracker.position.in_backward and func in _ACCUMULATES:
            tracker.accumulate(func, args, result)
        return result


def _hide_from_compiler(code: CodeType) -> None:
    """Have torch's compiler run a function, and all that it calls, as it is; without importing the compiler."""
    frames: Any = torch._C._dynamo.eval_frame
    if hasattr(frames, "set_code_exec_strategy"):
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, skip))


_hide_from_compiler(_Mode.__torch_dispatch__.__code__)


class Tracker:
    """Everything that is watched while a region is open.

    Args:
        account: where storages are entered.
        model: its parameters and buffers are the weights.
        optimizers: their state counts from the start; that of an optimizer that is not named here counts as soon as
            it steps.
        fake: whether to count fake tensors in place of real ones.
    """

    def __init__(self, account: Account, model: nn.Module, optimizers: Iterable[Optimizer], fake: bool = False) -> None:
        self.account = account
        self.position = Position(account, model, self._claim_gradients, self._claim_states)
        self._model = model
        self._optimizers = list(optimizers)
        # What counts: storages on the model's kind of device. Tensors on the device "meta" have no bytes, but the
        # storage of a fake tensor is on it.
        device = next((tensor.device.type for tensor in model.parameters()), "cpu")
        self._device = "meta" if fake else device if device != "meta" else None
        self._live: dict[int, _Reference] = {}
        self._lock = threading.RLock()
        self._when_freed = self._freed  # one bound method for all references
        # Sums that were made in backward: index of the sum's entry -> entries of its terms.
        self._terms: dict[int, list[Entry]] = {}
        # Tensors that were there before the region, and what was found in memory when its second round began.
        self._inputs: list[Entry] = []
        self._found: dict[int, weakref.ref[Memory]] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Everything in place for the duration of the context; whatever happens in it, nothing is left behind."""
        self._claim_all()
        with ExitStack() as stack:
            # Without their references the storages that outlive the region no longer report to anyone, and without
            # these bonds the tracker, and with it the model, goes when the region does.
            stack.callback(self._let_go)
            stack.enter_context(self.position.following())
            stack.enter_context(_resizes_reported(self._resized))
            stack.callback(self._claim_all)
            stack.enter_context(_Mode(self))
            yield

    def _let_go(self) -> None:
        """Undo what ties the tracker to storages, position and itself."""
        self._live.clear()
        self._inputs.clear()
        del self._when_freed
        self.position.forget_callbacks()

    # -- storages ------------------------------------------------------------------------------------------------

    def look(self, values: Iterable[Any]) -> None:
        """Enter the storages among an operator's inputs that nothing has entered yet."""
        live = self._live
        for value in values:
            if isinstance(value, Tensor):
                for storage in storages(value):
                    if storage._cdata not in live:
                        self._discover(value, storage)
            elif type(value) is list or type(value) is tuple:
                self.look(value)

    def enter(self, result: Any) -> None:
        """Enter the storages that an operator made, or made larger or smaller."""
        if isinstance(result, Tensor):
            for storage in storages(result):
                reference = self._live.get(storage._cdata)
                if reference is None:
                    self._open(storage, result, existed=False)
                elif reference.entry is not None and reference.size != size(storage):
                    reference.size = size(storage)
                    self.account.resize(reference.entry, perf_counter(), reference.size)
        elif type(result) is list or type(result) is tuple:
            for value in result:
                self.enter(value)

    def enter_all(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Enter what an operator that has just run returns, and what it has taken for itself beside that."""
        if kept := reserve(func, result):
            # Before the rest, at the size that it has in truth.
            for storage in storages(kept[0]):
                self._open(storage, kept[0], existed=False, nbytes=kept[1])
        self.enter(result)
        nbytes = hidden_bytes(func, args, result)
        if nbytes and any(storage.device.type == self._device for storage in storages(args[0])):
            # At the end of the operator, where its result is there as well.
            entry = self.account.open(
                perf_counter(),
                nbytes,
                phase=self.position.phase,
                module=self.position.module(),
                operator=self.position.operator,
                existed=False,
                place=user_place(),
            )
            self.account.close(entry, perf_counter())

    def _open(self, storage: Memory, tensor: Tensor, *, existed: bool, nbytes: int | None = None) -> Entry | None:
        with self._lock:
            reference = _Reference(storage, self._when_freed)
            reference.address, reference.size = storage._cdata, size(storage)
            reference.entry = None
            if storage.device.type == self._device:
                reference.entry = self.account.open(
                    perf_counter(),
                    reference.size if nbytes is None else nbytes,
                    phase=self.position.phase,
                    module="" if existed else self.position.module(),
                    operator=self.position.operator,
                    existed=existed,
                    shape=shape(tensor),
                    dtype=str(tensor.dtype).removeprefix("torch."),
                    place=None if existed else user_place(),
                )
            self._live[reference.address] = reference
            return reference.entry

    def _discover(self, tensor: Tensor, storage: Memory) -> None:
        """Enter a storage that nothing in the region was seen to make."""
        existed = self.position.phase in (BACKWARD, STEP) or self._was_there(storage)
        entry = self._open(storage, tensor, existed=existed)
        if entry is None:
            return
        if isinstance(tensor, nn.Parameter):
            entry.claim(WEIGHTS, self.position.owner(tensor))
        elif existed:
            self._inputs.append(entry)

    def _was_there(self, storage: Memory) -> bool:
        """Whether a storage that forward is given was there at the region's start.

        In the first round of forwards it was. Later it either was (a list of batches) or has come from elsewhere in
        the meantime (a loader's worker): the latter if no earlier input is left, else all of the process's tensors
        are listed, once, and what is not on that list came later.
        """
        if not self.position.later_round:
            return True
        if self._found is None:
            if all(entry.death is not None for entry in self._inputs):
                return False
            self._found = {}
            for tensor in reachable():
                for found in storages(tensor):
                    if found._cdata not in self._live:
                        self._found[found._cdata] = weakref.ref(found)
        known = self._found.pop(storage._cdata, None)
        return known is not None and known() is storage

    def _freed(self, reference: weakref.ref[Memory]) -> None:
        assert isinstance(reference, _Reference)
        if self._live.get(reference.address) is reference:
            del self._live[reference.address]
        if reference.entry is not None:
            self.account.close(reference.entry, perf_counter())

    def _resized(self, storage: UntypedStorage) -> None:
        reference = self._live.get(storage._cdata)
        if reference is not None and reference.entry is not None:
            reference.size = storage.nbytes()
            self.account.resize(reference.entry, perf_counter(), reference.size)

    def _entry(self, tensor: Tensor) -> Entry | None:
        for storage in storages(tensor):
            reference = self._live.get(storage._cdata)
            if reference is not None:
                return reference.entry
        return None

    # -- lines ---------------------------------------------------------------------------------------------------

    def accumulate(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Claim a parameter's gradient, and what is added to it, when the autograd engine puts it in place."""
        if self.position.phase is STEP:
            return
        parameter = self.position.accumulates_into()
        if isinstance(parameter, nn.Parameter):
            owner = self.position.owner(parameter)
            for value in (*args, result):
                entry = self._entry(value) if isinstance(value, Tensor) else None
                # A tensor of forward's that serves as a gradient (the same for a sum's every input) stays what it is.
                if entry is not None and (entry.claimed is not None or entry.phase is not FORWARD):
                    self._claim(value, GRADIENTS, owner)
        elif func is not _aten.detach.default and isinstance(result, Tensor):
            # What the engine sums up for a parameter that is used several times (a tied weight) is a gradient as much
            # as the sum is; whether a sum is for a parameter is known when it gets there.
            total, *terms = (self._entry(value) for value in (result, *args) if isinstance(value, Tensor))
            if total is not None:
                others = [term for term in terms if term is not None and term is not total]
                self._terms.setdefault(total.index, []).extend(others)

    def _claim(self, tensor: Tensor, line: int, owner: str | None) -> None:
        for storage in storages(tensor):
            reference = self._live.get(storage._cdata)
            if reference is not None:
                entry = reference.entry
            else:
                existed = self.position.phase is START or self._was_there(storage)
                entry = self._open(storage, tensor, existed=existed)
            # The indices of a sparse gradient may be the batch's own.
            if entry is not None and not (tensor.layout is not torch.strided and entry in self._inputs):
                entry.claim(line, owner)
                self._claim_terms(entry, line, owner)

    def _claim_terms(self, total: Entry, line: int, owner: str | None) -> None:
        for term in self._terms.pop(total.index, ()):
            if term.phase is BACKWARD:
                term.claim(line, owner)
                self._claim_terms(term, line, owner)

    def _claim_all(self) -> None:
        for name, module in self._model.named_modules():
            for tensor in module.parameters(recurse=False):
                self._claim(tensor, WEIGHTS, name)
            # A sum that stands in a gradient's place is a buffer only so that it is saved.
            line = GRADIENTS if getattr(module, "holds_gradients", False) else WEIGHTS
            for tensor in module.buffers(recurse=False):
                self._claim(tensor, line, name)
        for parameter in self._model.parameters():
            self._claim_gradient(parameter)
        for optimizer in self._optimizers:
            self._claim_states(optimizer)

    def _claim_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._claim(parameter.grad, GRADIENTS, self.position.owner(parameter))

    def _claim_gradients(self, optimizer: Optimizer) -> None:
        self._terms.clear()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._claim_gradient(parameter)

    def _claim_states(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._claim(parameter, WEIGHTS, self.position.owner(parameter))
                self._claim_gradient(parameter)
            for tensor in tensors_in([value for name, value in group.items() if name != "params"]):
                self._claim(tensor, OPTIMIZER, None)
        for parameter, state in optimizer.state.items():
            owner = self.position.owner(parameter) if isinstance(parameter, Tensor) else None
            for tensor in tensors_in(state):
                self._claim(tensor, OPTIMIZER, owner)


@contextmanager
def _resizes_reported(report: Callable[[UntypedStorage], None]) -> Iterator[None]:
    """Have ``report`` called after each ``UntypedStorage.resize_``, which is not an operator that a mode would see."""
    own = UntypedStorage.__dict__.get("resize_")
    original = UntypedStorage.resize_

    def resize_(storage: UntypedStorage, size: int) -> UntypedStorage:
        result = original(storage, size)
        report(storage)
        return result

    UntypedStorage.resize_ = resize_  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        if own is None:
            del UntypedStorage.resize_
        else:
            UntypedStorage.resize_ = own  # type: ignore[method-assign]
