"""The learning rate as a function of the step, and which parameter gets which."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from detcore.config import Optimizer, Schedule
from detcore.schedule import build_optimizer, lr_factor, set_lr


def schedule(**more: Any) -> Schedule:
    return Schedule.model_validate({"iterations": 100, "optimizer": {"lr": 1.0}} | more)


def test_warmup_and_steps() -> None:
    plan = schedule(warmup={"iterations": 10, "factor": 0.1}, steps=[60, 80])
    assert lr_factor(0, plan) == pytest.approx(0.1)
    assert lr_factor(5, plan) == pytest.approx(0.55)
    assert [lr_factor(step, plan) for step in (10, 59)] == [1.0, 1.0]
    assert [lr_factor(step, plan) for step in (60, 80, 99)] == pytest.approx([0.1, 0.01, 0.01])


def test_cosine() -> None:
    plan = schedule(cosine=True)
    assert [lr_factor(step, plan) for step in (0, 50, 100)] == pytest.approx([1.0, 0.5, 0.0])


def test_groups() -> None:
    model = nn.Module()
    model.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model.head = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))
    model.backbone[0].bias.requires_grad_(False)
    cfg = Optimizer(lr=0.5, weight_decay=0.1, norm_decay=0.0, backbone_lr=0.25)
    optimizer = build_optimizer(model, cfg)
    set_lr(optimizer, 0.4)
    found = {id(p): SimpleNamespace(**group) for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == 7 and id(model.backbone[0].bias) not in found
    conv, norm = found[id(model.backbone[0].weight)], found[id(model.backbone[1].bias)]
    assert (conv.lr, conv.weight_decay) == (0.1, 0.1) and (norm.lr, norm.weight_decay) == (0.1, 0.0)
    conv, norm = found[id(model.head[0].bias)], found[id(model.head[1].weight)]
    assert (conv.lr, conv.weight_decay) == (0.4, 0.1) and (norm.lr, norm.weight_decay) == (0.4, 0.0)
