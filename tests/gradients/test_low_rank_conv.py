"""Low-rank gradients of convolutions: against the dense layer with weight W + U V, for all of its arguments."""

from __future__ import annotations

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import memfit
from memfit.gradients.convolution import Geometry, low_rank_conv, low_rank_conv_transpose

PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def converted(model: nn.Module, **settings: Any) -> nn.Module:
    return memfit.convert_(model, memfit.LowRankGradient(**settings))


def compare_with_dense(dense: nn.Module, x: Tensor, *rest: Any, rank: int, sides: str) -> None:
    """Outputs and all gradients, against autograd through ``dense`` with its weight written as W + U V."""
    layer = converted(copy.deepcopy(dense), rank=rank, sides=sides)
    close = partial(torch.testing.assert_close, **({"atol": 1e-4, "rtol": 1e-4} if x.dtype == torch.float32 else {}))
    close(layer(x, *rest), dense(x, *rest))
    matrix = layer.matrix("weight")
    matrix.left.data.normal_()
    left = matrix.left.detach().clone().requires_grad_()
    right = matrix.right.detach().clone().requires_grad_()
    product = left @ right
    weight = dense.weight.detach() + (product.t() if matrix.transposed else product).reshape(dense.weight.shape)
    x_dense, x_low = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = torch.func.functional_call(dense, {"weight": weight}, (x_dense, *rest))
    y = layer(x_low, *rest)
    close(y, expected)
    assert y.stride() == expected.stride()
    d = torch.randn_like(expected)
    expected.backward(d)
    y.backward(d)
    close(x_low.grad, x_dense.grad)
    close(matrix.left.grad, left.grad)
    if sides == "both":
        close(matrix.right.grad, right.grad)
    if dense.bias is not None:
        close(layer.bias.grad, dense.bias.grad)
    close(layer.weight, weight)


@st.composite
def geometries(draw: Any, transposed: bool) -> dict[str, Any]:
    axes = draw(st.integers(1, 3))
    several = lambda least, most: tuple(draw(st.integers(least, most)) for _ in range(axes))  # noqa: E731
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    stride, dilation = several(1, 3), several(1, 2)
    arguments = {
        "in_channels": groups * draw(st.integers(2, 3)),
        "out_channels": groups * draw(st.integers(2, 4)),
        "kernel_size": several(1, 3),
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding": several(0, 2),
    }
    if transposed:
        room = [max(pair) - 1 for pair in zip(stride, dilation, strict=True)]
        arguments["output_padding"] = tuple(draw(st.integers(0, most)) for most in room)
        arguments["padding"] = tuple(0 for _ in range(axes)) if draw(st.booleans()) else (1,) * axes
    else:
        arguments["padding_mode"] = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
        kind = draw(st.sampled_from(["numbers", "same", "valid"]))
        if kind == "same":
            arguments["stride"] = (1,) * axes
        if kind != "numbers":
            arguments["padding"] = kind
    return arguments


common = {
    "batch": st.integers(0, 3),
    "sides": st.sampled_from(["both", "left"]),
    "data": st.data(),
}


