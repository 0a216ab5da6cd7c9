"""What a person names on the command line: read as it is meant, and its errors told from bugs of memfit's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from memfit.errors import DataError, MemfitError
from memfit.ledger.target import load_function, load_model, parse_conversion, parse_optimizer, users_code


def code_of(module: str, text: str) -> dict[str, Any]:
    """The names that a text defines, as code of a module of that name."""
    scope: dict[str, Any] = {"__name__": module}
    code: CodeType = compile(text, f"{module}.py", "exec")
    exec(code, scope)
    return scope


FAILS = "def fails(error):\n    raise error\n"


def run_by_memfit(call: Callable[..., object], *arguments: object) -> None:
    """Call as the command line does: this file's own frames are the user's."""
    text = "def run(context, call, arguments):\n    with context:\n        call(*arguments)\n"
    code_of("memfit.cli.demo", text)["run"](users_code("mine.py:net", "a smaller batch needs less"), call, arguments)


@pytest.mark.parametrize("module", ["mine", "some.library", "__main__"])
@pytest.mark.parametrize(
    ("kind", "message"), [(AssertionError, ""), (KeyError, "boom"), (ZeroDivisionError, "zero"), (RuntimeError, "a\nb")]
)
def test_an_error_of_the_users_code_becomes_one_sentence(module, kind, message):
    error = kind(message)
    with pytest.raises(MemfitError) as told:
        run_by_memfit(code_of(module, FAILS)["fails"], error)
    said = str(told.value)
    assert said.startswith(f"mine.py:net fails with {type(error).__name__}: ")
    assert said.endswith(f" (at {module}.py:2).")
    assert "\n" not in said
    assert told.value.__cause__ is error


@pytest.mark.parametrize("module", ["memfit.vision.batches", "torch.nn", "PIL.Image", "numpy", "rich.progress", "json"])
def test_a_bug_of_memfits_or_below_it_keeps_its_traceback(module):
    with pytest.raises(KeyError, match="boom"):
        run_by_memfit(code_of(module, FAILS)["fails"], KeyError("boom"))


def test_an_error_below_the_users_code_is_the_users():
    below = code_of("numpy", FAILS)["fails"]
    above = code_of("mine", "def calls(below):\n    below(ValueError('bad'))\n")["calls"]
    with pytest.raises(MemfitError, match=r"mine\.py:net fails with ValueError: bad \(at mine\.py:2\)"):
        run_by_memfit(above, below)


def test_memfits_own_sentences_stay_as_they_are():
    said = DataError("a.npz: has no array.")
    with pytest.raises(DataError) as told:
        run_by_memfit(code_of("mine", FAILS)["fails"], said)
    assert told.value is said


def test_what_lacks_memory_is_told_what_takes_less():
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")):
        with pytest.raises(MemfitError, match="; a smaller batch needs less "):
            run_by_memfit(code_of("memfit.fit", FAILS)["fails"], error)


FUNCTIONS = """
from torch import nn

def net(classes):
    return nn.Linear(2, classes)

def nothing():
    return None

def many(*, classes):
    return net(classes)

class Net(nn.Linear):
    def __init__(self, classes=3):
        super().__init__(2, classes)
"""


def test_a_function_that_cannot_be_called_so_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FUNCTIONS, encoding="utf-8")
    assert load_model("mine.py:net", {"the number of classes": 4}).out_features == 4
    assert load_model("mine.py:Net", {"the number of classes": 4}).out_features == 4
    assert load_model("mine.py:Net").out_features == 3
    for name, given, complaint in (
        ("nothing", ["the number of classes"], r"is called with the number of classes, and takes \(\)"),
        ("many", ["the number of classes"], r"is called with the number of classes, and takes \(\*, classes\)"),
        ("net", [], r"is called with no argument, and takes \(classes\)"),
    ):
        with pytest.raises(MemfitError, match=rf"mine\.py:{name} {complaint}"):
            load_function(f"mine.py:{name}", *given)
    with pytest.raises(MemfitError, match=r"must return a torch\.nn\.Module, not a NoneType"):
        load_model("mine.py:nothing")


def test_an_argument_that_is_said_twice_is_refused_by_name():
    with pytest.raises(MemfitError, match="says patch more than once"):
        parse_conversion("GradientFilter(patch=4, patch=5)@layer4.*")
    with pytest.raises(MemfitError, match="says lr more than once"):
        parse_optimizer("SGD(lr=1, momentum=0.9, lr=1)")
