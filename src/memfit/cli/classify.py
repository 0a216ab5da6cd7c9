"""``memfit classify``: print what images show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from memfit.cli.console import show
from memfit.ledger.target import users_code
from memfit.report_page import percent
from memfit.vision import classifier
from memfit.vision.batches import normalized
from memfit.vision.images import load_image


def classify(
    images: Annotated[
        list[Path],
        typer.Argument(help="Images: JPEG, PNG, WebP and others, of any size.", metavar="IMAGE..."),
    ],
    model: Annotated[Path, typer.Option(help="The classifier: model.safetensors of a fine-tuning.", metavar="FILE")],
    network: Annotated[
        str | None,
        typer.Option(
            help="For a model of one's own: the function that makes it, package.module:function or file.py:function.",
            metavar="NAME",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of {file, class, probability}.")] = False,
) -> None:
    """Print the class of images: the class alone for one image, each after its file's name for several."""
    found = []
    with users_code(network or str(model), "a smaller model needs less"):
        net, config = classifier.load(model, network)
        for path in images:
            pixels = load_image(path, config.size)[None]
            with torch.no_grad():
                probability, label = net(normalized(pixels))[0].float().softmax(dim=0).max(dim=0)
            name = config.classes[int(label)]
            found.append({"file": str(path), "class": name, "probability": round(float(probability), 4)})
            if not as_json:
                text = f"{name} ({percent(float(probability))})"
                show(text if len(images) == 1 else f"{path}: {text}")
    if as_json:
        print(json.dumps(found, indent=2))
