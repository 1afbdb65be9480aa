"""Objects as pairs of corners (CornerNet, arXiv:1808.01244): corner pooling, targets, losses, pairing."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detcore.ops.targets import Targets, pick

REJECTED = -1.0
PROBABILITY = 1e-4  # probabilities stay this far from 0 and 1; beyond, a logit has no gradient
EPSILON = 1e-4  # the reference's, beside counts


# Among equals the gradient of cummax goes to the last that it passes, the reference's to the first. What is
# pooled comes from a ReLU, so equals are zeros, and those have no gradient.
def top_pool(x: Tensor) -> Tensor:
    """(..., H, W): each value becomes the largest of those in its column from its own row down, eq. 6."""
    return x.flip(-2).cummax(-2).values.flip(-2)


def left_pool(x: Tensor) -> Tensor:
    """(..., H, W): each value becomes the largest of those in its row from its own column on, eq. 7."""
    return x.flip(-1).cummax(-1).values.flip(-1)


def bottom_pool(x: Tensor) -> Tensor:
    """(..., H, W): each value becomes the largest of those in its column down to its own row."""
    return x.cummax(-2).values


def right_pool(x: Tensor) -> Tensor:
    """(..., H, W): each value becomes the largest of those in its row up to its own column."""
    return x.cummax(-1).values


class CornerMaps(NamedTuple):
    """What the network says of one kind of corner, on a grid of H x W cells.

    heat    (N, K, H, W) logits of a corner of class K
    tag     (N, 1, H, W) the embedding, alike for the two corners of an object
    offset  (N, 2, H, W) where in its cell the corner is (x, y), in cells
    """

    heat: Tensor
    tag: Tensor
    offset: Tensor


class CornerTargets(NamedTuple):
    """What the network should say of one kind of corner of G objects an image.

    heat    (N, K, H, W) 1 at corners, a Gaussian around them
    cell    (N, G) int64, row * W + column
    offset  (N, G, 2) where in its cell the corner is (x, y), in cells
    """

    heat: Tensor
    cell: Tensor
    offset: Tensor


def gaussian_radius(height: Tensor, width: Tensor, iou: float) -> Tensor:
    """How far, in cells, both corners of a box may move so that its IoU with the old one stays at `iou`.

    Section 3.2: the least of three cases, in which one corner moves in and the other out, both in, or
    both out; each is the smaller root of a quadratic equation a r^2 - b r + c = 0.
    """
    # Not simplified: rounded otherwise than in the authors' code (sample/utils.py), a root that should be
    # whole would fall on the other side of it, and the radius be another.
    total = height + width
    c = width * height * (1 - iou) / (1 + iou)
    shifted = (total - (total**2 - 4 * c).sqrt()) / 2
    c = (1 - iou) * width * height
    inside = (2 * total - ((2 * total) ** 2 - 16 * c).sqrt()) / 8
    a, b, c = 4 * iou, -2 * iou * total, (iou - 1) * width * height
    outside = (b + (b**2 - 4 * a * c).sqrt()) / (2 * a)
    return torch.minimum(torch.minimum(shifted, inside), outside)


def bump_radius(boxes: Tensor, scale: Tensor, iou: float) -> Tensor:
    """Boxes (N, G, 4) in pixels -> whole radius (N, G) of their Gaussians, in cells."""
    width, height = ((boxes[..., 2:] - boxes[..., :2]) * scale).ceil().unbind(-1)
    return gaussian_radius(height, width, iou).trunc().clamp(min=0)


@torch.no_grad()
def corner_targets(
    targets: Targets, classes: int, pixels: tuple[int, int], cells: tuple[int, int], iou: float = 0.3
) -> tuple[CornerTargets, CornerTargets]:
    """Top left and bottom right corners of the objects in an input of `pixels` (height, width), on maps of
    `cells` (height, width). Slots of padding have no Gaussian.

    In float64 until a corner has its cell: in float32 a product may round up to the next one. Where the
    Gaussians of a class overlap the larger value counts; each ends at its radius, 3 sigma away.
    """
    (boxes, labels), (height, width) = targets, cells
    boxes = boxes.double()
    last = _xy(pixels[1] - 1, pixels[0] - 1, boxes)
    boxes = torch.minimum(boxes.clamp(min=0), last.repeat(2))  # so that the radius is that of what is seen
    scale = _xy(width / pixels[1], height / pixels[0], boxes)
    radius = torch.where(labels >= 0, bump_radius(boxes, scale, iou), REJECTED)[..., None]
    slot = labels.clamp(min=0)[..., None, None].expand(-1, -1, height, width)

    def corner(point: Tensor) -> CornerTargets:
        place = point * scale
        cell = place.floor()
        across, down = (
            _bump(torch.arange(size, device=boxes.device), center, radius)
            for size, center in ((width, cell[..., :1]), (height, cell[..., 1:]))
        )
        heat = across.new_zeros(len(labels), classes, height, width)
        heat = heat.scatter_reduce(1, slot, down[..., :, None] * across[..., None, :], reduce="amax")
        index = (cell[..., 1] * width + cell[..., 0]).long()
        return CornerTargets(heat, index, (place - cell).float())

    return corner(boxes[..., :2]), corner(boxes[..., 2:])


def _xy(x: float, y: float, like: Tensor) -> Tensor:
    """(2,), without a copy from the host that would wait for the device."""
    return torch.cat([like.new_full((1,), x), like.new_full((1,), y)])


def _bump(place: Tensor, center: Tensor, radius: Tensor) -> Tensor:
    """exp(-d^2 / (2 sigma^2)) along one axis, zero beyond the radius: (S,), (N, G, 1) x 2 -> (N, G, S)."""
    distance = place - center
    sigma = (2 * radius + 1) / 6
    return torch.where(distance.abs() <= radius, (-(distance**2) / (2 * sigma**2)).exp(), 0.0).float()


def focal_loss(logits: Tensor, heat: Tensor) -> Tensor:
    """Equation 1, before the division by the number of objects: (N, K, H, W) twice -> scalar.

    alpha = 2, beta = 4. Where the probability reaches its bound it has no gradient, as in the reference.
    """
    p = logits.sigmoid().clamp(PROBABILITY, 1 - PROBABILITY)
    positive = (1 - p) ** 2 * p.log()
    negative = (1 - heat) ** 4 * p**2 * (1 - p).log()
    return -torch.where(heat == 1, positive, negative).sum()


def pull_and_push(top_left: Tensor, bottom_right: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Equations 4 and 5 for embeddings (N, G) of corners -> (N,) each.

    As in the reference the sum of `push` goes over k = j, too, and 1 / n taken from each of its n^2 terms
    takes out those n ones. So an image with one object adds a constant 1, without a gradient.
    """
    count = real.sum(1, keepdim=True).float()
    mean = (top_left + bottom_right) / 2
    pull = ((top_left - mean) ** 2 + (bottom_right - mean) ** 2) / (count + EPSILON)
    pair, count = real[:, :, None] & real[:, None, :], count[..., None]
    near = F.relu(1 - (mean[:, :, None] - mean[:, None, :]).abs())
    push = (near - 1 / (count + EPSILON)) / ((count - 1) * count + EPSILON)
    return torch.where(real, pull, 0.0).sum(1), torch.where(pair, push, 0.0).sum((1, 2))


