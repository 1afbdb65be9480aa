"""CornerNet, arXiv:1808.01244: objects as pairs of corners on a map of stride 4, without anchors."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detcore.backbones.hourglass import HourglassNet
from detcore.backbones.layers import ConvNorm, Normalize
from detcore.ops.boxes import clip
from detcore.ops.canvas import centered
from detcore.ops.corners import (
    EPSILON,
    CornerMaps,
    Pairs,
    at_cells,
    both_views,
    bottom_pool,
    corner_targets,
    focal_loss,
    left_pool,
    pair_corners,
    pull_and_push,
    right_pool,
    top_pool,
)
from detcore.ops.losses import mean_over_ranks
from detcore.ops.nms import soft_nms
from detcore.ops.targets import Candidates, Detections, Targets, compact, pick

PRIOR_BIAS = -2.19  # of heat maps: the first predictions are sigmoid(-2.19) = 0.1


class CornerPooling(nn.Module):
    """Figure 7: two branches, each pooled its way, added, beside a 1x1 shortcut. (N, C, H, W) -> the same."""

    def __init__(self, channels: int, mid_channels: int, vertical: Any, horizontal: Any, norm: str) -> None:
        super().__init__()
        self.pool1, self.pool2 = vertical, horizontal
        self.branch1 = ConvNorm(channels, mid_channels, 3, norm=norm, activation=nn.ReLU)
        self.branch2 = ConvNorm(channels, mid_channels, 3, norm=norm, activation=nn.ReLU)
        self.pooled = ConvNorm(mid_channels, channels, 3, norm=norm)
        self.shortcut = ConvNorm(channels, channels, 1, norm=norm)
        self.output = ConvNorm(channels, channels, 3, norm=norm, activation=nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool1(self.branch1(x)) + self.pool2(self.branch2(x))
        return self.output(F.relu(self.pooled(pooled) + self.shortcut(x)))


class CornerHead(nn.Module):
    """Figure 4, one kind of corner: corner pooling, then heat map, embedding and offset."""

    def __init__(self, channels: int, num_classes: int, pooling: CornerPooling) -> None:
        super().__init__()

        def predictor(outputs: int) -> nn.Sequential:
            hidden = nn.Conv2d(channels, channels, 3, padding=1)
            return nn.Sequential(hidden, nn.ReLU(), nn.Conv2d(channels, outputs, 1))

        self.pooling = pooling
        self.heat, self.tag, self.offset = predictor(num_classes), predictor(1), predictor(2)
        nn.init.constant_(self.heat[-1].bias, PRIOR_BIAS)

    def forward(self, feature: Tensor) -> CornerMaps:
        """(N, C, H, W) -> maps in float32."""
        x = self.pooling(feature)
        return CornerMaps(self.heat(x).float(), self.tag(x).float(), self.offset(x).float())


class Corners(NamedTuple):
    """The two kinds of corner, of one stack."""

    top_left: CornerMaps
    bottom_right: CornerMaps


class CornerNet(nn.Module):
    """hourglasses -> one feature a stack -> heads of their own for the two kinds of corner.

    backbone         a `HourglassNet`
    pool_channels    of the branches that corner pooling works on
    pull, push       weights of these losses, which are means over images
    iou              a corner may be this far off: its box still has this IoU with the object's
    topk, kernel     corners of a kind that are paired, largest of the kernel x kernel cells around them
    tag_distance     how different the embeddings of a pair may be
    pairs            the best of them that soft NMS sees, of each view
    sigma            of soft NMS
    flip             look at the mirror image, too
    max_detections   that are left in the end
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        pool_channels: int = 128,
        norm: str = "bn",
        *,
        pull: float = 0.49,
        push: float = 0.49,
        iou: float = 0.3,
        topk: int = 100,
        kernel: int = 3,
        tag_distance: float = 0.5,
        pairs: int = 1000,
        sigma: float = 0.5,
        flip: bool = False,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.normalize = Normalize(backbone.pixels)

        def heads(vertical: Any, horizontal: Any) -> nn.ModuleList:
            return nn.ModuleList(
                CornerHead(
                    channels, num_classes, CornerPooling(channels, pool_channels, vertical, horizontal, norm)
                )
                for channels in backbone.channels
            )

        self.top_left, self.bottom_right = heads(top_pool, left_pool), heads(bottom_pool, right_pool)
        self.num_classes, self.iou = num_classes, iou
        self.pull, self.push = pull, push
        self.pairing = {"k": topk, "kernel": kernel, "tag_distance": tag_distance, "limit": pairs}
        self.sigma, self.flip, self.max_detections = sigma, flip, max_detections

    def forward(self, images: Tensor, sizes: Tensor, targets: Targets) -> dict[str, Tensor]:
        """images (N, 3, H, W) uint8 RGB, sizes (N, 2) true (h, w) -> four losses, scalars."""
        x = self.normalize(images, sizes)
        below, right = (-side % self.backbone.divisor for side in x.shape[-2:])
        features = self.backbone(F.pad(x, (0, right, 0, below)))
        return self.losses([self.predict(features, stack) for stack in range(len(features))], targets)

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Tensor) -> Detections:
        """Detections inside the true image, in pixels of `images` (section 4.2).

        Images whose canvases are of one size go through the network together, so the host looks at `sizes`
        and what is found in an image does not depend on the others.
        """
        mask = self.backbone.divisor - 1
        shapes = [(height | mask, width | mask) for height, width in sizes.tolist()]
        slots = (len(images), self.max_detections)
        found = Detections(
            boxes=torch.zeros(*slots, 4, device=images.device),
            scores=torch.zeros(slots, device=images.device),
            labels=torch.full(slots, -1, device=images.device),
            count=torch.zeros(len(images), dtype=torch.int64, device=images.device),
        )
        for shape in sorted(set(shapes)):
            alike = torch.tensor([own == shape for own in shapes], device=images.device).nonzero()[:, 0]
            some = self.detect_alike(images[alike], sizes[alike], shape)
            for all_of_it, part in zip(found[:3], some[:3], strict=True):
                all_of_it[alike, : part.shape[1]] = part
            found.count[alike] = some.count
        return found

    def detect_alike(self, images: Tensor, sizes: Tensor, shape: tuple[int, int]) -> Detections:
        """On canvases of `shape` (height, width), which is a pixel less than the backbone's divisor asks for:
        the reference's `size | 127`."""
        canvas, border = centered(images, sizes, shape, self.backbone.around)
        boxes, scores, labels = self.scored(canvas, sizes.new_tensor(shape).expand_as(sizes))
        boxes = clip(boxes - border.repeat(1, 2)[:, None], sizes)
        best, scores = soft_nms(boxes, scores, labels, self.max_detections, self.sigma)
        real = scores >= 0
        return compact(Detections(pick(boxes, best), scores, pick(labels, best), real.sum(1)), real)

    @torch.no_grad()
    def scored(self, images: Tensor, sizes: Tensor) -> Candidates:
        """The pairs that soft NMS sees, of canvases as in `detect_alike`. A score of -1: no pair."""
        x = self.normalize(images, sizes)
        if self.flip:
            x = torch.cat([x, x.flip(-1)])
        pairs = self.decode(self.predict(self.backbone(x), -1))
        return Candidates(*(both_views(pairs, images.shape[-1]) if self.flip else pairs)[:3])

    def predict(self, features: Sequence[Tensor], stack: int) -> Corners:
        """What the heads of a stack say of its feature."""
        feature = features[stack]
        return Corners(self.top_left[stack](feature), self.bottom_right[stack](feature))

    def decode(self, corners: Corners) -> Pairs:
        """Pairs with boxes in pixels of the network's input."""
        pairs = pair_corners(*corners, **self.pairing)
        (height, width), (down, across) = (corners.top_left.heat.shape[-2:], pixels_of(corners))
        scale = pairs.boxes.new_tensor([across / width, down / height]).repeat(2)
        return pairs._replace(boxes=pairs.boxes * scale)

    def losses(self, stacks: Sequence[Corners], targets: Targets) -> dict[str, Tensor]:
        """Equation 8, mean over stacks: focal loss of heat maps, pull and push of embeddings, offsets.

        Focal and offset losses are sums divided by the mean over ranks of the number of corner cells and of
        objects; pull and push are means over images. The reference divides by the counts of one GPU, and
        sums pull and push over the images of one GPU, of which it has 4.9 (49 on ten): its weights of 0.1
        are 0.49 here, whatever the number of GPUs.
        """
        maps = stacks[0].top_left.heat
        with torch.autocast(maps.device.type, enabled=False):
            cells = maps.shape[-2:]
            wanted = corner_targets(targets, self.num_classes, pixels_of(stacks[0]), cells, self.iou)
            real = targets.labels >= 0
            counts = torch.stack([*((kind.heat == 1).sum() for kind in wanted), real.sum()])
            *corners, objects = mean_over_ranks(counts.float())
            focal = pull = push = offset = maps.new_zeros(())
            for kinds in stacks:
                for kind, want, count in zip(kinds, wanted, corners, strict=True):
                    focal = focal + focal_loss(kind.heat, want.heat) / torch.where(count > 0, count, 1.0)
                    error = F.smooth_l1_loss(at_cells(kind.offset, want.cell), want.offset, reduction="none")
                    offset = offset + torch.where(real[..., None], error, 0.0).sum() / (objects + EPSILON)
                tags = [
                    at_cells(kind.tag, want.cell)[..., 0] for kind, want in zip(kinds, wanted, strict=True)
                ]
                near, apart = pull_and_push(*tags, real)
                pull, push = pull + near.mean(), push + apart.mean()
        terms = {
            "loss_focal": focal,
            "loss_pull": self.pull * pull,
            "loss_push": self.push * push,
            "loss_offset": offset,
        }
        return {name: loss / len(stacks) for name, loss in terms.items()}


def pixels_of(corners: Corners) -> tuple[int, int]:
    """(height, width) of the network's input: of the two inputs with this map the smaller one."""
    height, width = corners.top_left.heat.shape[-2:]
    return 4 * height - 1, 4 * width - 1


def build_cornernet(cfg: Any) -> CornerNet:
    """cfg: the recipe's `train.model`."""
    hourglasses = cfg.backbone
    return CornerNet(
        HourglassNet(
            hourglasses.stacks,
            hourglasses.dims,
            hourglasses.blocks,
            hourglasses.stem,
            cfg.norm,
            hourglasses.style,
        ),
        cfg.num_classes,
        cfg.pool_channels,
        cfg.norm,
        pull=cfg.pull,
        push=cfg.push,
        iou=cfg.iou,
        topk=cfg.test.topk,
        tag_distance=cfg.test.tag_distance,
        pairs=cfg.test.pairs,
        sigma=cfg.test.sigma,
        flip=cfg.test.flip,
        max_detections=cfg.test.max,
    )
