"""Gradient filtering against a reference that visits pixel by pixel, and in the company of everything else."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import memfit
from memfit import ConversionError, GradientFilter, LowRankGradient
from memfit.activations.tap_reads import Axis, Window, gathering

Case = tuple[nn.Conv2d, Tensor, Tensor]


def filtered(layer: nn.Module, patch: int, taps: Any = "summed") -> nn.Module:
    return memfit.convert_(copy.deepcopy(layer), GradientFilter(patch, taps), where="")


def gradients(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Of x and of the parameters, for a gradient g of the output."""
    x = x.detach().requires_grad_(True)
    layer.zero_grad()
    layer(x).backward(g)
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"x": x.grad, **found}  # type: ignore[dict-item]


def axis_of(layer: nn.Conv2d, axis: int, size: int, outputs: int, patch: int) -> dict[str, Any]:
    """Which pixels of x belong to which patch of y, and which patch each tap reads, written out."""
    kernel, stride, dilation = layer.kernel_size[axis], layer.stride[axis], layer.dilation[axis]
    if layer.padding == "same":
        padding = dilation * (kernel - 1) // 2
    else:
        padding = 0 if isinstance(layer.padding, str) else layer.padding[axis]
    patch = min(patch, outputs)
    patches = -(-outputs // patch)
    if kernel == 1 and padding == 0:
        owner = [
            i // stride // patch if i % stride == 0 and i // stride < patches * patch else None for i in range(size)
        ]
        return {
            "patches": patches,
            "owner": owner,
            "of_y": [t // patch for t in range(outputs)],
            "taps": [0],
            "s": 1,
        }
    # The centre of what the first patch of y reads, less the centre of a patch of x that begins at 0.
    reads = [stride * t + dilation * j - padding for t in range(patch) for j in range(kernel)]
    start = math.trunc((min(reads) + max(reads)) / 2 - (patch * stride - 1) / 2)
    owner = []
    for i in range(size):
        q = (i - start) // (patch * stride)
        owner.append(q if 0 <= q < patches else None)
    is_wide = kernel > 1 and kernel % 2 == 1 and dilation >= patch * stride
    step = round(dilation / (patch * stride)) if is_wide else 0
    taps = [step * (j - kernel // 2) for j in range(kernel)]
    return {
        "patches": patches,
        "owner": owner,
        "of_y": [t // patch for t in range(outputs)],
        "taps": taps,
        "s": stride,
    }


def reference(layer: nn.Conv2d, x: Tensor, g: Tensor, patch: int) -> dict[str, Tensor]:
    """The filtered gradients by their definition, one patch and one tap at a time."""
    weight, groups = layer.weight.detach(), layer.groups
    rows, columns = (axis_of(layer, axis, x.shape[2 + axis], g.shape[2 + axis], patch) for axis in (0, 1))
    shape = (rows["patches"], columns["patches"])

    def cells(owners: tuple[list[Any], list[Any]], q: tuple[int, int]) -> list[tuple[int, int]]:
        return [(i, j) for i, row in enumerate(owners[0]) for j, column in enumerate(owners[1]) if (row, column) == q]

    inputs = {q: cells((rows["owner"], columns["owner"]), q) for q in product(*map(range, shape))}
    outputs = {q: cells((rows["of_y"], columns["of_y"]), q) for q in product(*map(range, shape))}
    zero = torch.zeros(x.shape[0], x.shape[1], dtype=x.dtype)
    means = {q: torch.stack([x[:, :, i, j] for i, j in c]).mean(0) if c else zero for q, c in inputs.items()}
    dx, dweight = torch.zeros_like(x), torch.zeros_like(weight)
    per_in, per_out = x.shape[1] // groups, g.shape[1] // groups
    for q, pixels in outputs.items():
        mean = torch.stack([g[:, :, i, j] for i, j in pixels]).mean(0)
        reads = product(*[list(enumerate(each["taps"])) for each in (rows, columns)])
        for (a, tap_row), (b, tap_column) in reads:
            target = (q[0] + tap_row, q[1] + tap_column)
            if target not in inputs:
                continue
            for group in range(groups):
                o = slice(group * per_out, (group + 1) * per_out)
                i_ = slice(group * per_in, (group + 1) * per_in)
                dweight[o, :, a, b] += len(pixels) * mean[:, o].T @ means[target][:, i_]
                for i, j in inputs[target]:
                    dx[:, i_, i, j] += mean[:, o] @ weight[o, :, a, b] / (rows["s"] * columns["s"])
    found = {"x": dx, "weight": dweight}
    return found if layer.bias is None else {**found, "bias": g.sum((0, 2, 3))}


def flat(maps: Tensor, owners: list[list[int | None]]) -> Tensor:
    """Maps with the mean of each patch at all of its pixels, and zero at those of none, one patch at a time."""
    found = torch.zeros_like(maps)
    for q in product(*[{each for each in axis if each is not None} for axis in owners]):
        cells = [(i, j) for i, a in enumerate(owners[0]) for j, b in enumerate(owners[1]) if (a, b) == q]
        mean = torch.stack([maps[:, :, i, j] for i, j in cells]).mean(0)
        for i, j in cells:
            found[:, :, i, j] = mean
    return found


def nearest_plane(weight: Tensor, axes: tuple[bool, bool]) -> Tensor:
    """By least squares over the taps: a constant and a slope along each of the axes; along others, each tap is free."""
    height, width = weight.shape[2:]
    rows = [(tap, None) if not axes[0] else (0, tap - (height - 1) / 2) for tap in range(height)]
    columns = [(tap, None) if not axes[1] else (0, tap - (width - 1) / 2) for tap in range(width)]
    design = []
    for (row, slope_down), (column, slope_across) in product(rows, columns):
        free = torch.zeros(height, width, dtype=weight.dtype)
        free[row, column] = 1
        down, across = torch.zeros_like(free), torch.zeros_like(free)
        down[row, column], across[row, column] = slope_down or 0, slope_across or 0
        # Where one axis is free there is a slope along the other for each of its taps.
        design.append(torch.cat([free.flatten(), down.flatten(), across.flatten()]))
    basis = torch.stack(design)
    return (basis @ torch.linalg.pinv(basis) @ weight.flatten(2).mT.double()).mT.to(weight.dtype).view(weight.shape)


def reference_planar(layer: nn.Conv2d, x: Tensor, g: Tensor, patch: int) -> dict[str, Tensor]:
    """As with taps apart, of the plane nearest to the kernel, and of its gradient the nearest plane."""
    axes = []
    for axis in (0, 1):
        width = min(patch, g.shape[2 + axis]) * layer.stride[axis]
        axes.append(layer.kernel_size[axis] > 2 and layer.dilation[axis] < width)
    flattened = copy.deepcopy(layer)
    with torch.no_grad():
        flattened.weight.copy_(nearest_plane(layer.weight, (axes[0], axes[1])))
    found = reference_apart(flattened, x, g, patch)
    return {**found, "weight": nearest_plane(found["weight"], (axes[0], axes[1]))}


def reference_apart(layer: nn.Conv2d, x: Tensor, g: Tensor, patch: int) -> dict[str, Tensor]:
    """With taps apart: the exact gradients of flat maps."""
    of_x: list[list[int | None]] = []
    of_g: list[list[int | None]] = []
    for axis, (size, outputs) in enumerate(zip(x.shape[2:], g.shape[2:], strict=True)):
        width = min(patch, outputs)
        of_g.append([pixel // width for pixel in range(outputs)])
        padding, stride = layer._reversed_padding_repeated_twice[2 * (1 - axis)], layer.stride[axis]
        if layer.kernel_size[axis] == 1 and padding == 0:  # the pixels between are not read
            of_x.append([pixel // (stride * width) if pixel % stride == 0 else None for pixel in range(size)])
        else:
            of_x.append([pixel // (stride * width) for pixel in range(size)])
    return gradients(copy.deepcopy(layer), flat(x, of_x), flat(g, of_g))


REFERENCES = {"summed": reference, "planar": reference_planar, "apart": reference_apart}


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, int]:
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilation = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    if draw(st.booleans()) and stride == (1, 1):
        padding: Any = draw(st.sampled_from(["same", "valid"]))
    else:
        padding = (draw(st.integers(0, 5)), draw(st.integers(0, 5)))
    groups = draw(st.sampled_from([1, 2, 4]))
    mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "replicate", "reflect", "circular"]))
    needed = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if mode in ("reflect", "circular"):  # torch can't, of maps no larger than the padding
        needed = [max(7, least) for least in needed]
    height, width = (draw(st.integers(least, least + 8)) for least in needed)
    torch.manual_seed(draw(st.integers(0, 1000)))
    layer = nn.Conv2d(
        4, draw(st.sampled_from([4, 8])), kernel, stride, padding, dilation, groups, draw(st.booleans()), mode
    ).double()
    x = torch.randn(draw(st.integers(1, 2)), 4, height, width, dtype=torch.float64)
    with torch.no_grad():
        g = torch.randn_like(layer(x))
    return (layer, x, g), draw(st.integers(1, 6))


@settings(max_examples=120, deadline=None)
@given(cases(), st.sampled_from(list(REFERENCES)))
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_gradients_equal_the_pixel_by_pixel_reference(drawn: tuple[Case, int], taps: str) -> None:
    (layer, x, g), patch = drawn
    expected = REFERENCES[taps](layer, x, g, patch)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = filtered(layer, patch, taps).to(memory_format=memory_format)
        found = gradients(model, x.contiguous(memory_format=memory_format), g.contiguous(memory_format=memory_format))
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=30, deadline=None)
@given(cases())
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_forward_is_bit_for_bit_the_plain_layer(drawn: tuple[Case, int]) -> None:
    (layer, x, _), patch = drawn
    assert torch.equal(filtered(layer, patch)(x), layer(x))


@pytest.mark.parametrize(("kernel", "padding", "dilation"), [(1, 0, 1), (3, 1, 1), (5, 2, 1), (3, 4, 4)])
def test_patches_of_one_pixel_give_the_exact_gradients(kernel: int, padding: int, dilation: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, kernel, padding=padding, dilation=dilation).double()
    x, g = torch.randn(2, 3, 9, 7, dtype=torch.float64), torch.randn(2, 5, 9, 7, dtype=torch.float64)
    exact, found = gradients(layer, x, g), gradients(filtered(layer, 1), x, g)
    for name, value in found.items():
        torch.testing.assert_close(value, exact[name])


@pytest.mark.parametrize("patch", [2, 3])
@pytest.mark.parametrize("groups", [1, 4])
def test_gradients_are_exact_inside_where_map_and_gradient_are_flat(patch: int, groups: int) -> None:
    """The premise of the method: nothing is lost where there is nothing but the mean."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 3, padding=1, groups=groups).double()
    x = torch.randn(2, 4, 1, 1, dtype=torch.float64).expand(2, 4, 12, 12)
    g = torch.zeros(2, 8, 12, 12, dtype=torch.float64)
    g[:, :, 3:9, 3:9] = torch.randn(2, 8, 1, 1, dtype=torch.float64)  # whole patches of both sizes, off the border
    g = g if patch == 3 else torch.nn.functional.pad(g[:, :, 3:9, 3:9], (2, 4, 2, 4))
    exact, found = gradients(layer, x, g), gradients(filtered(layer, patch), x, g)
    torch.testing.assert_close(found["weight"], exact["weight"])
    torch.testing.assert_close(found["bias"], exact["bias"])
    inside = (slice(None), slice(None), slice(4, 8), slice(4, 8)) if patch == 3 else (..., slice(3, 7), slice(3, 7))
    torch.testing.assert_close(found["x"][inside], exact["x"][inside])


def test_gradcheck_of_a_pointwise_convolution_with_patches_of_one_pixel() -> None:
    torch.manual_seed(0)
    layer = filtered(nn.Conv2d(3, 4, 1, stride=2).double(), 1)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


@pytest.mark.parametrize("padding", [0, 1, "same"])
@pytest.mark.parametrize("patch", [1, 3])
def test_conv1d_is_a_map_of_one_row(padding: int | str, patch: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv1d(4, 6, 3, padding=padding).double()
    row = nn.Conv2d(4, 6, (1, 3), padding=padding if isinstance(padding, str) else (0, padding)).double()
    row.load_state_dict({"weight": layer.weight.unsqueeze(2), "bias": layer.bias})
    x = torch.randn(2, 4, 13, dtype=torch.float64)
    with torch.no_grad():
        g = torch.randn_like(layer(x))
    found = gradients(filtered(layer, patch), x, g)
    expected = reference(row, x.unsqueeze(2), g.unsqueeze(2), patch)
    torch.testing.assert_close(found["x"], expected["x"].squeeze(2))
    torch.testing.assert_close(found["weight"], expected["weight"].squeeze(2))
    torch.testing.assert_close(found["bias"], expected["bias"])


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1)])
def test_an_input_without_a_batch_axis_is_one_of_a_batch(layer: nn.Module) -> None:
    model = filtered(layer, 2)
    x = torch.randn(4, *(8,) * (2 if isinstance(layer, nn.Conv2d) else 1))
    g = torch.randn_like(x)
    single, batched = gradients(model, x, g), gradients(model, x.unsqueeze(0), g.unsqueeze(0))
    torch.testing.assert_close(single["x"], batched["x"].squeeze(0))
    torch.testing.assert_close(single["weight"], batched["weight"])


@pytest.mark.parametrize("shape", [(2, 4, 8), (4, 8), (2, 4, 8, 8), (4, 8, 8)])
def test_the_output_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    layer = nn.Conv1d(4, 4, 3, padding=1) if 8 not in shape[-2:-1] else nn.Conv2d(4, 4, 3, padding=1)
    x = torch.randn(shape, requires_grad=True)
    y = filtered(layer, 2)(x)
    y += x
    nn.functional.relu_(y).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_without_autograd_nothing_is_pooled(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = filtered(nn.Conv2d(4, 4, 3), 2)

    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("memfit.activations.filtered_convolution.pool", refuse)
    with torch.no_grad():
        assert layer(torch.randn(1, 4, 8, 8)).shape == (1, 4, 6, 6)


def test_a_map_of_another_number_of_axes_is_refused_as_torch_does() -> None:
    with pytest.raises(RuntimeError, match=r"Expected 3D \(unbatched\) or 4D \(batched\) input to Conv2d"):
        filtered(nn.Conv2d(4, 4, 3), 2)(torch.randn(4, 8))


def saved_bytes(call: Any) -> int:
    """Bytes that autograd keeps, each storage once, without parameters."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kernel", "stride", "share"), [(3, 1, 16), (3, 2, 64), (1, 1, 16), (1, 2, 64)])
def test_nothing_but_the_pooled_input_is_kept(
    kernel: int, stride: int, share: int, memory_format: torch.memory_format
) -> None:
    layer = nn.Conv2d(8, 8, kernel, stride, padding=kernel // 2).to(memory_format=memory_format)
    x = torch.randn(2, 8, 32, 32).contiguous(memory_format=memory_format).requires_grad_(True)
    assert saved_bytes(lambda: layer(x)) == x.numel() * 4
    assert saved_bytes(lambda: filtered(layer, 4)(x)) == x.numel() * 4 // share


def test_a_strided_pointwise_layer_with_patches_of_one_keeps_no_view_of_the_whole_map() -> None:
    x = torch.randn(2, 8, 32, 32, requires_grad=True)
    assert saved_bytes(lambda: filtered(nn.Conv2d(8, 8, 1, stride=2), 1)(x)) == x.numel()


def test_the_ledger_sees_what_a_filter_saves() -> None:
    def activations(model: nn.Module) -> int:
        x = torch.randn(4, 16, 64, 64)
        with memfit.ledger(model) as book:
            model(x).square().mean().backward()
        return book.peak.activations

    torch.manual_seed(0)
    # A layer without a neighbour that keeps the same map.
    plain = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.Conv2d(16, 16, 3, padding=1, bias=False))
    exact = activations(plain)
    converted = memfit.convert_(copy.deepcopy(plain), GradientFilter(4))
    assert activations(converted) <= exact - 2 * 4 * 16 * 64 * 64 * 4 * 15 // 16 + 4 * 16 * 64 * 64 * 4


def test_a_frozen_weight_keeps_no_input_and_a_first_layer_gives_no_input_gradient() -> None:
    layer = filtered(nn.Conv2d(4, 4, 3, padding=1), 2)
    x = torch.randn(1, 4, 8, 8)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    layer.weight.requires_grad_(False)
    layer.weight.grad = None
    x.requires_grad_(True)
    assert saved_bytes(lambda: layer(x)) == 0
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None
    assert layer.bias.grad is not None


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dilation", [1, 4])
def test_autocast_gives_bfloat16_forward_and_gradients_of_the_parameters_type(groups: int, dilation: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 3, padding=dilation, dilation=dilation, groups=groups)
    model = filtered(layer, 2)
    x = torch.randn(2, 4, 12, 12)
    full = gradients(model, x, torch.ones(2, 4, 12, 12))
    leaf = x.clone().requires_grad_(True)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(leaf)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, layer(leaf))
        y.float().sum().backward()  # within autocast, as some loops do
    assert leaf.grad is not None
    assert leaf.grad.dtype == model.weight.grad.dtype == torch.float32
    torch.testing.assert_close(leaf.grad, full["x"], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(model.weight.grad, full["weight"], rtol=2e-2, atol=0.5)


def test_under_autocast_the_pooled_input_is_kept_in_half_the_bytes() -> None:
    x = torch.randn(2, 8, 32, 32, requires_grad=True)
    model = filtered(nn.Conv2d(8, 8, 3, padding=1), 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert saved_bytes(lambda: model(x)) == x.numel() // 16 * 2


def test_gradients_add_up_over_micro_batches() -> None:
    torch.manual_seed(0)
    model = filtered(nn.Conv2d(4, 4, 3, padding=1), 2)
    x, g = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    whole = gradients(model, x, g)["weight"].clone()
    model.zero_grad()
    for part, its in zip(x.split(1), g.split(1), strict=True):
        model(part).backward(its)
    torch.testing.assert_close(model.weight.grad, whole)
    assert model.weight.grad.is_contiguous()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_around_it_changes_nothing(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = memfit.convert_(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8)),
        GradientFilter(2),
    )
    x, g = torch.randn(2, 3, 9, 9), torch.randn(2, 8, 9, 9)
    plain = gradients(model, x, g)
    leaf = x.requires_grad_(True)
    model.zero_grad()
    checkpoint(model, leaf, use_reentrant=reentrant).backward(g)
    assert torch.equal(leaf.grad, plain["x"])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, plain[name])


@pytest.mark.parametrize("training", [True, False])
def test_it_stands_beside_batch_norm_and_low_rank_layers(training: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 8),
    )
    memfit.convert_(model, LowRankGradient(rank=2), where="3")
    memfit.convert_(model, GradientFilter(4), where="0")
    for each in model.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.train(training)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    target = torch.arange(16) % 8
    x = torch.randn(8, 3, 1, 1)[target] + 0.3 * torch.randn(16, 3, 16, 16)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    memfit.restore_(model)
    assert type(model[0]) is type(model[3]) is nn.Conv2d


def test_maps_may_change_their_size_from_call_to_call() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 2, 3, padding=1).double()
    model = filtered(layer, 4)
    for size in [(16, 16), (3, 5), (1, 1), (9, 30), (16, 16)]:
        x = torch.randn(1, 2, *size, dtype=torch.float64)
        g = torch.randn_like(x)
        expected = reference(layer, x, g, 4)
        for name, value in gradients(model, x, g).items():
            torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("taps", ["planar", "apart"])
@pytest.mark.parametrize("size", [8, 9, 112])
def test_an_empty_batch_passes_with_taps_where_they_lie(size: int, taps: Any) -> None:
    found = gradients(
        filtered(nn.Conv2d(4, 6, 3, padding=1), 2, taps),
        torch.empty(0, 4, size, size),
        torch.empty(0, 6, size, size),
    )
    assert float(found["weight"].abs().max()) == 0
    assert found["x"].shape == (0, 4, size, size)


@pytest.mark.parametrize("taps", ["planar", "apart"])
@pytest.mark.parametrize("size", [(1, 400), (1, 401), (112, 9)])
def test_taps_of_long_maps_read_where_they_lie_too(size: tuple[int, int], taps: Any) -> None:
    """Of maps that are constant on patches already."""
    padding = (min(1, size[0] // 2), 1)
    layer = nn.Conv2d(2, 3, (1 + 2 * padding[0], 3), padding=padding).double()
    maps = [torch.randn(2, channels, -(-size[0] // 2), -(-size[1] // 2), dtype=torch.float64) for channels in (2, 3)]
    x, g = (each.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : size[0], : size[1]] for each in maps)
    near = copy.deepcopy(layer)
    axes = (taps == "planar" and padding[0] > 0, taps == "planar")
    with torch.no_grad():
        near.weight.copy_(nearest_plane(layer.weight, axes))
    found, exact = gradients(filtered(layer, 2, taps), x.contiguous(), g.contiguous()), gradients(near, x, g)
    torch.testing.assert_close(found["x"], exact["x"])
    torch.testing.assert_close(found["weight"], nearest_plane(exact["weight"], axes))


@pytest.mark.parametrize("taps", list(REFERENCES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_half_precision_have_gradients_of_it(taps: Any, dtype: torch.dtype) -> None:
    """Large patches, of which a table of taps in half precision would lose count."""
    torch.manual_seed(0)
    layer = nn.Conv1d(4, 6, 5, padding=2).to(dtype)
    x, g = torch.randn(2, 4, 2048).to(dtype), torch.randn(2, 6, 2048).to(dtype) / 64
    found = gradients(filtered(layer, 512, taps), x, g)
    exact = gradients(filtered(layer.double(), 512, taps), x.double(), g.double())
    for name, value in found.items():
        assert value.dtype == dtype
        assert float((value.double() - exact[name]).norm() / exact[name].norm()) < 0.02


def test_tables_of_taps_have_the_same_bits_each_time() -> None:
    axis = Axis(16000, 16000, 400, 400, Window(3, 1, 1, 1), is_planar=True)
    found = [gathering(axis, range(2), torch.zeros(1)) for _ in range(4)]
    assert all(torch.equal(each, found[0]) for each in found)


def test_an_exact_image_does_not_overflow_half_precision_on_the_way() -> None:
    layer = nn.Conv2d(1, 1, 1, bias=False).to(torch.float16)
    x = torch.full((4, 1, 2, 2), 2.0**-8, dtype=torch.float16)
    g = torch.full((4, 1, 2, 2), 2.0**14 * 1.5, dtype=torch.float16)
    model = memfit.convert_(copy.deepcopy(layer), GradientFilter(2, exact_every=4), where="")
    torch.testing.assert_close(gradients(model, x, g)["weight"], gradients(layer, x, g)["weight"])


def test_an_empty_batch_passes() -> None:
    found = gradients(filtered(nn.Conv2d(2, 2, 3, padding=1), 2), torch.zeros(0, 2, 8, 8), torch.zeros(0, 2, 8, 8))
    assert found["weight"].abs().sum() == 0


def test_an_expanded_gradient_of_the_output_is_taken() -> None:
    layer = nn.Conv2d(2, 4, 3, padding=1).double()
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    found = gradients(filtered(layer, 4), x, one.expand(2, 4, 8, 8))
    expected = reference(layer, x, torch.ones(2, 4, 8, 8, dtype=torch.float64), 4)
    torch.testing.assert_close(found["weight"], expected["weight"])


def test_conversion_and_restoring_leave_the_parameters_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Conv1d(4, 4, 3), nn.Linear(4, 4))
    before = dict(model.named_parameters())
    memfit.convert_(model, GradientFilter(2))
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert memfit.state_dict(model).keys() == model.state_dict().keys() == before.keys()
    assert "GradientFilter(patch=2)" in repr(model[0])
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert again[0].technique == GradientFilter(2)
    memfit.restore_(model)
    assert type(model[0]) is nn.Conv2d
    assert type(model[1]) is nn.Conv1d
    assert "technique" not in model[0].__dict__
    assert "GradientFilter" not in repr(model)


def test_tied_kernels_stay_one_parameter() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    model[1].weight = model[0].weight
    memfit.convert_(model, GradientFilter(2))
    assert model[0].weight is model[1].weight
    model(torch.randn(1, 4, 8, 8)).sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("every", [0, 2.5, True, "8"])
def test_a_number_of_exact_images_that_is_no_whole_number_is_refused(every: Any) -> None:
    with pytest.raises(ConversionError, match=r"exact_every=.* is not possible: give a whole number"):
        GradientFilter(2, exact_every=every)


@pytest.mark.parametrize("patch", [0, -1, 1.5, True, "4", None])
def test_a_patch_that_is_no_whole_number_is_refused(patch: Any) -> None:
    with pytest.raises(ConversionError, match=r"patch=.* is not possible: give a whole number of at least 1"):
        GradientFilter(patch)


def test_layers_that_cannot_be_filtered_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(ConversionError, match="layer '0' is a Linear, which GradientFilter does not convert"):
        memfit.convert_(model, GradientFilter(2), where="0")
    with pytest.raises(ConversionError, match=r"it converts Conv1d, Conv2d"):
        memfit.convert_(model, GradientFilter(2), where="1")
    memfit.convert_(model, GradientFilter(2))
    with pytest.raises(ConversionError, match="converted already, by GradientFilter"):
        memfit.convert_(model, LowRankGradient(2), where="2")


def test_differentiating_twice_is_refused_and_not_wrong() -> None:
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(filtered(nn.Conv2d(2, 2, 3), 2)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated twice|once_differentiable"):
        dx.sum().backward()


def test_an_estimate_knows_a_filtered_net() -> None:
    model = memfit.convert_(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3)), GradientFilter(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 3, 33, 33)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    expected = memfit.estimate(model, x, loss, optimizer).peak
    with memfit.ledger(model, optimizer) as book:
        for _ in range(2):
            optimizer.zero_grad()
            loss(model, x).backward()
            optimizer.step()
    assert book.peak == expected


@pytest.mark.filterwarnings("ignore")  # of dynamo, about the cache of plans
@pytest.mark.parametrize("taps", list(REFERENCES))
def test_compiled_it_gives_the_same_gradients(taps: Any) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = memfit.convert_(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1)), GradientFilter(2, taps)
    )
    x, g = torch.randn(2, 3, 9, 8), torch.randn(2, 4, 9, 8)
    plain = gradients(model, x, g)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    leaf = x.detach().requires_grad_(True)
    model.zero_grad()
    compiled(leaf).backward(g)
    torch.testing.assert_close(leaf.grad, plain["x"])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name])


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(list(REFERENCES)), st.integers(1, 3))
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_with_exact_images_the_weights_gradient_is_right_on_the_mean(
    drawn: tuple[Case, int], taps: Any, every: int
) -> None:
    (layer, x, g), patch = drawn
    x, g = (torch.cat([each, each.flip(0), 2 * each]) for each in (x, g))
    exact, alone = (gradients(each, x, g) for each in (copy.deepcopy(layer), filtered(layer, patch, taps)))
    model = memfit.convert_(copy.deepcopy(layer), GradientFilter(patch, taps, exact_every=every), where="")
    drawn_from = [gradients_drawn(model, x, g, first) for first in range(every)]
    for name, value in alone.items():
        mean = torch.stack([each[name] for each in drawn_from]).mean(0)
        torch.testing.assert_close(mean, exact[name] if name == "weight" else value)


def gradients_drawn(layer: nn.Module, x: Tensor, g: Tensor, first: int) -> dict[str, Tensor]:
    """Gradients, with the first exact image known."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "randint", lambda *_: torch.tensor(first))
        return gradients(layer, x, g)


def test_exact_images_are_drawn_evenly_from_torchs_random_numbers() -> None:
    torch.manual_seed(0)
    layer = memfit.convert_(nn.Conv2d(1, 1, 3), GradientFilter(2, exact_every=4), where="")
    x, g = torch.rand(1, 1, 6, 6), torch.rand(1, 1, 4, 4)
    found = [gradients(layer, x, g)["weight"] for _ in range(400)]
    exact = [bool((each - each.mean()).abs().max() > 1e-5) for each in found]  # not the same at all taps
    assert 60 < sum(exact) < 140


@pytest.mark.parametrize(("every", "kept"), [(None, 4 * 16), (4, 4 * 16 + 256), (1, 4 * 256)])
def test_exact_images_are_kept_whole_and_of_the_others_the_means(every: int | None, kept: int) -> None:
    layer = memfit.convert_(nn.Conv2d(1, 1, 3, padding=1), GradientFilter(4, exact_every=every), where="")
    storages = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda each: each):
        layer(torch.randn(4, 1, 16, 16))
    assert sum(storages.values()) == 4 * kept


def test_exact_images_leave_the_input_as_it_is() -> None:
    """Patches of one pixel are pooled to the map itself."""
    x = torch.randn(3, 2, 4, 4)
    before = x.clone()
    memfit.convert_(nn.Conv2d(2, 2, 1), GradientFilter(1, exact_every=2), where="")(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_draws_the_same_exact_images_again(reentrant: bool) -> None:
    layer = memfit.convert_(nn.Conv2d(2, 2, 3), GradientFilter(2, exact_every=3), where="")
    x = torch.randn(4, 2, 8, 8, requires_grad=True)
    found = []
    for run in (layer, lambda maps: checkpoint(layer, maps, use_reentrant=reentrant)):
        torch.manual_seed(3)
        layer.zero_grad()
        run(x).square().sum().backward()
        found.append(layer.weight.grad.clone())
    assert torch.equal(*found)


def test_conv1d_has_exact_images_too() -> None:
    layer = nn.Conv1d(2, 4, 3, padding=1, groups=2)
    x, g = torch.randn(3, 2, 9), torch.randn(3, 4, 9)
    model = memfit.convert_(copy.deepcopy(layer), GradientFilter(2, exact_every=1), where="")
    for name in ("weight", "bias"):
        torch.testing.assert_close(gradients(model, x, g)[name], gradients(layer, x, g)[name])


def test_taps_are_one_of_three_words() -> None:
    with pytest.raises(ConversionError, match="taps='near' is not possible"):
        GradientFilter(2, taps="near")  # type: ignore[arg-type]


@pytest.mark.parametrize("taps", list(REFERENCES))
def test_with_exact_images_the_others_have_their_taps_summed_for_the_weight(taps: Any) -> None:
    """One image in three counts three times its exact gradient and less two times its summed one."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1).double()
    x, g = (torch.randn(6, channels, 7, 7, dtype=torch.float64) for channels in (4, 6))
    model = memfit.convert_(copy.deepcopy(layer), GradientFilter(2, taps, exact_every=3), where="")
    summed = [reference(layer, x[[i]], g[[i]], 2)["weight"] for i in range(len(x))]
    exact = [gradients(layer, x[[i]], g[[i]])["weight"].clone() for i in range(len(x))]
    expected = sum(summed) + 3 * sum(exact[i] - summed[i] for i in (1, 4))
    found = gradients_drawn(model, x, g, 1)
    torch.testing.assert_close(found["weight"], expected)
    torch.testing.assert_close(found["x"], REFERENCES[taps](layer, x, g, 2)["x"])
