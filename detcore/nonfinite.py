"""Steps whose loss is not finite: that they leave no trace, how many may pass, and what is said of them."""

from collections.abc import Callable
from math import isfinite
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from detcore.data.feed import Feed
from detcore.distributed import Heard, World
from detcore.errors import TrainingError
from detcore.ops.losses import MovingCount


class Guard:
    """Keeps such a step, on whichever rank it is, from weights, the optimizer's state, batch norm's
    statistics and moving averages. All of it on the device: the host waits for nothing.

    A fused optimizer leaves everything as it is where its `found_inf` is 1, which is how GradScaler skips
    steps whose gradients overflow. The scaler still does so, and halves its scale; those are not counted.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, scaler: GradScaler, world: World) -> None:
        self._alone, self._scaled = world.size == 1, scaler.is_enabled()
        self._moving = [
            buffer
            for module in model.modules()
            if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm | MovingCount)
            for buffer in module.buffers(recurse=False)
        ]
        self._before = [buffer.clone() for buffer in self._moving]
        self._bad = torch.zeros((), device=world.device)
        optimizer.register_step_pre_hook(self._skip)

    def begin(self) -> None:
        """Before a step's first forward pass, which moves averages."""
        for before, moving in zip(self._before, self._moving, strict=True):
            before.copy_(moving)

    def end(self, terms: Tensor) -> None:
        """After the last backward pass. terms: this rank's of the step (T,)."""
        self._bad = terms.isfinite().all().logical_not().float()
        if not self._alone:
            dist.all_reduce(self._bad, dist.ReduceOp.MAX)
        for before, moving in zip(self._before, self._moving, strict=True):
            moving.copy_(torch.where(self._bad > 0, before, moving))

    def _skip(self, optimizer: Any, *_: Any) -> None:
        # With a scaler it is there already: whether gradients overflowed.
        optimizer.found_inf = torch.maximum(self._bad, optimizer.found_inf) if self._scaled else self._bad


class Tolerance:
    """Lets `allowed` of a run's steps pass, and no more. passed: how many have; every rank counts alike.

    last: what is to be said of the newest checkpoint, known on rank 0.
    """

    def __init__(
        self, allowed: int, world: World, feed: Feed, say: Callable[[str], None], last: Callable[[], str]
    ) -> None:
        self.allowed, self.passed = allowed, 0
        self._world, self._feed, self._say, self._last = world, feed, say, last

    def accepts(self, news: Heard, names: list[str]) -> bool:
        """Whether the step counts: not if its loss, of any rank, is not finite. Says whose images it was.

        Raises TrainingError where that is one step too many, on every rank.
        """
        if all(map(isfinite, news.terms)):
            return True
        own = [] if all(map(isfinite, news.own)) else self._feed.image_ids(news.step)
        ids = sorted({image for part in self._world.gather(own) for image in part})
        terms = ", ".join(f"{name} {value:g}" for name, value in zip(names, news.terms, strict=True))
        what = f"the loss of step {news.step} is not finite ({terms}); it was computed from images {ids}"
        if self.passed < self.allowed:
            self.passed += 1
            self._say(
                f"{what}; this step changes nothing, {self.passed} of at most {self.allowed} such steps"
            )
            return False
        before = f"; {self.passed} such steps have passed before" if self.allowed else ""
        cure = "a lower learning rate, a longer warm-up or schedule.optimizer.clip may help"
        raise TrainingError(self._world.from_first(f"{what}{before}; {self._last()}; {cure}"))
