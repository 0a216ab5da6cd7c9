"""A scan's figures are those of the model's own training step, and the model does not notice that it was scanned."""

from __future__ import annotations

import copy
import gc
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.utils.checkpoint import checkpoint

import memfit
from memfit.errors import ConversionError, MemfitError, TrainingError
from memfit.ledger.tensors import reachable
from memfit.vision.filter_scan import filter_scan
from memfit.vision.scan_figures import Filtered, FilterScan, ScannedLayer, advise
from memfit.vision.scan_kept import PROGRAM
from memfit.vision.scan_layer import Agreement, agreement


class Net(nn.Module):
    """Convolutions with each kind of neighbour: batch norm, an activation that keeps its output, none, two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.narrow = nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=False)
        self.around = nn.Conv2d(8, 6, 1, stride=2)
        self.plain = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = self.plain(self.narrow(x) + self.around(x))
        return self.head(self.drop(x).mean((2, 3)))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def task(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    net = Net().to(dtype)
    return net, (torch.randn(4, 3, 12, 12, dtype=dtype), torch.randint(0, 4, (4,)))


def by_name(scan: FilterScan) -> dict[str, ScannedLayer]:
    return {layer.name: layer for layer in scan.layers}


def compare(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[float, float]:
    a, b = (torch.cat([each.double().flatten() for each in several]) for several in (first, second))
    return float(a @ b / (a.norm() * b.norm())), float(b.norm() / a.norm())


def step(model: nn.Module, batch: Any, name: str) -> tuple[Tensor, Tensor]:
    """The gradients of a layer's weight and of its input, by autograd on the whole model."""
    inputs: list[Tensor] = []

    def keep(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = args[0].requires_grad_() if args[0].is_leaf else args[0].view_as(args[0])
        inputs.append(x)
        return (x,)

    layer = model.get_submodule(name)
    with layer.register_forward_pre_hook(keep):
        torch.manual_seed(1)
        value = loss(model, batch)
    weight, x = torch.autograd.grad(value, [layer.weight, inputs[0]])  # type: ignore[list-item]
    return weight, x


@pytest.mark.parametrize(
    ("name", "taps"),
    [
        ("stem", "summed"),
        ("narrow", "summed"),
        ("around", "summed"),
        ("plain", "summed"),
        ("plain", "planar"),
        ("plain", "apart"),
    ],
)
def test_a_layers_gradients_are_those_of_the_model_with_that_layer_filtered(name: str, taps: Any) -> None:
    net, batch = task()
    torch.manual_seed(1)
    layer = by_name(filter_scan(net, batch, loss, (2, 3), rounds=1, taps=taps))[name]
    exact = step(copy.deepcopy(net), batch, name)
    for filtered in layer.filtered:
        other = memfit.convert_(copy.deepcopy(net), memfit.GradientFilter(filtered.patch, taps), where=name)
        weight, x = step(other, batch, name)
        assert filtered.weight is not None
        assert (filtered.weight.cosine, filtered.weight.norm) == pytest.approx(compare([exact[0]], [weight]))
        if name == "stem":
            assert filtered.input is None
        else:
            assert filtered.input is not None
            assert (filtered.input.cosine, filtered.input.norm) == pytest.approx(compare([exact[1]], [x]))


def test_all_at_once_is_the_model_with_all_layers_filtered() -> None:
    net, batch = task()
    torch.manual_seed(1)
    scan = filter_scan(net, batch, loss, (2, 3), ["narrow", "around", "plain"], rounds=1)
    for together in scan.together:
        if together.patch is None:
            continue
        gradients = []
        for patch in (None, together.patch):
            model = copy.deepcopy(net)
            names = ["narrow", "around", "plain"]
            if patch:
                memfit.convert_(model, memfit.GradientFilter(patch), where=names)
            torch.manual_seed(1)
            loss(model, batch).backward()
            gradients.append([model.get_submodule(name).weight.grad for name in names])
        assert together.weight is not None
        assert (together.weight.cosine, together.weight.norm) == pytest.approx(compare(*gradients))


def test_patches_of_one_pixel_over_a_pointwise_convolution_are_exact() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Conv2d(4, 2, 1, groups=2))
    scan = filter_scan(net, torch.randn(2, 3, 5, 5), lambda model, x: model(x).square().mean(), (1,), rounds=1)
    for found in (scan.layers[0].filtered[0].weight, scan.layers[1].filtered[0].input, scan.together[0].weight):
        assert found is not None
        assert (found.cosine, found.norm) == pytest.approx((1, 1), abs=1e-6)


