"""The account behind the ledger: what every storage is, when it lived, and the five lines at any instant.

The tracker writes one :class:`Entry` per tensor storage and one event per change of its size. A storage's line is
often known only later (a tensor made in forward is an activation if it is still alive when backward begins), so the
lines are worked out afterwards, in one pass over the events. At every event

    total = weights + gradients + optimizer + activations + workspace,

because each entry is on exactly one line for all of its life.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

from memfit.ledger.source import Place, describe_place

LINES = ("weights", "gradients", "optimizer", "activations", "workspace")
"""The five lines of the account, in the order in which they are shown."""

WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, WORKSPACE = range(5)

# A storage that is claimed twice (a gradient that the optimizer keeps as its state) is on the first of these lines.
_PRECEDENCE = {WEIGHTS: 0, OPTIMIZER: 1, GRADIENTS: 2}

START, FORWARD, BACKWARD, RECOMPUTE, STEP = "start", "forward", "backward", "recompute", "step"


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes on each of the five lines at one instant.

    Attributes:
        weights: parameters and buffers.
        gradients: the weight gradients, alive from backward to step.
        optimizer: what the optimizer remembers between steps.
        activations: what forward keeps for backward, the input batch included.
        workspace: all other tensors: temporaries of forward, backward and step.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        """Sum of the five lines, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.workspace

    def to_dict(self) -> dict[str, int]:
        """The five lines and ``"total"``, in bytes."""
        return {**asdict(self), "total": self.total}


class Sample(NamedTuple):
    """One point of the timeline: seconds since the region's start, and the lines right after the event."""

    seconds: float
    lines: Peak


@dataclass(frozen=True, slots=True)
class Instant:
    """Where in the training step something happened.

    Attributes:
        seconds: seconds since the region's start.
        phase: ``"start"``, ``"forward"``, ``"backward"``, ``"recompute"`` (a forward inside backward, as activation
            checkpointing does) or ``"step"``.
        module: name of the module in the model, ``""`` for the model itself or for code outside of it.
        operator: the operator that made the tensor, such as ``"aten.mm"``; ``""`` at the start.
    """

    seconds: float
    phase: str
    module: str
    operator: str


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """One tensor's memory at the peak, or what an operator takes beside its tensors.

    Attributes:
        nbytes: of its storage; tensors that share one count once, by the first that was seen.
        line: which of the five lines it is on.
        shape: of the tensor.
        dtype: such as ``"float32"``; ``""`` for what an operator takes for itself (:attr:`is_inside`).
        module: the module that it belongs to or was made in, ``""`` for code outside of modules.
        phase: when it was made, as in :class:`Instant`; ``"start"`` for what was there before the region.
        operator: what made it, such as ``"aten.mm"``; ``""`` for what was there before.
        source: the line of code outside of PyTorch and memfit at which it was made, as in ``"model.py:42 in forward"``;
            of backward's tensors that is the line that called ``backward``. ``""`` for what was there before.
    """

    nbytes: int
    line: str
    shape: tuple[int, ...]
    dtype: str
    module: str
    phase: str
    operator: str
    source: str

    @property
    def is_inside(self) -> bool:
        """Whether it is no tensor, but what the operator takes for itself while it runs, as is known of oneDNN's."""
        return not self.dtype

    @property
    def title(self) -> str:
        """Shape and dtype for people: ``"64 x 512 float32"``."""
        if self.is_inside:
            return f"inside of {self.operator}"
        return f"{' x '.join(map(str, self.shape)) or 'scalar'} {self.dtype}"

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {**asdict(self), "shape": list(self.shape)}


class AtPeak(NamedTuple):
    """What the peak was made of: its lines, when it was, the lines by module, and all tensors, largest first."""

    peak: Peak
    instant: Instant
    modules: dict[str, Peak]
    tensors: list[LiveTensor]


@dataclass(slots=True)
class Entry:
    """One tensor storage: where it came from and, in the end, which line it is on."""

    index: int
    phase: str
    module: str
    operator: str
    nbytes: int
    """Bytes now; 0 once it is freed."""
    initial: int
    """Bytes at the region's start; 0 for a storage that was made in the region."""
    existed: bool
    """Whether it was there before the region."""
    birth: int
    """Number of events before it was made."""
    shape: tuple[int, ...]
    """Of the first tensor that was seen on it."""
    dtype: str
    place: Place | None
    """The line of the user's code that made it."""
    death: int | None = None
    """Number of events after it was freed; None while it is alive."""
    claimed: int | None = None
    """The line that a parameter, its gradient or an optimizer state put it on, if one did."""
    owner: str | None = None
    """The module of the parameter that it belongs to."""

    def claim(self, line: int, owner: str | None) -> None:
        """Put it on one of the lines weights, gradients, optimizer; weights and then optimizer take precedence."""
        if self.claimed is None or _PRECEDENCE[line] < _PRECEDENCE[self.claimed]:
            self.claimed, self.owner = line, owner


