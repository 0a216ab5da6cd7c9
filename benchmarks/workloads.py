"""The nets, batches and losses that `low_rank_gradient.py` measures on, each in full size and in a tiny one.

The tiny one loads the libraries' code before anything is measured; its matrices are just large enough (64 x 64) that
every method treats them as it treats the large ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memfit.speech.batches import Batch, ctc_loss
from memfit.speech.model import Recognizer, RecognizerConfig
from methods import CannotError, Layers


class Task(NamedTuple):
    """A model, one batch, and the loss of the model on it."""

    model: nn.Module
    batch: Any
    loss: Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
        title: for people.
        make: ``make(small)`` gives the task from torch's global generator.
        layers: those whose matrices are trained at low rank.
        inner: of those, attention and MLP alone; None where the net has no others.
        peak_goal: growth of the process's peak, of fused AdamW's; `step_goal`: seconds per step, of fused AdamW's.
        lr: the learning rate of all methods.
    """

    title: str
    make: Callable[[bool], Task]
    layers: Layers
    inner: Layers | None = None
    peak_goal: float = 0.50
    step_goal: float = 0.85
    lr: float = 1e-4


def mean_square(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def linears(rows: int, small: bool) -> Task:
    """Six Linear layers with ReLU between them."""
    width, count = (64, 2) if small else (2048, 6)
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [nn.Linear(width, width), nn.ReLU()]
    rows = 4 if small else rows
    return Task(nn.Sequential(*layers[:-1]), (torch.randn(rows, width), torch.randn(rows, width)), mean_square)


def recognizer(small: bool) -> Task:
    """A speech recognizer: an LSTM of 3 x 1280 and a small output layer, under CTC."""
    config = RecognizerConfig(
        features=40, stack=2, layers=1 if small else 3, hidden=64 if small else 1280, bidirectional=False
    )
    rows, frames = (2, 16) if small else (8, 150)
    return Task(
        Recognizer(config),
        Batch(
            torch.randn(rows, frames * config.stack, config.features),
            torch.full((rows,), frames * config.stack),
            torch.randint(1, len(config.alphabet), (rows, frames // 8)),
            torch.full((rows,), frames // 8),
        ),
        ctc_loss,
    )


def next_token(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def next_token_in_pieces(model: nn.Module, tokens: Tensor, positions: int = 64) -> Tensor:
    """The same loss, whose logits exist for a few positions at a time, and once more in backward."""
    causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft wraps

    def piece(states: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(causal.lm_head(states), targets, reduction="sum")

    states, targets = causal.model(input_ids=tokens).last_hidden_state[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    pieces = zip(states.split(positions), targets.split(positions), strict=True)
    total = sum(checkpoint(piece, *both, use_reentrant=False, preserve_rng_state=False) for both in pieces)
    return cast(Tensor, total) / len(targets)


def llama(loss: Callable[[nn.Module, Any], Tensor], small: bool, checkpointed: bool = False) -> Task:
    """The Llama of 58 million parameters on which GaLore and APOLLO are published; embedding and head are not tied."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise CannotError('transformers is not installed (pip install "memfit[bench]")') from error

    # vocabulary, width, width of the MLP, layers, heads
    tokens, width, inner, layers, heads = (64, 64, 128, 1, 2) if small else (32_000, 512, 1376, 8, 8)
    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=1024,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Task(model.train(), torch.randint(tokens, (1, 16 if small else 256)), loss)


def _linear(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


WORKLOADS = {
    **{
        f"linear-{rows}": Workload(
            f"six Linear 2048 x 2048, N = {rows}", partial(linears, rows), _linear, peak_goal=0.40, step_goal=0.65
        )
        for rows in (64, 256, 1024)
    },
    "lstm": Workload(
        "LSTM recognizer 3 x 1280, batch 8, 150 frames", recognizer, lambda name, module: isinstance(module, nn.LSTM)
    ),
    **{
        name: Workload(
            f"Llama 60M, batch 1, sequence 256{how}",
            make,
            lambda name, module: isinstance(module, nn.Linear | nn.Embedding),
            lambda name, module: isinstance(module, nn.Linear) and name != "lm_head",
        )
        for name, how, make in (
            ("llama", "", partial(llama, next_token)),
            ("llama-pieces", ", loss in pieces of 64 positions", partial(llama, next_token_in_pieces)),
            (
                "llama-checkpointed",
                ", loss in pieces, layers checkpointed",
                partial(llama, next_token_in_pieces, checkpointed=True),
            ),
        )
    },
}
