"""What holds for every detector, from a recipe's section to losses and detections. Their numbers are compared
in test_fixtures_*.py."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from detcore.models import build_model
from detcore.ops.targets import Targets
from tests.detcore.conftest import batch, model_section, total
from tests.detcore.sections import SECTIONS, section

EACH = pytest.mark.parametrize("name", SECTIONS)
ONE_OF_A_KIND = pytest.mark.parametrize("name", ["yolof", "retinanet", "fcos", "atss", "ssdlite"])


def small(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    changes = {"test": {"score": 0.0, "topk": 200}} | changes
    return build_model(model_section(section(name, **changes)))


@pytest.mark.parametrize(
    ("changes", "millions"),
    [
        ({"name": "yolof"}, 44.11),
        # torchvision's FCOS has 32,269,600 with 91 classes
        ({"name": "fcos", "style": "detectron2", "num_classes": 91}, 32.27),
        ({"name": "retinanet"}, 37.92),
    ],
)
def test_parameters_of_the_published_models(changes: dict[str, Any], millions: float) -> None:
    backbone = {"name": "resnet50", "style": "caffe", "norm": "frozen_bn", "freeze": 2}
    with torch.device("meta"):
        model = build_model(model_section({"num_classes": 80, "backbone": backbone} | changes))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("yolof", "resnet50"),
        ("retinanet", "mobilenetv2"),
        ("fcos", "resnet50"),
        ("atss", "mobilenetv2"),
        ("ssdlite", "mobilenetv2"),
    ],
)
def test_it_learns_one_batch(name: str, backbone: str) -> None:
    model = small(name, backbone={"name": backbone, "width": 0.25, "norm": "bn"})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    history = []
    for _ in range(12):
        loss = total(model(*batch()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.75 * history[0], history


@EACH
def test_images_without_objects_and_batches_without_any(name: str) -> None:
    model = small(name)
    images, sizes, _ = batch()
    for empty in (
        Targets(torch.zeros(3, 0, 4), torch.zeros(3, 0, dtype=torch.int64)),
        Targets(torch.zeros(3, 4, 4), torch.full((3, 4), -1)),
    ):
        losses = model(images, sizes, empty)
        # SSD learns background beside objects only
        assert (losses.pop("loss_cls") > 0) == (not name.startswith("ssdlite")) and not any(losses.values())
        model.zero_grad()
        total(model(images, sizes, empty)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@EACH
def test_an_image_with_500_objects(name: str) -> None:
    """Many in one place, some without an area, and beside them an image with one."""
    model = small(name)
    images, sizes, _ = batch(2)
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 500, 2, 2, generator=generator) * torch.tensor([160.0, 128.0])
    boxes = torch.cat([corners.amin(dim=2), corners.amax(dim=2)], dim=-1).round()
    boxes[:, 100:200] = boxes[:, :1]
    boxes[:, 200:220, 2] = boxes[:, 200:220, 0]
    labels = torch.randint(0, 3, (2, 500), generator=generator)
    labels[1, 1:] = -1
    losses = model(images, sizes, Targets(boxes, labels))
    total(losses).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())


@EACH
@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("objects", [0, 2])
def test_one_image_alone(name: str, amp: torch.dtype | None, objects: int) -> None:
    """As each of many ranks may have it, with objects or without."""
    model = small(name)
    images, sizes, targets = batch(1)
    targets = targets.map(lambda tensor: tensor[:, :objects])
    with torch.autocast("cpu", dtype=amp, enabled=amp is not None):
        losses = model(images, sizes, targets)
    total(losses).backward()
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(value.isfinite().all() for value in model.state_dict().values())


@ONE_OF_A_KIND
def test_what_lies_in_the_padding_changes_nothing(name: str) -> None:
    model = small(name).eval()
    images, sizes, targets = batch()
    noisy = images.clone()
    for image, (height, width) in zip(noisy, sizes.tolist(), strict=True):
        image[:, height:] = 77
        image[:, :, width:] = 99
    padded = Targets(
        torch.cat([targets.boxes, torch.full((3, 4, 4), 60.0)], 1),
        torch.cat([targets.labels, torch.full((3, 4), -1)], 1),
    )
    clean, dirty = model(images, sizes, targets), model(noisy, sizes, padded)
    for key, loss in clean.items():
        torch.testing.assert_close(dirty[key], loss)


@EACH
def test_detections_of_one_image_are_those_of_the_batch(name: str) -> None:
    model = small(name).eval()
    images, sizes, _ = batch()
    together = model.detect(images, sizes)
    assert (together.count > 0).all()
    for i, count in enumerate(together.count.tolist()):
        alone = model.detect(images[i : i + 1], sizes[i : i + 1])
        assert alone.count.tolist() == [count]
        torch.testing.assert_close(alone.boxes[0, :count], together.boxes[i, :count], atol=1e-2, rtol=0)
        torch.testing.assert_close(alone.scores[0, :count], together.scores[i, :count], atol=1e-5, rtol=0)
        height, width = sizes[i].tolist()
        boxes = together.boxes[i, :count]
        assert (boxes >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        scores = together.scores[i, :count]
        assert (scores.diff() <= 0).all()


@ONE_OF_A_KIND
def test_a_score_that_nothing_reaches_gives_nothing(name: str) -> None:
    model = small(name, test={"score": 1.0}).eval()
    images, sizes, _ = batch()
    found = model.detect(images, sizes)
    assert found.count.tolist() == [0, 0, 0] and (found.labels == -1).all() and not found.boxes.any()


HALF = [  # three seconds each on a CPU
    pytest.param(name, torch.float16, marks=() if name in ("yolof", "ssdlite") else pytest.mark.soak)
    for name in SECTIONS
]


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.bfloat16) for name in SECTIONS), *HALF])
def test_losses_stay_float32_under_autocast(name: str, dtype: torch.dtype) -> None:
    exact = small(name)(*batch())
    model = small(name)
    with torch.autocast("cpu", dtype=dtype):
        losses = model(*batch())
    total(losses).backward()
    for key, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact[key], rtol=0.05, atol=0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters())


class Uploads(TorchDispatchMode):
    """Counts tensors made from Python numbers: on a device each is a copy that the host waits for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


