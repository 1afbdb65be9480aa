"""One step of learning: parts of a batch, mixed precision, and what a checkpoint must hold of them."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from detcore.config import Train
from detcore.data.coco import read_coco
from detcore.data.feed import Feed
from detcore.distributed import World
from detcore.errors import InputError
from detcore.learner import Learner, settle
from detcore.train import Trainer
from tests.detcore.conftest import assert_same
from tests.detcore.sections import EVERY, section

ALONE = World(0, 1, torch.device("cpu"))


def made(tiny: dict[str, Any], world: World = ALONE, **schedule: Any) -> tuple[Learner, Feed]:
    tiny["data"] |= {"workers": 0, "group_by_aspect": False}
    tiny["schedule"] |= {"warmup": {"iterations": 0}} | schedule
    cfg = Train.model_validate(tiny)
    settle(cfg)
    data = cfg.data
    coco = read_coco(data.path(data.train.images), data.path(data.train.annotations), training=True)
    return Learner(cfg, world, pretrained=False), Feed(cfg, coco, world, 0)


def test_parts_add_up_to_the_mean_of_their_gradients(tiny: dict[str, Any]) -> None:
    plain = {"lr": 0.01, "momentum": 0.0, "weight_decay": 0.0}
    learner, feed = made(tiny, accumulate=2, optimizer=plain)
    parts = list(feed.step(1))
    assert [len(part.images) for part in parts] == [4, 4], "8 images in two parts"
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    terms = learner.step(1, parts)

    again, _ = made(tiny, accumulate=2, optimizer=plain)
    losses = [again.model(*part) for part in parts]
    sum(sum(loss.values()) for loss in losses).backward()
    mean = [sum(loss[name].detach() for loss in losses) / 2 for name in learner.terms]
    torch.testing.assert_close(terms, torch.stack(mean))
    for (name, p), other in zip(learner.model.named_parameters(), again.model.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.detach(), before[name] - 0.01 * other.grad / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_it_goes_on_the_same_from_what_it_saves(name: str, tiny: dict[str, Any]) -> None:
    """Moving normalisers, too, bit for bit."""
    tiny["model"] = section(name)
    learner, feed = made(tiny)
    parts = {step: list(feed.step(step)) for step in range(1, 5)}
    for step in (1, 2):
        learner.step(step, parts[step])
    weights, state = copy.deepcopy((learner.model.state_dict(), learner.state_dict()))
    other, _ = made(tiny)
    other.model.load_state_dict(weights)
    other.load_state_dict(state)
    for step in (3, 4):
        assert_same(other.step(step, parts[step]), learner.step(step, parts[step]))
    assert_same(dict(other.model.state_dict()), dict(learner.model.state_dict()))


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_learns_and_its_scale_is_kept(amp: str, tiny: dict[str, Any]) -> None:
    tiny["amp"] = amp
    learner, feed = made(tiny)
    if amp == "fp16":
        rescale(learner, 1024.0)  # no gradient overflows
    for step in (1, 2):
        assert learner.step(step, feed.step(step)).isfinite().all()
    assert all(p.dtype == torch.float32 for p in learner.model.parameters())
    state = learner.state_dict()
    if amp == "bf16":
        assert state["scaler"] == {}, "bf16 needs no scale"
        return
    assert state["scaler"]["_growth_tracker"] == 2
    other, _ = made(tiny)
    other.load_state_dict(state | {"scaler": state["scaler"] | {"scale": 17.0}})
    assert other.scaler.get_scale() == 17.0


def rescale(learner: Learner, scale: float) -> None:
    learner.scaler.load_state_dict(learner.scaler.state_dict() | {"scale": scale})


def test_a_first_step_that_overflows_changes_nothing_but_the_scale(tiny: dict[str, Any]) -> None:
    """Not even the momentum, which PyTorch's fused SGD would leave as the memory happened to be."""
    tiny["amp"] = "fp16"
    learner, feed = made(tiny)
    part, next_part = list(feed.step(1)), list(feed.step(2))
    before = [p.detach().clone() for p in learner.model.parameters()]
    rescale(learner, 2.0**120)
    rubbish = [torch.full_like(p, torch.nan) for p in before]  # for the allocator to give out again
    del rubbish
    learner.step(1, part)
    assert all(torch.equal(p, old) for p, old in zip(learner.model.parameters(), before, strict=True))
    assert learner.scaler.get_scale() == 2.0**119
    other, _ = made(tiny)
    for each in (learner, other):
        rescale(each, 64.0)
        each.step(2, next_part)
    for p, q in zip(learner.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("trouble", "expected"),
    [
        ("name", (InputError, "does not fit this recipe: more is in the checkpoint only")),
        ("shape", (InputError, r"does not fit this recipe: .* is \[1\] in the checkpoint")),
        ("amp", (InputError, "not trained with amp: fp16")),
        ("state", (InputError, "does not fit this recipe: 'optimizer'")),
        ("memory", (torch.OutOfMemoryError, "CUDA out of memory")),
    ],
)
def test_only_another_recipes_checkpoint_is_wrong_input(
    trouble: str,
    expected: tuple[type[Exception], str],
    tiny: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU that is full or fails raises the RuntimeError that a misfit raises, and may have passed later."""
    tiny["amp"] = "fp16" if trouble == "amp" else "none"
    learner, _ = made(tiny)
    weights = learner.model.state_dict()
    state = {"optimizer": learner.optimizer.state_dict(), "scaler": {}}
    if trouble == "name":
        weights["more"] = torch.zeros(1)
    elif trouble == "shape":
        weights[next(iter(weights))] = torch.zeros(1)
    elif trouble == "state":
        del state["optimizer"]
    elif trouble == "memory":

        def full(state: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(learner.model, "load_state_dict", full)
    found: Any = SimpleNamespace(path=Path("step-1"), model=lambda: weights, training=lambda: state)
    trainer: Any = SimpleNamespace(learner=learner)
    with pytest.raises(expected[0], match=expected[1]):
        Trainer.restore(trainer, found)
