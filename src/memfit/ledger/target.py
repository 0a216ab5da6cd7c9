"""What a person names on the command line, read: functions that make a training task, techniques, optimizers."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memfit.convert import convert_
from memfit.errors import MemfitError
from memfit.gradients.low_rank import LowRankGradient
from memfit.technique import Technique

TECHNIQUES: dict[str, type[Technique]] = {"LowRankGradient": LowRankGradient}
"""The techniques that a conversion may name."""


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
        if self.steps < 1:
            raise MemfitError(f"a profile takes 1 step or more, not {self.steps}.")
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


def load_function(text: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` or ``file.py:function`` names.

    Raises:
        MemfitError: there is no such file, module or function.
    """
    module_name, colon, function_name = text.rpartition(":")
    if not colon or not module_name or not function_name.isidentifier():
        raise MemfitError(f"{text!r} names no function: write package.module:function or file.py:function.")
    module = _load_file(Path(module_name)) if module_name.endswith(".py") else _load_module(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise MemfitError(f"{module_name} has no function {function_name!r}.")
    return cast(Callable[..., Any], function)


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
        names = [key.arg for key in node.keywords] if isinstance(node, ast.Call) else [None]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args and all(names):
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


def _kinds(value: object) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(type(part).__name__ for part in value) + ")"
    return f"a {type(value).__name__}"
