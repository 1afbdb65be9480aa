"""The `train` section of a recipe: its schema and defaults. Strict, and read without torch."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from detcore.config.models import Model
from detcore.config.section import Count, Factor, Positive, Section, Share

ENOUGH_FOR_NORM = 8  # images on a GPU, as in YOLOF's published run; with fewer its batch norm suffers


class Split(Section):
    images: str
    """Folder of images, under `root`."""
    annotations: str
    """COCO-format JSON file, under `root`."""


class Shift(Section):
    pixels: Count
    p: Share = 0.5


class Expand(Section):
    most: Annotated[float, Field(ge=1)] = 4.0
    """The canvas is at most so many times as wide and high as the image."""
    p: Share = 0.5


class Crop(Section):
    overlaps: list[Share] = [0.1, 0.3, 0.5, 0.7, 0.9]
    """Least overlaps (IoU) of window and objects, of which one is drawn, or none, or no crop at all."""
    least: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Width and height of the window, at least, in those of the image."""


class CornerCrop(Section):
    scales: Annotated[list[Factor], Field(min_length=1)] = [0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3]
    """Side of the window, in that of the `square` it becomes."""
    border: Count = 128
    """Pixels at the image's edges where the window's centre is not; fewer where the image is small."""


class Augment(Section):
    short: Annotated[list[Positive], Field(min_length=1)] = [800]
    """Length of the shorter side; one is drawn for each image."""
    max: Positive = 1333
    """The longer side is never longer."""
    square: Positive | None = None
    """Both sides, whatever the shape was; `short` and `max` do not matter then."""
    expand: Expand | None = None
    """SSD's zooming out: the image on a larger canvas of the mean colour."""
    crop: Crop | None = None
    """SSD's random crop."""
    corner_crop: CornerCrop | None = None
    """CornerNet's random crop: a square window that may reach beyond the image, where all is black."""
    flip: Share = 0.5
    """Probability of a mirror image, left and right."""
    flip_vertical: Share = 0.0
    shift: Shift | None = None
    photometric: bool = False
    """Random brightness, contrast, saturation and hue, as SSD has them."""
    channel_swap: Share = 0.0
    """With `photometric`: probability that red, green and blue change places."""
    jitter: Share = 0.0
    """Largest change of brightness, contrast and saturation, as CornerNet has them; there 0.4."""
    lighting: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of a colour's way along the principal components; in CornerNet 0.1."""

    @model_validator(mode="after")
    def together(self) -> "Augment":
        if self.corner_crop and not self.square:
            raise ValueError("needs `square` with `corner_crop`")
        if self.corner_crop and (self.expand or self.crop):
            raise ValueError("has `corner_crop` and also `expand` or `crop`; give one or the others")
        if self.channel_swap and not self.photometric:
            raise ValueError("needs `photometric: true` with `channel_swap`")
        return self


class Resize(Section):
    short: Positive | None = 800
    """Length of the shorter side; null: images keep their size."""
    max: Positive = 1333
    square: Positive | None = None
    """Both sides, whatever the shape was; `short` and `max` do not matter then."""


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
    name: Literal["sgd", "adam"] = "sgd"
    lr: Factor
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of Adam, beta 1; its beta 2 is 0.999."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    norm_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of the parameters of norms."""
    backbone_lr: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the learning rate of the backbone."""
    bias_lr: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the learning rate of biases."""
    bias_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay of biases; null: that of the weights they belong to."""
    bias_norms: bool = True
    """Whether the biases of norms are among them: yes with FCOS's authors, no in mmdetection."""
    clip: Factor | None = None
    """Largest norm of the whole gradient."""


class Warmup(Section):
    iterations: Count = 0
    factor: Share = 0.001
    """The learning rate starts at this share and rises linearly."""
    constant: bool = False
    """It stays at this share and does not rise."""


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
    warm-up factor, unless it is constant, with the batch, iterations, warm-up and steps against it
    (arXiv:1706.02677)."""

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
        # A rise starts at one iteration's worth; a constant is a share of the rate, and that is scaled.
        start = self.warmup.factor if self.warmup.constant else min(1.0, self.warmup.factor * factor)
        iterations = round(self.warmup.iterations / factor)
        warmup = self.warmup.model_copy(update={"iterations": iterations, "factor": start})
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
    skip_nonfinite: Count = 0
    """So many steps of a run may have a loss that is not finite, and change nothing; one more ends it."""
    deterministic: bool = False
    """Only bit-exact kernels on CUDA, so that a resumed run equals an undisturbed one there, too."""
    channels_last: bool = False
    compile: bool = False
    model: Model
    data: Data
    schedule: Schedule
    evaluation: Evaluation = Evaluation()
    log_every: Positive = 20

    def at_once(self, ranks: int) -> int:
        """Images that each of so many ranks sees in one forward pass."""
        return self.data.batch // (ranks * self.schedule.accumulate)

    def on(self, ranks: int) -> "Train":
        """As so many ranks train it: the schedule is the batch's, and `norm: auto` is decided."""
        model = self.model
        if getattr(model, "norm", None) == "auto":
            norm = "sync_bn" if self.at_once(ranks) < ENOUGH_FOR_NORM else "bn"
            model = model.model_copy(update={"norm": norm})
        return self.model_copy(update={"schedule": self.schedule.scaled(self.data.batch), "model": model})
