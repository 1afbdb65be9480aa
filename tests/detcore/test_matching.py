"""Matching goes over crowded ground truth in chunks: what it gives does not depend on them, its memory is
bounded by them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from detcore.ops.anchors import grid_anchors, grid_points
from detcore.ops.boxes import to_cxcywh
from detcore.ops.matching import BACKGROUND, IGNORED, LIMIT, in_chunks
from detcore.ops.matching.atss import atss_match
from detcore.ops.matching.iou import iou_match
from detcore.ops.matching.points import points_match
from detcore.ops.matching.ssd import ssd_match
from detcore.ops.targets import Targets
from tests.detcore.conftest import pad_targets

Rule = Callable[[Tensor, Targets], Tensor]  # anchors (R, 4), ground truth -> (N, R)


def points(detectron2: bool) -> Rule:
    def rule(anchors: Tensor, targets: Targets) -> Tensor:
        reach = torch.full((len(anchors),), 24.0)
        ranges = torch.tensor([[0.0, 64], [32, torch.inf]]).repeat_interleave(len(anchors) // 2, dim=0)
        return points_match(to_cxcywh(anchors)[:, :2], reach, ranges, targets, detectron2)

    return rule


RULES: dict[str, Rule] = {
    "iou": lambda anchors, targets: iou_match(anchors, targets, 0.3, 0.5),
    "points": points(detectron2=False),
    "points-detectron2": points(detectron2=True),
    "atss": lambda anchors, targets: atss_match(anchors, [len(anchors) // 2] * 2, targets, 9),
    "ssd": lambda anchors, targets: ssd_match(anchors, targets, 0.5),
}
EACH = pytest.mark.parametrize("name", RULES)


def anchors() -> Tensor:
    """R = 512 of two levels, whose sides are whole numbers, so that many IoUs and distances are the same."""
    places = grid_points(16, 16, 8, 0.5, torch.device("cpu"))
    return torch.cat([grid_anchors(places, (side,)) for side in (16, 32)])


def crowd(counts: list[int], seed: int = 0) -> Targets:
    """Boxes whose corners are multiples of 4, a third of them twice, one outside of everything."""
    generator = torch.Generator().manual_seed(seed)

    def boxes(count: int) -> Tensor:
        corners = torch.randint(0, 28, (count, 2), generator=generator)
        sides = torch.randint(1, 12, (count, 2), generator=generator)
        drawn = 4.0 * torch.cat([corners, corners + sides], dim=1)
        drawn[count - count // 3 :] = drawn[: count // 3]
        drawn[count // 2 : count // 2 + 1] += 1000
        return drawn

    return pad_targets([boxes(count) for count in counts], [torch.arange(count) % 3 for count in counts])


@EACH
@pytest.mark.parametrize("counts", [[40, 0, 3], [0, 41, 0], [17, 17, 17], [0, 0], [1, 0]], ids=str)
@pytest.mark.parametrize("limit", [1, 30_000])
def test_chunks_change_nothing(
    name: str, counts: list[int], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = crowd(counts)
    whole = RULES[name](anchors(), targets)
    monkeypatch.setattr("detcore.ops.matching.LIMIT", limit)
    assert RULES[name](anchors(), targets).equal(whole)
    assert whole.shape == (len(counts), 512)


@EACH
def test_of_a_crowd_every_verdict_occurs(name: str) -> None:
    """So that the test above means something."""
    seen = set(RULES[name](anchors(), crowd([40, 0, 3])).unique().tolist())
    assert {BACKGROUND, 0, 2} <= seen and len(seen) > 15
    assert (IGNORED in seen) == (name == "iou")


@EACH
def test_of_the_same_boxes_the_first_is_learnt_and_of_ssd_the_last_has_its_best(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detcore.ops.matching.LIMIT", 1)
    box = torch.tensor([[40.0, 40, 72, 70]])
    seen = RULES[name](anchors(), pad_targets([box.expand(5, -1)], [torch.zeros(5, dtype=torch.int64)]))
    assert set(seen.unique().tolist()) - {BACKGROUND, IGNORED} == ({0, 4} if name == "ssd" else {0})


@pytest.mark.parametrize("limit", [1, 100, 30_000, LIMIT])
def test_chunks_are_all_boxes_in_their_order(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detcore.ops.matching.LIMIT", limit)
    targets = crowd([40, 0, 3])
    chunks = in_chunks(targets, 10)
    assert torch.cat([chunk.boxes for chunk in chunks], dim=1).equal(targets.boxes)
    assert torch.cat([chunk.labels for chunk in chunks], dim=1).equal(targets.labels)
    sizes = [chunk.labels.shape[1] for chunk in chunks]
    assert [chunk.first for chunk in chunks] == [sum(sizes[:place]) for place in range(len(sizes))]
    assert max(sizes) == 1 or 3 * 10 * max(sizes) <= limit


class Largest(TorchDispatchMode):
    """The most numbers that a tensor has of those made meanwhile; a view of one is none of them."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                numbers = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.numbers = max(self.numbers, numbers)
        return made


@EACH
def test_memory_does_not_grow_with_the_crowd(name: str) -> None:
    """N = 2, R = 100,000 and G = 2,000, in an image beside one that has nothing: 400 million pairs, of
    tensors that have shapes and no values."""
    with torch.device("meta"), Largest() as largest:
        many = torch.empty(100_000, 4)
        targets = Targets(torch.empty(2, 2000, 4), torch.empty(2, 2000, dtype=torch.int64))
        assert RULES[name](many, targets).shape == (2, 100_000)
    assert LIMIT / 4 < largest.numbers <= LIMIT == 2**27


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # dynamo does so
@pytest.mark.parametrize(("name", "numbers"), {"iou": 1, "points": 4, "atss": 2, "ssd": 1}.items())
def test_crowds_of_many_sizes_are_one_graph(name: str, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for each number of chunks, here four, and not for each number of boxes."""
    torch._dynamo.reset()
    monkeypatch.setattr("detcore.ops.matching.LIMIT", 2 * 512 * numbers * 4)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(RULES[name], fullgraph=True, dynamic=True, backend=backend)
    for count in (9, 13, 15):
        targets = crowd([count, 0])
        assert len(in_chunks(targets, 512 * numbers)) == 4
        assert compiled(anchors(), targets).equal(RULES[name](anchors(), targets))
    assert len(graphs) == 1
