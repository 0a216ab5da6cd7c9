"""CIFAR-10's subset in two halves, and nets that have learned one of them from scratch, in two parts.

The nets are of half the width, and learn at 80 x 80 and at last 160 x 160. What is before their last four convolutions
is to be frozen: its features of the other half's images, at 224 x 224, are computed once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memfit.vision.models import ZOO

LAST = torch.channels_last
WIDTH, PRETRAINED_AT, SIZE, BATCH, PRETRAINING = 0.5, (80, 160), 224, 32, 8
MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


class Net(NamedTuple):
    """A net of the zoo, and the names of what holds its last four convolutions, and of its head."""

    name: str
    last: tuple[str, ...]
    head: str

    def build(self, classes: int, width: float) -> nn.Module:
        return ZOO[self.name].build(classes, width=width)

    def split(self, model: Any) -> tuple[nn.Module, nn.Module]:
        if self.name == "resnet18":
            stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
            frozen = nn.Sequential(stem, model.layer1, model.layer2, model.layer3)
            return frozen, nn.Sequential(model.layer4, model.avgpool, nn.Flatten(), model.fc)
        first = next(i for i, _ in enumerate(model.features) if f"features.{i}" == self.last[0])
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return model.features[:first], nn.Sequential(model.features[first:], pool, model.classifier)


NETS = {
    "resnet18": Net("resnet18", ("layer4",), "fc"),
    "mobilenet_v2": Net("mobilenet_v2", ("features.17", "features.18"), "classifier.1"),
}


class Images(NamedTuple):
    x: Tensor
    y: Tensor

    def of(self, classes: Sequence[int]) -> Images:
        kept = torch.isin(self.y, torch.tensor(classes))
        return Images(self.x[kept], torch.searchsorted(torch.tensor(sorted(classes)), self.y[kept]))


def load_data(path: Path) -> tuple[Images, Images]:
    with np.load(path) as arrays:
        return tuple(  # type: ignore[return-value]
            Images(torch.from_numpy(arrays[f"x_{part}"]), torch.from_numpy(arrays[f"y_{part}"]).long())
            for part in ("train", "test")
        )


def prepare(x: Tensor, size: int) -> Tensor:
    """(B, 32, 32, 3) bytes to (B, 3, size, size)."""
    x = (x.permute(0, 3, 1, 2).float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return F.interpolate(x, (size, size), mode="bilinear").contiguous(memory_format=LAST)


def accuracy(model: nn.Module, x: Tensor, y: Tensor, size: int | None) -> float:
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(a if size is None else prepare(a, size)).argmax(1) == b).sum())
            for a, b in zip(x.split(64), y.split(64), strict=True)
        )
    return right / len(y)


def pretrained(net: Net, split: str, train: Images, test: Images, work: Path) -> tuple[nn.Module, float]:
    """The net, trained from scratch on the first half; kept in the work folder."""
    path, told = (work / f"{net.name}-{split}{suffix}" for suffix in (".safetensors", ".json"))
    torch.manual_seed(0)
    model = net.build(int(train.y.max()) + 1, WIDTH).to(memory_format=LAST)
    if path.exists():
        model.load_state_dict(load_file(path))
        return model, json.loads(told.read_text())["accuracy"]
    steps_per_epoch = len(train.y) // BATCH
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=PRETRAINING * steps_per_epoch)
    for epoch in range(PRETRAINING):
        size = PRETRAINED_AT[epoch >= PRETRAINING * 3 // 4]
        model.train()
        for picked in torch.randperm(len(train.y))[: steps_per_epoch * BATCH].split(BATCH):
            images = prepare(train.x[picked], size)
            flipped = torch.rand(len(picked)) < 0.5
            images[flipped] = images[flipped].flip(3)
            optimizer.zero_grad()
            F.cross_entropy(model(images), train.y[picked]).backward()
            optimizer.step()
            scheduler.step()
        print(f"{net.name}, {split}: epoch {epoch + 1} of pretraining at {size}", flush=True)
    right = accuracy(model, test.x, test.y, PRETRAINED_AT[1])
    work.mkdir(parents=True, exist_ok=True)
    save_file({name: each.contiguous() for name, each in model.state_dict().items()}, path)
    told.write_text(json.dumps({"accuracy": right}))
    return model, right


def features(frozen: nn.Module, x: Tensor) -> Tensor:
    """What the frozen part gives, computed once: it has no dropout and its batch norms stand still."""
    frozen.eval()
    with torch.no_grad():
        return torch.cat([frozen(prepare(part, SIZE)) for part in x.split(64)]).contiguous(memory_format=LAST)


def halves(split: str, images: Images, is_test: bool) -> tuple[Images, Images]:
    """To pretrain on, and to fine-tune on; of the images, both are tested on all."""
    if split == "classes":
        return images.of(range(5)), images.of(range(5, 10))
    half = len(images.y) // 2
    return (images, images) if is_test else (Images(*(e[:half] for e in images)), Images(*(e[half:] for e in images)))
