"""CornerNet from a recipe's section to losses and detections. Its numbers: test_fixtures_cornernet.py."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from detcore.config import CornerCrop, Train
from detcore.config.models import CornerNet as Section
from detcore.models.cornernet import CornerNet, Corners, build_cornernet
from detcore.ops.canvas import centered
from detcore.ops.corners import CornerMaps, corner_targets, gaussian_radius, pull_and_push
from detcore.ops.nms import soft_nms
from detcore.ops.targets import Targets
from tests.detcore.conftest import pad_targets, total
from tests.detcore.sections import section
from tests.detcore.test_config import ROOT, merged
from tests.detcore.test_detectors import Uploads

SMALL = section("cornernet")


def small(seed: int = 0, **changes: Any) -> CornerNet:
    torch.manual_seed(seed)
    return build_cornernet(Section.model_validate(SMALL | changes))


def lively(**changes: Any) -> CornerNet:
    """One that finds something in noise, and its scores lie apart."""
    model = small(test={"topk": 100, "pairs": 300, "tag_distance": 5.0, "flip": False} | changes)
    for heads in (model.top_left, model.bottom_right):
        nn.init.normal_(heads[-1].heat[-1].weight, std=10.0)
    return model.eval()


def batch(count: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Targets]:
    """Images of which the second has no object, the first two and the third one."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 64, 96), dtype=torch.uint8, generator=generator)
    sizes = torch.tensor([[63, 95], [50, 90], [60, 81]])[:count]
    boxes = [[[5.0, 5, 40, 30], [12, 20, 80, 60]], [], [[5, 5, 60, 58]]]
    labels = [[0, 2], [], [1]]
    targets = pad_targets(
        [torch.tensor(b).reshape(-1, 4) for b in boxes[:count]],
        [torch.tensor(c, dtype=torch.int64) for c in labels[:count]],
    )
    return images, sizes, targets


def test_the_reference_has_201_million_parameters() -> None:
    with torch.device("meta"):
        model = build_cornernet(Section(name="cornernet", num_classes=80))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 201.04
    assert model.backbone.divisor == 128


def test_the_recipe_is_the_reference() -> None:
    """princeton-vl/CornerNet, config/CornerNet.json, but for a batch that 8 GPUs can share."""
    train = Train.model_validate(merged(ROOT / "recipes/cornernet_hg104.yaml")["train"])
    schedule, adam = train.schedule, train.schedule.optimizer
    assert (train.data.batch, schedule.iterations, schedule.steps) == (48, 500_000, [450_000])
    assert (adam.name, adam.lr, adam.momentum, adam.weight_decay, adam.clip) == ("adam", 2.5e-4, 0.9, 0, None)
    assert train.model == Section(name="cornernet", num_classes=80), "the defaults are the published numbers"
    assert train.model.test.model_dump() == {
        "topk": 100, "tag_distance": 0.5, "pairs": 1000, "sigma": 0.5, "flip": True, "max": 100,
    }  # fmt: skip
    assert train.data.test.short is None
    augment = train.data.augment
    assert (augment.square, augment.flip, augment.jitter, augment.lighting) == (511, 0.5, 0.4, 0.1)
    assert augment.corner_crop == CornerCrop() and augment.corner_crop.border == 128
    assert augment.corner_crop.scales == [0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3]


