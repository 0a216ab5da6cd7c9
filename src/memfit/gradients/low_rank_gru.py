"""``nn.GRU`` trained through low-rank factors: all layers and directions, packed sequences, dropout.

The input's share of the gates is one product over all steps; the rest is the recurrence.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from memfit.gradients.gru_recurrence import GRURecurrence
from memfit.gradients.low_rank_rnn import LowRankRNN, States, factors


class LowRankGRU(LowRankRNN, nn.GRU):  # type: ignore[misc]  # overloads of forward by the kind of input
    """``nn.GRU`` with one pair of factors for each of its matrices, shared by all time steps.

    Forward takes and returns what ``nn.GRU`` does. Under autocast it computes in the dtype of its weights.
    """

    plain_class = nn.GRU

    def _state_sizes(self) -> dict[str, int]:
        return {"hidden": self.hidden_size}

    def _run_one(self, rows: Tensor, suffix: str, states: States, batch_sizes: list[int]) -> tuple[Tensor, Tensor]:
        bias, inner_bias = None, None
        if self.bias:
            hidden_bias = getattr(self, "bias_hh" + suffix)
            early, inner_bias = hidden_bias.split((2 * self.hidden_size, self.hidden_size))
            bias = getattr(self, "bias_ih" + suffix) + F.pad(early, (0, self.hidden_size))
        gates, remake = self._input_share(rows, suffix, bias)
        recurrent = factors(self.matrix("weight_hh" + suffix))
        reverse = suffix.endswith("_reverse")
        return GRURecurrence.apply(gates, states[0], *recurrent, inner_bias, batch_sizes, reverse, remake)
