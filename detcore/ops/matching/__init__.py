"""Which anchors or points learn which ground truth: a rule a file.

A rule gives (N, R) int64: the index of the ground truth, BACKGROUND, or IGNORED. None depends on how many
boxes are real, so no step waits for the device. One crowded image pads all the others, so what a rule has of
every row and box is made for a chunk of the boxes at a time.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from detcore.ops.targets import Targets, at_least_one, pick

BACKGROUND, IGNORED = -1, -2
LIMIT = 2**27  # numbers in the largest tensor that a rule makes: 512 MiB of float32


class Chunk(NamedTuple):
    """Ground truth from index `first` on: boxes (N, g, 4), labels (N, g)."""

    first: int
    boxes: Tensor
    labels: Tensor


class Best(NamedTuple):
    """The highest score of each row (N, R), and the ground truth (N, R) that it is of."""

    score: Tensor
    gt: Tensor


def in_chunks(targets: Targets, numbers: int) -> list[Chunk]:
    """All ground truth, or padding where there is none, in as few chunks as keep LIMIT; `numbers` is how many
    a rule makes of a single box. A chunk has at least one box of every image."""
    boxes, labels = at_least_one(targets)
    (images, size), count = labels.shape, 1
    # Doubled, not the fewest possible: a compiled step is compiled anew for every other number of chunks.
    while count < size and images * numbers * -(-size // count) > LIMIT:
        count = min(2 * count, size)
    bounds = [place * size // count for place in range(count + 1)]
    return [Chunk(first, boxes[:, first:end], labels[:, first:end]) for first, end in pairwise(bounds)]


def better(best: Best | None, scores: Tensor, first: int) -> Best:
    """The best of what was best so far and of ground truth from `first` on, whose scores are (N, R, g), none
    NaN. Ties go to the lower index, as in a maximum over all of them."""
    own = Best(*scores.max(dim=2))
    if best is None:
        return own
    higher = own.score > best.score
    return Best(torch.where(higher, own.score, best.score), torch.where(higher, own.gt + first, best.gt))


def learned(assigned: Tensor, targets: Targets, otherwise: Tensor) -> tuple[Tensor, Tensor]:
    """What assignments (N, R) mean: classes (N, R), or BACKGROUND, or IGNORED; and boxes (N, R, 4),
    `otherwise` (R, 4) where there is no object, so that the arithmetic stays finite there."""
    foreground, gt = assigned >= 0, assigned.clamp(min=0)
    labels = torch.where(foreground, pick(targets.labels, gt), assigned)
    return labels, torch.where(foreground[..., None], pick(targets.boxes, gt), otherwise)
