"""The recurrence of one LSTM direction as one differentiable operator, with a low-rank recurrent weight.

    a_t = g_t + (W + U V) h_{t-1}        i, f, o = sigmoid and c~ = tanh of the quarters of a_t, in the order i f c~ o
    c_t = f c_{t-1} + i c~               h_t = o tanh(c_t)        (with a projection: h_t = (W_r + U_r V_r) o tanh(c_t))

where g_t, the input's share of the gates, was computed for all steps at once. The backward recursion leaves the
gradients of the gates of all steps in one matrix D (N x 4H), so that the factors' gradients are single products over
all steps, dU = D^T (H V^T) and dV = (D U)^T H, with H the previous outputs (N x P): the dense gradient is never formed.

Memory: forward keeps the gates alone, in the buffer that held g; cells and outputs are recomputed from them, and D
takes the gates' place unless the graph is retained. Rematerialized, forward keeps inputs and outputs in place of the
gates: since h is known by then, backward gets the gates of all steps back with two products.

Rows are in the order of a packed sequence: step t has ``batch_sizes[t]`` rows, one for each of the longest sequences.
A full batch is the same with equal batch sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memfit.gradients.low_rank_product import low_rank_linear

# A weight of this many elements no longer fits the inner caches. oneDNN's blocked layout then streams it 3 to 5 times
# faster through many products of a few rows each than the BLAS does, which repacks it every time.
_BLOCK_FROM = 512 * 512
# Backward works on this many steps at once: enough to hide the cost of a call, few enough to keep temporaries small.
_BLOCK_STEPS = 16


class RowProduct:
    """``x -> x (base + left right)^T``, made for many calls with an x of at most ``rows`` rows.

    A large float32 weight on the CPU is brought once into oneDNN's blocked layout, a copy that lives as long as this,
    and the low-rank part is added in each call: the sum would be a second copy. Small weights are summed.
    """

    def __init__(self, base: Tensor, left: Tensor, right: Tensor, rows: int) -> None:
        self.blocked: Tensor | None = None
        if (
            base.numel() >= _BLOCK_FROM
            and base.dtype == torch.float32
            and base.device.type == "cpu"
            and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        ):
            self.blocked = torch.ops.mkldnn._reorder_linear_weight(base.detach(), rows)
            self.left, self.right = left.t(), right.t().contiguous()
        else:
            self.transposed = torch.addmm(base, left, right).t()

    def __call__(self, x: Tensor) -> Tensor:
        if self.blocked is None:
            return torch.mm(x, self.transposed)
        product = torch.ops.mkldnn._linear_pointwise(x, self.blocked, None, "none", [], "")
        return product.addmm_(torch.mm(x, self.right), self.left)

    def plus(self, other: Tensor, x: Tensor) -> Tensor:
        """``other + x (base + left right)^T``, a new tensor."""
        if self.blocked is None:
            return torch.addmm(other, x, self.transposed)
        total = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.blocked, None, "add")
        return total.addmm_(torch.mm(x, self.right), self.left)


def run_order(rows: Tensor, batch_sizes: Sequence[int], reverse: bool) -> tuple[Tensor, ...]:
    """Views of the rows of each step, in the order in which the recurrence runs through the steps."""
    steps = rows.split(list(batch_sizes))
    return steps[::-1] if reverse else steps


def previous(states: Tensor, initial: Tensor, batch_sizes: Sequence[int], reverse: bool) -> Tensor:
    """For every row of ``states`` (N x K) the state of its sequence a step before; ``initial`` (B x K) at the first."""
    batch = initial.shape[0]
    if batch == batch_sizes[0] == batch_sizes[-1]:  # a full batch: all rows move by one step
        return torch.cat((states[batch:], initial) if reverse else (initial, states[:-batch]))
    shifted: list[list[Tensor]] = []
    before = initial[:0]
    for state in run_order(states, batch_sizes, reverse):
        rows, known = state.shape[0], min(before.shape[0], state.shape[0])
        shifted.append([before[:known], initial[known:rows]])
        before = state
    return torch.cat([piece for step in (shifted[::-1] if reverse else shifted) for piece in step])


def factor_gradients(
    d: Tensor,
    states: Tensor,
    initial: Tensor,
    left: Tensor,
    right: Tensor,
    order: tuple[Sequence[int], bool],
    both: bool,
) -> tuple[Tensor, Tensor | None]:
    """``d^T (S right^T)`` (M x r) and, where both sides train, ``(d left)^T S`` (r x P), with S the previous states.

    S (N x P) would be a copy of all states, so it is the narrow products (N x r) that are moved by a step.

    Args:
        d: (N, M) gradients of what S was multiplied into.
        states: (N, P); with ``initial`` (B, P) what S is made of.
        left: (M, r).
        right: (r, P).
        order: batch sizes and whether the recurrence runs in reverse.
        both: whether the second one is wanted.
    """
    count, batch = states.shape[0], initial.shape[0]
    numbers = torch.arange(count + batch, device=d.device).unsqueeze(1)
    source = previous(numbers[:count], numbers[count:], *order).squeeze(1)
    d_left = d.t() @ torch.cat((states @ right.t(), initial @ right.t())).index_select(0, source)
    if not both:
        return d_left, None
    moved = d.new_zeros(count + batch, left.shape[1]).index_copy_(0, source, d @ left)
    return d_left, (moved[:count].t() @ states).addmm_(moved[count:].t(), initial)


class Block(NamedTuple):
    """Consecutive steps of the recurrence: rows [start, end); the step that ran before them has the rows ``before``."""

    start: int
    end: int
    batch_sizes: list[int]
    before: slice | None


def blocks(batch_sizes: Sequence[int], reverse: bool) -> list[Block]:
    """All steps in blocks, in the order in which the recurrence runs."""
    ends = list(accumulate(batch_sizes))
    starts = [0, *ends[:-1]]
    found = []
    for first in range(0, len(batch_sizes), _BLOCK_STEPS):
        last = min(first + _BLOCK_STEPS, len(batch_sizes)) - 1
        ran_before = last + 1 if reverse else first - 1
        known = 0 <= ran_before < len(batch_sizes)
        before = slice(starts[ran_before], ends[ran_before]) if known else None
        found.append(Block(starts[first], ends[last], list(batch_sizes[first : last + 1]), before))
    return found[::-1] if reverse else found


def _state_before(block: Block, states: Tensor, initial: Tensor) -> Tensor:
    """The states (B x K) of all sequences before a block: of the step before, and initial where there is none."""
    if block.before is None:
        return initial
    known = states[block.before]
    return torch.cat((known, initial[known.shape[0] :]))


def cells(gates: Tensor, c0: Tensor, batch_sizes: Sequence[int], reverse: bool) -> Tensor:
    """The cells of all rows (N x H) from the activated gates (N x 4H) and the initial cells (B x H)."""
    i, f, g, _ = gates.chunk(4, dim=1)
    c = i * g
    before = c0[:0]
    for cell, keep in zip(run_order(c, batch_sizes, reverse), run_order(f, batch_sizes, reverse), strict=True):
        rows, known = cell.shape[0], min(before.shape[0], cell.shape[0])
        cell[:known].addcmul_(keep[:known], before[:known])
        if known < rows:
            cell[known:].addcmul_(keep[known:], c0[known:rows])
        before = cell
    return c


class InputProduct(NamedTuple):
    """The arguments of :func:`low_rank_linear` that gave the input's share of the gates, detached."""

    rows: Tensor
    base: Tensor
    bias: Tensor | None
    left: Tensor
    right: Tensor


