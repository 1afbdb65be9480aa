"""When a run in training saves a checkpoint, and the one that it goes on from."""

import time
from typing import Any

from detcore import checkpoint as ckpt
from detcore.distributed import World
from detcore.recorder import Recorder
from detcore.rundir import RunDir, sweep


def find(run: RunDir, world: World, recorder: Recorder) -> ckpt.Checkpoint | None:
    """The newest checkpoint that is whole: rank 0 looks, all use the same."""
    found = None
    if world.rank == 0:
        sweep(run)
        ckpt.sweep(run.checkpoints)
        found = ckpt.newest(run.checkpoints, recorder.say, recorder.heartbeat.beat)
    return world.from_first(found)


class Saver:
    """Saves when `run.every` says so: every so many steps, or by rank 0's clock. saved: step of the newest
    checkpoint."""

    def __init__(self, run: RunDir, world: World, recorder: Recorder, saved: int | None) -> None:
        self.run, self.world, self.recorder, self.saved = run, world, recorder, saved
        self._last = time.perf_counter()

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

    def save(self, step: int, training: dict[str, Any], model: dict[str, Any]) -> None:
        """A disk that refuses it ends nothing: the last one stays, and the next interval tries again."""
        done = self.world.from_first(self._write(step, training, model) if self.world.rank == 0 else None)
        self._last = time.perf_counter()
        if done:
            self.saved = step

    def _write(self, step: int, training: dict[str, Any], model: dict[str, Any]) -> bool:
        heartbeat, say = self.recorder.heartbeat, self.recorder.say
        phase = heartbeat.content["phase"]
        heartbeat.enter("saving", step=step)
        try:
            self.recorder.flush()  # first: whoever has a checkpoint has the lines up to it
            made = ckpt.save(self.run, step, training, model, heartbeat.beat)
        except OSError as error:
            last = f"the last is of step {self.saved}" if self.saved is not None else "there is none yet"
            say(f"no checkpoint of step {step} could be written ({error}); {last}")
            return False
        finally:
            heartbeat.enter(phase)
        say(f"saved {made.path.name}")
        return True
