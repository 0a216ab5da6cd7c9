"""Fine-tune a segmenter with an exact and with a filtered backward: how good, how fast, and where the memory is.

    python examples/segmentation.py                            # shapes on textures, made up on the spot
    python examples/segmentation.py --data mnist.npz           # handwritten digits on textures
    python examples/segmentation.py --data FOLDER              # your own: FOLDER/images/*.jpg, FOLDER/masks/*.png

The net is a small DeepLabV3: a ResNet whose last stage is dilated, and a head that looks at it at several distances
(Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017). It has learned on dark textures,
and is fine-tuned, last stage and head, on bright and noisy ones. Of your own images it learns from fresh weights, or
from those of a ResNet-18 that --weights names. A mask's pixels are class numbers from 0; 255 is left out.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memfit
from memfit.vision.batches import normalized
from memfit.vision.models import resnet18
from memfit.vision.training import train_only
from memfit.vision.weights import load_weights

LEFT_OUT = 255
Data = tuple[Tensor, Tensor]  # uint8 images (n, size, size, 3), and masks (n, size, size) int64


class Segmenter(nn.Module):
    """Images ``(batch, 3, size, size)`` to scores ``(batch, classes, size, size)``."""

    def __init__(self, classes: int, width: float) -> None:
        super().__init__()
        self.backbone = resnet18(1, width=width)
        self.backbone.fc = nn.Identity()
        # The last two stages look farther instead of shrinking the map: one position for 8 x 8 pixels, not 32 x 32.
        for stage, dilation in ((self.backbone.layer3, 2), (self.backbone.layer4, 4)):
            for module in stage.modules():
                if isinstance(module, nn.Conv2d):
                    module.stride = (1, 1)
                    if module.kernel_size == (3, 3):
                        module.dilation = module.padding = (dilation, dilation)
        deep = self.backbone.layer4[-1].conv2.out_channels
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(deep, 64, 1 if rate == 1 else 3, padding=0 if rate == 1 else rate, dilation=rate, bias=False),
                nn.BatchNorm2d(64),
                nn.ReLU(),
            )
            for rate in (1, 2, 4)
        )
        self.whole = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(deep, 64, 1), nn.ReLU())
        self.project = nn.Sequential(nn.Conv2d(256, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.classify = nn.Conv2d(64, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        net = self.backbone
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        x = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        seen = [branch(x) for branch in self.branches]
        seen.append(self.whole(x).expand(-1, -1, *x.shape[2:]))
        scores = self.classify(self.project(torch.cat(seen, 1)))
        return F.interpolate(scores, size=images.shape[2:], mode="bilinear", align_corners=False)


def made_up(count: int, size: int, seed: int, bright: bool, digits: tuple[np.ndarray, np.ndarray] | None) -> Data:
    """Textures with three figures each: discs, squares and crosses, or handwritten digits."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    images, masks = np.empty((count, size, size, 3), np.uint8), np.zeros((count, size, size), np.int64)
    for image, mask in zip(images, masks, strict=True):
        waves = np.sin(x[..., None] * random.uniform(0.1, 0.6, 3) + y[..., None] * random.uniform(0.1, 0.6, 3))
        image[:] = (170 if bright else 60) + 40 * waves
        for _ in range(3):
            side = int(random.integers(size // 4, size // 2))
            top, left = random.integers(0, size - side, 2)
            if digits is None:
                label = int(random.integers(3))
                v, u = np.abs(np.mgrid[:side, :side] - (side - 1) / 2) / (side / 2)
                figure = (u**2 + v**2 < 1, np.maximum(u, v) < 0.85, np.minimum(u, v) < 0.3)[label]
            else:
                chosen = int(random.integers(len(digits[0])))
                label = int(digits[1][chosen])
                rows = np.arange(side) * 28 // side
                figure = digits[0][chosen][rows][:, rows] > 100
            place = (slice(top, top + side), slice(left, left + side))
            image[place][figure] = random.integers(0, 120, 3) if bright else random.integers(120, 256, 3)
            mask[place][figure] = label + 1
        image[:] = np.clip(image + random.normal(0, 25 if bright else 8, image.shape), 0, 255)
    return torch.from_numpy(images), torch.from_numpy(masks)


def read(folder: Path, size: int) -> Data:
    """The images of a folder, and their masks, which have the same names but for the ending."""
    from PIL import Image, ImageOps

    from memfit.vision.images import load_image

    images, masks = [], []
    for path in sorted((folder / "images").iterdir()):
        (found,) = (folder / "masks").glob(f"{path.stem}.*")
        images.append(load_image(path, size))
        mask = ImageOps.fit(Image.open(found), (size, size), Image.Resampling.NEAREST)
        masks.append(torch.from_numpy(np.array(mask)).long())
    return torch.stack(images), torch.stack(masks)


def loss_on(model: nn.Module, images: Tensor, masks: Tensor) -> Tensor:
    return F.cross_entropy(model(normalized(images)), masks, ignore_index=LEFT_OUT)


def train(model: nn.Module, data: Data, steps: int, lr: float, batch: int) -> tuple[float, memfit.Ledger]:
    """Seconds of a step, and where its memory is."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    generator = torch.Generator().manual_seed(1)
    seconds = []

    def step() -> None:
        chosen = torch.randint(len(data[0]), (batch,), generator=generator)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss_on(model, data[0][chosen], data[1][chosen]).backward()
        optimizer.step()
        schedule.step()
        seconds.append(time.perf_counter() - start)

    step()
    with memfit.ledger(model, optimizer) as book:
        step()
    seconds.clear()  # the first steps allocate, and are watched
    for _ in range(steps - 2):
        step()
    return median(seconds), book


@torch.no_grad()
def mean_iou(model: nn.Module, data: Data, classes: int) -> float:
    """Of each class, the pixels that are right over those that are or are taken for it; the mean of the classes."""
    model.eval()
    table = torch.zeros(classes, classes)
    for images, masks in zip(data[0].split(16), data[1].split(16), strict=True):
        counted = masks != LEFT_OUT
        found = model(normalized(images)).argmax(1)
        table += torch.bincount(classes * masks[counted] + found[counted], minlength=classes**2).reshape(classes, -1)
    union = table.sum(0) + table.sum(1) - table.diag()
    return float((table.diag() / union)[union > 0].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a segmenter, exactly and with a filtered backward.")
    parser.add_argument("--data", type=Path, help="a folder with images and masks, or mnist.npz; shapes when left out")
    parser.add_argument("--weights", type=Path, help="of a ResNet-18: .safetensors or .pth")
    parser.add_argument("--width", type=float, help="of the ResNet; 1 with --weights, else 0.25")
    parser.add_argument("--size", type=int, default=64, help="pixels of an image's side")
    parser.add_argument("--images", type=int, default=200, help="how many are made up to train on")
    parser.add_argument("--pretrain", type=int, default=200, help="steps on dark textures")
    parser.add_argument("--steps", type=int, default=80, help="steps of fine-tuning")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--patch", type=int, default=2, help="side of the patches of the filter")
    arguments = parser.parse_args()
    if arguments.steps < 3 or arguments.pretrain < 3 or arguments.images < 5 or arguments.size < 32:
        parser.error("--steps and --pretrain must be at least 3, --images 5, --size 32")

    torch.manual_seed(0)
    width = arguments.width or (1.0 if arguments.weights else 0.25)
    if arguments.data and arguments.data.is_dir():
        images, masks = read(arguments.data, arguments.size)
        classes = int(masks[masks != LEFT_OUT].max()) + 1
        held_out = torch.arange(len(images)) % 5 == 4
        data, test = (images[~held_out], masks[~held_out]), (images[held_out], masks[held_out])
        model = Segmenter(classes, width)
    else:
        if arguments.data:
            with np.load(arguments.data) as file:
                digits = {part: (file[f"x_{part}"], file[f"y_{part}"]) for part in ("train", "test")}
        else:
            digits = {"train": None, "test": None}
        classes = 11 if arguments.data else 4
        dark = made_up(arguments.images, arguments.size, 0, False, digits["train"])
        data = made_up(arguments.images, arguments.size, 1, True, digits["train"])
        test = made_up(100, arguments.size, 2, True, digits["test"])
        model = Segmenter(classes, width)
        train(model.train(), dark, arguments.pretrain, 1e-2, arguments.batch)
    if arguments.weights:
        load_weights(model.backbone, arguments.weights)

    last = ["backbone.layer4", "branches", "whole", "project", "classify"]
    model.to(memory_format=torch.channels_last)
    print(f"mIoU before: {mean_iou(model, test, classes):.1%}")
    for name, technique in (("exact", None), ("filtered", memfit.GradientFilter(patch=arguments.patch))):
        tuned = copy.deepcopy(model)
        train_only(tuned, last)
        if technique is not None:
            memfit.convert_(tuned, technique, where=[f"{module}.*" for module in last[:-1]])
        seconds, book = train(tuned, data, arguments.steps, 4e-3, arguments.batch)
        memfit.restore_(tuned)
        print(f"\n{name}: mIoU {mean_iou(tuned, test, classes):.1%}, {seconds:.3f} s per step\n{book}")


if __name__ == "__main__":
    main()
