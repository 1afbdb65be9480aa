"""What only YOLOF has: joint logits, and anchors that are matched twice. See also test_detectors.py."""

import torch

from detcore.models import build_model
from detcore.models.yolof import joint_logits
from tests.detcore.conftest import batch, model_section, pad_targets, total


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


def test_with_a_dilated_stage_all_is_at_stride_16_but_the_clamp() -> None:
    section = {
        "name": "yolof",
        "num_classes": 3,
        "backbone": {"name": "resnet50", "width": 0.125, "norm": "bn", "dilate": True},
        "encoder": {"channels": 16, "mid_channels": 8},
        "anchors": [16, 64],
    }
    model = build_model(model_section(section))
    images, sizes, targets = batch()
    logits, deltas = model.predict(model.features(images, sizes))
    assert deltas.shape == (3, 2 * 4, 8, 10)
    anchors = model.anchors(deltas)
    assert anchors[[0, 3, -1]].tolist() == [[-8, -8, 8, 8], [-16, -32, 48, 32], [112, 80, 176, 144]]
    moved = model.decode(torch.full_like(deltas, 9.0))[0] - anchors
    shift = (moved[:, :2] + moved[:, 2:]) / 2
    torch.testing.assert_close(shift, torch.full_like(shift, 32.0), atol=1e-3, rtol=0)
    total(model.losses(logits, deltas, targets)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_repeated_anchors_give_the_same_label_every_time() -> None:
    """Two boxes in one place want the same anchors: the last pair of the list has them."""
    section = {
        "name": "yolof",
        "num_classes": 3,
        "backbone": {"name": "resnet18", "width": 0.25, "norm": "bn"},
    }
    model = build_model(model_section(section))
    images, sizes, _ = batch(1)
    same = torch.tensor([[20.0, 20, 80, 80], [20, 20, 80, 80]])
    targets = pad_targets([same], [torch.tensor([0, 1])])
    _, deltas = model.predict(model.features(images, sizes))
    matches = model.assign(model.decode(deltas), model.anchors(deltas), targets)
    assert set(matches.assigned[matches.assigned >= 0].tolist()) == {1}
