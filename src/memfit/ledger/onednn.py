"""What oneDNN's operators take for themselves on a CPU: memory that is no tensor, and often as large as their tensors.

A convolution copies what is not channels-last into blocks of 8 or 16 channels, computes, and copies the result back. A
recurrent layer copies its weights, and keeps the gates of all time steps. None of it is visible from Python, and
fake tensors know nothing of it; the sizes here are models, fitted to what the operating system reports for single
operators (float32, x86, torch 2.13; `tests/ledger/test_onednn.py` holds them against it). They are upper bounds where
one of oneDNN's other kernels is at work. Where torch uses kernels of its own (half and double precision, three
dimensions of space, one thread and few rows) and on other processors nothing is modelled.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
_RNN = _aten.mkldnn_rnn_layer.default

# In units of a layer's output: the four gates and the cells of all time steps; and what a pass has beside them.
_KEPT_PER_STATE, _FORWARD_PER_STATE, _BACKWARD_PER_STATE = 5, 4, 9

Arguments = Sequence[Any]


def hidden_bytes(func: Any, args: Arguments, result: Any) -> int:
    """Bytes that an operator takes beside its tensors at its own peak, and has given back when it returns.

    Args:
        func: an operator overload, such as ``torch.ops.aten.convolution.default``.
        args: what it was called with, all by position, as the dispatcher passes them.
        result: what it returned.
    """
    model = _HIDDEN.get(func)
    if model is None or args[0].device.type != "cpu" or not _channels_per_block():
        return 0
    return max(0, model(args, result))


def reserve(func: Any, result: Any) -> tuple[Tensor, int] | None:
    """The tensor in which a recurrent layer's forward keeps what its backward needs, and the bytes it writes to it.

    It asks for three times as much, which the system never has to provide. A fake tensor in its place has no size.
    """
    if func is not _RNN or not _channels_per_block() or not torch.is_grad_enabled() or result[3] is None:
        return None
    return result[3], _KEPT_PER_STATE * result[0].nbytes


@cache
def _channels_per_block() -> int:
    """0 where nothing is known of oneDNN."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return 0
    return {"AVX2": 8, "AVX512": 16}.get(torch.backends.cpu.get_cpu_capability(), 0)


def _convolution(args: Arguments, result: Any) -> int:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    if not _uses_onednn(x, weight, bias, geometry, None):
        return 0
    if _channels_last(x, weight):
        return _copied(x, weight, last=True)
    if transposed:
        return _copied(x) + _spread(x, weight, result, stride, groups)
    return _copied(x) + _gathered(x, weight, result)


def _convolution_backward(args: Arguments, result: Any) -> int:
    d, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, wanted = args
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    if not _uses_onednn(x, weight, None, geometry, bias_sizes):
        return 0
    if _channels_last(x, weight):
        return _copied(d, x, weight, last=True)
    most = 0
    if wanted[0]:
        # While it runs there is no gradient of the weight yet.
        later = weight.nbytes if wanted[1] else 0
        most = (_gathered(d, weight, x) if transposed else _spread(d, weight, x, stride, groups)) - later
    if wanted[1] and all(step == 1 for step in dilation):
        most = max(most, _blocked(x, may_stay=True) + _blocked(d), weight.nbytes)
    return _copied(d, x) + most


def _gathered(x: Tensor, weight: Tensor, y: Tensor) -> int:
    """Beside x, weight and y, of a convolution from x to y: copies of all three, and then only y's."""
    return max(_blocked(x, may_stay=True) + weight.nbytes + _blocked(y) - y.nbytes, _blocked(y))


def _spread(y: Tensor, weight: Tensor, x: Tensor, stride: Sequence[int], groups: int) -> int:
    """The same of the transposed convolution from y to x, which takes one more copy where it leaves gaps."""
    gaps = any(step > 1 for step in stride) and groups == 1
    return max(_blocked(y) + weight.nbytes + _blocked(x) - x.nbytes, (2 if gaps else 1) * _blocked(x))


def _blocked(tensor: Tensor, may_stay: bool = False) -> int:
    """Bytes of a copy in blocks of channels, the last one filled up; 0 where none is made."""
    channels, block = tensor.shape[1], _channels_per_block()
    if channels == 0 or (may_stay and channels == 3):  # an image
        return 0
    return tensor.nbytes // channels * (-(-channels // block) * block)


def _channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether torch works in channels-last, for which oneDNN copies nothing."""
    return any(each.dim() == 4 and _is_in_order(each, True) and not each.is_contiguous() for each in (x, weight))


def _copied(*tensors: Tensor, last: bool = False) -> int:
    """Bytes of the copies that torch makes of what is in another order, such as a loss's expanded number."""
    return sum(each.nbytes for each in tensors if not _is_in_order(each, last))


def _is_in_order(tensor: Tensor, last: bool) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _uses_onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Arguments, bias_sizes: Sequence[int] | None
) -> bool:
    if x.dim() > 4:  # three dimensions of space, where other kernels are at work
        return False
    backend = torch._C._select_conv_backend(x, weight, bias, *geometry, bias_sizes)
    return "Mkldnn" in str(backend) or "?" in str(backend)  # its transposed one has no name in Python


def _recurrent(args: Arguments, result: Any) -> int:
    return args[1].nbytes + args[2].nbytes + _FORWARD_PER_STATE * result[0].nbytes


def _recurrent_backward(args: Arguments, result: Any) -> int:
    # The weights are copied, and their gradients come in an order of oneDNN's. Of the gates' gradients, some are
    # written to the reserve, which ends soon after.
    return 2 * (args[1].nbytes + args[2].nbytes) + _BACKWARD_PER_STATE * args[7].nbytes


_HIDDEN: dict[Any, Callable[[Arguments, Any], int]] = {
    _aten.convolution.default: _convolution,
    _aten.convolution_backward.default: _convolution_backward,
    _RNN: _recurrent,
    _aten.mkldnn_rnn_layer_backward.default: _recurrent_backward,
}
