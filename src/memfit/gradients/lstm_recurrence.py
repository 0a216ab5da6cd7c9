"""The recurrence of one LSTM direction as one differentiable operator, with a low-rank recurrent weight.

    a_t = g_t + (W + U V) h_{t-1}        i, f, o = sigmoid and c~ = tanh of the quarters of a_t, in the order i f c~ o
    c_t = f c_{t-1} + i c~               h_t = o tanh(c_t)        (with a projection: h_t = (W_r + U_r V_r) o tanh(c_t))

where g_t, the input's share of the gates, was computed for all steps at once. The backward recursion leaves the
gradients of the gates of all steps in one matrix D (N x 4H), so that the factors' gradients are single products over
all steps, dU = D^T (H V^T) and dV = (D U)^T H, with H the previous outputs (N x P): the dense gradient is never formed.

Memory: forward keeps the gates, in the buffer that held g, and the states before every block of steps; cells and
outputs are recomputed from them block by block, and D takes the gates' place unless the graph is retained.
Rematerialized, forward keeps inputs and outputs in place of the gates: since h is known by then, backward gets the
gates back with two products.

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
# oneDNN reorders a transposed weight from a plain copy of it. In pieces of about this size, the copy is of one piece at
# a time; smaller ones would slow the products down.
_PIECE_BYTES = 3 << 20
# Backward works on this many steps at once: enough to hide the cost of a call, few enough to keep temporaries small.
_BLOCK_STEPS = 16


class RowProduct:
    """``x -> x (base + left right)^T``, made for many calls with an x of at most ``rows`` rows.

    A large float32 weight on the CPU is brought once into oneDNN's blocked layout, a copy that lives as long as this,
    and the low-rank part is added in each call: the sum would be a second copy. Small weights are summed. A transposed
    weight is blocked in pieces of its rows.
    """

    def __init__(self, base: Tensor, left: Tensor, right: Tensor, rows: int) -> None:
        self.blocked: list[Tensor] = []
        if (
            base.numel() >= _BLOCK_FROM
            and base.dtype == torch.float32
            and base.device.type == "cpu"
            and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        ):
            count = 1 if base.is_contiguous() else max(1, min(base.nbytes // _PIECE_BYTES, base.shape[0]))
            pieces = base.tensor_split(count)
            self.blocked = [torch.ops.mkldnn._reorder_linear_weight(piece.detach(), rows) for piece in pieces]
            self.left, self.right = left.t(), right.t().contiguous()
        else:
            self.transposed = torch.addmm(base, left, right).t()

    def __call__(self, x: Tensor) -> Tensor:
        if not self.blocked:
            return torch.mm(x, self.transposed)
        products = [torch.ops.mkldnn._linear_pointwise(x, piece, None, "none", [], "") for piece in self.blocked]
        product = products[0] if len(products) == 1 else torch.cat(products, dim=1)
        return product.addmm_(torch.mm(x, self.right), self.left)

    def plus(self, other: Tensor, x: Tensor) -> Tensor:
        """``other + x (base + left right)^T``, a new tensor."""
        if not self.blocked:
            return torch.addmm(other, x, self.transposed)
        if len(self.blocked) > 1:
            return self(x).add_(other)
        total = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.blocked[0], None, "add")
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


class Block(NamedTuple):
    """Consecutive steps of the recurrence: rows [start, end)."""

    start: int
    end: int
    batch_sizes: list[int]


def blocks(batch_sizes: Sequence[int], reverse: bool) -> list[Block]:
    """All steps in blocks, in the order in which the recurrence runs."""
    ends = list(accumulate(batch_sizes))
    starts = [0, *ends[:-1]]
    found = []
    for first in range(0, len(batch_sizes), _BLOCK_STEPS):
        last = min(first + _BLOCK_STEPS, len(batch_sizes)) - 1
        found.append(Block(starts[first], ends[last], list(batch_sizes[first : last + 1])))
    return found[::-1] if reverse else found


class FactorGradients:
    """``dU = D^T (S V^T)`` (M x r) and, where V trains, ``dV = (D U)^T S`` (r x K), summed over blocks of rows.

    S are the rows that met the matrix, D the gradients of what came of them. Half precision is summed in float32.
    """

    def __init__(self, left: Tensor, right: Tensor, both: bool) -> None:
        self.left, self.right = left, right
        precise = torch.promote_types(left.dtype, torch.float32)
        self.d_left = torch.zeros_like(left, dtype=precise)
        self.d_right = torch.zeros_like(right, dtype=precise) if both else None

    def add(self, d: Tensor, states: Tensor) -> None:
        """Another block: d (rows x M), states (rows x K)."""
        self.d_left += d.t() @ (states @ self.right.t())
        if self.d_right is not None:
            self.d_right += (d @ self.left).t() @ states

    def result(self) -> tuple[Tensor, Tensor | None]:
        return self.d_left.to(self.left.dtype), None if self.d_right is None else self.d_right.to(self.right.dtype)


def cells(gates: Tensor, start: Tensor, batch_sizes: Sequence[int], reverse: bool) -> Tensor:
    """The cells of a block's rows (N x H) from its activated gates (N x 4H) and the cells before it (B x H)."""
    i, f, g, _ = gates.chunk(4, dim=1)
    c = i * g
    before = start
    for cell, keep in zip(run_order(c, batch_sizes, reverse), run_order(f, batch_sizes, reverse), strict=True):
        rows, known = cell.shape[0], min(before.shape[0], cell.shape[0])
        cell[:known].addcmul_(keep[:known], before[:known])
        if known < rows:
            cell[known:].addcmul_(keep[known:], start[known:rows])
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
        starts = []
        for block in blocks(batch_sizes, reverse):
            starts.append(torch.cat((h, c), dim=1)[: block.batch_sizes[0]])
            rows = gates[block.start : block.end]
            views = (outputs[block.start : block.end], rows, rows[:, : 2 * hidden], *rows.chunk(4, dim=1))
            by_step = [run_order(view, block.batch_sizes, reverse) for view in views]
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
        ctx.save_for_backward(base, left, right, base_r, left_r, right_r, torch.cat(starts), *kept)
        ctx.batch_sizes, ctx.reverse = batch_sizes, reverse
        return outputs, h, c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_outputs: Tensor, d_hn: Tensor, d_cn: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(d_outputs.device.type, enabled=False):  # as in forward
            return Recurrence._backward(ctx, d_outputs, d_hn, d_cn)

    @staticmethod
    def _backward(ctx: Any, d_outputs: Tensor, d_hn: Tensor, d_cn: Tensor) -> tuple[Tensor | None, ...]:
        base, left, right, base_r, left_r, right_r, starts, *kept = ctx.saved_tensors
        batch, outputs = d_cn.shape[0], None
        if len(kept) == 1:
            d = kept[0].clone() if graph_is_kept() else kept[0]
        else:
            outputs, *remake = kept
            d = low_rank_linear(*remake)
        recurrent = FactorGradients(left, right, both=ctx.needs_input_grad[5])
        back = RowProduct(base.t(), right.t(), left.t(), batch)
        projected = project = None
        if base_r is not None:
            projected = FactorGradients(left_r, right_r, both=ctx.needs_input_grad[8])
            project = RowProduct(base_r.t(), right_r.t(), left_r.t(), batch)
        d_h, d_c = d_hn.clone(), d_cn.clone()
        steps = blocks(ctx.batch_sizes, ctx.reverse)
        by_block = starts.split([block.batch_sizes[0] for block in steps])
        for block, start in zip(steps[::-1], by_block[::-1], strict=True):
            rows, order = slice(block.start, block.end), (block.batch_sizes, ctx.reverse)
            h_start, c_start = start.split((d_h.shape[1], d_c.shape[1]), dim=1)
            gates = d[rows]
            if outputs is not None:
                h_before = previous(outputs[rows], h_start, *order)
                _activate_(gates.addmm_(h_before, base.t()).addmm_(h_before @ right.t(), left.t()))
            inner, d_output = _backward_block(*order, gates, c_start, d_outputs[rows], d_h, d_c, back, project)
            h = inner
            if projected is not None:
                projected.add(d_output, inner)
                h = low_rank_linear(inner, base_r, None, left_r, right_r)
            recurrent.add(gates, previous(h, h_start, *order))
        d_factors = recurrent.result()
        d_projection = (None, None) if projected is None else projected.result()
        return d, d_h, d_c, None, *d_factors, None, *d_projection, None, None, None


