"""``nn.LSTM`` trained through low-rank factors: all layers and directions, projections, packed sequences, dropout.

The input's share of the gates is one product over all steps; the rest is the recurrence.
"""

from __future__ import annotations

from torch import Tensor, nn

from memfit.gradients.low_rank_rnn import LowRankRNN, States, factors
from memfit.gradients.lstm_recurrence import Recurrence


class LowRankLSTM(LowRankRNN, nn.LSTM):  # type: ignore[misc]  # overloads of forward by the kind of input
    """``nn.LSTM`` with one pair of factors for each of its matrices, shared by all time steps.

    Forward takes and returns what ``nn.LSTM`` does. Under autocast it computes in the dtype of its weights.
    """

    plain_class = nn.LSTM

    def _state_sizes(self) -> dict[str, int]:
        return {"hidden[0]": self.proj_size or self.hidden_size, "hidden[1]": self.hidden_size}

    def _run_one(self, rows: Tensor, suffix: str, states: States, batch_sizes: list[int]) -> tuple[Tensor, ...]:
        bias = None
        if self.bias:
            bias = getattr(self, "bias_ih" + suffix) + getattr(self, "bias_hh" + suffix)
        gates, remake = self._input_share(rows, suffix, bias)
        projection = factors(self.matrix("weight_hr" + suffix)) if self.proj_size else (None, None, None)
        recurrent = factors(self.matrix("weight_hh" + suffix))
        reverse = suffix.endswith("_reverse")
        return Recurrence.apply(gates, *states, *recurrent, *projection, batch_sizes, reverse, remake)
