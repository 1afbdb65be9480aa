"""When a run in training saves a checkpoint, and the one that it goes on from."""

import time
from typing import Any

from torch.optim import Optimizer

from detcore import checkpoint as ckpt
from detcore.distributed import World
from detcore.recorder import Recorder
from detcore.rundir import RunDir, sweep
from detcore.writer import NotFinite, Writer

State = dict[str, Any]


def find(run: RunDir, world: World, recorder: Recorder) -> ckpt.Checkpoint | None:
    """The newest checkpoint that is whole: rank 0 looks, all use the same."""
    found = None
    if world.rank == 0:
        sweep(run)
        ckpt.sweep(run.checkpoints)
        found = ckpt.newest(run.checkpoints, recorder.say, recorder.heartbeat.beat)
    return world.from_first(found)


class Saver:
    """Saves when `run.every` says so: every so many steps, or by rank 0's clock.

    saved: step of the newest checkpoint; broken: step whose weights were not finite. Rank 0 alone writes, and
    learns of both at moments of its own; the others know them after `finish`. So before it nothing that all
    ranks do together may depend on them.
    """

    def __init__(
        self, run: RunDir, world: World, recorder: Recorder, optimizer: Optimizer, saved: int | None
    ) -> None:
        self.run, self.recorder, self.world, self.saved = run, recorder, world, saved
        self.broken: int | None = None
        self._writer = Writer(run, optimizer, recorder.sync)
        self._last = time.perf_counter()

    def warm(self, training: State, model: State) -> None:
        if self.world.rank == 0:
            self._writer.warm(training, model)

    def is_due(self, step: int) -> bool:
        """By the number of steps; every rank comes to the same answer."""
        every = self.run.every
        return every.endswith("it") and step % int(every[:-2]) == 0

    def clock_says_so(self) -> bool:
        """By time. Only rank 0's clock counts, so the others must be told."""
        every = self.run.every
        if self.world.rank != 0 or not every.endswith("s"):
            return False
        return time.perf_counter() - self._last >= float(every[:-1])

    def begin(self, step: int, training: State, model: State, must: bool = False) -> None:
        """A checkpoint of `step` is on its way. While the one before still is, wait for it, or skip this one
        if the recipe says so, unless it is a `must`.

        A disk that refuses it ends nothing: the last one stays, and the next interval tries again.
        """
        self._last = time.perf_counter()
        if self.world.rank != 0:
            return
        if self._writer.busy:
            other, age = f"that of step {self._writer.step}", self._writer.age
            if self.run.busy == "skip" and not must:
                self.recorder.say(f"skipped the checkpoint of step {step}: {other} takes {age:.1f} s already")
                return
            self.wait()
            waited = self._writer.age - age
            self.recorder.say(f"the checkpoint of step {step} waited {waited:.1f} s for {other}")
        self.look()
        try:
            self.recorder.flush()  # first: whoever has a checkpoint has the lines up to it
        except OSError as error:
            self._refused(step, error)
        else:
            self._writer.begin(step, training, model)

    def look(self) -> None:
        """Say what the last write came to, if it has ended."""
        try:
            made = self._writer.outcome()
        except OSError as error:
            self._refused(self._writer.step, error)
        except NotFinite:
            self.broken = self._writer.step
        else:
            if made is not None:
                self.saved = made.step
                self.recorder.say(f"saved {made.path.name}")

    def wait(self) -> None:
        """Until nothing is on its way any more."""
        if self._writer.busy:
            heartbeat = self.recorder.heartbeat
            phase = heartbeat.content["phase"]
            heartbeat.enter("saving")
            self._writer.wait(heartbeat.beat)
            heartbeat.enter(phase)
        self.look()

    def finish(self, step: int, training: State, model: State) -> None:
        """There is a checkpoint of `step`, or the log says why not. Every rank must call this."""
        if self.world.rank == 0:
            self.wait()
            if self.saved != step and self.broken is None:
                self.begin(step, training, model)
                self.wait()
        self.saved, self.broken = self.world.from_first((self.saved, self.broken))

    def last(self) -> str:
        """For people, on rank 0: which is the last good checkpoint. One on its way is waited for."""
        self.wait()
        found = [one for one in ckpt.candidates(self.run.checkpoints) if one.step == self.saved]
        return (
            f"the last good checkpoint is {max(found).path.name}" if found else "there is no checkpoint yet"
        )

    def _refused(self, step: int, error: OSError) -> None:
        last = f"the last is of step {self.saved}" if self.saved is not None else "there is none yet"
        self.recorder.say(f"no checkpoint of step {step} could be written ({error}); {last}")
