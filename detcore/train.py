"""Training, from a frozen recipe to a trained detector; comes back where it was stopped or killed.

torchrun --nproc-per-node N -m detcore.train [RECIPE.yaml] [--run-dir DIR]
"""

import argparse
import os
import resource
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from detcore import stop

if __name__ == "__main__":
    stop.install()  # before the second that importing torch takes

import torch

from detcore import checkpoint as ckpt
from detcore import config
from detcore.board import Board
from detcore.config import Train
from detcore.console import Console, duration
from detcore.data.coco import Coco, read_coco
from detcore.data.loader import Batch, TrainingSet, batches
from detcore.data.order import Order, training_steps
from detcore.distributed import Heard, Losses, Murmur, World, parallel
from detcore.errors import DetcoreError, InputError, TrainingError
from detcore.evaluate import evaluate, table, write_results
from detcore.loading import autocast
from detcore.metrics import JsonLines, Mean
from detcore.models import build_model
from detcore.rundir import Heartbeat, RunDir, sweep, write_outcome, write_whole
from detcore.schedule import build_optimizer, lr_factor, set_lr
from detcore.weights import WeightsError

COMPILING = 1800.0  # seconds that the first step may take when it compiles


class Trainer:
    """One attempt at a run. `step` counts the steps done; `evaluated` is the last step that was evaluated."""

    def __init__(self, cfg: Train, run: RunDir, world: World) -> None:
        self.cfg, self.run_dir, self.world = cfg, run, world
        self.schedule = cfg.schedule.scaled(cfg.data.batch)
        self.total = self.schedule.iterations
        self.first = world.rank == 0
        self.heartbeat = Heartbeat(run, self.first)
        self.heartbeat.enter("starting", of=self.total)
        self.console = Console(self.first, self.total)
        self.say = self.console.say
        self.step = self.evaluated = self.resumed = 0
        self.saved: int | None = None  # the step of the newest checkpoint
        self.metrics: dict[str, float] = {}  # of the last evaluation

    def run(self) -> str:
        """Train to the end, or to the step where all ranks agree to stop -> `finished` or `stopped`."""
        self.prepare()
        if self.world.any(stop.requested()):
            return self.stopped()
        if self.evaluation_is_due() and not self.evaluate():
            return self.stopped()
        self.heartbeat.enter("warm-up", limit=COMPILING if self.cfg.compile else None)
        while self.step < self.total:
            terms = self.train_step()
            self.step += 1
            wants_stop, wants_save = self.listen(self.murmur.say(self.step, self.wishes(), terms))
            self.heartbeat.beat(phase="training", step=self.step, limit=None)
            if wants_stop or wants_save or self.checkpoint_is_due() or self.step == self.total:
                self.save()
            if wants_stop or (self.evaluation_is_due() and not self.evaluate()):
                return self.stopped()
        self.save()
        if self.saved != self.total:
            raise TrainingError(
                f"the last checkpoint, of step {self.total}, could not be written; see the log"
            )
        return "finished"

    # ---- before the first step -----------------------------------------------------------------------

    def prepare(self) -> None:
        """Everything that is there before the first step, which is the same whatever came before."""
        cfg, world = self.cfg, self.world
        ranks = world.size * self.schedule.accumulate
        if cfg.data.batch % ranks:
            raise InputError(f"train.data.batch {cfg.data.batch} cannot be shared out evenly to {ranks}")
        torch.manual_seed(cfg.seed)
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = not cfg.deterministic

        found = self.find_checkpoint()
        coco = read_coco(
            cfg.data.path(cfg.data.train.images), cfg.data.path(cfg.data.train.annotations), training=True
        )
        self.check_classes(coco)
        self.batches = self.start_loader(coco)
        self.heartbeat.beat()

        self.model = build_model(cfg.model, pretrained=found is None)
        if cfg.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.model.to(world.device).train()
        self.optimizer = build_optimizer(self.model, self.schedule.optimizer)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=cfg.amp == "fp16")
        self.mean = Mean()
        if found:
            self.restore(found)
        self.losses = Losses(self.model, cfg.compile)
        self.parallel = parallel(self.losses, world)
        self.murmur = Murmur(world)
        self.recent: deque[tuple[int, list[int]]] = deque(maxlen=4)  # images of the last steps
        self.open_records()

    def find_checkpoint(self) -> ckpt.Checkpoint | None:
        """The newest checkpoint that is whole: rank 0 looks, all use the same."""
        found = None
        if self.first:
            sweep(self.run_dir)
            ckpt.sweep(self.run_dir.checkpoints)
            found = ckpt.newest(self.run_dir.checkpoints, self.say, self.heartbeat.beat)
        found = self.world.from_first(found)
        if found:
            self.step = self.resumed = self.saved = found.step
        self.heartbeat.enter("starting", step=self.step, resumed=self.step)
        return found

    def restore(self, found: ckpt.Checkpoint) -> None:
        try:
            self.model.load_state_dict(found.model())
            state = found.training()
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.mean.load_state_dict(state["mean"])
            self.evaluated = int(state["evaluated"])
        except (RuntimeError, KeyError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"checkpoint {found.path} does not fit this recipe: {reason}") from None
        self.say(f"resumed at step {self.step} from {found.path.name}")

    def check_classes(self, coco: Coco) -> None:
        if len(coco.categories) != self.cfg.model.num_classes:
            have = f"{coco.annotations} has {len(coco.categories)} categories"
            raise InputError(f"train.model.num_classes is {self.cfg.model.num_classes}, but {have}")
        self.classes, self.image_ids = coco.names, coco.ids.tolist()
        share = self.cfg.data.batch // self.world.size
        self.say(
            f"{len(coco)} images with {len(coco.labels)} objects of {len(self.classes)} classes; "
            f"{self.total} steps of {self.cfg.data.batch} images, {share} on each of {self.world.size} ranks"
        )

    def start_loader(self, coco: Coco) -> Iterator[Batch]:
        """From the step that comes next. Started first of all: it works while the model is built."""
        data = self.cfg.data
        wide = coco.sizes[:, 0] > coco.sizes[:, 1] if data.group_by_aspect else None
        order = Order(len(coco), data.batch, self.cfg.seed, wide)
        samples = training_steps(
            order, self.step, self.total, self.world.rank, self.world.size, self.schedule.accumulate
        )
        dataset = TrainingSet(coco, data.augment, self.cfg.seed)
        return batches(dataset, samples, data.workers, pin=self.world.device.type == "cuda")

    def open_records(self) -> None:
        """metrics.jsonl and its like, cut back to the step that this attempt begins at."""
        self.lines, self.timing = JsonLines(self.run_dir.metrics), JsonLines(self.run_dir.timing)
        self.board = Board(self.run_dir.tensorboard, self.run_dir.fence, self.resumed)
        if self.first:
            # An evaluation after the checkpoint of its step is done again.
            self.lines.cut(
                lambda line: (
                    line["step"] < self.step
                    or (line["step"] == self.step and ("AP" not in line or self.evaluated == self.step))
                )
            )
            self.timing.cut(lambda line: line["step"] <= self.step)
        self.last_save = self.last_log = time.perf_counter()
        self.last_logged, self.waited, self.loss = self.step, 0.0, float("nan")

    # ---- a step --------------------------------------------------------------------------------------

    def train_step(self) -> torch.Tensor:
        """One step of the whole batch -> its loss terms (T,), means over the parts, still on the device."""
        parts, clip = self.schedule.accumulate, self.schedule.optimizer.clip
        # The random numbers of a step, if the model uses any, are a function of the step, too.
        torch.manual_seed((self.cfg.seed * 1_000_003 + self.step) * 65_537 + self.world.rank)
        self.lr = self.schedule.optimizer.lr * lr_factor(self.step, self.schedule)
        set_lr(self.optimizer, self.lr)
        self.optimizer.zero_grad(set_to_none=True)
        terms, images = torch.zeros((), device=self.world.device), []
        for part in range(parts):
            images_, sizes, targets, index = self.next_batch()
            images += index
            alone = part < parts - 1 and self.world.size > 1
            with self.parallel.no_sync() if alone else nullcontext():
                with autocast(self.cfg.amp, self.world.device):
                    loss, own = self.parallel(images_, sizes, targets)
                self.scaler.scale(loss / parts).backward()
            terms = terms + own / parts
        if clip is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.recent.append((self.step + 1, images))
        return terms

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor, Any, list[int]]:
        """The next part of this rank's share, on the device, and which images it is of."""
        began = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - began

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self.world.device, non_blocking=True)

        images = move(batch.images)  # (N, H, W, 3) in memory, which is what channels_last means
        if not self.cfg.channels_last:
            images = images.contiguous()
        return images, move(batch.sizes), batch.targets.map(move), batch.index.tolist()

    # ---- after a step --------------------------------------------------------------------------------

    def wishes(self) -> list[float]:
        """What this rank wants all to do: stop; save (rank 0, whose clock decides)."""
        save = False
        if self.first and self.run_dir.every.endswith("s"):
            save = time.perf_counter() - self.last_save >= float(self.run_dir.every[:-1])
        return [float(stop.requested()), float(save)]

    def listen(self, heard: list[Heard]) -> tuple[bool, bool]:
        """Record what all ranks said of earlier steps -> does any wish to stop, to save?"""
        wants_stop = wants_save = False
        for news in heard:
            wants_stop |= news.flags[0] > 0
            wants_save |= news.flags[1] > 0
            if not all(abs(term) < float("inf") for term in news.terms):
                raise self.not_finite(news)
            self.mean.add(news.terms)
            self.loss = sum(news.terms)
            if news.step % self.cfg.log_every == 0 or news.step == self.total:
                self.log(news.step)
            self.console.show(news.step, self.loss)
        return wants_stop, wants_save

    def log(self, step: int) -> None:
        """The means since the last log, to the files; every rank keeps the means, rank 0 writes them."""
        terms = dict(zip(self.losses.names, self.mean.take(), strict=True))
        if not self.first:
            return
        lr = self.schedule.optimizer.lr * lr_factor(step - 1, self.schedule)
        loss = sum(terms.values())
        self.lines.append(step=step, lr=lr, loss=loss, **terms)

        now = time.perf_counter()
        steps = max(1, step - self.last_logged)
        seconds = max(1e-9, now - self.last_log) / steps
        speed, data = self.cfg.data.batch / seconds, self.waited / steps
        eta = seconds * (self.total - step)
        clock = {
            "images_per_s": speed,
            "step_s": seconds,
            "data_s": data,
            "memory_mb": memory(self.world.device),
        }
        self.timing.append(step=step, time=time.time(), **clock)
        self.board.scalars(step, {f"loss/{name}": value for name, value in terms.items()})
        self.board.scalars(step, {"loss": loss, "lr": lr} | {f"speed/{k}": v for k, v in clock.items()})
        self.heartbeat.beat(loss=loss, eta=eta)
        parts = "  ".join(f"{name} {value:.4f}" for name, value in terms.items())
        self.say(
            f"step {step}/{self.total}  loss {loss:.4f}  {parts}  lr {lr:.3g}  {speed:.1f} images/s  "
            f"data {100 * data / seconds:.0f} %  eta {duration(eta)}"
        )
        self.last_log, self.last_logged, self.waited = now, step, 0.0

    def not_finite(self, news: Heard) -> TrainingError:
        """Every rank comes here after the same step; rank 0 learns whose images it was."""
        bad = not all(abs(term) < float("inf") for term in news.own)
        images = next((images for step, images in self.recent if step == news.step), []) if bad else []
        ids = sorted(
            {image for part in self.world.gather([self.image_ids[i] for i in images]) for image in part}
        )
        terms = ", ".join(f"{k} {v:g}" for k, v in zip(self.losses.names, news.terms, strict=True))
        return TrainingError(
            f"the loss of step {news.step} is not finite ({terms}); it was computed from images {ids}; "
            "a lower learning rate, a longer warm-up or schedule.optimizer.clip may help"
        )

    # ---- saving and evaluating -----------------------------------------------------------------------

    def checkpoint_is_due(self) -> bool:
        every = self.run_dir.every
        return every.endswith("it") and self.step % int(every[:-2]) == 0

    def save(self) -> None:
        """A checkpoint of this step, unless there is one. A disk that refuses it ends nothing: the last one
        stays, and the next interval tries again."""
        if self.saved == self.step:
            return
        self.listen(self.murmur.drain(self.wishes()))
        trained = [p.detach().sum() for p in self.model.parameters() if p.requires_grad]
        if not bool(torch.stack(trained).isfinite().all()):
            raise TrainingError(
                f"a weight is not finite after step {self.step}; no checkpoint was written of it"
            )
        done = self.world.from_first(self.write_checkpoint() if self.first else None)
        self.last_save = time.perf_counter()
        if done:
            self.saved = self.step

    def write_checkpoint(self) -> bool:
        state = {
            "step": self.step,
            "evaluated": self.evaluated,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "mean": self.mean.state_dict(),
            "classes": self.classes,
        }
        phase = self.heartbeat.content["phase"]
        self.heartbeat.enter("saving", step=self.step)
        try:
            for file in (self.lines, self.timing):
                file.flush()
            self.board.flush()
            made = ckpt.save(self.run_dir, self.step, state, self.model.state_dict(), self.heartbeat.beat)
        except OSError as error:
            last = f"the last is of step {self.saved}" if self.saved is not None else "there is none yet"
            self.say(f"no checkpoint of step {self.step} could be written ({error}); {last}")
            return False
        finally:
            self.heartbeat.enter(phase)
        self.say(f"saved {made.path.name}")
        return True

    def evaluation_is_due(self) -> bool:
        every = self.cfg.evaluation.every
        due = self.step == self.total or (every is not None and self.step % every == 0 and self.step > 0)
        return due and self.evaluated != self.step

    def evaluate(self) -> bool:
        """Evaluate this step -> whether it was done to the end, not stopped."""
        self.listen(self.murmur.drain(self.wishes()))
        self.heartbeat.enter("evaluating", step=self.step)
        began = time.perf_counter()
        done = evaluate(self.model, self.cfg, self.world, self.heartbeat.beat)
        if done is None:
            return False
        self.metrics, self.evaluated = done.metrics, self.step
        if self.first:
            write_results(self.run_dir.results, done.results)
            self.lines.append(step=self.step, **done.metrics)
            self.board.scalars(self.step, {f"eval/{name}": value for name, value in done.metrics.items()})
            for number, picture in enumerate(done.pictures):
                self.board.picture(self.step, f"detections/{number}", picture)
            self.say(f"evaluated step {self.step}: {table(done.metrics)}")
        self.last_log += time.perf_counter() - began
        self.heartbeat.enter("training")
        return True

    def stopped(self) -> str:
        self.save()
        return "stopped"

    def close(self, state: str) -> None:
        """Flush all, then say how it ended: the outcome comes last."""
        self.console.close()
        if not self.first:
            return
        for file in (self.lines, self.timing):
            file.flush()
        self.board.close()
        write_outcome(self.run_dir, state, self.step, metrics=self.metrics, saved=self.saved == self.step)


