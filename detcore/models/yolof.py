"""You Only Look One-level Feature, arXiv:2103.09460: one feature map of stride 32, one head, no pyramid."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from detcore.backbones import build_backbone
from detcore.backbones.layers import ConvNorm, Normalize
from detcore.models.heads import initialize, rows, tower
from detcore.ops.anchors import grid_anchors, grid_points
from detcore.ops.coder import DeltaCoder
from detcore.ops.focal import focal_loss
from detcore.ops.losses import giou_loss, mean_over_ranks
from detcore.ops.matching import learned
from detcore.ops.matching.uniform import Matches, uniform_match
from detcore.ops.select import inside, select
from detcore.ops.targets import Candidates, Detections, Targets, pick

MAX_LOGIT = math.log(1e8)


class DilatedBlock(nn.Module):
    """x + (1x1 down, 3x3 with `dilation`, 1x1 up); norm and ReLU after each, none after the sum."""

    def __init__(self, channels: int, mid_channels: int, dilation: int, norm: str) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, mid_channels, 1, norm=norm, bias=True, activation=nn.ReLU)
        self.conv2 = ConvNorm(
            mid_channels, mid_channels, 3, norm=norm, dilation=dilation, bias=True, activation=nn.ReLU
        )
        self.conv3 = ConvNorm(mid_channels, channels, 1, norm=norm, bias=True, activation=nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv3(self.conv2(self.conv1(x)))


class DilatedEncoder(nn.Module):
    """Section 4.1: a projection, then residual blocks whose dilations cover objects of every size.

    (N, in_channels, H, W) -> (N, channels, H, W). The convolutions have a bias although a norm follows,
    as in the reference.
    """

    def __init__(
        self, in_channels: int, channels: int, mid_channels: int, dilations: Sequence[int], norm: str = "bn"
    ) -> None:
        super().__init__()
        self.lateral = ConvNorm(in_channels, channels, 1, norm=norm, bias=True)
        self.fpn = ConvNorm(channels, channels, 3, norm=norm, bias=True)
        self.blocks = nn.Sequential(*(DilatedBlock(channels, mid_channels, d, norm) for d in dilations))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        for projection in (self.lateral, self.fpn):
            nn.init.kaiming_uniform_(projection.conv.weight, a=1)  # Caffe2's Xavier: by fan-in alone

    def forward(self, c5: Tensor) -> Tensor:
        return self.blocks(self.fpn(self.lateral(c5)))


class Decoder(nn.Module):
    """Figure 5: a short branch for classes, a longer one for boxes and, implicitly, objectness.

    (N, channels, H, W) -> class logits (N, A * K, H, W), objectness (N, A, H, W), deltas (N, A * 4, H, W).
    """

    def __init__(
        self, channels: int, num_classes: int, anchors: int, cls_convs: int, reg_convs: int, norm: str = "bn"
    ) -> None:
        super().__init__()
        self.cls_tower = tower(channels, cls_convs, norm)
        self.reg_tower = tower(channels, reg_convs, norm)
        self.cls_score = nn.Conv2d(channels, anchors * num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(channels, anchors * 4, 3, padding=1)
        self.objectness = nn.Conv2d(channels, anchors, 3, padding=1)
        initialize(self, self.cls_score)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        regression = self.reg_tower(features)
        return (
            self.cls_score(self.cls_tower(features)),
            self.objectness(regression),
            self.bbox_pred(regression),
        )


def joint_logits(classes: Tensor, objectness: Tensor) -> Tensor:
    """Logits of sigmoid(classes) * sigmoid(objectness), where (..., K) meets (..., 1).

    log(pq / (1 - pq)) = c + o - log(1 + e^c + e^o). As in the reference e^c and e^o stop at 1e8; the
    exponent is clamped, not its result, so that a large logit has a zero gradient and no NaN.
    """
    c, o = classes.clamp(max=MAX_LOGIT).exp(), objectness.clamp(max=MAX_LOGIT).exp()
    return classes + objectness - torch.log1p(c + o)


class YOLOF(nn.Module):
    """backbone -> C5 -> encoder -> decoder; A square anchors a cell, R = H * W * A in all.

    backbone                      its last feature is C5, its `pixels` what it wants to see
    stride                        of C5, in pixels: 32, or 16 where res5 is dilated (DC5)
    anchors                       side of each, in pixels
    top, pos_ignore, neg_ignore   see `uniform_match`
    score, topk                   candidates: at most `topk` an image, with a score above `score`
    nms_iou, max_detections       of which NMS by class leaves at most `max_detections`
    """

    def __init__(
        self,
        backbone: nn.Module,
        encoder: DilatedEncoder,
        decoder: Decoder,
        anchors: Sequence[float],
        *,
        stride: int = 32,
        top: int = 4,
        pos_ignore: float = 0.15,
        neg_ignore: float = 0.7,
        score: float = 0.05,
        topk: int = 1000,
        nms_iou: float = 0.6,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        self.backbone, self.encoder, self.decoder = backbone, encoder, decoder
        self.normalize = Normalize(backbone.pixels)
        self.anchor_sizes = tuple(anchors)
        self.stride = stride
        self.coder = DeltaCoder(center_clamp=32.0)  # pixels, at either stride
        self.match = {"top": top, "pos_ignore": pos_ignore, "neg_ignore": neg_ignore}
        self.score, self.topk, self.nms_iou, self.max_detections = score, topk, nms_iou, max_detections

    def forward(self, images: Tensor, sizes: Tensor, targets: Targets) -> dict[str, Tensor]:
        """images (N, 3, H, W) uint8 RGB, sizes (N, 2) true (h, w) -> loss_cls and loss_box_reg, scalars."""
        return self.losses(*self.predict(self.features(images, sizes)), targets)

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Tensor) -> Detections:
        """Detections inside the true image, in pixels of `images`. NMS comes before the clipping, as in
        detectron2: clipping first changes which boxes are kept."""
        logits, deltas = self.predict(self.features(images, sizes))
        return inside(self.select(logits, self.decode(deltas)), sizes)

    @torch.no_grad()
    def scored(self, images: Tensor, sizes: Tensor) -> Candidates:
        """What `detect` chooses from."""
        logits, deltas = self.predict(self.features(images, sizes))
        return Candidates(self.decode(deltas), self._rows(logits).sigmoid())

    def features(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Bytes to C5 (N, C, H / stride, W / stride)."""
        return self.backbone(self.normalize(images, sizes))[-1]

    def predict(self, c5: Tensor) -> tuple[Tensor, Tensor]:
        """C5 -> joint logits (N, A * K, H, W) and deltas (N, A * 4, H, W), both float32."""
        classes, objectness, deltas = self.decoder(self.encoder(c5))
        classes = classes.float().unflatten(1, (len(self.anchor_sizes), -1))
        logits = joint_logits(classes, objectness.float()[:, :, None])
        return logits.flatten(1, 2), deltas.float()

    def anchors(self, maps: Tensor) -> Tensor:
        """Anchors (R, 4) of a map (..., H, W), in pixels."""
        points = grid_points(*maps.shape[-2:], self.stride, 0.0, maps.device)
        return grid_anchors(points, self.anchor_sizes)

    def decode(self, deltas: Tensor) -> Tensor:
        """Deltas (N, A * 4, H, W) -> boxes (N, R, 4) in pixels, not clipped."""
        return self.coder.decode(self._rows(deltas), self.anchors(deltas))

    def assign(self, boxes: Tensor, anchors: Tensor, targets: Targets) -> Matches:
        """Section 4.2 for predicted boxes (N, R, 4)."""
        return uniform_match(boxes, anchors, targets, **self.match)

    def losses(self, logits: Tensor, deltas: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Focal loss over all anchors that are not ignored, GIoU loss over positive pairs; both are sums
        divided by the mean over ranks of the number of foreground anchors.

        An anchor in two pairs counts twice in the box loss and once as foreground, as in the reference.
        """
        with torch.autocast(logits.device.type, enabled=False):
            boxes, anchors = self.decode(deltas), self.anchors(deltas)
            matches = self.assign(boxes, anchors, targets)
            foreground = matches.assigned >= 0
            normalizer = mean_over_ranks(foreground.sum().float()).clamp(min=1)

            labels, _ = learned(matches.assigned, targets, otherwise=anchors)
            loss_cls = focal_loss(self._rows(logits), labels) / normalizer

            giou = giou_loss(pick(boxes, matches.anchor), pick(targets.boxes, matches.gt))
            loss_box = torch.where(matches.positive, giou, 0.0).sum() / normalizer
        return {"loss_cls": loss_cls, "loss_box_reg": loss_box}

    def select(self, logits: Tensor, boxes: Tensor) -> Detections:
        """The best candidates after NMS by class, of boxes (N, R, 4), not clipped."""
        rows = self._rows(logits)
        return select(
            rows.amax(dim=-1).sigmoid(),
            lambda index: pick(rows, index).sigmoid(),
            partial(pick, boxes),
            [boxes.shape[1]],
            score=self.score,
            topk=self.topk,
            nms_iou=self.nms_iou,
            limit=self.max_detections,
        )

    def _rows(self, maps: Tensor) -> Tensor:
        return rows(maps, len(self.anchor_sizes))


def build_yolof(cfg: Any) -> YOLOF:
    """cfg: the recipe's `train.model`."""
    stride, channels, norm = 16 if cfg.backbone.dilate else 32, cfg.encoder.channels, cfg.norm
    backbone = build_backbone(cfg.backbone, (stride,))
    encoder = DilatedEncoder(
        backbone.channels[-1], channels, cfg.encoder.mid_channels, cfg.encoder.dilations, norm
    )
    decoder = Decoder(
        channels, cfg.num_classes, len(cfg.anchors), cfg.decoder.cls_convs, cfg.decoder.reg_convs, norm
    )
    return YOLOF(
        backbone,
        encoder,
        decoder,
        cfg.anchors,
        stride=stride,
        top=cfg.match.top,
        pos_ignore=cfg.match.pos_ignore,
        neg_ignore=cfg.match.neg_ignore,
        score=cfg.test.score,
        topk=cfg.test.topk,
        nms_iou=cfg.test.nms,
        max_detections=cfg.test.max,
    )
