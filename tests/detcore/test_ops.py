"""Boxes, anchors, coder, matching, losses and NMS against plain definitions written with loops."""

from functools import partial

import pytest
import torch
from torch import Tensor

from detcore.ops.anchors import grid_anchors, grid_points
from detcore.ops.boxes import clip, pairwise_iou
from detcore.ops.coder import DeltaCoder
from detcore.ops.losses import giou_loss
from detcore.ops.matching import BACKGROUND, IGNORED
from detcore.ops.matching.uniform import uniform_match
from detcore.ops.nms import nms
from detcore.ops.select import select
from detcore.ops.targets import Detections, Targets, compact, pick
from tests.detcore.conftest import pad_targets

CPU = torch.device("cpu")


def random_boxes(count: int, generator: torch.Generator, extent: float = 300) -> Tensor:
    corner = torch.rand(count, 2, generator=generator) * extent
    size = torch.rand(count, 2, generator=generator) * extent / 2 + 2
    return torch.cat([corner, corner + size], dim=1)


def iou(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / total if shared else 0.0


def distance(a: list[float], b: list[float]) -> float:
    def form(box: list[float]) -> list[float]:
        return [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]]

    return sum(abs(x - y) for x, y in zip(form(a), form(b), strict=True))


def match_one_image(
    predicted: list[list[float]],
    anchors: list[list[float]],
    boxes: list[list[float]],
    top: int,
    pos_ignore: float,
    neg_ignore: float,
) -> tuple[list[tuple[int, int, bool]], list[int]]:
    """Section 4.2 of the YOLOF paper, in loops: pairs (anchor, ground truth, positive), and assignment."""

    def ranked(sources: list[list[float]], box: list[float]) -> list[int]:
        return sorted(range(len(sources)), key=lambda i: distance(sources[i], box))

    near = [[ranked(source, box) for box in boxes] for source in (predicted, anchors)]
    pairs = [
        (near[side][g][rank], g, iou(anchors[near[side][g][rank]], boxes[g]) >= pos_ignore)
        for rank in range(top)
        for side in range(2)
        for g in range(len(boxes))
    ]
    assigned = [IGNORED if any(iou(p, box) > neg_ignore for box in boxes) else BACKGROUND for p in predicted]
    for anchor, g, positive in pairs:
        assigned[anchor] = g if positive else IGNORED
    return pairs, assigned


@pytest.mark.parametrize("counts", [[3, 0, 7], [5, 4, 4], [12, 2, 0]])
@pytest.mark.parametrize("seed", range(4))
def test_batched_matching_is_the_papers_image_by_image(counts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    anchors = grid_anchors(grid_points(4, 5, 64, 0.0, CPU), (32, 96, 160))
    anchors = anchors + torch.rand(anchors.shape, generator=generator)  # squares on a grid tie in L1
    predicted = anchors + torch.randn(len(counts), len(anchors), 4, generator=generator) * 8
    boxes = [random_boxes(count, generator) for count in counts]
    for i, own in enumerate(boxes):  # some predictions so good that the second ignore rule speaks
        predicted[i, 5 : 5 + len(own)] = own + torch.rand(own.shape, generator=generator)
    targets = pad_targets(boxes, [torch.zeros(count, dtype=torch.int64) for count in counts])
    matches = uniform_match(predicted, anchors, targets, top=4, pos_ignore=0.15, neg_ignore=0.7)

    seen = set()
    for i, own in enumerate(boxes):
        pairs, assigned = match_one_image(predicted[i].tolist(), anchors.tolist(), own.tolist(), 4, 0.15, 0.7)
        real = matches.real[i]
        got = zip(matches.anchor[i], matches.gt[i], matches.positive[i], real, strict=True)
        assert [(int(a), int(g), bool(p)) for a, g, p, r in got if r] == pairs
        assert matches.assigned[i].tolist() == assigned
        seen |= {min(one, 0) for one in assigned}
    assert IGNORED in seen and BACKGROUND in seen and 0 in seen


def test_padding_of_the_ground_truth_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    anchors = grid_anchors(grid_points(4, 4, 64, 0.0, CPU), (64, 128))
    predicted = anchors + torch.randn(2, len(anchors), 4, generator=generator) * 8
    targets = pad_targets(
        [random_boxes(3, generator), random_boxes(1, generator)],
        [torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)],
    )
    padded = Targets(
        torch.cat([targets.boxes, torch.full((2, 5, 4), 50.0)], dim=1),
        torch.cat([targets.labels, torch.full((2, 5), -1)], dim=1),
    )
    few = uniform_match(predicted, anchors, targets, 4, 0.15, 0.7)
    many = uniform_match(predicted, anchors, padded, 4, 0.15, 0.7)
    assert few.assigned.equal(many.assigned)
    assert few.anchor[few.real].equal(many.anchor[many.real])


def test_fewer_anchors_than_matches_and_no_ground_truth_at_all() -> None:
    anchors = grid_anchors(grid_points(1, 1, 32, 0.0, CPU), (32, 64))
    one = pad_targets([torch.tensor([[0.0, 0, 20, 20]])], [torch.zeros(1, dtype=torch.int64)])
    assert uniform_match(anchors[None], anchors, one, 4, 0.15, 0.7).anchor.shape == (1, 4)
    none = Targets(torch.zeros(3, 0, 4), torch.zeros(3, 0, dtype=torch.int64))
    matches = uniform_match(anchors.expand(3, -1, -1), anchors, none, 4, 0.15, 0.7)
    assert not matches.real.any() and (matches.assigned == BACKGROUND).all()


def greedy(boxes: Tensor, labels: Tensor, threshold: float) -> list[bool]:
    keep: list[bool] = []
    for j, box in enumerate(boxes.tolist()):
        rivals = (i for i in range(j) if keep[i] and labels[i] == labels[j])
        keep.append(all(iou(boxes[i].tolist(), box) <= threshold for i in rivals))
    return keep


