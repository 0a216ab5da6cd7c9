"""What a person names on the command line, read: functions that make a training task, techniques, optimizers."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import Optimizer

from memfit.activations.gradient_filter import GradientFilter
from memfit.convert import convert_
from memfit.errors import MemfitError
from memfit.gradients.low_rank import LowRankGradient
from memfit.ledger.source import is_users
from memfit.run.counts import check_count
from memfit.technique import Technique

TECHNIQUES: dict[str, type[Technique]] = {"LowRankGradient": LowRankGradient, "GradientFilter": GradientFilter}
"""The techniques that a conversion may name."""

# What memfit itself calls: that an error came up in there does not make it one of the user's code.
_LIBRARIES = frozenset({"matplotlib", "numpy", "PIL", "rich", "safetensors", "sklearn"})


class Task(NamedTuple):
    """A model, one batch, and the loss of the model on it: ``(model, batch) -> scalar tensor``."""

    model: nn.Module
    batch: Any
    loss: Callable[[nn.Module, Any], Tensor]


class Conversion(NamedTuple):
    """A technique and the layers that it is for, as :func:`memfit.convert_` takes them."""

    technique: Technique
    where: str


@dataclass(frozen=True)
class ProfileConfig:
    """What to profile.

    Attributes:
        target: ``package.module:function`` or ``file.py:function``, which returns ``(model, batch, loss)``.
        optimizer: of ``torch.optim``, such as ``AdamW`` or ``SGD(lr=0.1, momentum=0.9)``.
        conversions: each such as ``LowRankGradient(rank=16)@encoder.*``, in this order.
        steps: training steps for the process's peak; the ledger sees one more.
    """

    target: str
    optimizer: str = "AdamW"
    conversions: tuple[str, ...] = ()
    steps: int = 3

    def __post_init__(self) -> None:
        check_count("number of steps", self.steps)
        parse_optimizer(self.optimizer)
        for conversion in self.conversions:
            parse_conversion(conversion)


def load_target(text: str) -> Callable[[], Task]:
    """The function that ``package.module:function`` or ``file.py:function`` names; calling it makes the task.

    Raises:
        MemfitError: there is no such file, module or function, or it does not return ``(model, batch, loss)``.
    """
    function = load_function(text)

    def make() -> Task:
        made = function()
        if not (isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], nn.Module) and callable(made[2])):
            raise MemfitError(
                f"{text} must return (model, batch, loss), a torch.nn.Module, anything, and a function "
                f"loss(model, batch) that returns a scalar tensor, not {_kinds(made)}."
            )
        return Task(*made)

    return make


def load_function(text: str, *given: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` or ``file.py:function`` names.

    Args:
        text: the function.
        given: what it will be called with, in words, one for each argument.

    Raises:
        MemfitError: there is no such file, module or function, or it can't be called so.
    """
    module_name, colon, function_name = text.rpartition(":")
    if not colon or not module_name or not function_name.isidentifier():
        raise MemfitError(f"{text!r} names no function: write package.module:function or file.py:function.")
    module = _load_file(Path(module_name)) if module_name.endswith(".py") else _load_module(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise MemfitError(f"{module_name} has no function {function_name!r}.")
    if isinstance(function, nn.Module):  # which can be called, too
        raise MemfitError(f"{text} is a model, not a function that returns one: write a function, and name that.")
    signature = _signature(function)
    try:
        if signature is not None:
            signature.bind(*given)
    except TypeError:
        arguments = ", ".join(given) or "no argument"
        raise MemfitError(f"{text} is called with {arguments}, and takes {signature}: change the function.") from None
    return cast(Callable[..., Any], function)


def load_model(text: str, given: Mapping[str, object] | None = None) -> nn.Module:
    """The model that a function makes.

    Args:
        text: the function, as :func:`load_function` takes it.
        given: its arguments by what they are in words.

    Raises:
        MemfitError: there is no such function, it can't be called so, or it returns something else.
    """
    arguments = given or {}
    model = load_function(text, *arguments)(*arguments.values())
    if not isinstance(model, nn.Module):
        raise MemfitError(f"{text} must return a torch.nn.Module, not a {type(model).__name__}.")
    if any(
        isinstance(each, UninitializedParameter | UninitializedBuffer)
        for each in chain(model.parameters(), model.buffers())
    ):
        raise MemfitError(f"the model of {text} has parameters without a size: let it see a sample before.")
    return model


def loss_of(task: Task) -> Tensor:
    """The loss of the task's model on its batch.

    Raises:
        MemfitError: it is no scalar tensor.
    """
    loss = task.loss(task.model, task.batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise MemfitError(f"the target's loss(model, batch) must return a scalar tensor, not {found}.")
    return loss


@contextmanager
def users_code(target: str, without_memory: str) -> Iterator[None]:
    """In here code of the user's runs: its errors become a sentence; a bug of memfit's keeps its traceback.

    Args:
        target: what the user has named.
        without_memory: what to do where memory was too little.

    Raises:
        MemfitError: as it came up, or what :func:`describe_failure` says of an error of the user's code.
    """
    try:
        yield
    except MemfitError:
        raise
    except Exception as error:
        if not _is_of_users_code(error):
            raise
        raise MemfitError(describe_failure(target, error, without_memory)) from error


def describe_failure(target: str, error: Exception, without_memory: str) -> str:
    """A sentence on what came up while code of the user's ran, and where in it.

    Args:
        target: what the user has named.
        error: as it was caught.
        without_memory: what to do where memory was too little.
    """
    # The first paragraph: after it, torch lists its back ends and the frames of compiled code.
    said = " ".join(str(error).strip().partition("\n\n")[0].split()) or "no message"
    if _lacks_memory(error):
        said += f"; {without_memory}"
    return f"{target} fails with {type(error).__name__}: {said} (at {_place_of(error)})."


def parse_conversion(text: str) -> Conversion:
    """``"LowRankGradient(rank=16)@encoder.*"`` as a technique and a pattern; without ``@``, all layers that it knows.

    Raises:
        MemfitError: it is not written like that, or the technique refuses an argument.
    """
    call, at, where = text.rpartition("@") if "@" in text else (text, "", "*")
    if at and not where:
        raise MemfitError(f"{text!r} names no layers after the @: write a layer's name or a pattern such as encoder.*.")
    name, arguments = _parse_call(call)
    if name not in TECHNIQUES:
        raise MemfitError(f"there is no technique {name!r}: choose from {', '.join(TECHNIQUES)}.")
    try:
        return Conversion(TECHNIQUES[name](**arguments), where)
    except TypeError as error:
        raise MemfitError(f"{call!r} does not fit {name}: {error}.") from None


def parse_optimizer(text: str) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    """``"AdamW"`` or ``"SGD(lr=0.1, momentum=0.9)"``, of ``torch.optim``, as a function of the parameters.

    Raises:
        MemfitError: it is not written like that, or ``torch.optim`` has no such optimizer. The function that is
            returned raises it where the optimizer refuses its arguments.
    """
    name, arguments = _parse_call(text)
    kind = getattr(torch.optim, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise MemfitError(f"torch.optim has no optimizer {name!r}: write one such as AdamW or SGD(lr=0.1).")

    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        parameters = list(parameters)
        if not parameters:
            raise MemfitError("no parameter of the model trains: there is no step to profile.")
        try:
            return cast(Callable[..., Optimizer], kind)(parameters, **arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise MemfitError(f"torch.optim.{name} refuses {text!r}: {error}.") from None

    return make


def prepare(task: Task, config: ProfileConfig) -> tuple[Task, Optimizer]:
    """Convert the task's model in place, and make the optimizer of what trains.

    Raises:
        MemfitError: a conversion matches no layer, nothing trains, or the optimizer refuses its arguments.
    """
    for text in config.conversions:
        conversion = parse_conversion(text)
        convert_(task.model, conversion.technique, conversion.where)
    trained = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    return task, parse_optimizer(config.optimizer)(trained)


def fused_adam(text: str) -> str:
    """The same optimizer, fused, where ``text`` is an Adam that may be and is not; else ``""``."""
    name, arguments = _parse_call(text)
    if name not in ("Adam", "AdamW") or {"fused", "foreach"} & set(arguments):
        return ""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in {**arguments, 'fused': True}.items())})"


def _parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """``"Name"`` or ``"Name(key=value, ...)"``, the values plain ones."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        names: list[str | None] = [key.arg for key in node.keywords] if isinstance(node, ast.Call) else [None]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args and all(names):
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice:
                raise MemfitError(f"{text!r} says {twice} more than once: leave all but one out.")
            return node.func.id, {cast(str, key.arg): ast.literal_eval(key.value) for key in node.keywords}
    except (SyntaxError, ValueError):
        pass
    raise MemfitError(f"{text!r} is not of the form Name or Name(key=value, ...) with plain values.")


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise MemfitError(f"there is no file {path}.")
    name = f"_target_{path.stem}"  # not the stem alone, which may be the name of a library
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickling and dataclasses look a class's module up there
    sys.path.insert(0, str(path.parent.resolve()))  # its neighbours, as `python file.py` would find them
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> Any:
    sys.path.insert(0, "")  # the working directory, as `python -m` would have it
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise  # a module that this one imports
        raise MemfitError(f"there is no module {name!r} that Python finds from here.") from None


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """What a function takes; None of a builtin one that does not say so."""
    try:
        return inspect.signature(function)
    except (ValueError, TypeError):
        return None


def _is_of_users_code(error: Exception) -> bool:
    """Whether an error came up in code of the user's, or below it, or for lack of memory; else it is a bug of ours."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return isinstance(error, SyntaxError) or _lacks_memory(error) or any(map(_is_users, frames))


def _is_users(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__"))
    return is_users(name) and name.partition(".")[0] not in _LIBRARIES


def _lacks_memory(error: Exception) -> bool:
    said = str(error)
    return isinstance(error, MemoryError) or "allocate memory" in said or "out of memory" in said


def _place_of(error: Exception) -> str:
    """File and line of the user's code in which an error came up, or went into a library."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = list(traceback.walk_tb(error.__traceback__))
    frame, line = ([each for each in frames if _is_users(each[0])] or frames)[-1]
    return f"{frame.f_code.co_filename}:{line}"


def _kinds(value: object) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(type(part).__name__ for part in value) + ")"
    return f"a {type(value).__name__}"