class Pairs(NamedTuple):
    """Pairs of corners, best first; those that do not belong together come last with score REJECTED.

    boxes   (N, D, 4) x1 y1 x2 y2 in cells
    scores  (N, D) mean of the two corners' scores
    labels  (N, D) int64
    top_left, bottom_right  (N, D) scores of the corners
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    top_left: Tensor
    bottom_right: Tensor


@torch.no_grad()
def pair_corners(
    top_left: CornerMaps, bottom_right: CornerMaps, k: int, tag_distance: float, limit: int, kernel: int = 3
) -> Pairs:
    """Section 4.2: every one of the `k` best top left corners with every one of the `k` best bottom right
    ones, unless their classes differ, their tags differ by more than `tag_distance`, or the bottom right
    corner lies left of the top left one or above it. At most `limit` pairs an image."""
    tl, br = _peaks(top_left, k, kernel), _peaks(bottom_right, k, kernel)
    start, stop = tl.place[:, :, None], br.place[:, None, :]
    together = (
        (tl.label[:, :, None] == br.label[:, None, :])
        & ((tl.tag[:, :, None] - br.tag[:, None, :]).abs() <= tag_distance)
        & (stop >= start).all(dim=-1)
    )
    means = (tl.score[:, :, None] + br.score[:, None, :]) / 2
    scores = torch.where(together, means, REJECTED).flatten(1)
    best, pair = scores.topk(min(limit, scores.shape[1]), dim=1)
    count = br.score.shape[1]
    first, second = pair // count, pair % count
    return Pairs(
        boxes=torch.cat([pick(tl.place, first), pick(br.place, second)], dim=-1),
        scores=best,
        labels=pick(tl.label, first),
        top_left=pick(tl.score, first),
        bottom_right=pick(br.score, second),
    )


def both_views(pairs: Pairs, width: int) -> Pairs:
    """Pairs of N images `width` pixels wide, then of their mirror images -> side by side, (N, 2 D)."""
    views = Pairs(*(part.unflatten(0, (2, -1)) for part in pairs))
    x1, y1, x2, y2 = views.boxes[1].unbind(-1)
    back = torch.stack([width - x2, y1, width - x1, y2], dim=-1)
    views = views._replace(boxes=torch.stack([views.boxes[0], back]))
    return Pairs(*(part.transpose(0, 1).flatten(1, 2) for part in views))


class _Peaks(NamedTuple):
    """score, label, tag (N, P), place (N, P, 2) as (x, y) in cells."""

    score: Tensor
    label: Tensor
    tag: Tensor
    place: Tensor


def _peaks(maps: CornerMaps, k: int, kernel: int) -> _Peaks:
    """The best `k` of the cells that are the largest of the `kernel` x `kernel` around them."""
    heat = maps.heat.sigmoid()
    heat = heat * (F.max_pool2d(heat, kernel, stride=1, padding=kernel // 2) == heat)
    width, cells = heat.shape[-1], heat.shape[-2] * heat.shape[-1]
    flat = heat.flatten(1)
    score, index = flat.topk(min(k, flat.shape[1]), dim=1)
    cell = index % cells
    place = torch.stack([cell % width, cell // width], dim=-1) + at_cells(maps.offset, cell)
    return _Peaks(score, index // cells, at_cells(maps.tag, cell)[..., 0], place)


def at_cells(maps: Tensor, cell: Tensor) -> Tensor:
    """Values (N, G, D) of maps (N, D, H, W) at cells (N, G)."""
    return pick(maps.flatten(2).transpose(1, 2), cell)
