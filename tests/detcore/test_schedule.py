"""The learning rate as a function of the step, and which parameter gets which."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
    flat = schedule(warmup={"iterations": 10, "factor": 0.1, "constant": True}, for_batch=2)
    assert [lr_factor(step, flat) for step in (0, 9, 10)] == pytest.approx([0.1, 0.1, 1.0])
    assert flat.scaled(4).warmup.constant


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

    optimizer = build_optimizer(model, cfg.model_copy(update={"bias_lr": 2.0, "bias_decay": 0.05}))
    set_lr(optimizer, 0.4)
    found = {id(p): SimpleNamespace(**group) for group in optimizer.param_groups for p in group["params"]}
    for bias, lr in ((model.backbone[1].bias, 0.2), (model.head[0].bias, 0.8), (model.head[1].bias, 0.8)):
        assert (found[id(bias)].lr, found[id(bias)].weight_decay) == (lr, 0.05)
    assert found[id(model.head[0].weight)].lr == 0.4

    own = cfg.model_copy(update={"bias_lr": 2.0, "bias_decay": 0.05, "bias_norms": False})
    groups = build_optimizer(model, own).param_groups
    found = {id(p): (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found[id(model.head[0].bias)] == (2.0, 0.05) and found[id(model.head[1].bias)] == (1.0, 0.0)


def learned(optimizer: torch.optim.Optimizer, model: nn.Module, steps: range) -> list[Tensor]:
    """The weights after these steps, each with a gradient of its own."""
    for step in steps:
        set_lr(optimizer, 0.1 / (step + 1))
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_an_optimizer_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    cfg = Optimizer(name=name, lr=0.1, weight_decay=0.01)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = build_optimizer(model, cfg)
    assert type(optimizer).__name__.lower() == name
    learned(optimizer, model, range(3))
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "saved.pth")
    undisturbed = learned(optimizer, model, range(3, 6))

    weights, state = torch.load(tmp_path / "saved.pth", weights_only=True)
    again = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    again.load_state_dict(weights)
    optimizer = build_optimizer(again, cfg)
    optimizer.load_state_dict(state)
    for ours, theirs in zip(learned(optimizer, again, range(3, 6)), undisturbed, strict=True):
        assert torch.equal(ours, theirs)


def test_adam_is_the_papers() -> None:
    """arXiv:1412.6980, algorithm 1, with the betas and epsilon it proposes."""
    model = nn.Linear(2, 1, bias=False)
    weight = model.weight.detach().double().clone()
    optimizer = build_optimizer(model, Optimizer(name="adam", lr=1.0, weight_decay=0.0))
    mean = square = torch.zeros_like(weight)
    for step in range(1, 5):
        model.weight.grad = torch.tensor([[1.0, -2.0]]) / step
        gradient = model.weight.grad.double()
        set_lr(optimizer, 0.01 * step)
        optimizer.step()
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        rate = 0.01 * step * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
        weight = weight - rate * mean / (square.sqrt() + 1e-8)
    torch.testing.assert_close(model.weight.detach().double(), weight, rtol=1e-5, atol=1e-6)
