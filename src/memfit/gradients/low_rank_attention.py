"""``nn.MultiheadAttention`` trained through low-rank factors, with its output projection as a part of it.

The three projections of one input are one product; keys, values and queries are then views into its result.
"""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from memfit.convert import ConvertedLayer, Technique
from memfit.errors import ConversionError
from memfit.gradients.low_rank_layer import LowRankLayer, LowRankLinear
from memfit.gradients.low_rank_product import low_rank_linear


class LowRankOutProjection(LowRankLinear, NonDynamicallyQuantizableLinear):
    """The linear layer at the end of an attention."""

    plain_class = NonDynamicallyQuantizableLinear


class LowRankMultiheadAttention(LowRankLayer, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with one pair of factors for ``in_proj_weight`` (3E x E) and one for ``out_proj``.

    With ``kdim`` or ``vdim`` there is a pair for each of ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight``.
    Forward takes and returns what ``nn.MultiheadAttention`` does, by ``F.scaled_dot_product_attention`` unless it is
    asked for the weights. A layer around it that reads its weights, as ``nn.TransformerEncoderLayer`` does in eval
    mode, gets the effective ones.
    """

    plain_class = nn.MultiheadAttention

    @classmethod
    def weight_names(cls, layer: nn.Module) -> list[str]:
        return ["in_proj_weight"] if layer._qkv_same_embed_dim else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]

    @classmethod
    def parts(cls, layer: nn.Module) -> dict[str, type[ConvertedLayer]]:
        return {"out_proj": LowRankOutProjection}

    @classmethod
    def unsupported(cls, layer: nn.Module, technique: Technique) -> str | None:
        kind = type(layer.out_proj)
        if kind is not NonDynamicallyQuantizableLinear:
            return f"has an out_proj of another type, {kind.__name__}"
        return super().unsupported(layer, technique)

    def plain_state(self, made: dict[nn.Module, Tensor]) -> dict[str, Tensor]:
        state = super().plain_state(made)
        out = self.out_proj
        inner = out.plain_state(made) if isinstance(out, ConvertedLayer) else out.state_dict()
        return {**state, **{f"out_proj.{name}": value for name, value in inner.items()}}

    def _reset_parameters(self) -> None:
        raise ConversionError("a converted layer cannot be initialized anew: call memfit.restore_ first.")

    def extra_repr(self) -> str:
        return str(self.technique)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested or key.is_nested or value.is_nested:  # one fused operator of torch's, on effective weights
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        padding, mask = self._masks(query, key, value, key_padding_mask, attn_mask)
        if is_causal and mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        if is_causal and padding is None and not need_weights:
            mask = None  # the operator makes its own
        else:
            is_causal = False

        batched = query.dim() == 3
        q, k, v = (self._heads(part, batched) for part in self._project(query, key, value))
        mask = self._joined(mask, padding, (q.shape[0], self.num_heads, q.shape[2], k.shape[2]))
        if self.bias_k is not None and self.bias_v is not None:
            extra = (bias.view(1, self.num_heads, 1, self.head_dim) for bias in (self.bias_k, self.bias_v))
            k, v = (torch.cat((x, one.expand(x.shape[0], -1, -1, -1)), 2) for x, one in zip((k, v), extra, strict=True))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))

        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(2, 3)
            weights = F.dropout((scores if mask is None else scores.add_(mask)).softmax(-1), dropout)
            mixed = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        if not batched:
            rows = mixed.squeeze(0).transpose(0, 1)
        else:
            rows = mixed.transpose(1, 2) if self.batch_first else mixed.permute(2, 0, 1, 3)
        return self.out_proj(rows.flatten(-2)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """The three projections; neighbours with the same input share one product."""
        width = self.embed_dim
        if not self._qkv_same_embed_dim:
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            matrices = [self.matrix(name) for name in self.weight_names(self)]
            inputs = (query, key, value)
            return [matrix.linear(x, b) for matrix, x, b in zip(matrices, inputs, biases, strict=True)]
        matrix = self.matrix("in_proj_weight")
        found: list[Tensor] = []
        for _, run in groupby((query, key, value), id):
            same = list(run)
            rows = slice(len(found) * width, (len(found) + len(same)) * width)
            bias = None if self.in_proj_bias is None else self.in_proj_bias[rows]
            product = low_rank_linear(same[0], matrix.base[rows], bias, matrix.left[rows], matrix.right)
            found += product.chunk(len(same), dim=-1)
        return found

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """A projection as (batch, heads, length, width of a head)."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if not batched:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _masks(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Both masks as numbers to add to the scores; what ``nn.MultiheadAttention`` refuses, is refused as there."""
        other = F._none_or_dtype(mask)
        padding = F._canonical_mask(padding, "key_padding_mask", other, "attn_mask", query.dtype)
        mask = F._canonical_mask(mask, "attn_mask", None, "", query.dtype, False)
        F._mha_shape_check(  # type: ignore[attr-defined]
            query, key, value, padding, mask, self.num_heads
        )
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}")
        sides = slice(None) if self._qkv_same_embed_dim else slice(-1)
        if key.shape[sides] != value.shape[sides]:
            raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")
        return padding, mask

    @staticmethod
    def _joined(mask: Tensor | None, padding: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor | None:
        """The masks' sum, to be added to scores of ``shape`` (batch, heads, L, S), with ones where it is the same."""
        batch, heads, length, keys = shape
        if mask is not None:
            expected = (length, keys) if mask.dim() == 2 else (batch * heads, length, keys)
            if mask.shape != expected:
                raise RuntimeError(
                    f"The shape of the {mask.dim()}D attn_mask is {mask.shape}, but should be {expected}."
                )
            mask = mask.view(1, 1, length, keys) if mask.dim() == 2 else mask.unflatten(0, (batch, heads))
        if padding is not None:
            if padding.numel() != batch * keys:
                raise RuntimeError(f"key_padding_mask is {tuple(padding.shape)}, but should be {(batch, keys)}.")
            padding = padding.view(batch, 1, 1, keys)
            mask = padding if mask is None else mask + padding
        return mask
