"""Writing checkpoints in the background: training stops for one copy in memory and goes on.

By a thread, not a process: torch.save, hash and write leave the interpreter alone for long stretches. At
training's own priority: where other processes want the cores, a niced thread loses its turn with the
interpreter's lock in hand, and training waits for it (measured on busy cores: nearly twice the stall).
"""

import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from detcore.checkpoint import Checkpoint, save
from detcore.rundir import RunDir
from detcore.snapshot import Snapshot

TURN = 0.0005  # seconds after which the writing thread gives up the interpreter's lock, to training
LOOK = 0.1  # seconds between looks at how a write gets on


class NotFinite(Exception):
    """A weight is not finite: of these no checkpoint is written."""


class Writer:
    """Writes one checkpoint at a time. `step`: which one.

    before: called in that thread ahead of each write; its OSError is the write's.
    """

    def __init__(self, run: RunDir, optimizer: Optimizer, before: Callable[[], None]) -> None:
        self._run, self._before = run, before
        self._snapshot = Snapshot(optimizer)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._write: Future[Checkpoint] | None = None
        self._moved = self.step = 0
        self._began = 0.0

    def warm(self, training: dict[str, Any], model: dict[str, Any]) -> None:
        """Allocate the memory for copies, so that the first one is as quick as the others."""
        self._snapshot.take((training, model))

    def begin(self, step: int, training: dict[str, Any], model: dict[str, Any]) -> None:
        """Copy the state, which is all that the caller waits for, and begin to write it. `outcome` has told
        of the write before."""
        assert self._write is None
        self.step, self._began = step, time.perf_counter()
        copied = self._snapshot.take((training, model))
        self._write = self._thread.submit(self._work, step, *copied)

    @property
    def busy(self) -> bool:
        return self._write is not None and not self._write.done()

    @property
    def age(self) -> float:
        """Seconds since the write began."""
        return time.perf_counter() - self._began

    def wait(self, beat: Callable[[], None]) -> None:
        """Until the write has ended. beat: called whenever it has got on."""
        seen = self._moved
        while self._write is not None and not self._write.done():
            wait([self._write], timeout=LOOK)
            if seen != self._moved:
                seen = self._moved
                beat()

    def outcome(self) -> Checkpoint | None:
        """What a write came to that has ended, once; None if there is none. Raises OSError, NotFinite."""
        if self._write is None or self.busy:
            return None
        ended, self._write = self._write, None
        return ended.result()

    def _work(self, step: int, training: dict[str, Any], model: dict[str, Any]) -> Checkpoint:
        usual = sys.getswitchinterval()
        sys.setswitchinterval(TURN)
        try:
            self._snapshot.wait()
            if not all(map(_is_finite, model.values())):
                raise NotFinite
            self._before()
            return save(self._run, step, training, model, self._move)
        finally:
            sys.setswitchinterval(usual)

    def _move(self) -> None:
        self._moved += 1


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.sum().isfinite():
        return True
    return bool(tensor.isfinite().all())  # the sum alone may have overflowed
