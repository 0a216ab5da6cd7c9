"""The methods that the benchmarks hold against each other: memfit's, torch's, and the peers from their own packages.

A method takes a model and gives back what `loss.backward(); optimizer.step()` trains. GaLore and APOLLO are set up as
their READMEs say, with the scale and the interval of their published runs; they project the matrices that memfit
converts, at the same rank, and treat all other parameters as their AdamW does.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import memfit

Layers = Callable[[str, nn.Module], bool]
GALORE = {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
APOLLO = {"update_proj_gap": 200, "scale": 1.0, "proj_type": "std", "proj": "random", "scale_type": "channel"}


class CannotError(Exception):
    """A method cannot train a model here; the message says why, for the method's row."""


@dataclass(frozen=True)
class Setting:
    """What all methods are given alike.

    Attributes:
        rank: of factors and projections.
        lr: the learning rate.
        layers: which layers' matrices are trained at low rank.
        inner: of those, the ones inside of attention and MLP blocks; peers are published with these alone.
        low_rank: further arguments of :class:`memfit.LowRankGradient`.
    """

    rank: int
    lr: float
    layers: Layers
    inner: Layers | None = None
    low_rank: tuple[tuple[str, Any], ...] = ()


class PerLayer:
    """One optimizer per parameter, stepped within backward as soon as the gradient is there, which is then let go.

    What GaLore's README calls per-layer weight updates. Gradients cannot be accumulated over micro-batches, clipped
    by their joint norm, or averaged by DistributedDataParallel.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        for group in groups:
            settings = {name: value for name, value in group.items() if name != "params"}
            for parameter in group["params"]:
                own = optimizer([{"params": [parameter], **settings}])
                parameter.register_post_accumulate_grad_hook(partial(self._update, own))

    @staticmethod
    def _update(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    def step(self) -> None:
        """Nothing is left to do."""

    def zero_grad(self) -> None:
        """Nothing is left to do."""


Optimizer = torch.optim.Optimizer | PerLayer
Make = Callable[[nn.Module, Setting], tuple[nn.Module, Optimizer]]


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    Attributes:
        title: what the row is called.
        make: model and setting -> what trains, and its optimizer.
        package: the distribution that it comes from; empty for torch and memfit.
        not_counted: why it is shown and not counted among the peers to beat, those that train all weights in any loop.
        compiles: whether it compiles its step, which needs a C++ compiler.
        opaque: whether its step runs in compiled code or in one large operator: the ledger does not see inside.
    """

    title: str
    make: Make
    package: str = ""
    not_counted: str = ""
    compiles: bool = False
    opaque: bool = False

    @property
    def is_counted_peer(self) -> bool:
        return bool(self.package) and not self.not_counted

    def build(self, model: nn.Module, setting: Setting) -> tuple[nn.Module, Optimizer]:
        """What trains and its optimizer.

        Raises:
            CannotError: the package is missing, or cannot do this model.
        """
        if self.package and importlib.util.find_spec(self.package.replace("-", "_")) is None:
            raise CannotError(f'{self.package} is not installed (pip install "memfit[bench]")')
        if self.compiles and not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
            raise CannotError("compiles its step, and there is no C++ compiler")
        return self.make(model, setting)


def chosen(model: nn.Module, layers: Layers) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if layers(name, module))


