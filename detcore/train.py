"""Training, from a frozen recipe to a trained detector; comes back where it was stopped or killed.

torchrun --nproc-per-node N -m detcore.train [RECIPE.yaml] [--run-dir DIR]
"""

import argparse
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from detcore import stop
from detcore.rundir import Heartbeat, RunDir, first_beat, write_outcome, write_whole

if __name__ == "__main__":
    stop.install()  # before the second that importing torch takes
    first_beat()  # importing, CUDA and the other ranks can hang, too

from detcore.annotations import read_categories
from detcore.check import decisions
from detcore.checkpoint import Checkpoint
from detcore.config import Train
from detcore.data.coco import Coco, read_coco
from detcore.data.feed import Feed
from detcore.distributed import Heard, Murmur, World
from detcore.errors import DetcoreError, InputError, TrainingError, listed
from detcore.evaluate import evaluate
from detcore.learner import Learner, fit, settle
from detcore.nonfinite import Tolerance
from detcore.recipe import read_recipe
from detcore.recorder import Recorder
from detcore.saving import Saver, find
from detcore.weights import WeightsError

COMPILING = 1800.0  # seconds that the first step may take when it compiles


class Trainer:
    """One attempt at a run. `step` counts the steps done; `evaluated` is the last step that was evaluated."""

    def __init__(self, cfg: Train, run: RunDir, world: World) -> None:
        self.cfg, self.run_dir, self.world = cfg.on(world.size), run, world
        self.decisions = decisions(cfg, world.size, "GPU" if world.device.type == "cuda" else "worker")
        self.total = self.cfg.schedule.iterations
        self.heartbeat = Heartbeat(run, world.rank == 0)
        self.heartbeat.enter("starting", of=self.total)
        self.recorder = Recorder(self.cfg, run, world, self.heartbeat)
        self.step = self.evaluated = 0
        self.metrics: dict[str, float] = {}  # of the last evaluation

    def run(self) -> str:
        """Train to the end, or to the step where all ranks agree to stop -> `finished` or `stopped`."""
        self.prepare()
        try:
            return self.train()
        finally:
            self.saver.wait()  # also where it fails: a checkpoint on its way is worth the second

    def train(self) -> str:
        if self.world.any(stop.requested()):
            return self.stopped()
        if self.evaluation_is_due() and not self.evaluate():
            return self.stopped()
        self.heartbeat.enter("warm-up", limit=COMPILING if self.cfg.compile else None)
        while self.step < self.total:
            terms = self.learner.step(self.step + 1, self.feed.step(self.step + 1))
            self.step += 1
            wants_stop, wants_save = self.listen(self.murmur.say(self.step, self.wishes(), terms))
            self.heartbeat.beat(phase="training", step=self.step, limit=None)
            if wants_stop:
                return self.stopped()
            if wants_save or self.saver.is_due(self.step) or self.step == self.total:
                self.save()
            if self.evaluation_is_due() and not self.evaluate():
                return self.stopped()
        self.finish()
        if self.saver.saved != self.total:
            raise TrainingError(
                f"the last checkpoint, of step {self.total}, could not be written; see the log"
            )
        return "finished"

    def stopped(self) -> str:
        self.finish()
        return "stopped"

    def close(self, state: str) -> None:
        """Flush all, then say how it ended: the outcome comes last."""
        self.recorder.close()
        if self.world.rank == 0:
            saved = self.saver.saved == self.step
            write_outcome(self.run_dir, state, self.step, metrics=self.metrics, saved=saved)

    # ---- before the first step -----------------------------------------------------------------------

    def prepare(self) -> None:
        """Everything that is there before the first step, which is the same whatever came before."""
        cfg, world = self.cfg, self.world
        ranks = world.size * cfg.schedule.accumulate
        if cfg.data.batch % ranks:
            raise InputError(f"train.data.batch {cfg.data.batch} cannot be shared out evenly to {ranks}")
        for sentence in self.decisions:
            self.recorder.say(sentence)
        settle(cfg)
        found = find(self.run_dir, world, self.recorder)
        if found:
            self.step = found.step
        self.heartbeat.enter("starting", step=self.step, resumed=self.step)
        coco = self.read_data()
        self.feed = Feed(cfg, coco, world, self.step)  # works while the model is built
        self.heartbeat.beat()
        self.learner = Learner(cfg, world, pretrained=found is None)
        saved, optimizer = found.step if found else None, self.learner.optimizer
        self.saver = Saver(self.run_dir, world, self.recorder, optimizer, saved)
        self.tolerance = Tolerance(
            cfg.skip_nonfinite, world, self.feed, say=self.recorder.say, last=self.saver.last
        )
        if found:
            self.restore(found)
        self.murmur = Murmur(world)
        self.recorder.begin(self.step, self.evaluated)
        self.saver.warm(*self.state())

    def read_data(self) -> Coco:
        data, classes = self.cfg.data, self.cfg.model.num_classes
        coco = read_coco(data.path(data.train.images), data.path(data.train.annotations), training=True)
        if len(coco.categories) != classes:
            have = f"{coco.annotations} has {len(coco.categories)} categories"
            raise InputError(f"train.model.num_classes is {classes}, but {have}")
        self.classes, val = coco.names, data.path(data.val.annotations)
        if unknown := [name for name in read_categories(val).values() if name not in coco.names]:
            raise InputError(f"{val} has classes that {coco.annotations} does not have: {listed(unknown)}")
        share, ranks = data.batch // self.world.size, self.world.size
        self.recorder.say(
            f"{len(coco)} images with {len(coco.labels)} objects of {classes} classes; "
            f"{self.total} steps of {data.batch} images, {share} on each of {ranks} ranks"
        )
        return coco

    # ---- after a step --------------------------------------------------------------------------------

    def wishes(self) -> list[float]:
        """What this rank wants all to do: stop, save, give up because of the weights of that step."""
        self.saver.look()
        return [float(stop.requested()), float(self.saver.clock_says_so()), float(self.saver.broken or 0)]

    def listen(self, heard: list[Heard]) -> tuple[bool, bool]:
        """Record what all ranks said of earlier steps -> does any wish to stop, to save?"""
        wants_stop = wants_save = False
        for news in heard:
            wants_stop |= news.flags[0] > 0
            wants_save |= news.flags[1] > 0
            if news.flags[2]:
                raise self.weights_not_finite(int(news.flags[2]))
            terms = dict(zip(self.learner.terms, news.terms, strict=True))
            counts = self.tolerance.accepts(news, self.learner.terms)
            self.recorder.step(news.step, terms, self.feed.waited, counts)
        return wants_stop, wants_save

    def weights_not_finite(self, step: int) -> TrainingError:
        """Every rank comes here after the same step."""
        what = f"a weight is not finite after step {step}; no checkpoint was written of it"
        return TrainingError(self.world.from_first(f"{what}; {self.saver.last()}"))

    # ---- saving, coming back, evaluating -------------------------------------------------------------

    def save(self) -> None:
        """Begin a checkpoint of this step; it is written while training goes on."""
        self.listen(self.murmur.drain(self.wishes()))
        self.saver.begin(self.step, *self.state(), must=self.step == self.total)

    def finish(self) -> None:
        """Wait until there is a checkpoint of this step, if the disk takes it."""
        self.listen(self.murmur.drain(self.wishes()))
        self.saver.finish(self.step, *self.state())
        if self.saver.broken is not None:
            raise self.weights_not_finite(self.saver.broken)

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """All else that resuming needs, and the weights; `classes` are for those who use the weights."""
        own = {"step": self.step, "evaluated": self.evaluated, "classes": self.classes}
        own |= self.learner.state_dict() | {"mean": self.recorder.mean.state_dict()}
        own |= {"skipped": self.tolerance.passed}
        return own, self.learner.model.state_dict()

    def restore(self, found: Checkpoint) -> None:
        weights, state = found.model(), found.training()
        try:
            fit(self.learner.model, weights)
            self.learner.model.load_state_dict(weights)
            self.learner.load_state_dict(state)
            self.recorder.mean.load_state_dict(state["mean"])
            self.evaluated = int(state["evaluated"])
            self.tolerance.passed = int(state.get("skipped", 0))  # not in the first checkpoints there were
        except (KeyError, ValueError) as error:  # not a RuntimeError: a full GPU would be the recipe's fault
            reason = str(error).splitlines()[0]
            raise InputError(f"checkpoint {found.path} does not fit this recipe: {reason}") from None
        self.recorder.say(f"resumed at step {self.step} from {found.path.name}")

    def evaluation_is_due(self) -> bool:
        every = self.cfg.evaluation.every
        due = self.step == self.total or (every is not None and self.step % every == 0 and self.step > 0)
        return due and self.evaluated != self.step

    def evaluate(self) -> bool:
        """Evaluate this step -> whether it was done to the end, not stopped."""
        self.listen(self.murmur.drain(self.wishes()))
        self.heartbeat.enter("evaluating", step=self.step)
        began = time.perf_counter()
        done = evaluate(self.learner.model, self.cfg, self.world, self.heartbeat.beat, self.classes)
        if done is None:
            return False
        self.metrics, self.evaluated = done.metrics, self.step
        self.recorder.evaluation(self.step, done, began)
        self.heartbeat.enter("training")
        return True


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
        cfg = read_recipe(args.recipe or run.recipe)
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