class Recurrence(torch.autograd.Function):
    """``outputs, h_n, c_n = Recurrence.apply(gates, h0, c0, W, U, V, W_r, U_r, V_r, batch_sizes, reverse, remake)``.

    Shapes: gates (N, 4H), the input's share, overwritten; h0 (B, P); c0 (B, H); W (4H, P), U (4H, r), V (r, P);
    W_r (P, H), U_r (P, r), V_r (r, H) or all None, and then P = H. Returns (N, P), (B, P), (B, H).
    W and W_r get no gradient; all others do, once. ``remake`` is None, or what to rematerialize the gates from.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gates: Tensor,
        h0: Tensor,
        c0: Tensor,
        base: Tensor,
        left: Tensor,
        right: Tensor,
        base_r: Tensor | None,
        left_r: Tensor | None,
        right_r: Tensor | None,
        batch_sizes: Sequence[int],
        reverse: bool,
        remake: InputProduct | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, hidden = c0.shape
        recur = RowProduct(base, left, right, batch)
        project = None
        if base_r is not None and left_r is not None and right_r is not None:
            project = RowProduct(base_r, left_r, right_r, batch)
        outputs = gates.new_empty(gates.shape[0], h0.shape[1])
        h, c = h0.clone(), c0.clone()
        states = {rows: (h[:rows], c[:rows]) for rows in set(batch_sizes)}
        views = (outputs, gates, gates[:, : 2 * hidden], *gates.chunk(4, dim=1))
        by_step = [run_order(view, batch_sizes, reverse) for view in views]
        for output, gate, i_and_f, i, f, g, o in zip(*by_step, strict=True):
            state, cell = states[gate.shape[0]]
            raw = recur.plus(gate, state)
            torch.sigmoid(raw[:, : 2 * hidden], out=i_and_f)
            torch.tanh(raw[:, 2 * hidden : 3 * hidden], out=g)
            torch.sigmoid(raw[:, 3 * hidden :], out=o)
            cell.mul_(f).addcmul_(i, g)
            inner = torch.tanh(cell)
            if project is None:
                torch.mul(inner, o, out=state)
            else:
                state.copy_(project(inner.mul_(o)))
            output.copy_(state)
        kept = (gates,) if remake is None else (outputs, *remake)
        ctx.save_for_backward(h0, c0, base, left, right, base_r, left_r, right_r, *kept)
        ctx.batch_sizes, ctx.reverse = batch_sizes, reverse
        return outputs, h, c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_outputs: Tensor, d_hn: Tensor, d_cn: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(d_outputs.device.type, enabled=False):  # as in forward
            return Recurrence._backward(ctx, d_outputs, d_hn, d_cn)

    @staticmethod
    def _backward(ctx: Any, d_outputs: Tensor, d_hn: Tensor, d_cn: Tensor) -> tuple[Tensor | None, ...]:
        h0, c0, base, left, right, base_r, left_r, right_r, *kept = ctx.saved_tensors
        direction = (ctx.batch_sizes, ctx.reverse)
        right_trains, right_r_trains = ctx.needs_input_grad[5], ctx.needs_input_grad[8]
        if len(kept) == 1:
            d = kept[0].clone() if graph_is_kept() else kept[0]
        else:
            d = _rematerialize(kept[0], InputProduct(*kept[1:]), h0, (base, left, right), direction)
        d_projected = project = None
        if base_r is not None:
            project = RowProduct(base_r.t(), right_r.t(), left_r.t(), c0.shape[0])
            d_projected = d_outputs.new_empty(d_outputs.shape)
        back = RowProduct(base.t(), right.t(), left.t(), c0.shape[0])
        d_h, d_c = d_hn.clone(), d_cn.clone()
        c = cells(d, c0, *direction)
        for block in blocks(ctx.batch_sizes, ctx.reverse)[::-1]:
            d_h = _backward_block(block, ctx.reverse, d, c, c0, d_outputs, d_projected, d_h, d_c, back, project)
        del back, project

        inner = outputs = c  # each block has left o tanh(c) there
        d_left_r = d_right_r = None
        if base_r is not None and d_projected is not None:
            outputs = low_rank_linear(inner, base_r, None, left_r, right_r)
            d_left_r = d_projected.t() @ (inner @ right_r.t())
            d_right_r = (d_projected @ left_r).t() @ inner if right_r_trains else None
        d_left, d_right = factor_gradients(d, outputs, h0, left, right, direction, right_trains)
        return d, d_h, d_c, None, d_left, d_right, None, d_left_r, d_right_r, None, None, None


def _activate_(i_and_f: Tensor, g: Tensor, o: Tensor) -> None:
    i_and_f.sigmoid_()
    g.tanh_()
    o.sigmoid_()


def _rematerialize(
    outputs: Tensor,
    remake: InputProduct,
    h0: Tensor,
    recurrent: tuple[Tensor, Tensor, Tensor],
    direction: tuple[Sequence[int], bool],
) -> Tensor:
    """The activated gates (N x 4H) of all steps, from what the steps put out."""
    gates = low_rank_linear(*remake)
    base, left, right = recurrent
    h_before = previous(outputs, h0, *direction)
    gates.addmm_(h_before, base.t()).addmm_(h_before @ right.t(), left.t())
    hidden = gates.shape[1] // 4
    _activate_(gates[:, : 2 * hidden], gates[:, 2 * hidden : 3 * hidden], gates[:, 3 * hidden :])
    return gates


def _backward_block(
    block: Block,
    reverse: bool,
    gates: Tensor,
    c: Tensor,
    c0: Tensor,
    d_outputs: Tensor,
    d_projected: Tensor | None,
    d_h: Tensor,
    d_c: Tensor,
    back: RowProduct,
    project: RowProduct | None,
) -> Tensor:
    """The backward recursion through one block of steps, last step first.

    Turns the block's rows of ``gates`` into their gradients, and those of ``c`` into o tanh(c); fills in the block's
    rows of ``d_projected``; moves ``d_c``, the gradients of the cells, to before the block, and returns ``d_h`` there.

    What each step's gradients get multiplied with is computed for all steps of the block at once: dh meets
    k = o (1 - tanh^2 c) on its way to dc, and o (1 - o) tanh c on its way to the gate o; dc meets i (1 - i) c~,
    f (1 - f) c_{t-1} and i (1 - c~^2) on its way to i, f and c~, and f on its way to the step before.
    """
    rows = slice(block.start, block.end)
    d = gates[rows]
    i, f, g, o = d.chunk(4, dim=1)
    inner = c[rows]
    keep = f.clone()
    before = _state_before(block, c, c0)
    f.neg_().add_(1).mul_(previous(inner, before, block.batch_sizes, reverse).mul_(keep))
    fresh = i * g
    g.square_().neg_().add_(1).mul_(i)
    i.neg_().add_(1).mul_(fresh)
    tanh_c = torch.tanh(inner, out=fresh)
    torch.mul(o, tanh_c, out=inner)
    k = torch.addcmul(o, inner, tanh_c, value=-1)
    o.neg_().add_(1).mul_(inner)

    i_f_g = d[:, : -o.shape[1]].unflatten(1, (3, o.shape[1]))
    d_output = d_outputs[rows]
    kept = d_output if d_projected is None else d_projected[rows]
    views = (d, i_f_g, o, k, keep, d_output, kept)
    by_step = [run_order(view, block.batch_sizes, reverse)[::-1] for view in views]
    for d_gate, d_ifg, d_o, k_t, keep_t, d_out_t, kept_t in zip(*by_step, strict=True):
        active = d_gate.shape[0]
        full = active == d_h.shape[0]
        d_out = (d_h if full else d_h[:active]).add_(d_out_t)
        if project is not None:
            kept_t.copy_(d_out)
            d_out = project(d_out)
        d_cell = d_c if full else d_c[:active]
        d_cell.addcmul_(d_out, k_t)
        d_o.mul_(d_out)
        d_ifg.mul_(d_cell.unsqueeze(1))
        d_cell.mul_(keep_t)
        if full:
            d_h = back(d_gate)
        else:
            d_h[:active] = back(d_gate)
    return d_h


def graph_is_kept() -> bool:
    """Whether the running backward was asked to retain its graph, so that saved tensors must stay as they are."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else bool(asked())