class Account:
    """Entries and events of one region, and the figures that follow from them."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        # One flat array (seconds, index of the entry, change in bytes): 24 bytes per event, and one `extend` is a
        # single step for the interpreter, so a storage that dies in between (a finalizer) cannot tear an event apart.
        self._events = array("d")
        # Numbers of events at which a backward began, a backward ended and an optimizer step ended.
        self.backward_begins: list[int] = []
        self.backward_ends: list[int] = []
        self.step_ends: list[int] = []

    def __len__(self) -> int:
        """Number of events so far."""
        return len(self._events) // 3

    def open(
        self,
        seconds: float,
        nbytes: int,
        *,
        phase: str,
        module: str,
        operator: str,
        existed: bool,
        shape: tuple[int, ...] = (),
        dtype: str = "",
        place: Place | None = None,
    ) -> Entry:
        """Enter a new storage; one that existed before the region counts from the region's start."""
        entry = Entry(
            index=len(self.entries),
            phase=phase,
            module=module,
            operator=operator,
            nbytes=nbytes,
            initial=nbytes if existed else 0,
            existed=existed,
            birth=0 if existed else len(self),
            shape=shape,
            dtype=dtype,
            place=place,
        )
        self.entries.append(entry)
        if nbytes and not existed:
            self._events.extend((seconds, entry.index, nbytes))
        return entry

    def resize(self, entry: Entry, seconds: float, nbytes: int) -> None:
        """Enter a change of a storage's size."""
        if nbytes != entry.nbytes:
            self._events.extend((seconds, entry.index, nbytes - entry.nbytes))
            entry.nbytes = nbytes

    def close(self, entry: Entry, seconds: float) -> None:
        """Enter the end of a storage."""
        if entry.nbytes:
            self._events.extend((seconds, entry.index, -entry.nbytes))
            entry.nbytes = 0
        entry.death = len(self)

    def events(self) -> Iterator[tuple[float, int, int]]:
        """The events so far: seconds, index of the entry, change in bytes."""
        # A copy of the length: an entry may end while a reader is in the middle.
        for at in range(0, len(self) * 3, 3):
            yield self._events[at], int(self._events[at + 1]), int(self._events[at + 2])

    def line(self, entry: Entry) -> int:
        """The line that a storage is on, as far as is known by now."""
        if entry.claimed is not None:
            return entry.claimed
        if entry.existed:
            # What was there before and is not a parameter, gradient or state: the batch, or what an earlier forward
            # saved; in the optimizer's hands, something it keeps outside of its `state`.
            return OPTIMIZER if entry.phase == STEP else ACTIVATIONS
        if entry.phase == STEP:
            return OPTIMIZER if self._outlives(entry, self.step_ends) else WORKSPACE
        if entry.phase == BACKWARD:
            # A gradient that no parameter holds, as from torch.autograd.grad, is still one that waits for the step.
            return GRADIENTS if self._outlives(entry, self.backward_ends) else WORKSPACE
        return ACTIVATIONS if self._outlives(entry, self.backward_begins) else WORKSPACE

    @staticmethod
    def _outlives(entry: Entry, boundaries: list[int]) -> bool:
        """Whether a storage is still there at the first boundary after its birth, the region's end being the last."""
        if entry.death is None:
            return True
        following = bisect_right(boundaries, entry.birth)
        return following < len(boundaries) and boundaries[following] < entry.death

    def initial(self, lines: list[int]) -> list[int]:
        """Bytes per line at the region's start; ``lines`` is the line of every entry."""
        totals = [0] * len(LINES)
        for entry, line in zip(self.entries, lines, strict=False):
            totals[line] += entry.initial
        return totals

    def lines(self) -> list[int]:
        """The line of every entry."""
        return [self.line(entry) for entry in self.entries]

    def timeline(self, started: float) -> list[Sample]:
        """The lines at the start and after every event."""
        lines = self.lines()
        totals = self.initial(lines)
        samples = [Sample(0.0, Peak(*totals))]
        for seconds, index, change in self.events():
            totals[lines[index]] += change
            samples.append(Sample(seconds - started, Peak(*totals)))
        return samples

    def at_peak(self, started: float) -> AtPeak:
        """The first instant of the largest total, and what is there then."""
        lines = self.lines()
        total = highest = sum(self.initial(lines))
        count, peak_event = 0, None
        for number, event in enumerate(self.events(), start=1):
            total += event[2]
            if total > highest:
                highest, count, peak_event = total, number, event

        alive = [entry.initial for entry in self.entries]
        for _, (_, index, change) in zip(range(count), self.events(), strict=False):
            alive[index] += change
        totals = [0] * len(LINES)
        modules: defaultdict[str, list[int]] = defaultdict(lambda: [0] * len(LINES))
        tensors = []
        for entry, line, nbytes in zip(self.entries, lines, alive, strict=False):
            if nbytes:
                totals[line] += nbytes
                owner = entry.module if entry.owner is None else entry.owner
                modules[owner][line] += nbytes
                tensors.append(
                    LiveTensor(
                        nbytes=nbytes,
                        line=LINES[line],
                        shape=entry.shape,
                        dtype=entry.dtype,
                        module=owner,
                        phase=START if entry.existed else entry.phase,
                        operator="" if entry.existed else entry.operator,
                        source="" if entry.existed else describe_place(entry.place),
                    )
                )
        instant = Instant(0.0, START, "", "")
        if peak_event is not None:
            seconds, index, _ = peak_event
            entry = self.entries[index]
            instant = Instant(seconds - started, entry.phase, entry.module, entry.operator)
        tensors.sort(key=lambda tensor: -tensor.nbytes)
        return AtPeak(Peak(*totals), instant, {name: Peak(*modules[name]) for name in sorted(modules)}, tensors)