def test_bytes_are_those_of_the_input_and_of_its_means() -> None:
    net, batch = task(torch.float32)
    layers = by_name(filter_scan(net, batch, loss, (2, 12), rounds=1))
    assert layers["stem"].nbytes == 4 * 4 * 3 * 12 * 12
    assert [each.nbytes for each in layers["stem"].filtered] == [4 * 4 * 3 * 6 * 6, 4 * 4 * 3]
    assert layers["narrow"].nbytes == 4 * 4 * 8 * 12 * 12
    assert [each.nbytes for each in layers["narrow"].filtered] == [4 * 4 * 8 * 3 * 3, 4 * 4 * 8]


def test_memory_that_others_keep_is_not_counted_as_spared() -> None:
    net, batch = task(torch.float32)
    scan = filter_scan(net, batch, loss, (3,), rounds=1)
    layers = by_name(scan)
    assert layers["stem"].kept_by == (PROGRAM,), "the batch is there after the step as well"
    assert layers["narrow"].kept_by == ("relu", "around")
    assert layers["around"].kept_by == ("relu", "narrow")
    assert layers["plain"].kept_by == ()
    for name in ("stem", "narrow", "around"):
        assert layers[name].filtered[0].spared == -layers[name].filtered[0].nbytes
    assert layers["plain"].filtered[0].spared == layers["plain"].nbytes - layers["plain"].filtered[0].nbytes
    assert scan.together[0].spared == sum(layer.filtered[0].spared for layer in scan.layers)
    assert any(sentence.startswith("Others keep the input of 3 of 4 layers") for sentence in scan.advice)


def test_an_input_that_two_layers_keep_is_spared_when_both_are_filtered() -> None:
    net, batch = task(torch.float32)
    net.relu = nn.Identity()  # type: ignore[assignment]
    net.norm = nn.Identity()  # type: ignore[assignment]
    scan = filter_scan(net, batch, loss, (3,), ["narrow", "around"], rounds=1)
    layers = by_name(scan)
    assert layers["narrow"].kept_by == ("around",)
    assert layers["narrow"].filtered[0].spared < 0
    means = sum(layer.filtered[0].nbytes for layer in scan.layers)
    assert scan.together[0].spared == layers["narrow"].nbytes - means
    assert "What narrow and around keep is the same: it is spared if all are filtered." in scan.advice
    assert not any("faster, not smaller" in sentence for sentence in scan.advice)


def test_what_is_kept_agrees_with_the_ledger() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(4)))
    batch = torch.randn(8, 16, 32, 32)
    scan = filter_scan(net, batch, lambda model, x: model(x).sum(), (4,), rounds=1)

    def activations() -> int:
        with memfit.ledger(net) as book:
            value = net(batch).sum()
            forward = len(book.timeline)
            value.backward()
        return book.timeline[forward - 1].lines.activations

    exact = activations()
    memfit.convert_(net, memfit.GradientFilter(4))
    assert scan.together[0].spared == pytest.approx(exact - activations(), abs=1024)


