"""The C++ operator against torch's operators, and how it stands aside."""

from __future__ import annotations

import copy
import random
import shutil
import sys
from typing import Any

import pytest
import torch
from torch import nn

import memfit
from memfit import ConversionError, GradientFilter, MissingExtraError
from memfit.activations import native

needs_compiler = pytest.mark.skipif(
    shutil.which("ninja") is None or shutil.which("c++") is None, reason="needs ninja and a C++ compiler"
)


def gradients(layer: nn.Module, technique: GradientFilter, x: torch.Tensor, seed: int) -> list[torch.Tensor]:
    model = memfit.convert_(copy.deepcopy(layer), technique, where="")
    leaf = x.detach().clone().requires_grad_(True)
    y = model(leaf)
    g = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(seed))
    layout = torch.contiguous_format if y.is_contiguous() else torch.channels_last
    y.backward(g.contiguous(memory_format=layout))
    return [leaf.grad, *(parameter.grad for parameter in model.parameters())]  # type: ignore[list-item]


@pytest.mark.slow  # it is compiled
@needs_compiler
def test_the_operator_computes_what_torch_does() -> None:
    drawn = random.Random(0)
    for seed in range(300):
        kernel, stride, dilation, padding = (
            (drawn.randint(least, most), drawn.randint(least, most)) for least, most in ((1, 4), (1, 3), (1, 3), (0, 4))
        )
        layer = nn.Conv2d(
            4, drawn.choice([4, 8]), kernel, stride, padding, dilation, drawn.choice([1, 2, 4]), drawn.random() < 0.5
        ).double()
        size = [d * (k - 1) + 1 + drawn.randint(0, 9) for d, k in zip(dilation, kernel, strict=True)]
        patch = drawn.randint(1, 6)
        x = torch.randn(drawn.randint(0, 3), 4, *size, dtype=torch.float64)
        for layout in (torch.contiguous_format, torch.channels_last):
            layer, x = layer.to(memory_format=layout), x.contiguous(memory_format=layout)
            expected = gradients(layer, GradientFilter(patch), x, seed)
            found = gradients(layer, GradientFilter(patch, native=True), x, seed)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other)


@pytest.mark.slow
@needs_compiler
def test_what_the_operator_does_not_take_goes_the_usual_way() -> None:
    model = memfit.convert_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)), GradientFilter(2, native=True))
    x = torch.randn(2, 3, 9, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x).float().sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    peak = memfit.estimate(model, x, lambda model, x: model(x).sum(), optimizer).peak  # of tensors without data
    assert peak.activations > 0


def test_without_a_compiler_the_conversion_is_refused_and_nothing_changed(monkeypatch: Any) -> None:
    native.operator.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: "ninja" if name == "ninja" else None)
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ConversionError, match=r"there is no compiler .*: install one, or leave native out"):
        memfit.convert_(model, GradientFilter(2, native=True))
    assert type(model[0]) is nn.Conv2d


def test_without_ninja_the_extra_is_named(monkeypatch: Any) -> None:
    native.operator.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(MissingExtraError, match=r"memfit\[native\]"):
        memfit.convert_(nn.Sequential(nn.Conv2d(3, 4, 3)), GradientFilter(2, native=True))


def test_native_is_true_or_false() -> None:
    with pytest.raises(ConversionError, match="native='yes' is not possible: give True or False"):
        GradientFilter(2, native="yes")  # type: ignore[arg-type]