def memory(device: torch.device) -> float:
    """MiB at the most: of the GPU, or else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="torchrun -m detcore.train", description=__doc__.split("\n")[0])
    told = os.environ.get("LAUNCH_RUN_DIR")
    parser.add_argument("recipe", type=Path, nargs="?", help="frozen recipe (recipe.yaml of the run folder)")
    parser.add_argument("--run-dir", type=Path, default=told, help="run folder ($LAUNCH_RUN_DIR)")
    args = parser.parse_args(argv)
    if args.run_dir is None:
        parser.error("without $LAUNCH_RUN_DIR the run folder must be named with --run-dir")
    run = RunDir.of_attempt(args.run_dir)
    trainer = None
    try:
        cfg = config.load(args.recipe or run.recipe)
        world = World.join()
        if world.rank == 0 and not run.recipe.exists():  # without a launcher; evaluate and infer look there
            run.path.mkdir(parents=True, exist_ok=True)
            write_whole(run.recipe, args.recipe.read_bytes())
        trainer = Trainer(cfg, run, world)
        state = trainer.run()
        trainer.close(state)
        world.leave()
        return 0
    except (DetcoreError, WeightsError) as error:
        # Also on a rank other than 0: the others may wait for this one, and would never tell why.
        print(f"error: {error}", file=sys.stderr, flush=True)
        write_outcome(run, "failed", trainer.step if trainer else 0, reason=str(error))
        return getattr(error, "exit_status", InputError.exit_status)
    except Exception:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    status = main()
    if status:
        # At once, without taking leave: that would wait for ranks which wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
