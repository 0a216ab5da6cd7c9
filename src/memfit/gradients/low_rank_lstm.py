"""``nn.LSTM`` trained through low-rank factors: all layers and directions, projections, packed sequences, dropout.

The input's share of the gates is one product over all steps; the rest is the recurrence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from memfit.convert import Technique
from memfit.gradients.low_rank_layer import LowRankLayer
from memfit.gradients.low_rank_matrix import LowRankMatrix
from memfit.gradients.lstm_recurrence import InputProduct, Recurrence

if TYPE_CHECKING:
    from memfit.gradients.low_rank import LowRankGradient

State = tuple[Tensor, Tensor]


class LowRankLSTM(LowRankLayer, nn.LSTM):
    """``nn.LSTM`` with one pair of factors for each of its matrices, shared by all time steps.

    Forward takes and returns what ``nn.LSTM`` does. Under autocast it computes in the dtype of its weights.
    """

    plain_class = nn.LSTM

    @classmethod
    def weight_names(cls, layer: nn.Module) -> list[str]:
        return [name for name in layer._parameters if name.startswith("weight_")]

    @classmethod
    def convert_(cls, layer: nn.Module, technique: Technique, name: str) -> None:
        super().convert_(layer, technique, name)
        layer._flat_weights_names = []  # type: ignore[assignment]  # the list that nn.LSTM hands to its operator: it would keep dense weights alive
        layer._init_flat_weights()  # type: ignore[operator]

    def restore_(self) -> None:
        super().restore_()
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._init_flat_weights()

    def flatten_parameters(self) -> None:
        """Nothing to do: there is no flat weight buffer."""

    def forward(  # type: ignore[override]
        self, input: Tensor | PackedSequence, hx: State | None = None
    ) -> tuple[Tensor | PackedSequence, State]:
        with torch.autocast(self.matrix("weight_ih_l0").base.device.type, enabled=False):
            if isinstance(input, PackedSequence):
                return self._forward_packed(input, hx)
            return self._forward_padded(input, hx)

    def _forward_packed(self, packed: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
        data, batch_sizes, order, back = packed
        self._check_width(data)
        state = self._state(hx, int(batch_sizes[0]), data)
        if order is not None:
            state = (state[0].index_select(1, order), state[1].index_select(1, order))
        output, (h, c) = self._run(data, state, batch_sizes.tolist())
        if back is not None:
            h, c = h.index_select(1, back), c.index_select(1, back)
        return PackedSequence(output, batch_sizes, order, back), (h, c)

    def _forward_padded(self, input: Tensor, hx: State | None) -> tuple[Tensor, State]:
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        self._check_width(input)
        single = input.dim() == 2
        x = input.unsqueeze(1) if single else input.transpose(0, 1) if self.batch_first else input
        if single and hx is not None:
            hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        steps, batch, width = x.shape
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        state = self._state(hx, batch, x)
        output, (h, c) = self._run(x.reshape(steps * batch, width), state, [batch] * steps)
        output = output.view(steps, batch, -1)
        if single:
            return output.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return output.transpose(0, 1) if self.batch_first else output, (h, c)

    def _run(self, rows: Tensor, state: State, batch_sizes: list[int]) -> tuple[Tensor, State]:
        """All layers and directions over rows in packed order; state is (layers x directions, batch, size) twice."""
        rows = rows.to(state[0].dtype)
        suffixes = ("", "_reverse") if self.bidirectional else ("",)
        last: list[State] = []
        for layer in range(self.num_layers):
            if layer and self.training and self.dropout:
                rows = F.dropout(rows, self.dropout)
            outputs = []
            for suffix in suffixes:
                output, *end = self._run_one(rows, f"_l{layer}{suffix}", state, len(last), batch_sizes)
                outputs.append(output)
                last.append((end[0], end[1]))
            rows = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return rows, (torch.stack([h for h, _ in last]), torch.stack([c for _, c in last]))

    def _run_one(
        self, rows: Tensor, suffix: str, state: State, index: int, batch_sizes: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        bias = None
        if self.bias:
            bias = getattr(self, "bias_ih" + suffix) + getattr(self, "bias_hh" + suffix)
        gates = self.matrix("weight_ih" + suffix).linear(rows, bias)
        remake = None
        if cast("LowRankGradient", self.technique).rematerialize and torch.is_grad_enabled():
            base, left, right = _factors(self.matrix("weight_ih" + suffix))
            remake = InputProduct(rows.detach(), base, None if bias is None else bias.detach(), left, right)
        projection = _factors(self.matrix("weight_hr" + suffix)) if self.proj_size else (None, None, None)
        recurrent = _factors(self.matrix("weight_hh" + suffix))
        reverse = suffix.endswith("_reverse")
        return Recurrence.apply(
            gates, state[0][index], state[1][index], *recurrent, *projection, batch_sizes, reverse, remake
        )

    def _state(self, hx: State | None, batch: int, like: Tensor) -> State:
        """The initial state in the weights' dtype; zeros where none was given."""
        dtype = self.matrix("weight_hh_l0").base.dtype
        count = self.num_layers * (2 if self.bidirectional else 1)
        shapes = (count, batch, self.proj_size or self.hidden_size), (count, batch, self.hidden_size)
        if hx is None:
            return like.new_zeros(shapes[0], dtype=dtype), like.new_zeros(shapes[1], dtype=dtype)
        for state, shape, what in zip(hx, shapes, ("hidden[0]", "hidden[1]"), strict=True):
            if state.shape != shape:
                raise RuntimeError(f"Expected {what} size {shape}, got {list(state.shape)}")
        return hx[0].to(dtype), hx[1].to(dtype)

    def _check_width(self, input: Tensor) -> None:
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )


def _factors(matrix: LowRankMatrix) -> tuple[Tensor, Tensor, Tensor]:
    """Base, left and right of one dtype."""
    matrix.watch()
    dtype = matrix.base.dtype
    return matrix.base, matrix.left.to(dtype), matrix.right.to(dtype)