def snapshot(net: nn.Module) -> dict[str, Any]:
    """All that a scan could leave behind in a model and in the process."""
    tensors = [*net.parameters(), *net.buffers()]
    modules = list(net.modules())
    hooks = ["_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"]
    return {
        "identities": [id(tensor) for tensor in tensors],
        "values": [tensor.detach().clone() for tensor in tensors],
        "grads": [(id(each.grad), each.grad.clone()) for each in net.parameters() if each.grad is not None],
        "hooked": [len(parameter._backward_hooks or ()) for parameter in net.parameters()],
        "trains": [parameter.requires_grad for parameter in net.parameters()],
        "classes": [type(module) for module in modules],
        "attributes": [sorted(vars(module)) for module in modules],
        "modes": [module.training for module in modules],
        "hooks": [[list(getattr(module, name)) for name in hooks] for module in modules],
        "global hooks": [
            len(values)
            for name, values in sorted(vars(global_hooks).items())
            if name.startswith("_global_") and hasattr(values, "__len__")
        ],
        "random": (torch.get_rng_state(), random.getstate()),
        "modes of torch": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
    }


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def check_untouched(net: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(net)
    assert [name for name in before if not same(before[name], after[name])] == []


def touched() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A net in the middle of a training: gradients, mixed modes, a hook of the user's."""
    net, batch = task(torch.float32)
    loss(net, batch).backward()
    net.drop.eval()  # type: ignore[operator]
    net.narrow.register_forward_hook(lambda *_: None)  # type: ignore[operator]
    torch.manual_seed(5)
    return net, batch


def test_the_model_is_left_as_it_was() -> None:
    net, batch = touched()
    before = snapshot(net)
    filter_scan(net, batch, loss, (2,), rounds=1)
    check_untouched(net, before)


def test_hooks_on_weights_do_not_run_and_gradients_do_not_move() -> None:
    net, batch = touched()
    stepped = []
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(stepped.append)
    filter_scan(net, batch, loss, (2,), rounds=1)
    assert stepped == []


@pytest.mark.parametrize(("where", "kind"), [("forward", ValueError), ("backward", KeyboardInterrupt)])
def test_the_model_is_left_as_it_was_wherever_the_scan_is_stopped(where: str, kind: type[BaseException]) -> None:
    net, batch = touched()
    before = snapshot(net)
    calls = 0

    def stop(*_: object) -> None:
        raise kind

    def failing(last: int) -> Callable[[nn.Module, Any], Tensor]:
        def run(model: nn.Module, batch: Any) -> Tensor:
            nonlocal calls
            calls += 1
            value = loss(model, batch)
            random.random()
            model.train()
            if calls == last and where == "forward":
                raise kind
            if calls == last:
                value.register_hook(stop)
            return value

        return run

    filter_scan(net, batch, failing(0), (2,), rounds=1, least_cosine=0)
    total, stopped = calls, 0
    check_untouched(net, before)
    for last in range(1, total + 1):
        calls = 0
        try:
            filter_scan(net, batch, failing(last), (2,), rounds=1, least_cosine=0)
        except kind:
            stopped += 1
        check_untouched(net, before)
    assert stopped >= 2  # the passes that look at memory have no backward; whole steps differ by what is advised


def test_the_model_is_left_as_it_was_when_the_clock_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    net, batch = touched()
    before = snapshot(net)

    def stop() -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr("memfit.vision.scan_layer.perf_counter", stop)
    with pytest.raises(KeyboardInterrupt):
        filter_scan(net, batch, loss, (2,), rounds=1)
    check_untouched(net, before)


def test_nothing_stays_in_memory() -> None:
    net, batch = task(torch.float32)
    filter_scan(net, batch, loss, (2,), rounds=1)  # what is made once in a process
    gc.collect()
    before = sum(1 for _ in reachable())
    for _ in range(2):
        filter_scan(net, batch, loss, (2,), rounds=1)
    gc.collect()
    assert sum(1 for _ in reachable()) == before


def test_the_loss_sees_the_same_random_numbers_in_each_step() -> None:
    net, batch = task()
    seen: list[float] = []

    def noted(model: nn.Module, batch: Any) -> Tensor:
        value = loss(model, batch)
        seen.append(value.item())
        return value

    filter_scan(net, batch, noted, (2, 3), rounds=2)
    assert len(seen) > 6
    assert set(seen) == {seen[0]}


def test_calls_of_one_layer_are_added_up() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))

    def twice(model: nn.Module, x: Tensor) -> Tensor:
        return model(model(x).sin()).square().mean()

    x = torch.randn(2, 3, 8, 8)
    (layer,) = filter_scan(net, x, twice, (2,), rounds=1).layers
    assert layer.shape.endswith("on 8 x 8, 2 times")
    assert layer.nbytes == 2 * x.nbytes


def test_layers_that_share_a_weight_get_the_same_advice() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).sin())

    torch.manual_seed(0)
    scan = filter_scan(Tied(), torch.randn(2, 4, 9, 9), lambda net, x: net(x).square().mean(), (2, 3), rounds=1)
    assert scan.layers[0].advised == scan.layers[1].advised