def _activate_(gates: Tensor) -> None:
    i_and_f, g, o = gates.split((gates.shape[1] // 2, gates.shape[1] // 4, gates.shape[1] // 4), dim=1)
    i_and_f.sigmoid_()
    g.tanh_()
    o.sigmoid_()


def _backward_block(
    batch_sizes: Sequence[int],
    reverse: bool,
    d: Tensor,
    c_start: Tensor,
    d_outputs: Tensor,
    d_h: Tensor,
    d_c: Tensor,
    back: RowProduct,
    project: RowProduct | None,
) -> tuple[Tensor, Tensor]:
    """The backward recursion through one block of steps, last step first.

    Turns ``d``, the activated gates, into their gradients, and moves ``d_h`` and ``d_c``, the gradients of the states
    and the cells, to before the block. Returns o tanh(c) and the gradients of the steps' outputs.

    What each step's gradients get multiplied with is computed for all steps of the block at once: dh meets
    k = o (1 - tanh^2 c) on its way to dc, and o (1 - o) tanh c on its way to the gate o; dc meets i (1 - i) c~,
    f (1 - f) c_{t-1} and i (1 - c~^2) on its way to i, f and c~, and f on its way to the step before.
    """
    i, f, g, o = d.chunk(4, dim=1)
    inner = cells(d, c_start, batch_sizes, reverse)
    keep = f.clone()
    f.neg_().add_(1).mul_(previous(inner, c_start, batch_sizes, reverse).mul_(keep))
    fresh = i * g
    g.square_().neg_().add_(1).mul_(i)
    i.neg_().add_(1).mul_(fresh)
    tanh_c = torch.tanh(inner, out=fresh)
    torch.mul(o, tanh_c, out=inner)
    k = torch.addcmul(o, inner, tanh_c, value=-1)
    o.neg_().add_(1).mul_(inner)

    d_state = d_outputs if project is None else torch.empty_like(d_outputs)
    i_f_g = d[:, : -o.shape[1]].unflatten(1, (3, o.shape[1]))
    by_step = [run_order(view, batch_sizes, reverse)[::-1] for view in (d, i_f_g, o, k, keep, d_outputs, d_state)]
    for d_gate, d_ifg, d_o, k_t, keep_t, d_output, d_projected in zip(*by_step, strict=True):
        active = d_gate.shape[0]
        d_out = d_h[:active].add_(d_output)
        if project is not None:
            d_projected.copy_(d_out)
            d_out = project(d_out)
        d_cell = d_c[:active].addcmul_(d_out, k_t)
        d_o.mul_(d_out)
        d_ifg.mul_(d_cell.unsqueeze(1))
        d_cell.mul_(keep_t)
        d_h[:active] = back(d_gate)
    return inner, d_state


def graph_is_kept() -> bool:
    """Whether the running backward was asked to retain its graph, so that saved tensors must stay as they are."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else bool(asked())