def test_it_learns_one_batch() -> None:
    model = small()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    history = []
    for _ in range(12):
        loss = total(model(*batch()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.5 * history[0], history


def test_images_without_objects_and_batches_without_any() -> None:
    model = small()
    images, sizes, _ = batch()
    for empty in (
        Targets(torch.zeros(3, 0, 4), torch.zeros(3, 0, dtype=torch.int64)),
        Targets(torch.zeros(3, 4, 4), torch.full((3, 4), -1)),
    ):
        losses = model(images, sizes, empty)
        assert losses["loss_focal"] > 0
        assert all(losses[f"loss_{name}"] == 0 for name in ("pull", "push", "offset"))
        model.zero_grad()
        total(losses).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("objects", [0, 2])
def test_one_image_alone(amp: torch.dtype | None, objects: int) -> None:
    model = small()
    images, sizes, targets = batch(1)
    targets = targets.map(lambda tensor: tensor[:, :objects])
    with torch.autocast("cpu", dtype=amp, enabled=amp is not None):
        losses = model(images, sizes, targets)
    total(losses).backward()
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_an_image_with_500_objects() -> None:
    """Many in one place, some in one pixel, and beside them an image with one."""
    model = small()
    images, sizes, _ = batch(2)
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 500, 2, 2, generator=generator) * torch.tensor([90.0, 50.0])
    boxes = torch.cat([corners.amin(dim=2), corners.amax(dim=2)], dim=-1).round()
    boxes[:, 100:200] = boxes[:, :1]
    boxes[:, 200:220, 2:] = boxes[:, 200:220, :2]
    labels = torch.randint(0, 3, (2, 500), generator=generator)
    labels[1, 1:] = -1
    losses = model(images, sizes, Targets(boxes, labels))
    total(losses).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_what_lies_in_the_padding_changes_nothing() -> None:
    model = small().eval()
    images, sizes, targets = batch()
    noisy = images.clone()
    for image, (height, width) in zip(noisy, sizes.tolist(), strict=True):
        image[:, height:] = 77
        image[:, :, width:] = 99
    padded = Targets(
        torch.cat([targets.boxes, torch.full((3, 4, 4), 30.0)], 1),
        torch.cat([targets.labels, torch.full((3, 4), -1)], 1),
    )
    clean, dirty = model(images, sizes, targets), model(noisy, sizes, padded)
    for name, loss in clean.items():
        torch.testing.assert_close(dirty[name], loss)
    for one, other in zip(model.detect(images, sizes), model.detect(noisy, sizes), strict=True):
        assert one.equal(other)


def test_losses_of_a_batch_are_those_of_its_images() -> None:
    """One image alone, which squeezed maps would break: focal and offset losses are sums over the batch
    divided by counts, pull and push are means over images."""
    model = small().eval()
    images, sizes, targets = batch()
    together = model(images, sizes, targets)
    alone = [
        model(
            images[i : i + 1], sizes[i : i + 1], Targets(targets.boxes[i : i + 1], targets.labels[i : i + 1])
        )
        for i in range(3)
    ]
    counts = {"focal": [2, 1, 1], "offset": [2, 0, 1]}  # without objects the focal loss is divided by one
    for name, loss in together.items():
        parts = torch.stack([one[name] for one in alone])
        if name in ("loss_pull", "loss_push"):
            expected = parts.mean()
        else:
            weights = torch.tensor(counts[name.removeprefix("loss_")])
            expected = (parts * weights).sum() / 3
        torch.testing.assert_close(loss, expected, rtol=2e-4, atol=1e-6)


def test_one_pixel_less_than_a_multiple_is_the_same_input() -> None:
    """511 and 512 pixels have the same maps where the 512th is padding, so loaders may pad."""
    model = small().eval()
    x = torch.randn(1, 3, 63, 95, generator=torch.Generator().manual_seed(0))
    for one, other in zip(model.backbone(x), model.backbone(F.pad(x, (0, 1, 0, 1))), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_push_sees_pairs_of_objects() -> None:
    """Added masks of type bool never equal 2, and so push would be zero without a word."""
    real = torch.tensor([[True, True, False], [True, True, True], [True, False, False], [False] * 3])
    tags = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.25, 5.0], [1.0, 9, 9], [1, 1, 1]], requires_grad=True)
    pull, push = pull_and_push(tags, tags, real)
    # Of k != j: two pairs at distance 0; two at 0.25 and four beyond 1; none; none.
    torch.testing.assert_close(push[:2], torch.tensor([1.0, 2 * 0.75 / 6]), rtol=1e-3, atol=1e-3)
    assert push[2].item() == pytest.approx(1.0, abs=1e-2) and push[3] == 0  # a constant; see its docstring
    assert (pull == 0).all()
    push.sum().backward()
    assert tags.grad[1, :2].abs().min() > 0 and not tags.grad[2:].any()

    pull, _ = pull_and_push(torch.tensor([[1.0, 0, 7]]), torch.tensor([[3.0, 0, 1]]), real[:1])
    assert pull.item() == pytest.approx((1 + 1) / 2, rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_batched_targets_are_the_papers_box_by_box(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(2, 6, 2, generator=generator) * torch.tensor([150.0, 90])
    size = torch.rand(2, 6, 2, generator=generator) ** 2 * torch.tensor([60.0, 60])
    boxes = torch.cat([corner, torch.minimum(corner + size, torch.tensor([190.0, 126]))], dim=-1)
    labels = torch.randint(0, 2, (2, 6), generator=generator)
    labels[1, 3:] = -1
    found = corner_targets(Targets(boxes, labels), 2, (127, 191), (32, 48))
    scale = (48 / 191, 32 / 127)
    for kind, targets in enumerate(found):
        heat = torch.zeros(2, 2, 32, 48)
        for i in range(2):
            for g in range(6):
                if labels[i, g] < 0:
                    continue
                x, y = (boxes[i, g, 2 * kind + axis].item() * scale[axis] for axis in range(2))
                assert targets.cell[i, g] == int(y) * 48 + int(x)
                torch.testing.assert_close(targets.offset[i, g], torch.tensor([x - int(x), y - int(y)]))
                width, height = (
                    math.ceil((boxes[i, g, 2 + axis] - boxes[i, g, axis]).item() * scale[axis])
                    for axis in range(2)
                )
                radius = int(gaussian_radius(*torch.tensor([height, width], dtype=torch.float64), 0.3))
                sigma = (2 * radius + 1) / 6
                for row in range(max(0, int(y) - radius), min(31, int(y) + radius) + 1):
                    for column in range(max(0, int(x) - radius), min(47, int(x) + radius) + 1):
                        squared = (row - int(y)) ** 2 + (column - int(x)) ** 2
                        bump = math.exp(-squared / (2 * sigma**2))
                        heat[i, labels[i, g], row, column] = max(bump, heat[i, labels[i, g], row, column])
        torch.testing.assert_close(targets.heat[:, :], heat, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("height", "width", "radius"), [(10, 24, 2), (12, 15, 3), (23, 60, 7), (25, 44, 6), (48, 60, 12)]
)
def test_a_radius_at_a_whole_number_is_that_of_the_authors_code(height: int, width: int, radius: int) -> None:
    """By rounding alone these fall to one side or the other; the values are those of CornerNet's
    sample/utils.py at an IoU of 0.3."""
    sides = torch.tensor([height, width], dtype=torch.float64)
    assert int(gaussian_radius(*sides, 0.3)) == radius


def test_the_radius_keeps_the_iou() -> None:
    """Each of the three cases has IoU of at least 0.3, and one has it exactly."""
    height, width = torch.tensor([[20.0, 33, 7], [20, 14, 90]], dtype=torch.float64)
    r, area = gaussian_radius(height, width, 0.3), height * width
    outside = area / ((height + 2 * r) * (width + 2 * r))
    inside = (height - 2 * r) * (width - 2 * r) / area
    shared = (height - r) * (width - r)
    shifted = shared / (2 * area - shared)
    torch.testing.assert_close(
        torch.stack([outside, inside, shifted]).amin(0), torch.full((3,), 0.3, dtype=torch.float64)
    )


def test_corners_at_the_edge_stay_on_the_map() -> None:
    targets = pad_targets([torch.tensor([[0.0, 0, 96, 64], [-3, -2, 95.5, 63.9]])], [torch.tensor([0, 1])])
    for kind, cell in zip(corner_targets(targets, 2, (63, 95), (16, 24)), (0, 16 * 24 - 1), strict=True):
        assert kind.cell.tolist() == [[cell, cell]]
        assert (kind.offset >= 0).all() and (kind.offset < 1).all()


def test_what_of_an_object_is_outside_counts_for_nothing() -> None:
    """Boxes are cut to the first and last pixel before all else (princeton-vl/CornerNet, sample/coco.py), so
    that the radius is that of what is seen."""
    whole = pad_targets([torch.tensor([[-300.0, 8, 80, 60], [40, 2, 300, 64]])], [torch.tensor([0, 1])])
    seen = pad_targets([torch.tensor([[0.0, 8, 80, 60], [40, 2, 94, 62]])], [torch.tensor([0, 1])])
    kinds = (corner_targets(targets, 2, (63, 95), (16, 24)) for targets in (whole, seen))
    for one, other in zip(*kinds, strict=True):
        assert all(part.equal(same) for part, same in zip(one, other, strict=True))


def perfect(model: CornerNet, targets: Targets, cells: tuple[int, int]) -> Corners:
    """Maps as they should be: logits of the heat maps, a tag for each object, its offsets."""
    pixels = (4 * cells[0] - 1, 4 * cells[1] - 1)
    kinds = []
    for wanted in corner_targets(targets, model.num_classes, pixels, cells):
        count, objects = targets.labels.shape
        tag, offset = torch.zeros(count, 1, *cells), torch.zeros(count, 2, *cells)
        for i in range(count):
            for g in range(objects):
                if targets.labels[i, g] >= 0:
                    tag[i].flatten(1)[:, wanted.cell[i, g]] = 3.0 * g
                    offset[i].flatten(1)[:, wanted.cell[i, g]] = wanted.offset[i, g]
        kinds.append(CornerMaps(wanted.heat.clamp(1e-6, 0.99).logit(), tag, offset))
    return Corners(*kinds)


def test_targets_decode_to_their_boxes() -> None:
    model, (_, _, targets) = small(), batch()
    corners = perfect(model, targets, (16, 24))
    pairs = model.decode(corners)
    for i, real in enumerate(targets.labels >= 0):
        sure = pairs.scores[i] > 0.9
        found = {
            int(label): box for label, box in zip(pairs.labels[i][sure], pairs.boxes[i][sure], strict=True)
        }
        assert sorted(found) == sorted(targets.labels[i][real].tolist())
        for label, box in zip(targets.labels[i][real].tolist(), targets.boxes[i][real], strict=True):
            torch.testing.assert_close(found[label], box, atol=1e-3, rtol=0)
    losses = model.losses([corners, corners], targets)
    assert losses["loss_offset"] < 1e-6 and losses["loss_pull"] == 0 and losses["loss_focal"] < 1


def test_detections_of_one_image_are_those_of_the_batch() -> None:
    model = lively(max=40)
    images, _, _ = batch()
    sizes = torch.tensor([[63, 95], [48, 90], [50, 64]])  # on 63x95, 63x95 and 63x79
    together = model.detect(images, sizes)
    assert (together.count > 0).all()
    for i, count in enumerate(together.count.tolist()):
        alone = model.detect(images[i : i + 1], sizes[i : i + 1])
        assert alone.count.tolist() == [count]
        torch.testing.assert_close(alone.boxes[0], together.boxes[i], atol=1e-2, rtol=0)
        torch.testing.assert_close(alone.scores[0], together.scores[i], atol=1e-5, rtol=0)
        height, width = sizes[i].tolist()
        boxes = together.boxes[i, :count]
        assert (boxes >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
        assert (together.scores[i, :count].diff() <= 0).all()
        assert (together.labels[i, count:] == -1).all() and not together.boxes[i, count:].any()


def test_with_flip_a_mirror_image_has_mirrored_detections() -> None:
    images, _, _ = batch(1)
    images, sizes = images[..., :63, :91], torch.tensor([[63, 91]])
    model = lively(flip=True)
    one, other = model.detect(images, sizes), model.detect(images.flip(-1), sizes)
    assert one.count > 10 and one.count.equal(other.count)
    torch.testing.assert_close(one.scores, other.scores, atol=1e-5, rtol=0)
    x1, y1, x2, y2 = other.boxes.unbind(-1)
    torch.testing.assert_close(one.boxes, torch.stack([91 - x2, y1, 91 - x1, y2], -1), atol=1e-2, rtol=0)


def test_images_are_centered_on_black() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (2, 3, 32, 64), dtype=torch.uint8, generator=generator)
    sizes = torch.tensor([[32, 50], [17, 64]])
    moved, border = centered(images, sizes, (63, 95))
    assert moved.shape == (2, 3, 63, 95) and moved.dtype == torch.uint8
    for image, canvas, (height, width), (left, top) in zip(images, moved, sizes, border, strict=True):
        assert (left, top) == (47 - width // 2, 31 - height // 2)
        expected = torch.zeros_like(canvas)
        expected[:, top : top + height, left : left + width] = image[:, :height, :width]
        assert canvas.equal(expected)


def soft_nms_one_class(rows: list[list[float]], sigma: float, threshold: float) -> list[list[float]]:
    """The definition in loops: boxes x1, y1, x2, y2, score that include their last pixel."""
    kept, rows = [], [list(row) for row in rows]
    while rows:
        best = rows.pop(max(range(len(rows)), key=lambda i: rows[i][4]))
        kept.append(best)
        for row in list(rows):
            width = min(best[2], row[2]) - max(best[0], row[0]) + 1
            height = min(best[3], row[3]) - max(best[1], row[1]) + 1
            if width > 0 and height > 0:
                areas = ((b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (best, row))
                row[4] *= math.exp(-((width * height / (sum(areas) - width * height)) ** 2) / sigma)
                if row[4] < threshold:
                    rows.remove(row)
    return kept


@pytest.mark.parametrize("limit", [8, 60])
def test_soft_nms_of_a_batch_is_the_loop_of_each_class(limit: int) -> None:
    generator = torch.Generator().manual_seed(3)
    corner = torch.rand(3, 60, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + torch.rand(3, 60, 2, generator=generator) * 40 + 2], dim=-1)
    scores = torch.rand(3, 60, generator=generator) ** 4
    labels = torch.randint(0, 3, (3, 60), generator=generator)
    scores[0, 40:], scores[2] = -1, -1
    order, best = soft_nms(boxes, scores, labels, limit, sigma=0.3, threshold=0.01)
    assert order.shape == best.shape == (3, limit)
    for i in range(3):
        expected = []
        for label in range(3):
            mine = (labels[i] == label) & (scores[i] >= 0)
            rows = torch.cat([boxes[i], scores[i][:, None]], dim=1)[mine].tolist()
            expected += [[*row, label] for row in soft_nms_one_class(rows, 0.3, 0.01)]
        expected = sorted(expected, key=lambda row: -row[4])[:limit]
        count = int((best[i] >= 0).sum())
        assert count == len(expected) and (best[i, count:] == -1).all()
        assert i == 2 or 8 <= count < 60
        kept = order[i, :count]
        got = torch.cat([boxes[i, kept], best[i, :count, None], labels[i, kept, None]], dim=1)
        torch.testing.assert_close(got, torch.tensor(expected).reshape(-1, 6), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_stay_float32_under_autocast(dtype: torch.dtype) -> None:
    model = small()
    exact = model(*batch())
    with torch.autocast("cpu", dtype=dtype):
        losses = model(*batch())
        found = model.eval().detect(*batch()[:2])
    total(losses).backward()
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact[name], rtol=0.1, atol=0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert found.boxes.dtype == torch.float32 and found.scores.isfinite().all()


def test_extreme_logits_have_finite_losses_and_gradients() -> None:
    model, (_, _, targets) = small(), batch()
    for value in (-3e4, -200.0, 0.0, 200.0, 3e4):
        maps = torch.full((3, 3, 16, 24), value, requires_grad=True)
        kind = CornerMaps(maps, maps[:, :1], maps[:, :2])
        losses = model.losses([Corners(kind, kind)], targets)
        total(losses).backward()
        assert total(losses).isfinite() and maps.grad.isfinite().all()


def test_a_training_step_asks_for_no_value() -> None:
    """Fake tensors have shapes and no values: .item(), nonzero, a boolean index, `if tensor` all raise."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = small()
        images, sizes, targets = batch()
        arguments = (mode.from_tensor(images), mode.from_tensor(sizes), targets.map(mode.from_tensor))
        with Uploads() as uploads:
            total(model(*arguments)).backward()
    assert uploads.count == 0


def test_the_training_step_is_one_graph() -> None:
    losses = torch.compile(small(), fullgraph=True, backend="eager")(*batch())
    for name, loss in small()(*batch()).items():
        torch.testing.assert_close(losses[name], loss)
