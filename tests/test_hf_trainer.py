"""transformers.Trainer with converted layers: checkpoints, exact resume, and an ordinary model at the end."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_model
from torch import Tensor, nn

import memfit

transformers = pytest.importorskip("transformers", reason='needs pip install "memfit[hf]"')
pytest.importorskip("accelerate", reason='needs pip install "memfit[hf]"')

RANDOM = memfit.LowRankGradient(rank=4, refresh=3)
POWER = memfit.LowRankGradient(rank=4, refresh=3, basis="power")
STEPS, SAVED = 8, 4


def build(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":  # its layers are Conv1D, and its head is tied to the embedding
        config = transformers.GPT2Config(
            vocab_size=64, n_embd=48, n_layer=2, n_head=4, n_positions=32, bos_token_id=None, eos_token_id=None
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attention_dropout=0.1,  # so that a resume must also bring back the random numbers
        tie_word_embeddings=kind == "tied llama",
    )
    return transformers.LlamaForCausalLM(config)


def converted(kind: str = "llama") -> Any:
    if kind == "llama":
        return memfit.convert_(build(kind), RANDOM, where="model.layers.*")
    return memfit.convert_(build(kind), POWER if kind == "tied llama" else RANDOM)


def trainer(model: nn.Module, folder: Path, **settings: Any) -> Any:
    passages = torch.randint(16, (40, 12), generator=torch.Generator().manual_seed(1)).repeat(1, 2)
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=STEPS,
        save_steps=SAVED,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    return transformers.Trainer(model, arguments, train_dataset=[{"input_ids": p, "labels": p} for p in passages])


class Run(NamedTuple):
    """A finished run: what was trained, and its Trainer."""

    kind: str
    trainer: Any

    @property
    def model(self) -> Any:
        return self.trainer.model

    @property
    def folder(self) -> Path:
        return Path(self.trainer.args.output_dir)


@pytest.fixture(scope="module", params=["llama", "tied llama", "gpt2"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nobody disturbed."""
    finished = trainer(converted(request.param), tmp_path_factory.mktemp("run"))
    finished.train()
    return Run(request.param, finished)


def same(state: Any, other: Any) -> bool:
    """Whether two nests of plain values and tensors have the same bits."""
    if isinstance(state, dict):
        return state.keys() == other.keys() and all(same(state[key], other[key]) for key in state)
    if isinstance(state, (list, tuple)):
        return len(state) == len(other) and all(same(a, b) for a, b in zip(state, other, strict=True))
    return torch.equal(state, other) if isinstance(state, Tensor) else state == other


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(20)[None]).logits


def test_the_loss_falls_and_all_but_the_frozen_weights_train(run: Run) -> None:
    losses = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.1
    held = {id(p) for group in run.trainer.optimizer.param_groups for p in group["params"]}
    names = {name for name, p in run.model.named_parameters() if id(p) in held}
    assert names == {name for name, _ in run.model.named_parameters() if not name.endswith(".base")}
    assert any(name.endswith(".left") for name in names)


def test_a_resumed_run_ends_with_the_same_bits(run: Run, tmp_path: Path) -> None:
    """Weights, factors, steps to the next refresh, and the optimizer's moments."""
    shutil.copytree(run.folder / f"checkpoint-{SAVED}", tmp_path / f"checkpoint-{SAVED}")
    resumed = trainer(converted(run.kind), tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    assert same(resumed.model.state_dict(), run.model.state_dict())
    assert same(resumed.optimizer.state_dict(), run.trainer.optimizer.state_dict())


def check_ordinary(folder: Path, run: Run) -> None:
    """A folder that transformers loads without a word, as a model that computes what the run's does."""
    plain, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert type(plain) is type(build(run.kind))
    torch.testing.assert_close(logits(plain), logits(run.model), atol=1e-5, rtol=1e-5)
    tied = plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    assert tied == (run.kind != "llama")


def test_the_state_with_plain_keys_is_an_ordinary_model(run: Run, tmp_path: Path) -> None:
    run.model.save_pretrained(tmp_path, state_dict=memfit.state_dict(run.model))
    check_ordinary(tmp_path, run)


def test_a_checkpoint_on_the_way_becomes_an_ordinary_model(run: Run, tmp_path: Path) -> None:
    """As docs/hugging-face.md does it."""
    model = converted(run.kind)
    load_model(model, run.folder / f"checkpoint-{STEPS}" / "model.safetensors")
    memfit.restore_(model).save_pretrained(tmp_path)
    assert [vars(module).keys() for module in model.modules()] == [vars(m).keys() for m in build(run.kind).modules()]
    check_ordinary(tmp_path, run)


def test_a_checkpoint_does_not_resume_in_an_unconverted_model(run: Run) -> None:
    plain = trainer(build(run.kind), run.folder)
    with pytest.raises(ValueError, match="size of optimizer's group"):
        plain.train(resume_from_checkpoint=True)


def test_weight_decay_can_leave_the_factors_out(tmp_path: Path) -> None:
    """As docs/hugging-face.md does it."""

    class Trainer(transformers.Trainer):
        def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
            return [name for name in super().get_decay_parameter_names(model) if ".low_rank." not in name]

    arguments = transformers.TrainingArguments(str(tmp_path), weight_decay=0.1, report_to=[], use_cpu=True)
    decaying = Trainer(converted(), arguments)
    decaying.create_optimizer()
    names = {id(p): name for name, p in decaying.model.named_parameters()}
    by_decay = {g["weight_decay"]: [names[id(p)] for p in g["params"]] for g in decaying.optimizer.param_groups}
    assert sorted(by_decay[0.1]) == ["lm_head.weight", "model.embed_tokens.weight"]
    assert any(".low_rank." in name for name in by_decay[0.0])


@pytest.mark.parametrize("saving", ["activation checkpointing", "bfloat16"])
def test_the_trainers_own_savings_work_along(tmp_path: Path, saving: str) -> None:
    model = converted()
    if saving == "activation checkpointing":
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    trainer(model, tmp_path, bf16=saving == "bfloat16").train()
    start, end = build().state_dict(), memfit.state_dict(model)
    assert start.keys() == end.keys()
    assert all(not torch.equal(start[name], end[name]) and end[name].isfinite().all() for name in start)
