"""YOLOF from a recipe's section to losses and detections. Its numbers: test_fixtures_yolof.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from detcore.backbones.layers import SyncBatchNorm
from detcore.models import build_model
from detcore.models.yolof import YOLOF, joint_logits
from detcore.ops.targets import Targets
from tests.detcore.conftest import model_section, pad_targets

SMALL = {
    "name": "yolof",
    "num_classes": 3,
    "backbone": {"name": "resnet18", "width": 0.25, "norm": "bn"},
    "encoder": {"channels": 32, "mid_channels": 8, "dilations": [2, 4]},
    "decoder": {"cls_convs": 1, "reg_convs": 2},
    "test": {"score": 0.0},
}


def small(seed: int = 0, **changes: Any) -> YOLOF:
    torch.manual_seed(seed)
    return build_model(model_section(SMALL | changes))


def batch(count: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Targets]:
    """Images of which the second has no object, and the others one and two."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 128, 160), dtype=torch.uint8, generator=generator)
    sizes = torch.tensor([[128, 160], [100, 150], [90, 120]])[:count]
    boxes = [[[10.0, 10, 70, 60], [30, 40, 149, 99]], [], [[5, 5, 88, 80]]]
    labels = [[0, 2], [], [1]]
    targets = pad_targets(
        [torch.tensor(b).reshape(-1, 4) for b in boxes[:count]],
        [torch.tensor(c, dtype=torch.int64) for c in labels[:count]],
    )
    return images, sizes, targets


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def test_the_reference_has_44_million_parameters() -> None:
    backbone = {"name": "resnet50", "style": "caffe", "norm": "frozen_bn", "freeze": 2}
    with torch.device("meta"):
        model = build_model(model_section({"name": "yolof", "num_classes": 80, "backbone": backbone}))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 44.11