@settings(deadline=None, max_examples=50)
@given(arguments=geometries(transposed=False), **common)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_a_convolution_is_the_dense_one_with_the_effective_weight(
    arguments: dict[str, Any], batch: int, sides: str, data: Any
) -> None:
    torch.manual_seed(0)
    axes = len(arguments["kernel_size"])
    dense = PLAIN[axes](**arguments).double()
    most = min(dense.out_channels, dense.weight[0].numel())
    if dense.groups > 1:
        most = min(dense.out_channels // dense.groups, dense.weight[0].numel()) - 1
    size = [data.draw(st.integers(6, 8)) for _ in range(axes)]
    x = torch.randn(*[batch][: batch > 0], dense.in_channels, *size, dtype=torch.float64)  # of batch 0: unbatched
    compare_with_dense(dense, x, rank=data.draw(st.integers(1, most)), sides=sides)


@settings(deadline=None, max_examples=30)
@given(arguments=geometries(transposed=True), ask_size=st.booleans(), **common)
def test_a_transposed_convolution_is_the_dense_one_with_the_effective_weight(
    arguments: dict[str, Any], ask_size: bool, batch: int, sides: str, data: Any
) -> None:
    torch.manual_seed(0)
    axes = len(arguments["kernel_size"])
    dense = TRANSPOSED[axes](**arguments).double()
    most = min(dense.in_channels, dense.weight[0].numel())
    if dense.groups > 1:
        most = min(dense.in_channels // dense.groups, dense.weight[0].numel()) - 1
    size = [data.draw(st.integers(3, 5)) for _ in range(axes)]
    x = torch.randn(*[batch][: batch > 0], dense.in_channels, *size, dtype=torch.float64)
    rest = []
    if ask_size:  # of which the layer finds its output padding, up to stride - 1
        dense.output_padding = tuple(map(min, dense.output_padding, (n - 1 for n in dense.stride)))
        rest = [list(dense(x).shape[-axes:])]
        dense.output_padding = (0,) * axes
    compare_with_dense(dense, x, *rest, rank=data.draw(st.integers(1, most)), sides=sides)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("sides", ["both", "left"])
def test_channels_last_stays_channels_last(groups: int, sides: str) -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(4, 6, 3, padding=1, groups=groups).double().to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64).to(memory_format=torch.channels_last)
    compare_with_dense(dense, x, rank=2, sides=sides)
    x.requires_grad_()
    y = converted(dense, rank=2, sides=sides)(x)
    y.backward(torch.randn_like(y))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


class Placeholders(TorchDispatchMode):
    """Remembers whether torch would have to copy what stands for the input where that is not read."""

    def __init__(self, layout: torch.memory_format) -> None:
        super().__init__()
        self.layout = layout
        self.in_order: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default and not args[-1][1]:
            self.in_order += [each.is_contiguous(memory_format=self.layout) for each in args[:2]]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_backward_copies_no_tensor_that_it_does_not_read(layout: torch.memory_format, stride: int) -> None:
    layer = converted(nn.Conv2d(4, 6, 3, padding=1, stride=stride), rank=2).to(memory_format=layout)
    x = torch.randn(2, 4, 6, 6).to(memory_format=layout).requires_grad_()
    y = layer(x)
    with Placeholders(layout) as seen:
        y.backward(torch.randn_like(y))
    assert seen.in_order
    assert all(seen.in_order)


def test_inputs_of_any_layout_and_expanded_gradients_are_taken() -> None:
    torch.manual_seed(0)
    dense = nn.Conv1d(4, 6, 3).double()
    layer = converted(copy.deepcopy(dense), rank=2)
    for x in (torch.randn(2, 9, 4).double().transpose(1, 2), torch.randn(9, 4, 2).double().permute(2, 1, 0)):
        torch.testing.assert_close(layer(x), dense(x))
        layer(x).sum().backward()
    assert layer(torch.randn(0, 4, 9).double()).shape == (0, 6, 7)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_first_and_second_derivatives_pass_gradcheck(transposed: bool, groups: int) -> None:
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    by = (
        Geometry((2, 1), (1, 0), (1, 2), transposed, (1, 0), groups)
        if transposed
        else Geometry((2, 1), (1, 0), (1, 2), groups=groups)
    )
    base = torch.randn(4, 6 // groups, 2, 3, dtype=torch.float64)
    if transposed:
        function, x, bias, m, n = low_rank_conv_transpose, make(2, 4, 2, 3), make(6), 6 // groups * 6, 4
    else:
        function, x, bias, m, n = low_rank_conv, make(2, 6, 3, 5), make(4), 4, 6 // groups * 6
    inputs = (x, bias, make(m, 2), make(2, n))
    assert torch.autograd.gradcheck(lambda x, b, left, right: function(x, base, b, left, right, by), inputs)
    assert torch.autograd.gradgradcheck(
        lambda x, b, left, right: function(x, base, b, left, right, by), inputs, fast_mode=True
    )


class Made(TorchDispatchMode):
    """Notes the shape of every tensor that is made, views excepted."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in before:
                self.shapes.append(tuple(tensor.shape))
        return out


LAYERS = [
    lambda: nn.Conv1d(6, 10, 5, padding=2),
    lambda: nn.Conv2d(6, 10, 3, padding=1, padding_mode="reflect"),
    lambda: nn.Conv2d(6, 10, 3, groups=2),
    lambda: nn.ConvTranspose1d(6, 10, 5),
    lambda: nn.ConvTranspose2d(6, 10, 3, stride=2),
]


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("sides", ["both", "left"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_single_precision_takes_other_kernels_to_the_same_numbers(make: Any, sides: str, channels_last: bool) -> None:
    torch.manual_seed(0)
    dense = make()
    x = torch.randn(4, 6, *(11,) * (dense.weight.dim() - 2))
    if channels_last and x.dim() == 4:
        dense, x = dense.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    compare_with_dense(dense, x, rank=2, sides=sides)


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("sides", ["both", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dense_gradient_is_never_formed(make: Any, sides: str, dtype: torch.dtype) -> None:
    """No tensor of the weight's size is made; and in forward only one of the output's (two when transposed)."""
    layer = make().to(dtype)
    numel, shape, transposed = layer.weight.numel(), layer.weight.shape, layer.transposed
    converted(layer, rank=2, sides=sides)
    x = torch.randn(4, 6, *(11,) * (len(shape) - 2), dtype=dtype, requires_grad=True)
    with Made() as forward:
        y = layer(x)
    assert forward.shapes.count(tuple(y.shape)) == 1 + transposed
    with Made() as backward:
        y.square().sum().backward()
    made = forward.shapes + backward.shapes
    assert len(made) > 8
    assert [seen for seen in made if torch.Size(seen).numel() == numel] == []


def kept(layer: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for backward, the layer's parameters and buffers and copies of factors excepted."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own and tensor.shape[0] == x.shape[0]:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = layer(x)
    del y
    return sum(storages.values())


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_the_left_side_keeps_a_projection_in_place_of_the_input(mode: str) -> None:
    make = lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode=mode)  # noqa: E731
    x = torch.randn(11, 6, 5, 5, requires_grad=True)
    padded = 11 * 6 * (25 if mode == "zeros" else 49) * 4
    assert kept(make(), x) >= padded
    assert kept(converted(make(), rank=2), x) == padded + 11 * 2 * 25 * 4
    assert kept(converted(make(), rank=2, sides="left"), x) == 11 * 2 * 25 * 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kept(converted(make(), rank=2, sides="left"), x) == 11 * 2 * 25 * 2


def test_the_left_side_of_a_transposed_convolution_keeps_a_projection_too() -> None:
    x = torch.randn(11, 6, 5, 5, requires_grad=True)
    make = lambda: nn.ConvTranspose2d(6, 8, 3, stride=2)  # noqa: E731
    assert kept(make(), x) == 11 * 6 * 25 * 4
    assert kept(converted(make(), rank=2), x) == 11 * (6 + 2) * 25 * 4
    assert kept(converted(make(), rank=2, sides="left"), x) == 11 * 2 * 25 * 4


@pytest.mark.parametrize(
    ("layer", "rank"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), 1),
        (nn.Conv1d(8, 16, 9, groups=8), 2),
        (nn.Conv2d(16, 16, 3, groups=4), 4),
        (nn.ConvTranspose2d(8, 8, 3, groups=8), 1),
    ],
)
def test_groups_too_small_for_a_pair_stay_dense_and_are_refused_by_name(layer: nn.Module, rank: int) -> None:
    model = nn.ModuleDict({"thin": layer, "full": nn.Conv2d(8, 8, 3)})
    plain = type(layer)
    converted(model, rank=rank)
    assert type(model["thin"]) is plain
    assert type(model["full"]) is not nn.Conv2d
    memfit.restore_(model)
    with pytest.raises(memfit.ConversionError, match=rf"layer 'thin' has {layer.groups} groups .* save nothing"):
        memfit.convert_(model, memfit.LowRankGradient(rank=rank), where="thin")
    with pytest.raises(memfit.ConversionError, match=r"matched no layer .* layer 'thin' has"):
        memfit.convert_(model, memfit.LowRankGradient(rank=rank), where="th*")


def test_a_rank_above_the_layers_is_refused_with_its_matrix() -> None:
    with pytest.raises(memfit.ConversionError, match="16 x 27, so the rank may be at most 16, not 17"):
        converted(nn.Conv2d(3, 16, 3), rank=17)
    with pytest.raises(memfit.ConversionError, match="144 x 3, so the rank may be at most 3, not 4"):
        converted(nn.ConvTranspose2d(3, 16, 3), rank=4)


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 4, 3), lambda: nn.ConvTranspose2d(3, 4, 3)])
@pytest.mark.parametrize("x", [torch.randn(3, 9), torch.randn(2, 5, 9, 9), torch.randn(2, 3, 9, 9).double()])
def test_a_wrong_input_is_refused_as_by_the_plain_layer(make: Any, x: Tensor) -> None:
    for layer in (make(), converted(make(), rank=2)):
        with pytest.raises(RuntimeError):
            layer(x)


class Net(nn.Module):
    """A small encoder and decoder with what a vision model has; (B, 3, 12, 12) -> (B, 2, 12, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8)
        self.mix = nn.Conv2d(8, 12, 1)
        self.up = nn.ConvTranspose2d(12, 2, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.tanh(self.mix(self.depthwise(torch.tanh(self.norm(self.down(x)))))))


def net_and_data(seed: int = 0) -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(6, 3, 12, 12)
    return Net(), x, torch.tanh(x[:, :2] + x[:, 1:].roll(1, dims=3))


def fit(model: nn.Module, x: Tensor, y: Tensor, steps: int, optimizer: torch.optim.Optimizer | None = None) -> float:
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x).float(), y.float())
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize(
    ("sides", "basis", "refresh"),
    [
        ("both", "random", None),
        ("both", "random", 7),
        ("both", "power", 7),
        ("left", "random", None),
        ("left", "random", 7),
    ],
)
def test_a_convolutional_net_learns_saves_and_comes_back(sides: str, basis: str, refresh: int | None) -> None:
    model, x, y = net_and_data()
    original = copy.deepcopy(model)
    weights = dict(model.named_parameters())
    converted(model, rank=2, sides=sides, basis=basis, refresh=refresh)
    assert type(model.depthwise) is nn.Conv2d
    first = fit(model, x, y, 1)
    assert fit(model, x, y, 40) < 0.8 * first
    if refresh:
        assert model.up.matrix("weight").steps == 41
    model.eval()
    trained = model(x)
    for copied in (copy.deepcopy(model), through_a_file(model)):
        torch.testing.assert_close(copied(x), trained)
    original.eval().load_state_dict(memfit.state_dict(model))
    torch.testing.assert_close(original(x), trained, atol=1e-5, rtol=1e-5)
    memfit.restore_(model)
    torch.testing.assert_close(model(x), trained, atol=1e-5, rtol=1e-5)
    assert repr(model) == repr(original)
    assert [name for name, _ in model.named_parameters()] == list(weights)
    assert all(parameter is weights[name] and parameter.requires_grad for name, parameter in model.named_parameters())
    for module, plain in zip(model.modules(), original.modules(), strict=True):
        assert set(vars(module)) == set(vars(plain))


