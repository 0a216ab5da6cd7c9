"""What the recurrent layers share: layers and directions, padded, packed and single sequences, dropout, initial states.

All of them run on rows in the order of a packed sequence: step t has one row for each of the ``batch_sizes[t]`` longest
sequences. A subclass computes one layer and direction, in :meth:`LowRankRNN._run_one`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from memfit.convert import Technique
from memfit.gradients.low_rank_layer import LowRankLayer
from memfit.gradients.low_rank_matrix import LowRankMatrix
from memfit.gradients.lstm_recurrence import InputProduct

if TYPE_CHECKING:
    from memfit.gradients.low_rank import LowRankGradient

States = tuple[Tensor, ...]


class LowRankRNN(LowRankLayer, nn.RNNBase):
    """A recurrent layer with one pair of factors for each of its matrices, shared by all time steps.

    Forward takes and returns what the plain layer does. Under autocast it computes in the dtype of its weights.
    """

    @classmethod
    def weight_names(cls, layer: nn.Module) -> list[str]:
        return [name for names in cast(nn.RNNBase, layer)._all_weights for name in names if name.startswith("weight_")]

    @classmethod
    def convert_(cls, layer: nn.Module, technique: Technique, name: str) -> None:
        super().convert_(layer, technique, name)
        rnn = cast(nn.RNNBase, layer)
        rnn._flat_weights_names = []  # the list that torch hands to its operator: it would keep dense weights alive
        rnn._init_flat_weights()

    def restore_(self) -> None:
        super().restore_()
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._init_flat_weights()

    def flatten_parameters(self) -> None:
        """Nothing to do: there is no flat weight buffer."""

    @abstractmethod
    def _state_sizes(self) -> dict[str, int]:
        """The width of each of the layer's states, by the name that torch's errors give it; one state is ``hx``."""

    @abstractmethod
    def _run_one(self, rows: Tensor, suffix: str, states: States, batch_sizes: list[int]) -> tuple[Tensor, ...]:
        """The outputs (N x P) of one layer and direction, and its last states (B x ... each).

        Args:
            rows: (N, width), its inputs.
            suffix: of its parameters' names, such as ``_l0_reverse``.
            states: its initial states.
            batch_sizes: of each step.
        """

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Tensor | PackedSequence, Any]:
        states = hx if hx is None or len(self._state_sizes()) > 1 else (hx,)
        with torch.autocast(self.matrix("weight_ih_l0").base.device.type, enabled=False):
            result: tuple[Tensor | PackedSequence, States]
            if isinstance(input, PackedSequence):
                result = self._forward_packed(input, states)
            else:
                result = self._forward_padded(input, states)
        output, last = result
        return output, last if len(last) > 1 else last[0]

    def _forward_packed(self, packed: PackedSequence, hx: States | None) -> tuple[PackedSequence, States]:
        data, batch_sizes, order, back = packed
        self._check_width(data)
        states = self._initial(hx, int(batch_sizes[0]), data)
        if order is not None:
            states = tuple(state.index_select(1, order) for state in states)
        output, states = self._run(data, states, batch_sizes.tolist())
        if back is not None:
            states = tuple(state.index_select(1, back) for state in states)
        return PackedSequence(output, batch_sizes, order, back), states

    def _forward_padded(self, input: Tensor, hx: States | None) -> tuple[Tensor, States]:
        if input.dim() not in (2, 3):
            raise ValueError(f"{self.mode}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        self._check_width(input)
        single = input.dim() == 2
        x = input.unsqueeze(1) if single else input.transpose(0, 1) if self.batch_first else input
        if single and hx is not None:
            hx = tuple(state.unsqueeze(1) for state in hx)
        steps, batch, width = x.shape
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        states = self._initial(hx, batch, x)
        output, states = self._run(x.reshape(steps * batch, width), states, [batch] * steps)
        output = output.view(steps, batch, output.shape[-1])
        if single:
            return output.squeeze(1), tuple(state.squeeze(1) for state in states)
        return output.transpose(0, 1) if self.batch_first else output, states

    def _run(self, rows: Tensor, states: States, batch_sizes: list[int]) -> tuple[Tensor, States]:
        """All layers and directions over rows in packed order; each state is (layers x directions, batch, size)."""
        rows = rows.to(states[0].dtype)
        suffixes = ("", "_reverse") if self.bidirectional else ("",)
        last: list[States] = []
        for layer in range(self.num_layers):
            if layer and self.training and self.dropout:
                rows = F.dropout(rows, self.dropout)
            outputs = []
            for suffix in suffixes:
                start = tuple(state[len(last)] for state in states)
                output, *end = self._run_one(rows, f"_l{layer}{suffix}", start, batch_sizes)
                outputs.append(output)
                last.append(tuple(end))
            rows = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return rows, tuple(torch.stack(ends) for ends in zip(*last, strict=True))

    def _input_share(self, rows: Tensor, suffix: str, bias: Tensor | None) -> tuple[Tensor, InputProduct | None]:
        """The input's share of all steps' gates, and what to compute it from anew, if the technique asks for that."""
        matrix = self.matrix("weight_ih" + suffix)
        gates = matrix.linear(rows, bias)
        if not (cast("LowRankGradient", self.technique).rematerialize and torch.is_grad_enabled()):
            return gates, None
        base, left, right = factors(matrix)
        return gates, InputProduct(rows.detach(), base, None if bias is None else bias.detach(), left, right)

    def _initial(self, hx: States | None, batch: int, like: Tensor) -> States:
        """The initial states in the weights' dtype; zeros where none were given."""
        dtype = self.matrix("weight_hh_l0").base.dtype
        sizes = self._state_sizes()
        count = self.num_layers * (2 if self.bidirectional else 1)
        if hx is None:
            return tuple(like.new_zeros(count, batch, size, dtype=dtype) for size in sizes.values())
        for state, (what, size) in zip(hx, sizes.items(), strict=True):
            if state.shape != (count, batch, size):
                raise RuntimeError(f"Expected {what} size {(count, batch, size)}, got {list(state.shape)}")
        return tuple(state.to(dtype) for state in hx)

    def _check_width(self, input: Tensor) -> None:
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )


def factors(matrix: LowRankMatrix) -> tuple[Tensor, Tensor, Tensor]:
    """Base, left and right of one dtype."""
    dtype = matrix.base.dtype
    return matrix.base, matrix.left.to(dtype), matrix.right.to(dtype)
