"""CornerNet against numbers from its reference implementation; see tests/fixtures/README.md."""

import re
from collections.abc import Callable

import pytest
import torch
from fixture_files import Fixture, each, read
from torch import Tensor

from detcore.backbones.hourglass import HourglassNet
from detcore.models.cornernet import CornerNet, Corners
from detcore.ops.corners import (
    CornerMaps,
    CornerTargets,
    Pairs,
    bottom_pool,
    bump_radius,
    corner_targets,
    left_pool,
    pair_corners,
    right_pool,
    top_pool,
)
from detcore.ops.nms import soft_nms
from detcore.ops.targets import Targets
from detcore.weights.keys import best_table, rename
from tests.detcore.conftest import pad_targets

KINDS = {"tl": "top_left", "br": "bottom_right"}
MAPS = {"heat": "heat", "tag": "tag", "regr": "offset"}


def targets_of(fixture: Fixture) -> Targets:
    return pad_targets(fixture.per_image("target/boxes"), fixture.per_image("target/labels"))


def build(fixture: Fixture, images: int) -> CornerNet:
    """The reference's network as the file describes it; its losses are sums over the images of a GPU."""
    c = fixture.config
    assert c["n"] == len(c["dims"]) - 1
    model = CornerNet(
        HourglassNet(c["stacks"], c["dims"], c["modules"], c["stem_channels"]),
        c["num_classes"],
        c["pool_channels"],
        pull=c["pull_weight"] * images,
        push=c["push_weight"] * images,
        iou=c["gaussian_iou"],
        topk=c["K"],
        kernel=c["nms_kernel"],
        tag_distance=c["ae_threshold"],
        pairs=c["num_dets"],
    )
    missing, unexpected = model.load_state_dict(fixture.weights("cornernet"), strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    return model.eval()


def run(model: CornerNet, image: Tensor) -> list[Corners]:
    features = model.backbone(image)
    return [model.predict(features, stack) for stack in range(len(features))]


def check_pairs(fixture: Fixture, pairs: Pairs, at: str) -> None:
    for i, scores in enumerate(pairs.scores):
        kept = scores > -1
        parts = (pairs.scores, pairs.top_left, pairs.bottom_right, pairs.labels)
        rows = torch.cat([pairs.boxes[i][kept], *(part[i][kept][:, None] for part in parts)], dim=1)
        fixture.close(rows, f"{at}/{i}", "det")
        torch.testing.assert_close(rows[:, 4:], fixture[f"{at}/{i}"][:, 4:], atol=1e-4, rtol=0)


@each("cornernet")
def test_fixture_cornernet_maps_and_detections(name: str) -> None:
    fixture = read(name)
    image = fixture["input/image"]
    with torch.no_grad():
        stacks = run(build(fixture, len(image)), image)
    compared = set()
    for key in fixture.arrays:
        if found := re.fullmatch(r"expect/eval/(tl|br)_(heat|tag|regr)s/(\d+)", key):
            maps = getattr(stacks[int(found[3])], KINDS[found[1]])
            fixture.close(getattr(maps, MAPS[found[2]]), key, "head")
            compared.add(found[0])
    assert len(compared) >= 6
    c = fixture.config
    pairs = pair_corners(*stacks[-1], c["K"], c["ae_threshold"], c["num_dets"], c["nms_kernel"])
    check_pairs(fixture, pairs, "expect/eval/det")


@each("cornernet")
def test_fixture_cornernet_losses_and_gradients(name: str) -> None:
    fixture, at = read(name), "expect/eval"
    image, targets = fixture["input/image"], targets_of(fixture)
    model = build(fixture, len(image))
    stacks = run(model, image)
    cells = stacks[0].top_left.heat.shape[-2:]
    assert tuple(cells) == tuple(fixture["input/output_size"].tolist())
    kinds = corner_targets(targets, model.num_classes, image.shape[-2:], cells, model.iou)
    check_cells(fixture, targets, kinds, "expect/target_render")

    losses = model.losses(stacks, targets)
    for key, loss in losses.items():
        fixture.close(loss, f"{at}/loss/{key.removeprefix('loss_')}", "loss")
    total = sum(losses.values())
    fixture.close(total, f"{at}/loss/total", "loss")

    total.backward()
    parameters = dict(model.named_parameters())
    names = fixture.names(f"{at}/grad_norm_names")
    assert {rename(key, "cornernet") for key in names} == set(parameters)
    norms = fixture[f"{at}/grad_norms"]
    for key, norm in zip(names, norms, strict=True):  # a whole gradient off by so much has such a norm
        got, limit = parameters[rename(key, "cornernet")].grad.norm(), tolerance(key)
        torch.testing.assert_close(got, norm, rtol=limit, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    for key, wanted in fixture.under(f"{at}/grad").items():
        error = (parameters[rename(key, "cornernet")].grad - wanted).norm() / wanted.norm()
        assert error <= tolerance(key), f"{key}: {error:.1e}"


def tolerance(key: str) -> float:
    """Of gradients, as the file has it: rounding adds up on the way to the first layers."""
    return 0.1 if key.startswith(("pre.", "kps.0.")) else 0.05


def check_cells(fixture: Fixture, targets: Targets, kinds: tuple, at: str) -> None:
    real, slots = targets.labels >= 0, fixture[f"{at}/mask"].bool()
    for kind, found in zip(KINDS, kinds, strict=True):
        assert found.cell[real].equal(fixture[f"{at}/{kind}_ind"][slots])


@each("cornernet")
def test_fixture_cornernet_names_are_told_from_others(name: str) -> None:
    """As a checkpoint of the reference has them."""
    fixture = read(name)
    ours = set(build(fixture, 1).state_dict())
    assert best_table([f"module.{key}" for key in fixture.under("weights")], ours) == "cornernet"


@each("op_cornernet_targets")
def test_fixture_cornernet_targets(name: str) -> None:
    fixture = read(name)
    c, targets = fixture.config, targets_of(fixture)
    kinds = corner_targets(targets, c["num_classes"], c["input"], c["output"], c["gaussian_iou"])
    check_cells(fixture, targets, kinds, "expect")
    real, slots = targets.labels >= 0, fixture["expect/mask"].bool()
    for kind, found in zip(KINDS, kinds, strict=True):
        fixture.close(found.heat, f"expect/{kind}_heat", "heat")
        offset = torch.zeros_like(fixture[f"expect/{kind}_regr"])
        offset[slots] = found.offset[real]
        fixture.close(offset, f"expect/{kind}_regr", "offsets")
    (height, width), (rows, columns) = c["input"], c["output"]
    scale = torch.tensor([columns / width, rows / height], dtype=torch.float64)
    radius = torch.full_like(fixture["expect/radius"], -1)
    radius[slots] = bump_radius(targets.boxes.double(), scale, c["gaussian_iou"])[real].long()
    fixture.close(radius, "expect/radius", "ints")


@each("op_cornernet_decode")
def test_fixture_cornernet_decode(name: str) -> None:
    fixture = read(name)
    kinds = [CornerMaps(*(fixture[f"input/{kind}_{one}"] for one in MAPS)) for kind in KINDS]
    c = fixture.config
    check_pairs(fixture, pair_corners(*kinds, c["K"], c["ae_threshold"], c["num_dets"]), "expect/det")


@each("op_cornernet_losses")
def test_fixture_cornernet_losses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From given maps. What objects there were, the file tells by their heat maps, cells and offsets."""
    fixture = read(name)
    c = fixture.config
    leaves: dict[str, Tensor] = {
        key: value.clone().requires_grad_() for key, value in fixture.under("input").items()
    }
    stacks = [
        Corners(*(CornerMaps(*(leaves[f"{kind}_{one}/{stack}"] for one in MAPS)) for kind in KINDS))
        for stack in range(c["stacks"])
    ]
    real = fixture["target/mask"].bool()
    images = len(real)
    model = CornerNet(
        HourglassNet(1, (4, 4), (1, 1), 4),
        c["num_classes"],
        4,
        pull=c["pull_weight"] * images,
        push=c["push_weight"] * images,
    )
    wanted = tuple(
        CornerTargets(*(fixture[f"target/{kind}_{one}"] for one in ("heat", "ind", "regr"))) for kind in KINDS
    )
    monkeypatch.setattr("detcore.models.cornernet.corner_targets", lambda *_: wanted)
    targets = Targets(torch.zeros(*real.shape, 4), real.long() - 1)
    losses = model.losses(stacks, targets)
    for key, loss in losses.items():
        fixture.close(loss, f"expect/loss/{key.removeprefix('loss_')}", "loss")
    total = sum(losses.values())
    fixture.close(total, "expect/loss/total", "loss")
    total.backward()
    for key in fixture.under("expect/grad"):
        fixture.close(leaves[key].grad, f"expect/grad/{key}", "grad")


@each("op_corner_pool")
@pytest.mark.parametrize("pool", [top_pool, bottom_pool, left_pool, right_pool])
def test_fixture_corner_pooling(name: str, pool: Callable[[Tensor], Tensor]) -> None:
    fixture, key = read(name), pool.__name__.removesuffix("_pool")
    x = fixture["input/x"].clone().requires_grad_()
    pooled = pool(x)
    fixture.close(pooled, f"expect/{key}", "all")
    pooled.backward(fixture["input/grad_out"])
    fixture.close(x.grad, f"expect/{key}_grad_x", "all")


@each("op_nms")
def test_fixture_soft_nms(name: str) -> None:
    """All classes in one call, where the reference has a call for each."""
    fixture = read(name)
    boxes, scores, labels = (fixture[f"input/{key}"][None] for key in ("boxes", "scores", "labels"))
    assert fixture.config["soft_method"] == "exponential"
    order, best = soft_nms(
        boxes,
        scores,
        labels,
        boxes.shape[1],
        fixture.config["soft_sigma"],
        fixture.config["soft_threshold"],
    )
    left = order[best >= 0]
    for label, count in enumerate(fixture.per_image("expect/soft_num")):
        own = left[labels[0, left] == label]
        rows = torch.cat([boxes[0, own], best[0, : len(left)][labels[0, left] == label][:, None]], dim=1)
        assert len(rows) == count
        fixture.close(rows, f"expect/soft_rows/{label}", "soft")