@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_nms_of_a_batch_is_the_greedy_loop_of_each_image(threshold: float) -> None:
    generator = torch.Generator().manual_seed(3)
    boxes = torch.stack([random_boxes(120, generator, 60) for _ in range(4)])
    labels = torch.randint(0, 3, (4, 120), generator=generator)
    keep = nms(boxes, labels, threshold)
    for i in range(4):
        assert keep[i].tolist() == greedy(boxes[i], labels[i], threshold)
    assert 0 < keep.sum() < keep.numel()


def test_nms_follows_a_long_chain() -> None:
    """Each box suppresses the next: exactly every other one stays, however long the chain."""
    x = torch.arange(200.0)[:, None] * 3
    boxes = torch.cat([x, torch.zeros_like(x), x + 10, torch.full_like(x, 10)], dim=1)[None]
    keep = nms(boxes, None, 0.5)[0]
    assert keep.tolist() == [i % 2 == 0 for i in range(200)]


def test_nms_keeps_what_overlaps_by_exactly_the_threshold() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 5]]])
    assert nms(boxes, None, 0.5).all()
    assert nms(boxes, None, 0.49).tolist() == [[True, False]]


def test_nms_of_nothing() -> None:
    assert nms(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64), 0.5).shape == (2, 0)


def test_anchors_start_at_the_corner_and_go_by_row() -> None:
    anchors = grid_anchors(grid_points(2, 3, 32, 0.0, CPU), (32, 64))
    assert anchors.shape == (12, 4)
    assert anchors[0].tolist() == [-16, -16, 16, 16]
    assert anchors[3].tolist() == [0, -32, 64, 32]  # second column, second size
    assert anchors[6].tolist() == [-16, 16, 16, 48]  # second row


def test_coder_goes_there_and_back_and_holds_the_centre() -> None:
    generator = torch.Generator().manual_seed(1)
    anchors, boxes = random_boxes(50, generator), random_boxes(50, generator)
    coder = DeltaCoder((10, 10, 5, 5))
    torch.testing.assert_close(coder.decode(coder.encode(boxes, anchors), anchors), boxes, atol=1e-3, rtol=0)
    far = DeltaCoder(center_clamp=32).decode(torch.tensor([9.0, -9, 0, 99]), torch.tensor([0.0, 0, 64, 64]))
    assert far.tolist() == pytest.approx(
        [32, -2000, 96, 2000]
    )  # 32 right, 32 up, 64 wide, 1000 / 16 times as high


def test_iou_and_giou_of_empty_boxes_are_finite() -> None:
    empty = torch.zeros(1, 4, requires_grad=True)
    assert pairwise_iou(empty, empty).item() == 0
    giou_loss(empty, torch.zeros(1, 4)).sum().backward()
    assert empty.grad.isfinite().all()


def test_clip_and_compact() -> None:
    boxes = torch.tensor([[[-5.0, -5, 30, 9], [1, 2, 3, 4]], [[0, 0, 50, 50], [60, 60, 70, 70]]])
    clipped = clip(boxes, torch.tensor([[10, 20], [40, 30]]))
    assert clipped[0, 0].tolist() == [0, 0, 20, 9] and clipped[1, 0].tolist() == [0, 0, 30, 40]
    found = Detections(boxes, torch.tensor([[0.9, 0.8], [0.7, 0.6]]), torch.tensor([[1, 2], [3, 4]]), None)
    kept = compact(found, torch.tensor([[False, True], [True, True]]), limit=1)
    assert kept.count.tolist() == [1, 1] and kept.labels.tolist() == [[2], [3]]
    padded = compact(found, torch.tensor([[False, True], [False, False]]))
    assert padded.count.tolist() == [1, 0] and padded.labels.tolist() == [[2, -1], [-1, -1]]
    assert not padded.boxes[0, 1].any() and not padded.scores[1].any()


def test_of_equal_scores_the_first_comes_first_in_any_company() -> None:
    """At the cut, too; and what is no number displaces nothing."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(1, 300, 2, generator=generator) * 3000
    boxes = torch.cat([corners, corners + 5], dim=-1)
    scores = torch.full((1, 300, 1), 0.5)
    scores[0, 100:] = torch.nan

    def found(scores: torch.Tensor, boxes: torch.Tensor) -> Detections:
        given = scores.amax(-1), partial(pick, scores), partial(pick, boxes), [300]
        return select(*given, score=0.1, topk=10, nms_iou=0.6, limit=100)

    alone = found(scores, boxes)
    assert alone.boxes[0].equal(boxes[0, :10])
    for other in (0.01, 0.9):
        both = found(torch.cat([scores, torch.full_like(scores, other)]), torch.cat([boxes, boxes]))
        assert both.boxes[0, :10].equal(alone.boxes[0]) and both.count[0] == 10


def test_a_few_candidates_are_enough_for_nms(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many it looks at to begin with, the detections are the same; levels have candidates each."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 300, 2, generator=generator) * 60
    boxes = torch.cat([corners, corners + 30], dim=-1)
    scores = torch.rand(2, 300, 3, generator=generator)
    scores[1, 5:] = 0
    options = {"score": 0.1, "topk": 100, "nms_iou": 0.3, "limit": 20}
    given = (scores.amax(-1), partial(pick, scores), partial(pick, boxes), [200, 100])
    whole = select(*given, **options)
    monkeypatch.setattr("detcore.ops.select.FIRST", 8)
    for ours, wanted in zip(select(*given, **options), whole, strict=True):
        assert ours.equal(wanted)
    assert whole.count[0] == 20 and 0 < whole.count[1] <= 15