def test_frozen_layers_are_passed_over_and_below_them_no_input_gradient_is_asked_for() -> None:
    net, batch = task()
    net.stem.requires_grad_(False)  # type: ignore[operator]
    net.norm.requires_grad_(False)  # type: ignore[operator]
    layers = by_name(filter_scan(net, batch, loss, (2,), rounds=1))
    assert list(layers) == ["narrow", "around", "plain"]
    assert layers["narrow"].filtered[0].input is None
    assert layers["plain"].filtered[0].input is not None
    assert layers["narrow"].kept_by == ("around",), "a frozen activation keeps nothing"


def test_layers_without_a_part_in_the_loss_are_named() -> None:
    net, batch = task()
    net.other = nn.Conv2d(1, 1, 1)
    scan = filter_scan(net, batch, loss, (2,), rounds=1)
    assert scan.unused == ("other",)
    assert "The loss does not depend on other." in scan.advice


def test_one_dimensional_and_unbatched_and_padded_convolutions_are_scanned() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 4, 5, padding=2, padding_mode="reflect"), nn.Tanh(), nn.Conv1d(4, 2, 3, stride=2))
    for shape in ((3, 2, 17), (2, 17)):
        scan = filter_scan(net, torch.randn(shape), lambda model, x: model(x).square().mean(), (3,), rounds=1)
        assert [layer.shape for layer in scan.layers] == ["2 to 4, 5, on 17", "4 to 2, 3, stride 2, on 17"]
        assert all(layer.filtered[0].ms > 0 and layer.filtered[0].weight for layer in scan.layers)


def test_under_autocast_the_layer_computes_and_keeps_what_it_does_in_the_model() -> None:
    net, batch = task(torch.float32)

    def cast(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model, batch)

    layers = by_name(filter_scan(net, batch, cast, (2,), rounds=1))
    weight = net.plain.weight.numel()  # type: ignore[union-attr,operator]
    assert layers["plain"].nbytes == 2 * (4 * 6 * 6 * 6 + weight), "the copy of the weight too"
    assert layers["plain"].filtered[0].weight is not None


def test_a_checkpointed_model_is_scanned() -> None:
    net, batch = task()

    def recomputed(model: Net, batch: Any) -> Tensor:
        x = checkpoint(lambda x: model.relu(model.norm(model.stem(x))), batch[0], use_reentrant=False)
        x = checkpoint(lambda x: model.plain(model.narrow(x) + model.around(x)), x, use_reentrant=False)
        return nn.functional.cross_entropy(model.head(x.mean((2, 3))), batch[1])

    before = snapshot(net)
    layers = by_name(filter_scan(net, batch, recomputed, (2,), rounds=1))  # type: ignore[arg-type]
    check_untouched(net, before)
    assert layers["narrow"].nbytes == 0
    assert layers["narrow"].shape == "8 to 6, 3 x 3, stride 2, on 12 x 12", "one call, whatever is computed anew"


def test_the_figures_are_plain_values() -> None:
    net, batch = task(torch.float32)
    scan = filter_scan(net, batch, loss, (2,), rounds=1)
    found = json.loads(json.dumps(scan.to_dict(), allow_nan=False))
    assert [layer["name"] for layer in found["layers"]] == ["stem", "narrow", "around", "plain"]
    assert found["together"][0]["patch"] == 2


def test_a_layer_without_gradient_is_left_alone() -> None:
    net, batch = task(torch.float32)
    nn.init.zeros_(net.head.weight)  # type: ignore[union-attr,arg-type]
    scan = filter_scan(net, batch, loss, (2,), rounds=1)
    assert all(layer.filtered[0].weight is None and layer.advised is None for layer in scan.layers)
    assert {layer.reason for layer in scan.layers} <= {"no gradient", "not faster"}
    json.dumps(scan.to_dict(), allow_nan=False)


def layer_of(ms: float, *filtered: tuple[int, float, float, float | None]) -> ScannedLayer:
    return ScannedLayer(
        "conv",
        "",
        ms,
        0,
        (),
        tuple(
            Filtered(patch, each, 0, 0, Agreement(weight, 1), None if of_input is None else Agreement(of_input, 1))
            for patch, each, weight, of_input in filtered
        ),
    )


