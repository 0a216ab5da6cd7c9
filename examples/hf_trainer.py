"""A tiny Llama of characters, trained by the Hugging Face Trainer through low-rank gradients.

    pip install "memfit[hf]"
    python examples/hf_trainer.py                            # on a few sonnets
    python examples/hf_trainer.py --text my.txt --steps 500
    python examples/hf_trainer.py --resume                   # after an interruption: go on from the last checkpoint

Checkpoints are the Trainer's own. At the end an ordinary Llama is saved, which knows nothing of memfit. The model is
built from a config and the text is embedded below: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import memfit

LENGTH = 64


def build(characters: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=characters,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4 * LENGTH,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


class Passages(torch.utils.data.Dataset[dict[str, Tensor]]):
    """All passages of so many characters, as the Trainer wants them: the model itself shifts the labels by one."""

    def __init__(self, text: str, alphabet: str) -> None:
        self.codes = torch.tensor([alphabet.index(character) for character in text])

    def __len__(self) -> int:
        return len(self.codes) - LENGTH

    def __getitem__(self, start: int) -> dict[str, Tensor]:
        passage = self.codes[start : start + LENGTH]
        return {"input_ids": passage, "labels": passage}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tiny Llama of characters through low-rank gradients.")
    parser.add_argument("--text", type=Path, help="a text file in UTF-8; without it, the sonnets embedded here")
    parser.add_argument("--output", type=Path, default=Path("tiny-llama"))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    arguments = parser.parse_args()

    try:
        text = arguments.text.read_text(encoding="utf-8") if arguments.text else SONNETS
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--text {arguments.text}: {error}")
    if len(text) <= LENGTH:
        parser.error(f"{arguments.text}: the text must be longer than {LENGTH} characters")
    alphabet = "".join(sorted(set(text)))
    torch.manual_seed(0)
    model = build(len(alphabet))

    # Convert before the Trainer makes its optimizer. Also before a resume: the checkpoint has the factors.
    try:
        memfit.convert_(model, memfit.LowRankGradient(rank=arguments.rank), where="model.layers.*")
    except memfit.ConversionError as error:
        parser.error(str(error))
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(arguments.output),
            max_steps=arguments.steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            warmup_steps=10,
            weight_decay=0.0,  # on factors it would pull towards the start, not towards zero: docs/hugging-face.md
            save_steps=40,
            save_total_limit=2,
            logging_steps=20,
            report_to=[],
            use_cpu=True,
        ),
        train_dataset=Passages(text, alphabet),
    )
    if arguments.resume and not list(arguments.output.glob("checkpoint-*")):
        parser.error(f"--resume: there is no checkpoint in {arguments.output}")
    trainer.train(resume_from_checkpoint=arguments.resume)

    # An ordinary Llama again, with the trained weights under their original keys.
    memfit.restore_(model)
    if not trainer.is_world_process_zero():  # started by torchrun, which works as with any model
        return
    final = arguments.output / "final"
    model.save_pretrained(final)
    (final / "alphabet.json").write_text(json.dumps(alphabet), encoding="utf-8")

    plain = LlamaForCausalLM.from_pretrained(final)
    prompt = torch.tensor([[alphabet.index(character) for character in text[:16]]])
    written = plain.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=80, do_sample=False)
    print(f"{final} continues the text: " + repr("".join(alphabet[code] for code in written[0])))


SONNETS = """\
Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date:
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
And every fair from fair sometime declines,
By chance, or nature's changing course, untrimm'd;
But thy eternal summer shall not fade
Nor lose possession of that fair thou ow'st;
Nor shall Death brag thou wander'st in his shade,
When in eternal lines to time thou grow'st;
So long as men can breathe or eyes can see,
So long lives this, and this gives life to thee.

When, in disgrace with fortune and men's eyes,
I all alone beweep my outcast state,
And trouble deaf heaven with my bootless cries,
And look upon myself and curse my fate,
Wishing me like to one more rich in hope,
Featured like him, like him with friends possess'd,
Desiring this man's art and that man's scope,
With what I most enjoy contented least;
Yet in these thoughts myself almost despising,
Haply I think on thee, and then my state,
Like to the lark at break of day arising
From sullen earth, sings hymns at heaven's gate;
For thy sweet love remember'd such wealth brings
That then I scorn to change my state with kings.

Let me not to the marriage of true minds
Admit impediments. Love is not love
Which alters when it alteration finds,
Or bends with the remover to remove:
O no! it is an ever-fixed mark
That looks on tempests and is never shaken;
It is the star to every wandering bark,
Whose worth's unknown, although his height be taken.
Love's not Time's fool, though rosy lips and cheeks
Within his bending sickle's compass come:
Love alters not with his brief hours and weeks,
But bears it out even to the edge of doom.
If this be error and upon me proved,
I never writ, nor no man ever loved.
"""


if __name__ == "__main__":
    main()