@EACH
def test_a_training_step_asks_for_no_value(name: str) -> None:
    """Fake tensors have shapes and no values: .item(), nonzero, a boolean index, `if tensor` all raise."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = small(name)
        images, sizes, targets = batch()
        arguments = (mode.from_tensor(images), mode.from_tensor(sizes), targets.map(mode.from_tensor))
        with Uploads() as uploads:
            total(model(*arguments)).backward()
    assert uploads.count == 0


@EACH
def test_no_gradient_asks_for_a_value(name: str) -> None:
    """Some of PyTorch's do, as that of Tensor.prod, but not of fake tensors."""
    model = small(name)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        total(model(*batch())).backward()
    assert not {"aten::item", "aten::nonzero"} & {event.name for event in seen.events()}


@EACH
def test_a_training_step_never_waits_for_the_device(name: str, cuda: torch.device) -> None:
    images, sizes, targets = batch()
    model = small(name).to(cuda)
    arguments = (images.to(cuda), sizes.to(cuda), targets.map(lambda tensor: tensor.to(cuda)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        total(model(*arguments)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # dynamo does so
@ONE_OF_A_KIND
def test_the_training_step_is_one_graph(name: str) -> None:
    """torch.compile finds nothing it cannot trace: no break, so no point where the host must look."""
    model = small(name)
    losses = torch.compile(model, fullgraph=True, backend="eager")(*batch())
    for key, loss in small(name)(*batch()).items():
        torch.testing.assert_close(losses[key], loss)


@pytest.mark.parametrize("name", ["retinanet", "fcos-detectron2"])
def test_the_moving_normaliser_is_kept_and_moves_only_in_training(name: str) -> None:
    model, (images, sizes, targets) = small(name), batch()
    start = model.normalizer.average.clone()
    model.eval()(images, sizes, targets)
    assert model.normalizer.average.equal(start)
    model.train()(images, sizes, targets)
    foreground = (model.normalizer.average - 0.9 * start) / 0.1
    torch.testing.assert_close(foreground, foreground.round(), rtol=1e-3, atol=1e-3)
    assert "normalizer.average" in model.state_dict() and not model.normalizer.average.equal(start)


@pytest.mark.parametrize(("weights", "eps"), [(None, 1e-3), ("torchvision_mobilenetv2", 1e-5)])
def test_norms_of_a_backbone_with_weights_stay_as_those_know_them(weights: str | None, eps: float) -> None:
    backbone = {"name": "mobilenetv2", "weights": weights, "norm": "bn"}
    cfg = model_section(section("ssdlite", backbone=backbone))
    model = build_model(cfg, pretrained=False)
    assert model.backbone.conv2.norm.eps == eps and model.neck.layers[0].reduce.norm.eps == 1e-3