@pytest.mark.parametrize(
    ("layer", "advised", "reason"),
    [
        (layer_of(1.0, (2, 0.5, 0.9, 0.8), (4, 0.2, 0.6, 0.7)), 4, ""),
        (layer_of(1.0, (2, 0.5, 0.9, 0.8), (4, 0.2, 0.6, 0.4)), 2, ""),
        (layer_of(1.0, (2, 0.21, 0.9, 0.8), (4, 0.2, 0.6, 0.7)), 2, ""),  # about as fast, and better
        (layer_of(1.0, (4, 0.2, 0.6, None), (7, 0.2, 0.6, None)), 4, ""),
        (layer_of(1.0, (2, 0.5, 0.9, 0.3), (4, 0.2, 0.6, 0.2)), None, "cosine 0.30"),
        (layer_of(1.0, (2, 1.5, 0.9, 0.9), (4, 0.8, 0.1, 0.9)), None, "cosine 0.10"),
        (layer_of(1.0, (2, 1.5, 0.9, 0.9)), None, "not faster"),
    ],
)
def test_advised_is_what_is_faster_and_points_the_same_way(
    layer: ScannedLayer, advised: int | None, reason: str
) -> None:
    found = advise(layer, least_cosine=0.5)
    assert (found.advised, found.reason) == (advised, reason)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9), st.floats(-5, 5), st.integers(0, 2**31))
def test_agreement_is_cosine_and_relative_length(values: list[float], scale: float, seed: int) -> None:
    exact = torch.tensor(values, dtype=torch.float64)
    other = scale * exact + torch.randn(len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = agreement([exact[:3], exact[3:]], [other[:3], other[3:]])
    if not exact.square().sum() > 0:
        assert found is None
        return
    assert found is not None
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(exact, other, dim=0, eps=1e-300)), abs=1e-9)
    assert found.norm == pytest.approx(float(other.norm() / exact.norm()))


def nothing(model: nn.Module, batch: Any) -> Tensor:
    return torch.zeros(())


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"patches": (0,)}, ConversionError, "patch=0"),
        ({"patches": (2, 2.5)}, ConversionError, "patch=2.5"),
        ({"patches": (2, "4")}, ConversionError, "patch='4'"),
        ({"patches": ()}, MemfitError, "no size of patches"),
        ({"rounds": 0}, MemfitError, "number of rounds must be 1 or more"),
        ({"least_cosine": 1.5}, MemfitError, "from 0 to 1"),
        ({"where": "encoder.*"}, ConversionError, "encoder"),
        ({"where": "head"}, ConversionError, "Linear"),
        ({"loss": lambda model, batch: model(batch[0])}, MemfitError, r"scalar tensor, not a tensor of shape \(4, 4\)"),
        ({"loss": lambda model, batch: loss(model, batch) * float("nan")}, TrainingError, "loss of the batch is nan"),
        ({"loss": lambda model, batch: loss(model, batch).item()}, MemfitError, "scalar tensor, not float"),
        ({"loss": nothing}, TrainingError, "depends on no parameter that trains"),
        (
            {"loss": lambda model, batch: model.head(batch[0].mean() + torch.zeros(1, 6).double()).sum()},
            TrainingError,
            "depends on none of the layers",
        ),
        (
            {"loss": lambda model, batch: (loss(model, batch) * 0).sqrt()},
            TrainingError,
            "gradient of what layer 'stem' gives is not finite",
        ),
    ],
)
def test_bad_input_gets_one_sentence_and_leaves_the_model(
    arguments: dict[str, Any], kind: type[MemfitError], said: str
) -> None:
    net, batch = task()
    before = snapshot(net)
    with pytest.raises(kind, match=said) as raised:
        filter_scan(net, batch, **{"loss": loss, "rounds": 1, **arguments})
    assert "\n" not in str(raised.value)
    check_untouched(net, before)


def test_a_model_that_has_nothing_to_filter_is_refused() -> None:
    net, batch = task()
    with pytest.raises(ConversionError, match="frozen"):
        filter_scan(copy.deepcopy(net).requires_grad_(False), batch, loss)
    with pytest.raises(ConversionError, match="the model has none"):
        filter_scan(nn.Linear(2, 2), torch.zeros(2, 2), lambda model, x: model(x).sum())
    with pytest.raises(ConversionError, match="converted already"):
        filter_scan(memfit.convert_(net, memfit.GradientFilter(2)), batch, loss)
