"""The devices of a simulation: each in a world with a scheme, here, or several at once in processes of their own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from memfit.errors import ConversionError, MemfitError
from memfit.ledger.target import load_function, load_model, users_code
from memfit.nvm.config import NvmConfig
from memfit.nvm.data import Images, load_images
from memfit.nvm.model import LIMIT, CharacterNet
from memfit.nvm.online import learn_online
from memfit.nvm.run_report import SchemeResult, result_of
from memfit.nvm.schemes import Learner, Scheme
from memfit.nvm.streams import Stream, UserStream
from memfit.nvm.worlds import ImageStream, World
from memfit.run.identity import digest
from memfit.run.interrupts import InterruptedRun
from memfit.run.processes import run_in_processes
from memfit.run.progress import Meter
from memfit.run.report import JSON
from memfit.weights.technology import technology

ONLINE = "online"
Device = tuple[World, Scheme]


def run_device(
    config: NvmConfig,
    out: Path,
    model: nn.Module,
    stream: Stream,
    device: Device,
    settings: dict[str, JSON],
    resume: bool,
    on_chunk: Callable[[int, float, int], None],
) -> SchemeResult:
    """Let one device see all samples, or those that its checkpoint has not; ``on_chunk`` as of ``learn_online``."""
    world, scheme = device
    rates, writes, learner = config.rates(scheme), config.writes(scheme), _learner(config, model, scheme)
    record = learn_online(
        learner,
        stream,
        world=world,
        seed=config.seed,
        samples=config.samples,
        checkpoint=out / ONLINE / f"{world}-{scheme}.safetensors",
        resume=resume,
        settings={
            **settings,
            "world": world,
            "scheme": scheme,
            "lr": rates.weights,
            "bias_lr": rates.biases,
            **(writes.settings() if writes else {}),
        },
        on_chunk=on_chunk,
    )
    return result_of(learner, record, world=world, seed=config.seed, rates=rates, technology=technology(config.memory))


def run_at_once(
    config: NvmConfig,
    out: Path,
    model: nn.Module,
    devices: list[Device],
    settings: dict[str, JSON],
    resume: bool,
    jobs: int,
    progress: bool,
) -> None:
    """Run every device to its checkpoint, so many at a time in processes of their own."""
    state = pickle.dumps({name: each.detach() for name, each in _tensors(model)})
    tasks = {", ".join(device): (config, out, state, device, settings, resume) for device in devices}
    done = dict.fromkeys(tasks, 0)
    with Meter(f"{len(tasks)} devices, {jobs} at once", config.samples * len(tasks), progress) as meter:

        def heard(name: str, samples: int) -> None:
            done[name] = samples
            finished = sum(each == config.samples for each in done.values())
            meter.show(sum(done.values()), f"{finished} done")

        signal = run_in_processes(tasks, _run_alone, jobs, heard)
    if signal is not None:
        raise InterruptedRun(signal, sum(done.values()), config.samples * len(tasks), out / ONLINE)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Those that are in no ``state_dict`` too."""
    return [*model.named_parameters(), *model.named_buffers()]


def _run_alone(
    tell: Callable[[int], None],
    config: NvmConfig,
    out: Path,
    state: bytes,
    device: Device,
    settings: dict[str, JSON],
    resume: bool,
) -> None:
    """A device in a process that knows nothing yet."""
    with users_code(config.own, "fewer jobs at once need less"), one_thread():
        images = load_images(config.data) if config.stream is None else None
        if config.model is None:
            assert images is not None
            model: nn.Module = CharacterNet(images.size, images.classes)
        else:
            model = load_model(config.model)
        held = pickle.loads(state)
        with torch.no_grad():
            for name, each in _tensors(model):
                each.copy_(held[name])
        stream = streams_of(config, images)[device[0]]
        if config.model is not None:
            check_model(config, model, stream)
        run_device(config, out, model, stream, device, settings, resume, lambda done, *_: tell(done))
        tell(config.samples)  # of what was there


def _learner(config: NvmConfig, model: nn.Module, scheme: Scheme) -> Learner:
    """A device that leaves the factory."""
    # A model of the user's has weights of any size; the method's network has them in [-1, 1).
    limit = LIMIT if config.model is None else None
    return Learner(
        copy.deepcopy(model),
        scheme,
        config.rates(scheme),
        limit=limit,
        seed=config.seed,
        writes=config.writes(scheme),
        native=config.native,
    )


def streams_of(config: NvmConfig, images: Images | None) -> dict[World, Stream]:
    """What the device meets in each world."""
    if config.stream is not None:
        return dict.fromkeys(config.worlds, UserStream(load_function(config.stream), config.stream))
    assert images is not None
    return {world: ImageStream(images, world, config.seed, config.shift_every) for world in config.worlds}


def check_model(config: NvmConfig, model: nn.Module, stream: Stream) -> str:
    """Find out before the run whether every scheme takes the model, and the model the stream's samples.

    Returns:
        a digest of the first samples.
    """
    target = config.model
    try:
        copied = copy.deepcopy(model).eval()
    except (RuntimeError, TypeError) as problem:
        first = str(problem).partition("\n")[0]
        raise MemfitError(
            f"every device gets a copy of the model of {target}, which can't be copied: {first}"
        ) from problem
    inputs, labels = stream.chunk(0)
    if len(labels):  # that a stream is too short is said where it ends
        _check_sample(target, copied, stream, inputs, labels)
    for scheme in config.schemes:
        try:
            _learner(config, model, scheme)
        except ConversionError as problem:
            raise MemfitError(f"the scheme {scheme!r} can't take the model of {target}: {problem}") from problem
    return digest([inputs, labels])


@torch.no_grad()
def _check_sample(target: str | None, model: nn.Module, stream: Stream, inputs: Tensor, labels: Tensor) -> None:
    shape = tuple(inputs[:1].shape)
    try:
        logits = model(inputs[:1])
    except (RuntimeError, ValueError, TypeError, IndexError) as problem:
        first = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise MemfitError(
            f"the model of {target} can't take a sample of shape {shape}, of which the first 1 is the batch axis, put "
            f"before what the stream gives: {first}"
        ) from problem
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 1:
        raise MemfitError(
            f"the model of {target} must take a sample of shape {shape} to logits (1, classes), not to "
            f"{tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__}."
        )
    classes = logits.shape[1]
    if int(labels.max()) >= classes:
        raise MemfitError(
            f"the model of {target} has {classes} classes, and the samples' labels are from {int(labels.min())} to "
            f"{int(labels.max())}."
        )
    if isinstance(stream, UserStream):
        stream.expect(shape[1:], classes)


@contextmanager
def one_thread() -> Iterator[None]:
    """One sample is too little to share, and the same number of threads gives the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
