"""What learns: the detector with its optimizer, and one step of both over parts of a batch."""

import os
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from detcore.config import Train
from detcore.data.feed import Inputs
from detcore.distributed import Losses, World, parallel
from detcore.loading import autocast
from detcore.models import build_model
from detcore.nonfinite import Guard
from detcore.schedule import build_optimizer, learning_rate, set_lr


def settle(cfg: Train) -> None:
    """Seed torch and choose its kernels, before anything draws a number or runs one.

    Without cudnn.benchmark: it tries all kernels anew for each shape, and the batches have many. On an H200
    the first ten steps took 37 s with it and 20 s without, a later shape 23 s and 7 s
    (recipes/fcos_mbv2_bccd.yaml).
    """
    torch.manual_seed(cfg.seed)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def fit(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raises ValueError if `weights` are another model's.

    load_state_dict says so in a RuntimeError, which is also what a GPU that fails or is full looks like.
    """
    own = model.state_dict()
    if alone := sorted(own.keys() ^ weights.keys()):
        raise ValueError(f"{alone[0]} is in {'the model' if alone[0] in own else 'the checkpoint'} only")
    for name, value in own.items():
        if value.shape != weights[name].shape:
            shapes = f"{list(weights[name].shape)} in the checkpoint, {list(value.shape)} in the model"
            raise ValueError(f"{name} is {shapes}")


class Learner:
    """A detector in training on this rank's device, its gradients shared with the other ranks'."""

    def __init__(self, cfg: Train, world: World, pretrained: bool) -> None:
        self.cfg, self.world = cfg, world
        self.model = build_model(cfg.model, pretrained)
        if cfg.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.model.to(world.device).train()
        self.optimizer = build_optimizer(self.model, cfg.schedule.optimizer)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=cfg.amp == "fp16")
        tolerant = cfg.skip_nonfinite > 0
        self._guard = Guard(self.model, self.optimizer, self.scaler, world) if tolerant else None
        self._losses = Losses(self.model, cfg.compile)
        self._parallel = parallel(self._losses, world)

    @property
    def terms(self) -> list[str]:
        """Names of the loss terms, known after the first step."""
        return self._losses.names

    def step(self, step: int, parts: Iterable[Inputs]) -> Tensor:
        """Learn from the parts of step `step` -> its loss terms (T,), means over the parts, still on
        the device."""
        schedule = self.cfg.schedule
        # The random numbers of a step, if the model uses any, are a function of the step, too.
        torch.manual_seed((self.cfg.seed * 1_000_003 + step - 1) * 65_537 + self.world.rank)
        set_lr(self.optimizer, learning_rate(step, schedule))
        self.optimizer.zero_grad(set_to_none=True)
        if self._guard:
            self._guard.begin()
        count, terms = schedule.accumulate, torch.zeros((), device=self.world.device)
        for number, inputs in enumerate(parts, start=1):
            alone = number < count and self.world.size > 1
            with self._parallel.no_sync() if alone else nullcontext():
                with autocast(self.cfg.amp, self.world.device):
                    loss, own = self._parallel(*inputs)
                self.scaler.scale(loss / count).backward()
            terms = terms + own / count
        if self._guard:
            self._guard.end(terms)
        if schedule.optimizer.clip is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), schedule.optimizer.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return terms

    def state_dict(self) -> dict[str, Any]:
        """What goes on from here needs, beside the weights of `model`."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError or ValueError if it is another recipe's."""
        if self.scaler.is_enabled() and not state["scaler"]:
            raise ValueError("it was not trained with amp: fp16")
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
