"""Heads: towers of convolutions before predictions of classes, boxes and centerness, shared by all levels."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from detcore.backbones.layers import ConvNorm
from detcore.ops.targets import pick

PRIOR = 0.01  # probability of an object that the first predictions start from (arXiv:1708.02002, 4.1)


def tower(channels: int, length: int, norm: str) -> nn.Sequential:
    """3x3 convolutions, each with norm and ReLU."""
    return nn.Sequential(
        *(ConvNorm(channels, channels, 3, norm=norm, bias=True, activation=nn.ReLU) for _ in range(length))
    )


def initialize(head: nn.Module, classifier: nn.Conv2d) -> None:
    """Small weights, no bias but the prior's."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
    nn.init.constant_(classifier.bias, -math.log((1 - PRIOR) / PRIOR))


def rows(maps: Tensor, anchors: int) -> Tensor:
    """(N, A * D, H, W) -> (N, H * W * A, D): index (row * W + column) * A + anchor."""
    return maps.unflatten(1, (anchors, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3)


class Predictions(NamedTuple):
    """Of all levels, finest first, in `rows` of float32; R in all.

    logits      (N, R, K)
    boxes       (N, R, 4), deltas or distances
    centerness  (N, R) logits, if the head has them
    shapes      (H, W) of each level
    """

    logits: Tensor
    boxes: Tensor
    centerness: Tensor | None
    shapes: tuple[tuple[int, int], ...]

    def at(self, rows: Tensor) -> "Predictions":
        """Those of rows (N, r)."""
        quality = self.centerness
        quality = None if quality is None else pick(quality, rows)
        return Predictions(pick(self.logits, rows), pick(self.boxes, rows), quality, self.shapes)


def of_rows(rows: Tensor | None, predicted: Tensor, *places: Tensor) -> tuple[Tensor, ...]:
    """Predictions (N, R, D) and what belongs to each row (R, ...) -> those of rows (N, r), or of all."""
    if rows is None:
        return predicted, *places
    return pick(predicted, rows), *(place[rows] for place in places)


class DenseHead(nn.Module):
    """The head of RetinaNet (arXiv:1708.02002, figure 3), and with centerness that of FCOS
    (arXiv:1904.01355, figure 2).

    anchors     in a cell
    norm        "none" or "gn"; the convolutions have a bias with either
    centerness  the branch that it is predicted from: none, "cls" or "reg"
    scales      levels, if each multiplies the boxes with a learned number of its own
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        anchors: int = 1,
        convs: int = 4,
        norm: str = "none",
        centerness: Literal["cls", "reg"] | None = None,
        scales: int = 0,
    ) -> None:
        super().__init__()
        self.anchors, self.branch = anchors, centerness
        self.cls_tower = tower(channels, convs, norm)
        self.reg_tower = tower(channels, convs, norm)
        self.cls_score = nn.Conv2d(channels, anchors * num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(channels, anchors * 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, anchors, 3, padding=1) if centerness else None
        self.scales = nn.ParameterList(torch.ones(()) for _ in range(scales))
        initialize(self, self.cls_score)

    def forward(self, levels: Sequence[Tensor]) -> Predictions:
        logits, boxes, centerness = [], [], []
        for i, level in enumerate(levels):
            classes, regression = self.cls_tower(level), self.reg_tower(level)
            logits.append(self._rows(self.cls_score(classes)))
            box = self._rows(self.bbox_pred(regression))
            boxes.append(box * self.scales[i] if self.scales else box)
            if self.centerness is not None:
                branch = classes if self.branch == "cls" else regression
                centerness.append(self._rows(self.centerness(branch)).squeeze(-1))
        return Predictions(
            torch.cat(logits, dim=1),
            torch.cat(boxes, dim=1),
            torch.cat(centerness, dim=1) if centerness else None,
            tuple((level.shape[-2], level.shape[-1]) for level in levels),
        )

    def _rows(self, maps: Tensor) -> Tensor:
        return rows(maps.float(), self.anchors)
