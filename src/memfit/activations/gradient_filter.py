"""The technique of gradient filtering: its setting, and the convolutions that it converts."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import ClassVar, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from memfit.activations.filtered_convolution import ExactImages, filtered_convolution
from memfit.activations.plan import Taps
from memfit.activations.tap_reads import Window
from memfit.convert import ConvertedLayer, Technique
from memfit.convolution_input import padded_input, windows
from memfit.errors import ConversionError
from memfit.native import FILTERED, operator

_FEW_PIXELS = 600  # up to so many, of all images, a product of matrices is faster than torch's weight gradient; up to
# half of them with the channels first


class _FilteredConv(ConvertedLayer, _ConvNd):
    """A convolution whose parameters are as ever, and whose backward is filtered."""

    plain_class: ClassVar[type[_ConvNd]]

    @classmethod
    def weight_names(cls, layer: nn.Module) -> list[str]:
        return ["weight"]

    @classmethod
    def obstacle(cls, layer: nn.Module, technique: Technique) -> str | None:
        if not cast(_ConvNd, layer).weight.dtype.is_floating_point:
            return f"has weights of {cast(_ConvNd, layer).weight.dtype}: only real numbers are averaged over patches"
        if cast("GradientFilter", technique).native:
            operator(FILTERED)
        return None

    @classmethod
    def convert_(cls, layer: nn.Module, technique: Technique, name: str) -> None:
        layer.__class__ = cls
        cast(_FilteredConv, layer).technique = technique

    def restore_(self) -> None:
        del self.technique
        self.__class__ = self.plain_class  # type: ignore[assignment]

    def plain_state(self, made: dict[nn.Module, Tensor]) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._parameters.items() if parameter is not None}

    @classmethod
    def reading(cls, layer: nn.Module, weight: str) -> Hashable:
        return "weight"

    def tie_(self, weight: str, other: ConvertedLayer, other_weight: str) -> None:
        """Nothing to do: the weight is still the one Parameter of both."""

    def forward(self, input: Tensor) -> Tensor:
        axes = len(self.kernel_size)
        if input.dim() not in (axes + 1, axes + 2):
            raise RuntimeError(
                f"Expected {axes + 1}D (unbatched) or {axes + 2}D (batched) input to {self.plain_class.__name__}, "
                f"but got input of size: {list(input.shape)}"
            )
        if not torch.is_grad_enabled():
            return self._conv_forward(input, self.weight, self.bias)
        technique = cast("GradientFilter", self.technique)
        every = technique.exact_every
        return filtered_convolution(
            input,
            self.weight,
            self.bias,
            self._conv_forward,
            self._windows(),
            self.groups,
            (technique.patch, technique.patch),
            technique.taps,
            technique.native,
            None if every is None else ExactImages(every, self._weight_gradient),
        )

    def _windows(self) -> tuple[Window, Window]:
        """How rows and columns are read; of a single row, as it is."""
        # Before each axis, the last axis first; padding="same" may put one more after it.
        before = self._reversed_padding_repeated_twice[-2::-2]
        axes = zip(self.kernel_size, self.stride, before, self.dilation, strict=True)
        windows = [Window(*each, self.padding_mode) for each in axes]
        return (windows[0], windows[1]) if len(windows) == 2 else (Window(1, 1, 0, 1), windows[0])

    def _weight_gradient(self, x: Tensor, g: Tensor, kernel: Tensor) -> Tensor:
        """The exact one. A map of one row is (B, C, 1, W), as is the kernel."""
        if len(self.kernel_size) == 1:
            x, g = x.squeeze(2), g.squeeze(2)
        x, padding = padded_input(self, x)
        pixels = g.numel() // max(1, g.shape[1])
        few = _FEW_PIXELS if x.is_contiguous(memory_format=torch.channels_last) else _FEW_PIXELS // 2
        if x.is_cpu and x.dim() == 4 and self.groups == 1 and 0 < pixels <= few:
            x = x.contiguous(memory_format=torch.channels_last)
            read = windows(x, kernel.shape[2:], g.shape[2:], self.stride, padding, self.dilation)
            patches = read.permute(0, 1, 2, 4, 5, 3).reshape(pixels, -1)  # channels last: what lies together is copied
            product = g.permute(0, 2, 3, 1).reshape(pixels, -1).t() @ patches
            return product.view(len(kernel), *kernel.shape[2:], -1).permute(0, 3, 1, 2)
        like = g.new_empty(1).expand(self.weight.shape)
        by = (self.stride, padding, self.dilation, False, (0,) * len(padding), self.groups)
        mask = (False, True, False)
        return torch.ops.aten.convolution_backward.default(g, x, like, None, *by, mask)[1].view(kernel.shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.technique}"


class FilteredConv2d(_FilteredConv, nn.Conv2d):
    """``nn.Conv2d`` with a filtered backward."""

    plain_class = nn.Conv2d


class FilteredConv1d(_FilteredConv, nn.Conv1d):
    """``nn.Conv1d`` with a filtered backward: a map of one row, of which each patch is ``patch`` positions."""

    plain_class = nn.Conv1d


@dataclass(frozen=True)
class GradientFilter(Technique):
    """Train convolutions with the gradient of their output averaged over patches: backward becomes many times faster.

    Forward is exactly PyTorch's. Backward replaces each ``patch`` x ``patch`` patch of the output's gradient by its
    mean, so that it needs of the input only means over patches, which is all that is kept: 1 / (patch x stride)^2 of
    the input. The weights stay plain parameters and train densely; the gradient of the bias is exact.

    The gradients are approximations, and the weight's is the same at every tap of the kernel, unless ``taps`` says
    otherwise or some images are exact. So use it to fine-tune the last layers of a pretrained net, whose gradient maps
    are smooth, and not to train one from scratch. ``memfit filter-scan`` measures the error layer by layer. Batch norms
    and activation functions around the convolution keep what they keep.

    Args:
        patch: width and height of a patch in pixels of the layer's output; on smaller maps it is the whole map. Along
            an axis where the kernel is dilated by a patch or more, its taps keep gradients of their own.
        taps: ``"summed"`` is the paper's: one number of x and of the gradient for all taps of a kernel. Otherwise each
            tap reads what is where it lies: as little is kept, and the gradients are nearer to the exact ones. With
            ``"apart"`` they are those of the convolution of maps that are constant on patches, and take k times k the
            products for a k x k kernel. With ``"planar"`` a kernel of three taps or more along an axis counts as the
            plane over them that is nearest to it, its mean and its slopes: three products for k x k.
        exact_every: compute the weight's gradient exactly for every so many of the images of a batch, from a random one
            on, which are then kept whole, and weight it so that the weight's gradient is right on the mean, whatever
            the patch. ``taps`` is then of the input's gradient. 1: of all images; the filter is then for the gradient
            of the input alone. None: of no image.
        native: let a C++ operator do it, on the CPU in float32 or float64; all else goes the usual way. It is compiled
            on first use, which takes a compiler, ninja and about a minute, and pays for small maps, where the time of
            backward goes into calling torch.

    Raises:
        ConversionError: patch or exact_every is not a whole number of at least 1, or taps none of the three; on
            conversion, the operator can't be compiled.

    Source: arXiv 2301.00330.

    Example:
        >>> memfit.convert_(model, memfit.GradientFilter(patch=4), where="layer4.*")
        >>> optimizer = torch.optim.SGD(model.layer4.parameters(), lr=0.01, momentum=0.9)
    """

    patch: int
    taps: Taps = "summed"
    native: bool = False
    exact_every: int | None = None

    layers: ClassVar[Mapping[type[nn.Module], type[ConvertedLayer]]] = {
        nn.Conv1d: FilteredConv1d,
        nn.Conv2d: FilteredConv2d,
    }

    def __post_init__(self) -> None:
        for field, value in (("patch", self.patch), ("exact_every", self.exact_every)):
            if value is None and field == "exact_every":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConversionError(f"{field}={value!r} is not possible: give a whole number of at least 1.")
        if self.taps not in get_args(Taps):
            raise ConversionError(f"taps={self.taps!r} is not possible: give 'summed', 'planar' or 'apart'.")
        if not isinstance(self.native, bool):
            raise ConversionError(f"native={self.native!r} is not possible: give True or False.")