def through_a_file(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_the_full_state_dict_resumes_training_exactly() -> None:
    model, x, y = net_and_data()
    other = copy.deepcopy(model)
    for net in (model, other):
        converted(net, rank=2, refresh=3)
    optimizer, resumed = (torch.optim.Adam(net.parameters(), lr=1e-2) for net in (model, other))
    fit(model, x, y, 4, optimizer)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fit(model, x, y, 4, optimizer)
    fit(other, x, y, 4, resumed)
    for (name, first), second in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(first, second), name


def test_factors_of_bfloat16_weights_are_float32_and_learn() -> None:
    model, x, y = net_and_data()
    converted(model.bfloat16(), rank=2)
    assert model.down.matrix("weight").left.dtype == torch.float32
    first = fit(model, x.bfloat16(), y, 1)
    assert fit(model, x.bfloat16(), y, 40) < 0.8 * first
    assert memfit.restore_(model).up.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sides", ["both", "left"])
def test_autocast_computes_in_its_dtype_and_trains(dtype: torch.dtype, sides: str) -> None:
    model, x, y = net_and_data()
    converted(model, rank=2, sides=sides)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            out = model(x)
        assert out.dtype == dtype
        loss = nn.functional.mse_loss(out.float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert model.up.matrix("weight").left.grad.dtype == torch.float32
