"""What is written about a run while it trains: metrics.jsonl, timing.jsonl, TensorBoard, lines and a bar."""

import resource
import time

import torch

from detcore.board import Board
from detcore.config import Train
from detcore.console import Console, duration
from detcore.distributed import World
from detcore.evaluate import Evaluation, table, write_results
from detcore.metrics import JsonLines, Line, Mean
from detcore.rundir import Heartbeat, RunDir
from detcore.schedule import learning_rate


class Recorder:
    """Records steps and evaluations. Every rank keeps the means, rank 0 alone writes."""

    def __init__(self, cfg: Train, run: RunDir, world: World, heartbeat: Heartbeat) -> None:
        self.cfg, self.run, self.heartbeat, self.device = cfg, run, heartbeat, world.device
        self.first, self.total = world.rank == 0, cfg.schedule.iterations
        self.console = Console(self.first, self.total)
        self.say = self.console.say
        self.lines, self.timing = JsonLines(run.metrics), JsonLines(run.timing)
        self.mean = Mean()

    def begin(self, step: int, evaluated: int) -> None:
        """Cut the files back to `step`, which this attempt goes on from, and start the clocks.

        evaluated: the last step whose evaluation counts; a later one's will be done again.
        """

        def stays(line: Line) -> bool:
            done_again = "AP" in line and evaluated != step
            return line["step"] < step or (line["step"] == step and not done_again)

        self.board = Board(self.run.tensorboard, self.run.fence, step)
        if self.first:
            self.lines.cut(stays)
            self.timing.cut(lambda line: line["step"] <= step)
        self._restart_clocks(step, 0.0)

    def step(self, step: int, terms: dict[str, float], waited: float, counts: bool = True) -> None:
        """The loss terms of a step, of all ranks. waited: seconds spent on waiting for images so far;
        counts: whether the terms belong in a mean."""
        if counts:
            self.mean.add(list(terms.values()))
            self.console.show(step, sum(terms.values()))
        if self.mean.count and (step % self.cfg.log_every == 0 or step == self.total):
            means = dict(zip(terms, self.mean.take(), strict=True))
            if self.first:
                self._log(step, means, waited)

    def evaluation(self, step: int, done: Evaluation, began: float) -> None:
        """began: time.perf_counter() when the evaluation did; speeds leave the time since then out."""
        if self.first:
            write_results(self.run.results, done.results)
            self.lines.append(step=step, **done.metrics)
            self.board.scalars(step, {f"eval/{name}": value for name, value in done.metrics.items()})
            for number, picture in enumerate(done.pictures):
                self.board.picture(step, f"detections/{number}", picture)
            self.say(f"evaluated step {step}: {table(done.metrics)}")
        self._since += time.perf_counter() - began

    def flush(self) -> None:
        """Everything to the files. Raises OSError."""
        for file in (self.lines, self.timing):
            file.flush()
        self.board.flush()

    def sync(self) -> None:
        """The lines that were flushed to the disk; from any thread. Raises OSError."""
        for file in (self.lines, self.timing):
            file.sync()

    def close(self) -> None:
        """Raises OSError."""
        self.console.close()
        if self.first:
            self.flush()
            self.sync()
            self.board.close()

    def _log(self, step: int, terms: dict[str, float], waited: float) -> None:
        """The means since the last log, to the files, and how fast the steps were."""
        lr, loss = learning_rate(step, self.cfg.schedule), sum(terms.values())
        self.lines.append(step=step, lr=lr, loss=loss, **terms)
        clock = self._clock(step, waited)
        self.timing.append(step=step, time=time.time(), **clock)
        self.board.scalars(step, {f"loss/{name}": value for name, value in terms.items()})
        self.board.scalars(step, {"loss": loss, "lr": lr} | {f"speed/{k}": v for k, v in clock.items()})
        eta = clock["step_s"] * (self.total - step)
        self.heartbeat.beat(loss=loss, eta=eta)
        parts = "  ".join(f"{name} {value:.4f}" for name, value in terms.items())
        self.say(
            f"step {step}/{self.total}  loss {loss:.4f}  {parts}  lr {lr:.3g}  "
            f"{clock['images_per_s']:.1f} images/s  data {100 * clock['data_s'] / clock['step_s']:.0f} %  "
            f"eta {duration(eta)}"
        )

    def _clock(self, step: int, waited: float) -> dict[str, float]:
        """Means over the steps since the last log; the next ones begin here."""
        steps = max(1, step - self._since_step)
        seconds = max(1e-9, time.perf_counter() - self._since) / steps
        data = (waited - self._since_waited) / steps
        self._restart_clocks(step, waited)
        return {
            "images_per_s": self.cfg.data.batch / seconds,
            "step_s": seconds,
            "data_s": data,
            "memory_mb": memory(self.device),
        }

    def _restart_clocks(self, step: int, waited: float) -> None:
        self._since, self._since_step, self._since_waited = time.perf_counter(), step, waited


def memory(device: torch.device) -> float:
    """MiB at the most: of the GPU, or else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
