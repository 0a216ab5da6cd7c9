"""The recurrence of one GRU direction as one differentiable operator, with a low-rank recurrent weight.

    [a_r a_z q]_t = (W + U V) h_{t-1} + [0 0 b]        r, z = sigmoid(g_r + a_r), sigmoid(g_z + a_z)
    n_t = tanh(g_n + r q)                              h_t = (1 - z) n + z h_{t-1}

where g_t, the input's share of the gates with all other biases, was computed for all steps at once, in the order r z n.
The backward recursion leaves the gradients of a_r, a_z and q in one matrix D (3H columns), so that the factors'
gradients are products over many steps, dU = D^T (H V^T) and dV = (D U)^T H, with H the previous outputs: the dense
gradient is never formed.

Memory: forward keeps r, z and n (N x 3H), in the buffer that held g, and the states before each block of steps.
Backward gets the other states back from z and n, and q from the states, in one more product with a third of W: keeping
q would be N x H more for each layer. D takes the gates' place unless the graph is retained. The gradient of g_n differs
from q's, so it waits beside D until the block's products are done; that is why they are made by block. Rematerialized,
forward keeps inputs and outputs in place of the gates, and backward computes the gates from them.

Rows are in the order of a packed sequence, as in the LSTM's recurrence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memfit.gradients.low_rank_product import low_rank_linear
from memfit.gradients.lstm_recurrence import InputProduct, RowProduct, blocks, graph_is_kept, previous, run_order


class GRURecurrence(torch.autograd.Function):
    """``outputs, h_n = GRURecurrence.apply(gates, h0, W, U, V, b, batch_sizes, reverse, remake)``.

    Shapes: gates (N, 3H), the input's share, overwritten; h0 (B, H); W (3H, H), U (3H, r), V (r, H); b (H,) or None.
    Returns (N, H), (B, H). W gets no gradient; all others do, once. ``remake`` is None, or what to rematerialize the
    gates from.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gates: Tensor,
        h0: Tensor,
        base: Tensor,
        left: Tensor,
        right: Tensor,
        bias: Tensor | None,
        batch_sizes: Sequence[int],
        reverse: bool,
        remake: InputProduct | None,
    ) -> tuple[Tensor, Tensor]:
        batch, hidden = h0.shape
        recur = RowProduct(base, left, right, batch)
        bias_rows = None
        if bias is not None:
            bias_rows = h0.new_zeros(batch, 3 * hidden)
            bias_rows[:, 2 * hidden :] = bias
        outputs = gates.new_empty(gates.shape[0], hidden)
        h = h0.clone()
        states = {rows: h[:rows] for rows in set(batch_sizes)}
        starts = []
        for block in blocks(batch_sizes, reverse):
            starts.append(h[: block.batch_sizes[0]].clone())
            gate = gates[block.start : block.end]
            views = (outputs[block.start : block.end], gate[:, : 2 * hidden], *gate.chunk(3, dim=1))
            by_step = [run_order(view, block.batch_sizes, reverse) for view in views]
            for output, r_and_z, r, z, n in zip(*by_step, strict=True):
                rows = output.shape[0]
                state = states[rows]
                share = recur(state) if bias_rows is None else recur.plus(bias_rows[:rows], state)
                r_and_z.add_(share[:, : 2 * hidden]).sigmoid_()
                n.addcmul_(r, share[:, 2 * hidden :]).tanh_()
                output.copy_(torch.lerp(n, state, z, out=state))
        kept = (gates,) if remake is None else (outputs, *remake)
        ctx.save_for_backward(base, left, right, bias, torch.cat(starts), *kept)
        ctx.batch_sizes, ctx.reverse = batch_sizes, reverse
        return outputs, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_outputs: Tensor, d_hn: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(d_outputs.device.type, enabled=False):  # as in forward
            return GRURecurrence._backward(ctx, d_outputs, d_hn)

    @staticmethod
    def _backward(ctx: Any, d_outputs: Tensor, d_hn: Tensor) -> tuple[Tensor | None, ...]:
        base, left, right, bias, starts, *kept = ctx.saved_tensors
        batch, hidden = d_hn.shape
        late = slice(2 * hidden, 3 * hidden)
        outputs = None
        if len(kept) == 1:
            d = kept[0].clone() if graph_is_kept() else kept[0]
        else:
            outputs, *remake = kept
            d = low_rank_linear(*remake)
        back = RowProduct(base.t(), right.t(), left.t(), batch)
        precise = torch.promote_types(left.dtype, torch.float32)  # to sum over the blocks in
        d_left, d_right = torch.zeros_like(left, dtype=precise), torch.zeros_like(right, dtype=precise)
        d_bias = d_hn.new_zeros(hidden, dtype=precise)
        d_h = d_hn.clone()
        steps = blocks(ctx.batch_sizes, ctx.reverse)
        by_block = starts.split([block.batch_sizes[0] for block in steps])
        for block, start in zip(steps[::-1], by_block[::-1], strict=True):
            rows = slice(block.start, block.end)
            order = (block.batch_sizes, ctx.reverse)
            gates = d[rows]
            before = states_before(gates, start, *order) if outputs is None else previous(outputs[rows], start, *order)
            narrow = before @ right.t()
            q = torch.mm(before, base[late].t()).addmm_(narrow, left[late].t())
            if bias is not None:
                q += bias
            if outputs is not None:
                _activate_(gates, before, narrow, q, base, left)
            _backward_block(*order, gates, before, q, d_outputs[rows], d_h, back)
            d_left += gates.t() @ narrow
            if ctx.needs_input_grad[4]:
                d_right += (gates @ left).t() @ before
            d_bias += gates[:, late].sum(dim=0)
            gates[:, late] = q
        return (
            d,
            d_h,
            None,
            d_left.to(left.dtype),
            d_right.to(right.dtype) if ctx.needs_input_grad[4] else None,
            None if bias is None else d_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def states_before(gates: Tensor, start: Tensor, batch_sizes: Sequence[int], reverse: bool) -> Tensor:
    """For every row the state of its sequence a step before (N x H), from the activated gates and the first states."""
    _, z, n = gates.chunk(3, dim=1)
    found = z.new_empty(z.shape)
    h = start.clone()
    by_step = [run_order(view, batch_sizes, reverse) for view in (found, z, n)]
    for before, keep, fresh in zip(*by_step, strict=True):
        state = h[: before.shape[0]]
        before.copy_(state)
        torch.lerp(fresh, state, keep, out=state)
    return found


def _activate_(gates: Tensor, before: Tensor, narrow: Tensor, q: Tensor, base: Tensor, left: Tensor) -> None:
    """Turn the input's share of the gates into r, z and n; ``narrow`` is what V makes of the states ``before``."""
    early, late = gates.split((2 * q.shape[1], q.shape[1]), dim=1)
    early.addmm_(before, base[: early.shape[1]].t()).addmm_(narrow, left[: early.shape[1]].t()).sigmoid_()
    late.addcmul_(early[:, : q.shape[1]], q).tanh_()


def _backward_block(
    batch_sizes: Sequence[int],
    reverse: bool,
    gates: Tensor,
    before: Tensor,
    q: Tensor,
    d_outputs: Tensor,
    d_h: Tensor,
    back: RowProduct,
) -> None:
    """The backward recursion through one block of steps, last step first.

    Turns ``gates`` into the gradients of a_r, a_z and q, and ``q`` into that of g_n; moves ``d_h``, the gradient of the
    state, to before the block.

    What each step's dh gets multiplied with is computed for all steps of the block at once: k = (1 - z) (1 - n^2) on
    its way to g_n, k r to q, k r (1 - r) q to a_r, (h_{t-1} - n) z (1 - z) to a_z, and z to the step before.
    """
    r, z, n = gates.chunk(3, dim=1)
    keep = z.clone()
    work = (before - n).mul_(z)
    z.neg_().add_(1)
    k = n.square_().neg_().add_(1).mul_(z)
    z.mul_(work)
    torch.mul(k, r, out=work)
    r.neg_().add_(1).mul_(work).mul_(q)
    q.copy_(k)
    n.copy_(work)

    views = (gates, gates.unflatten(1, (3, n.shape[1])), q, keep, d_outputs)
    by_step = [run_order(view, batch_sizes, reverse)[::-1] for view in views]
    for d_gate, each, d_n, keep_t, d_out in zip(*by_step, strict=True):
        d_state = d_h[: d_gate.shape[0]].add_(d_out)
        each.mul_(d_state.unsqueeze(1))
        d_n.mul_(d_state)
        d_state.copy_(back.plus(d_state.mul_(keep_t), d_gate))
