"""SSD (arXiv:1512.02325) with depthwise separable convolutions: SSDLite, arXiv:1801.04381, section 6.2.

With mmdetection's numbers, or those of the model that TensorFlow released.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detcore.backbones import build_backbone
from detcore.backbones.layers import ConvNorm
from detcore.models.dense import DenseDetector
from detcore.models.heads import Predictions, of_rows, rows
from detcore.ops.anchors import boxes_around, grid_points
from detcore.ops.coder import DeltaCoder
from detcore.ops.losses import mean_over_ranks, smooth_l1_loss
from detcore.ops.matching import learned
from detcore.ops.matching.ssd import hard_negatives, ssd_match
from detcore.ops.targets import Targets

NORM_EPS, NORM_MOMENTUM = 1e-3, 0.03


class ExtraLayer(nn.Sequential):
    """Half the resolution: 1x1 to half the channels, 3x3 depthwise, 1x1."""

    def __init__(self, inputs: int, outputs: int, norm: str, same: bool) -> None:
        middle = outputs // 2
        super().__init__()
        self.reduce = ConvNorm(inputs, middle, 1, norm=norm, activation=nn.ReLU6)
        self.depthwise = ConvNorm(
            middle, middle, 3, norm=norm, stride=2, groups=middle, same=same, activation=nn.ReLU6
        )
        self.pointwise = ConvNorm(middle, outputs, 1, norm=norm, activation=nn.ReLU6)


class ExtraLayers(nn.Module):
    """Two features -> these and one level for each of `outputs`, (N, channels, H, W) each."""

    def __init__(self, inputs: Sequence[int], outputs: Sequence[int], norm: str, same: bool = False) -> None:
        super().__init__()
        self.channels = (*inputs, *outputs)
        pairs = zip(self.channels[len(inputs) - 1 : -1], outputs, strict=True)
        self.layers = nn.ModuleList(ExtraLayer(before, after, norm, same) for before, after in pairs)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        levels = list(features)
        for layer in self.layers:
            levels.append(layer(levels[-1]))
        return tuple(levels)


class SSDLiteHead(nn.Module):
    """On each level two predictors of its own: 3x3 depthwise, then 1x1.

    channels  of each level
    anchors   prior boxes in a cell of each level
    """

    def __init__(self, channels: Sequence[int], num_classes: int, anchors: Sequence[int], norm: str) -> None:
        super().__init__()
        self.anchors = tuple(anchors)

        def predictors(outputs: int) -> nn.ModuleList:
            return nn.ModuleList(
                nn.Sequential(
                    ConvNorm(width, width, 3, norm=norm, groups=width, activation=nn.ReLU6),
                    nn.Conv2d(width, count * outputs, 1),
                )
                for width, count in zip(channels, anchors, strict=True)
            )

        self.cls_score, self.bbox_pred = predictors(num_classes + 1), predictors(4)

    def forward(self, levels: Sequence[Tensor]) -> Predictions:
        """Logits have one column more than there are classes: the last is background."""
        logits, boxes = (
            torch.cat([rows(branch[i](level).float(), self.anchors[i]) for i, level in enumerate(levels)], 1)
            for branch in (self.cls_score, self.bbox_pred)
        )
        return Predictions(logits, boxes, None, tuple((x.shape[-2], x.shape[-1]) for x in levels))


def prior_shapes(
    sizes: Sequence[float], ratios: Sequence[float], style: str
) -> list[list[tuple[float, float]]]:
    """(width, height) of the prior boxes of each level, in pixels (SSD, section 2.2).

    Level k has a square of sizes[k], one whose side is the geometric mean of sizes[k] and sizes[k + 1], and
    for each ratio r a box of the area sizes[k]^2 that is r times as wide as high, and one that is r times as
    high. TensorFlow has the second square last, counts 1/3 as 0.3333, and on its first level has a square of
    half the size and the two boxes of the first ratio only.
    """
    levels = []
    for k, (size, above) in enumerate(pairwise(sizes)):
        small, large = (size, size), (math.sqrt(size * above),) * 2
        aspects = [aspect for ratio in ratios for aspect in (ratio, 1 / ratio)]
        if style == "tensorflow":
            aspects = [round(aspect, 4) for aspect in aspects]
        oblong = [(size * math.sqrt(aspect), size / math.sqrt(aspect)) for aspect in aspects]
        if style != "tensorflow":
            levels.append([small, large, *oblong])
        elif k > 0:
            levels.append([small, *oblong, large])
        else:
            levels.append([(size / 2, size / 2), *oblong[:2]])
    return levels


class SSDLite(DenseDetector):
    """R prior boxes in all, in the middle of each cell.

    neck       two features -> levels
    strides    of each level, in pixels
    shapes     see `prior_shapes`
    positive   see `ssd_match`
    negatives  background that is learnt for each object that is
    pretrained whether the backbone comes with weights, whose batch norm then stays as they know it
    style      "mmdet" or "tensorflow". The latter has a sigmoid for each class and background, no softmax
               over them, and cuts boxes to the image after NMS.
    """

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module,
        head: SSDLiteHead,
        strides: Sequence[float],
        shapes: Sequence[Sequence[tuple[float, float]]],
        *,
        positive: float = 0.5,
        negatives: int = 3,
        pretrained: bool = False,
        style: str = "mmdet",
        **test: Any,
    ) -> None:
        super().__init__(backbone, neck, head, **test)
        self.strides, self.shapes = strides, shapes
        self.positive, self.negatives = positive, negatives
        self.sigmoid = style == "tensorflow"
        self.clip_first = not self.sigmoid
        self.coder = DeltaCoder((10.0, 10.0, 5.0, 5.0), symmetric=True)
        self._initialize([neck, head] if pretrained else [backbone, neck, head])

    def _initialize(self, new: Sequence[nn.Module]) -> None:
        for module in (module for part in new for module in part.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.03)
            if isinstance(module, nn.BatchNorm2d):
                module.eps, module.momentum = NORM_EPS, NORM_MOMENTUM
        for module in self.head.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.001)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def priors(self, predictions: Predictions) -> Tensor:
        """(R, 4), pixels."""
        device = predictions.boxes.device
        levels = zip(predictions.shapes, self.strides, self.shapes, strict=True)
        return torch.cat(
            [boxes_around(grid_points(*size, stride, 0.5, device), shapes) for size, stride, shapes in levels]
        )

    def level_rows(self, predictions: Predictions) -> list[int]:
        levels = zip(predictions.shapes, self.head.anchors, strict=True)
        return [height * width * count for (height, width), count in levels]

    def decode(self, predictions: Predictions, rows: Tensor | None = None) -> Tensor:
        return self.coder.decode(*of_rows(rows, predictions.boxes, self.priors(predictions)))

    def scores(self, predictions: Predictions) -> tuple[Tensor, None]:
        logits = predictions.logits
        return (logits.sigmoid() if self.sigmoid else logits.softmax(dim=-1))[..., :-1], None

    def best(self, predictions: Predictions) -> tuple[Tensor, None]:
        return self.scores(predictions)[0].amax(dim=-1), None  # a softmax needs all logits

    def assign(self, priors: Tensor, targets: Targets) -> Tensor:
        """SSD, section 2.2, "matching strategy" -> (N, R)."""
        return ssd_match(priors, targets, self.positive)

    def losses(self, predictions: Predictions, targets: Targets) -> dict[str, Tensor]:
        """Equations 1 to 3: cross entropy of the positive and the hard negative prior boxes, smooth L1 over
        the deltas of the positive ones. Both are sums divided by the number of positive ones, mean over
        ranks. As in mmdetection an image without any counts as one; it adds nothing to the sums."""
        priors = self.priors(predictions)
        assigned = self.assign(priors, targets)
        labels, boxes = learned(assigned, targets, otherwise=priors)
        positive = assigned >= 0
        confidence = self.class_losses(predictions.logits, labels)
        counts = positive | hard_negatives(confidence, positive, self.negatives)
        deltas = self.coder.encode(boxes, priors)
        location = smooth_l1_loss(predictions.boxes, deltas, beta=1.0).sum(dim=-1)
        normalizer = mean_over_ranks(positive.sum(dim=1).clamp(min=1).sum().float())
        return {
            "loss_cls": torch.where(counts, confidence, 0.0).sum() / normalizer,
            "loss_box_reg": torch.where(positive, location, 0.0).sum() / normalizer,
        }

    def class_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (N, R, K + 1) against labels (N, R): a class, or BACKGROUND -> (N, R)."""
        column = torch.where(labels >= 0, labels, logits.shape[-1] - 1)
        if not self.sigmoid:
            return F.cross_entropy(logits.movedim(-1, 1), column, reduction="none")
        wanted = torch.zeros_like(logits).scatter(-1, column[..., None], 1.0)
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(dim=-1)


def build_ssdlite(cfg: Any) -> SSDLite:
    """cfg: the recipe's `train.model`."""
    backbone = build_backbone(cfg.backbone, (16, 32))
    neck = ExtraLayers(backbone.channels, cfg.extra, cfg.norm, same=cfg.style == "tensorflow")
    shapes = prior_shapes(cfg.priors.sizes, cfg.priors.ratios, cfg.style)
    head = SSDLiteHead(neck.channels, cfg.num_classes, [len(level) for level in shapes], cfg.norm)
    return SSDLite(
        backbone,
        neck,
        head,
        cfg.priors.strides,
        shapes,
        positive=cfg.match.positive,
        negatives=cfg.match.negatives,
        pretrained=cfg.backbone.weights is not None,
        style=cfg.style,
        score=cfg.test.score,
        topk=cfg.test.topk,
        nms_iou=cfg.test.nms,
        max_detections=cfg.test.max,
    )
