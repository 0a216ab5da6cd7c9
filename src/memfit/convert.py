"""``convert_``, the verb for every technique that changes layers, its way back, ``restore_``, and ``state_dict``."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from memfit.choose import Where, choose, label
from memfit.errors import ConversionError
from memfit.sharding import any_sharded
from memfit.technique import ConvertedLayer, Technique, put_parameter

__all__ = ["ConvertedLayer", "Technique", "Where", "convert_", "put_parameter", "restore_", "state_dict"]


def convert_(model: nn.Module, technique: Technique, where: Where = "*") -> nn.Module:
    """Convert layers of a model in place, and return the model.

    Make the optimizer after the conversion: the parameters that train are the converted layers' own.

    Args:
        model: any module; it may itself be the layer.
        technique: for example ``memfit.LowRankGradient(rank=16)``.
        where: which layers. A glob over the names of ``model.named_modules()`` (``"encoder.*"``), several globs, or a
            callable ``(name, module) -> bool``. A glob with wildcards takes the layers that the technique supports
            and that train, and leaves those dense that are too thin for its rank (a classifier's last layer); a plain
            name, or a callable's yes, must be such a layer. The model itself is called ``""``.
            Layers that share one Parameter (tied weights) are converted together and stay tied. When only some of
            them are chosen, by a wildcard, they are left as they are.

    Raises:
        ConversionError: an argument is of another kind; nothing matched; a layer is unsupported, frozen, converted
            already, shares its weight with a layer that is not chosen, or does not suit the technique (for example a
            rank above the layer's); the model is wrapped in DistributedDataParallel or sharded by fully_shard already:
            convert it before. The model is then unchanged.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
        >>> convert_(model, memfit.LowRankGradient(rank=8), where="0")
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"memfit.convert_ needs a torch.nn.Module first, not {type(model).__name__}.")
    if not isinstance(technique, Technique):
        given = f"the class {technique.__name__}" if isinstance(technique, type) else repr(technique)
        raise ConversionError(f"memfit.convert_ needs a technique such as LowRankGradient(rank=16), not {given}.")
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            raise ConversionError(
                f"{label(name)} is in DistributedDataParallel already, which has noted the dense weights and would not "
                "reduce the factors' gradients: convert the model before it is wrapped."
            )
        if any_sharded(module.parameters(recurse=False)):
            raise ConversionError(
                f"{label(name)} has sharded parameters (DTensor): convert the model before fully_shard, which then "
                "shards the factors too."
            )
    chosen, ties = choose(model, technique, where)
    obstacles = {name: choice.kind.obstacle(choice.layer, technique) for name, choice in chosen.items()}
    if any(obstacles.values()):
        reasons = "; ".join(f"{label(name)} {reason}" for name, reason in obstacles.items() if reason)
        raise ConversionError(f"{technique} cannot convert these layers: {reasons}. Leave them out of where.")
    for name, choice in chosen.items():
        choice.kind.convert_(choice.layer, technique, name)
    for first, *others in ties:
        for owner in others:
            owner.module.tie_(owner.attribute, first.module, first.attribute)  # type: ignore[operator]
    return model


def restore_(model: nn.Module) -> nn.Module:
    """Turn every converted layer of a model back into its plain class, with the trained weights, and return the model.

    The original parameter objects come back, so that weights keep their identity; the factors are gone. Make a new
    optimizer to train on, and wrap it in DistributedDataParallel anew. A model without converted layers is returned
    as it is.

    Raises:
        ConversionError: the model is sharded by fully_shard, which holds on to the factors: load what
            :func:`state_dict` gives into a plain model instead.
    """
    layers = [module for module in model.modules() if isinstance(module, ConvertedLayer)]
    if any(any_sharded(layer.parameters()) for layer in layers):
        raise ConversionError(
            "the model's parameters are sharded (DTensor), and fully_shard holds on to the factors: gather what "
            "memfit.state_dict gives (`value.full_tensor()` of each) and load it into a plain model."
        )
    for layer in layers:
        layer.restore_()
    return model


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state with the original model's keys and the effective weights.

    Loads into the original model with ``load_state_dict``, and is what one saves to use the model elsewhere. To go on
    training, save ``model.state_dict()`` instead: it has the factors.

    In DistributedDataParallel the keys have its prefix, ``module.``: give the model inside to be without. Sharded by
    fully_shard, values are DTensors, as in ``model.state_dict()``; all processes must call this, as they talk.

    Returns:
        Detached tensors in the original order. Unconverted ones share memory with the model; effective weights are new.
    """
    plain: dict[int, dict[str, Tensor]] = {}  # once for each layer: one under two names stays tied
    made: dict[nn.Module, Tensor] = {}

    def replace(layer: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            del state[key]
        if id(layer) not in plain:
            plain[id(layer)] = layer.plain_state(made)  # type: ignore[operator]
        state.update({prefix + name: value for name, value in plain[id(layer)].items()})

    # Hooks, for wrappers around a layer rename its keys: they must find the plain ones.
    layers = [module for module in model.modules() if isinstance(module, ConvertedLayer)]
    hooks = [layer.register_state_dict_post_hook(replace) for layer in layers]
    try:
        return dict(model.state_dict())
    finally:
        for hook in hooks:
            hook.remove()
