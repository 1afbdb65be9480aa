"""The `train` section of a recipe: its schema and defaults. Strict, and read without torch.

`python -m detcore.config --check` is how a launcher asks, before it starts anything; see `detcore.check`.
"""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Norm = Literal["bn", "sync_bn"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class Backbone(Section):
    name: Literal["resnet18", "resnet34", "resnet50", "resnet101", "mobilenetv2"]
    weights: str | None = None
    """A name in detcore.weights' catalogue, a path, an s3:// or https:// address; null: random."""
    style: Literal["caffe", "torchvision"] = "torchvision"
    """Of a ResNet: where the stride is and how pixels are normalised. Must be that of the weights."""
    norm: Literal["frozen_bn", "bn", "sync_bn"] = "frozen_bn"
    freeze: Annotated[int, Field(ge=0, le=5)] = 0
    """Stages that are not trained: 1 the stem, 2 the stem and res2, ..."""
    width: Annotated[float, Field(gt=0)] = 1.0
    """Factor on all channels."""


class Encoder(Section):
    channels: Positive = 512
    mid_channels: Positive = 128
    dilations: Annotated[list[Positive], Field(min_length=1)] = [2, 4, 6, 8]


class Decoder(Section):
    cls_convs: Count = 2
    reg_convs: Count = 4


class Match(Section):
    top: Positive = 4
    """Nearest predictions, and nearest anchors, that each object is matched with."""
    pos_ignore: Share = 0.15
    """Matches whose anchor has a smaller IoU are left out."""
    neg_ignore: Share = 0.7
    """Background whose prediction has a larger IoU is left out."""


class Test(Section):
    score: Share = 0.05
    topk: Positive = 1000
    nms: Share = 0.6
    max: Positive = 100


class Model(Section):
    name: Literal["yolof"]
    num_classes: Positive
    backbone: Backbone
    encoder: Encoder = Encoder()
    decoder: Decoder = Decoder()
    norm: Norm = "bn"
    anchors: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] = [32, 64, 128, 256, 512]
    match: Match = Match()
    test: Test = Test()


class Split(Section):
    images: str
    """Folder of images, under `root`."""
    annotations: str
    """COCO-format JSON file, under `root`."""


class Shift(Section):
    pixels: Count
    p: Share = 0.5


class Augment(Section):
    short: Annotated[list[Positive], Field(min_length=1)] = [800]
    """Length of the shorter side; one is drawn for each image."""
    max: Positive = 1333
    """The longer side is never longer."""
    flip: Share = 0.5
    """Probability of a mirror image, left and right."""
    flip_vertical: Share = 0.0
    shift: Shift | None = None
    photometric: bool = False
    """Random brightness, contrast, saturation and hue."""


class Resize(Section):
    short: Positive = 800
    max: Positive = 1333


class Data(Section):
    root: str
    """Folder of the data set; a relative one lies under $DETCORE_DATA, or else the working directory."""
    train: Split
    val: Split
    batch: Positive
    """Images in a step, over all GPUs."""
    workers: Count = 4
    """Loader processes of each GPU; 0 loads in the training process."""
    augment: Augment = Augment()
    test: Resize = Resize()
    group_by_aspect: bool = True
    """Batches of only wide or only tall images, so that less is padded."""

    def path(self, name: str) -> Path:
        """Where a file of the data set is."""
        return Path(os.environ.get("DETCORE_DATA", "."), Path(self.root).expanduser(), name)


class Optimizer(Section):
    name: Literal["sgd"] = "sgd"
    lr: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    norm_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of the parameters of norms."""
    backbone_lr: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the learning rate of the backbone."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the whole gradient."""


class Warmup(Section):
    iterations: Count = 0
    factor: Share = 0.001
    """The learning rate starts at this share and rises linearly."""


class Schedule(Section):
    iterations: Positive
    optimizer: Optimizer
    warmup: Warmup = Warmup()
    steps: list[Positive] = []
    """Iterations after which the learning rate becomes a tenth."""
    cosine: bool = False
    """Half a cosine down to zero, instead of `steps`."""
    accumulate: Positive = 1
    """Parts that each GPU's share of the batch is worked off in, to save memory."""
    for_batch: Positive | None = None
    """The batch that these numbers are meant for. Another `data.batch` scales them all: learning rate and
    warm-up factor with the batch, iterations, warm-up and steps against it (arXiv:1706.02677)."""

    @model_validator(mode="after")
    def one_decay(self) -> "Schedule":
        if self.cosine and self.steps:
            raise ValueError("has both `steps` and `cosine`; give one")
        if self.steps != sorted(set(self.steps)) or (self.steps and self.steps[-1] >= self.iterations):
            raise ValueError(f"needs rising `steps` before its {self.iterations} iterations are over")
        return self

    def scaled(self, batch: int) -> "Schedule":
        """The schedule for this batch: itself, unless `for_batch` says that it was made for another."""
        if self.for_batch in (None, batch):
            return self
        factor = batch / self.for_batch
        optimizer = self.optimizer.model_copy(update={"lr": self.optimizer.lr * factor})
        warmup = Warmup(
            iterations=round(self.warmup.iterations / factor), factor=min(1.0, self.warmup.factor * factor)
        )
        changed = {
            "optimizer": optimizer,
            "warmup": warmup,
            "iterations": max(1, round(self.iterations / factor)),
            "steps": [round(step / factor) for step in self.steps],
            "for_batch": batch,
        }
        return self.model_copy(update=changed)


class Evaluation(Section):
    every: Positive | None = None
    """Iterations between evaluations; there is always one at the end."""


class Train(Section):
    seed: Count = 0
    amp: Literal["none", "bf16", "fp16"] = "none"
    deterministic: bool = False
    """Only bit-exact kernels on CUDA, so that a resumed run equals an undisturbed one there, too."""
    channels_last: bool = False
    compile: bool = False
    model: Model
    data: Data
    schedule: Schedule
    evaluation: Evaluation = Evaluation()
    log_every: Positive = 20


if __name__ == "__main__":
    from detcore.check import main  # imports this file again, under its own name

    main()