def split(model: nn.Module, layers: Layers) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of the chosen layers, and all other parameters, each once."""
    matrices = {
        id(parameter): parameter
        for _, module in chosen(model, layers)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 2
    }
    return list(matrices.values()), [parameter for parameter in model.parameters() if id(parameter) not in matrices]


def dense(
    optimizer: Callable[..., torch.optim.Optimizer], model: nn.Module, setting: Setting
) -> tuple[nn.Module, Optimizer]:
    return model, optimizer(model.parameters(), lr=setting.lr)


def low_rank(sides: str, model: nn.Module, setting: Setting) -> tuple[nn.Module, Optimizer]:
    technique = memfit.LowRankGradient(setting.rank, **{"sides": sides, **dict(setting.low_rank)})
    memfit.convert_(
        model, technique, lambda name, layer: setting.layers(name, layer) and type(layer) in technique.layers
    )
    return model, adamw((p for p in model.parameters() if p.requires_grad), lr=setting.lr)


def projected(
    name: str, model: nn.Module, setting: Setting, inner: bool = False, per_layer: bool = False
) -> tuple[nn.Module, Optimizer]:
    """GaLore's or APOLLO's AdamW, over the matrices that memfit converts, or over those of the inner layers alone."""
    if inner and setting.inner is None:
        raise CannotError("this net has no other matrices than inner ones")
    matrices, others = split(model, setting.inner if inner and setting.inner else setting.layers)
    if name == "galore":
        from galore_torch import GaLoreAdamW

        optimizer = partial(GaLoreAdamW, lr=setting.lr, no_deprecation_warning=True)
        group = {"params": matrices, "rank": setting.rank, **GALORE}
    else:
        from apollo_torch import APOLLOAdamW

        optimizer = partial(APOLLOAdamW, lr=setting.lr)
        group = {"params": matrices, "rank": setting.rank, **APOLLO}
    groups = [group, {"params": others}] if others else [group]
    return model, PerLayer(groups, optimizer) if per_layer else optimizer(groups)


def eight_bit(model: nn.Module, setting: Setting, per_layer: bool = False) -> tuple[nn.Module, Optimizer]:
    from bitsandbytes.optim import Adam8bit

    optimizer = partial(Adam8bit, lr=setting.lr)
    groups = [{"params": list(model.parameters())}]
    return model, PerLayer(groups, optimizer) if per_layer else optimizer(groups)


def eight_bit_torchao(model: nn.Module, setting: Setting) -> tuple[nn.Module, Optimizer]:
    from torchao.optim import AdamW8bit

    return model, AdamW8bit(model.parameters(), lr=setting.lr, weight_decay=0.0)


def lora(model: nn.Module, setting: Setting) -> tuple[nn.Module, Optimizer]:
    from peft import LoraConfig, get_peft_model

    names = [name for name, _ in chosen(model, setting.inner or setting.layers)]
    try:
        adapted = get_peft_model(model, LoraConfig(r=setting.rank, lora_alpha=setting.rank, target_modules=names))
    except ValueError as error:
        raise CannotError(str(error).split(". ")[0].replace("\n", " ")) from error
    return adapted, adamw((p for p in adapted.parameters() if p.requires_grad), lr=setting.lr)


# No weight decay, which GaLore, APOLLO and Adam8bit have off by default: it would pull at other things in each method.
adamw = partial(torch.optim.AdamW, weight_decay=0.0, fused=True)

_IN_BACKWARD = "updates in backward: no accumulation, no clipping, no DDP"

METHODS: dict[str, Method] = {
    "sgd": Method("SGD", partial(dense, torch.optim.SGD)),
    "momentum": Method("SGD, momentum", partial(dense, partial(torch.optim.SGD, momentum=0.9))),
    "adamw": Method("AdamW", partial(dense, partial(torch.optim.AdamW, weight_decay=0.0))),
    "adamw-fused": Method("AdamW, fused", partial(dense, adamw)),
    "galore": Method("GaLore AdamW", partial(projected, "galore"), "galore-torch"),
    "galore-inner": Method("GaLore AdamW, inner", partial(projected, "galore", inner=True), "galore-torch"),
    "apollo": Method("APOLLO AdamW", partial(projected, "apollo"), "apollo-torch"),
    "apollo-inner": Method("APOLLO AdamW, inner", partial(projected, "apollo", inner=True), "apollo-torch"),
    "adam8bit": Method("Adam8bit, bitsandbytes", eight_bit, "bitsandbytes", opaque=True),
    "adamw8bit": Method("AdamW8bit, torchao", eight_bit_torchao, "torchao", compiles=True, opaque=True),
    "lora": Method("LoRA, peft", lora, "peft", "does not train all weights"),
    "galore-per-layer": Method(
        "GaLore AdamW, per layer", partial(projected, "galore", per_layer=True), "galore-torch", _IN_BACKWARD
    ),
    "adam8bit-per-layer": Method(
        "Adam8bit, per layer", partial(eight_bit, per_layer=True), "bitsandbytes", _IN_BACKWARD, opaque=True
    ),
    "low-rank": Method("low-rank AdamW", partial(low_rank, "both")),
    "low-rank-left": Method("low-rank AdamW, left", partial(low_rank, "left")),
}