@pytest.mark.parametrize("backbone", ["resnet50", "mobilenetv2"])
def test_it_learns_one_batch(backbone: str) -> None:
    model = small(backbone={"name": backbone, "width": 0.25, "norm": "bn"})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    history = []
    for _ in range(16):
        loss = total(model(*batch()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.6 * history[0], history


def test_images_without_objects_and_batches_without_any() -> None:
    model = small()
    images, sizes, _ = batch()
    for empty in (
        Targets(torch.zeros(3, 0, 4), torch.zeros(3, 0, dtype=torch.int64)),
        Targets(torch.zeros(3, 4, 4), torch.full((3, 4), -1)),
    ):
        losses = model(images, sizes, empty)
        assert losses["loss_box_reg"] == 0 and losses["loss_cls"] > 0
        model.zero_grad()
        total(losses).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_what_lies_in_the_padding_changes_nothing() -> None:
    model = small().eval()
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
    for name, loss in clean.items():
        torch.testing.assert_close(dirty[name], loss)


def test_detections_of_one_image_are_those_of_the_batch() -> None:
    model = small().eval()
    images, sizes, _ = batch()
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
        scores = together.scores[i, :count]
        assert (scores.diff() <= 0).all()


def test_a_score_that_nothing_reaches_gives_nothing() -> None:
    model = small(test={"score": 1.0}).eval()
    images, sizes, _ = batch()
    found = model.detect(images, sizes)
    assert found.count.tolist() == [0, 0, 0] and (found.labels == -1).all() and not found.boxes.any()


def test_joint_logits_are_the_product_of_two_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(100, 4, generator=generator, dtype=torch.float64) * 4
    objectness = torch.randn(100, 1, generator=generator, dtype=torch.float64) * 4
    product = classes.sigmoid() * objectness.sigmoid()
    torch.testing.assert_close(joint_logits(classes, objectness), (product / (1 - product)).log())


def test_extreme_logits_have_finite_gradients() -> None:
    """exp(200) is infinite in float32, and clamping it afterwards would make the gradient NaN."""
    for value in (-200.0, 88.0, 89.0, 200.0, 3e4):
        classes = torch.full((1, 2), value, requires_grad=True)
        objectness = torch.full((1, 1), -value, requires_grad=True)
        joint_logits(classes, objectness).sum().backward()
        assert classes.grad.isfinite().all() and objectness.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_stay_float32_under_autocast(dtype: torch.dtype) -> None:
    model = small()
    exact = model(*batch())
    with torch.autocast("cpu", dtype=dtype):
        losses = model(*batch())
    total(losses).backward()
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact[name], rtol=0.05, atol=0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters())


class Uploads(TorchDispatchMode):
    """Counts tensors made from Python numbers: on a device each is a copy that the host waits for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


def test_a_training_step_asks_for_no_value() -> None:
    """Fake tensors have shapes and no values: .item(), nonzero, a boolean index, `if tensor` all raise."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = small()
        images, sizes, targets = batch()
        arguments = (mode.from_tensor(images), mode.from_tensor(sizes), targets.map(mode.from_tensor))
        with Uploads() as uploads:
            total(model(*arguments)).backward()
    assert uploads.count == 0


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_a_training_step_never_waits_for_the_device(device: str) -> None:
    images, sizes, targets = batch()
    model = small().to(device)
    arguments = (images.to(device), sizes.to(device), targets.map(lambda t: t.to(device)))
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        total(model(*arguments)).backward()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_training_step_is_one_graph() -> None:
    """torch.compile finds nothing it cannot trace: no break, so no point where the host must look."""
    model = small()
    losses = torch.compile(model, fullgraph=True, backend="eager")(*batch())
    for name, loss in small()(*batch()).items():
        torch.testing.assert_close(losses[name], loss)


def test_repeated_anchors_give_the_same_label_every_time() -> None:
    """Two boxes in one place want the same anchors: the last pair of the list has them."""
    model = small()
    images, sizes, _ = batch(1)
    same = torch.tensor([[20.0, 20, 80, 80], [20, 20, 80, 80]])
    targets = pad_targets([same], [torch.tensor([0, 1])])
    _, deltas = model.predict(model.features(images, sizes))
    matches = model.assign(model.decode(deltas), model.anchors(deltas), targets)
    assert set(matches.assigned[matches.assigned >= 0].tolist()) == {1}


def worker(rank: int, store: str, results: str) -> None:
    """One of two ranks, with half of the batch; writes its share of what one process would compute."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    images, sizes, targets = batch(2)
    one = slice(rank, rank + 1)
    model = small().eval()
    total(model(images[one], sizes[one], Targets(targets.boxes[one], targets.labels[one]))).backward()
    gradients = [p.grad / 2 for p in model.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)

    norm = SyncBatchNorm(3)
    x = torch.arange(48.0).reshape(2, 3, 2, 4).sin().requires_grad_()
    y = norm(x[one])
    y.square().mul(torch.arange(4.0)).sum().backward()
    torch.save(
        {"gradients": gradients, "y": y.detach(), "x": x.grad[one], "state": norm.state_dict()},
        f"{results}/{rank}.pth",
    )
    dist.destroy_process_group()


def test_two_ranks_are_one_big_batch(tmp_path: Path) -> None:
    """The rank without objects counts in the normaliser; SyncBatchNorm sees both ranks' values."""
    torch.multiprocessing.spawn(worker, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2)]

    model = small().eval()
    total(model(*batch(2))).backward()
    for ours, p in zip(ranks[0]["gradients"], model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-4, atol=1e-6)

    norm = nn.BatchNorm2d(3)
    x = torch.arange(48.0).reshape(2, 3, 2, 4).sin().requires_grad_()
    y = norm(x)
    y.square().mul(torch.arange(4.0)).sum().backward()
    torch.testing.assert_close(torch.cat([rank["y"] for rank in ranks]), y.detach())
    torch.testing.assert_close(torch.cat([rank["x"] for rank in ranks]), x.grad, rtol=1e-4, atol=1e-5)
    for rank in ranks:
        for key, value in norm.state_dict().items():
            torch.testing.assert_close(rank["state"][key], value)
