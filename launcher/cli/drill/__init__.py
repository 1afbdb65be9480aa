"""`launch drill`: preempts a run on purpose, as its backend would, and proves that nothing was lost.

Two short runs of one recipe: the first is preempted and comes back, the second is left alone up to the same
checkpoint. Then the files of both are compared (proof.py); the trainer is known by docs/contract.md alone.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.text import Text

from launcher.backends import BACKENDS
from launcher.checkpoints import checkpoints
from launcher.cli import submit
from launcher.cli.drill.blow import Blow, strike
from launcher.cli.drill.proof import Row, rows, show
from launcher.cli.remove import remove
from launcher.cli.status import row as status_of
from launcher.cli.submit import Plan
from launcher.errors import LaunchError, UserError
from launcher.recipe import Flags
from launcher.rundir import RunDir, read_json, read_jsonl
from launcher.supervisor import lease
from launcher.supervisor.attempt import Pulse

SCHEMA = 1
POLL = 0.1  # seconds
QUEUE = 600.0  # seconds to wait for a place, unless the recipe has a max_wait
KEEP = 100  # checkpoints: those to compare must not be deleted by later ones
PATIENCE = 60.0  # seconds for what has nothing left to do but to exit
LATE = 5  # intervals after which a checkpoint that is still not there will not come
Found = TypeVar("Found")
Say = Callable[[str], None]


def drill(path: Path, overrides: Sequence[str], flags: Flags, backend: str, every: int, as_json: bool) -> int:
    """Print the proof; 0 if all held. Raises RecipeError, UserError, and LaunchError if it came to none."""
    backend = submit.pick_backend(backend)
    forced = [*overrides, f"checkpoint.every={every}it", f"checkpoint.keep={KEEP}"]
    name = f"drill-{submit.recipe_key(path).rpartition('/')[2][:60]}"
    plans = [
        submit.plan(path, forced, flags, f"{name}-{which}", backend, dry=False)
        for which in ("preempted", "undisturbed")
    ]
    console = Console(stderr=True, highlight=False)
    for sentence in plans[0].notes + plans[0].warnings:
        console.print(Text(f"note: {sentence}"), soft_wrap=True)
    for number in (signal.SIGTERM, signal.SIGHUP):  # whatever ends the drill ends its runs
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)
    with console.status("starting") as status:

        def say(sentence: str) -> None:
            status.update(sentence)
            if not console.is_terminal:
                console.print(Text(sentence), soft_wrap=True)

        blow, found = Drill(plans[0], plans[1], every, say).run()
    held = all(row.held is not False for row in found)
    kept = [] if held else [plan.run.id for plan in plans]
    if as_json:
        told = {"backend": backend, "kind": blow.kind, "every": every, "held": held, "kept": kept}
        print(json.dumps({"schema": SCHEMA} | told | {"rows": [row.record() for row in found]}))
    else:
        show(f"launch drill: {path} on {backend}, preempted by {blow.kind}", found, kept)
    return 0 if held else 1


class Drill:
    """`run` gives what was done to the first run, and the proof. Whatever happens, both are over then.

    They are deleted unless something failed. Raises LaunchError in a sentence if it cannot be proved."""

    def __init__(self, first: Plan, second: Plan, every: int, say: Say) -> None:
        self._plans, self._every, self._say = (first, second), every, say
        self._recipe, self._backend = first.recipe, first.backend
        self._foreground: dict[str, subprocess.Popen[bytes]] = {}

    def run(self) -> tuple[Blow, list[Row]]:
        keep = False
        try:
            blow, found = self._drill(*(plan.run for plan in self._plans))
            keep = any(row.held is False for row in found)
            return blow, found
        except LaunchError as error:
            kept = [plan.run.id for plan in self._plans if plan.run.path.exists()]
            keep = bool(kept)
            hint = f"{error.hint} Kept: {', '.join(kept)}." if kept else error.hint
            raise LaunchError(error.message, hint.strip()) from None
        finally:
            self._say("ending both runs")
            for plan in self._plans:
                self._end(plan.run)
                if not keep and plan.run.path.exists():
                    remove(plan.run, in_store=bool(plan.record.get("url")))

    def _drill(self, preempted: RunDir, undisturbed: RunDir) -> tuple[Blow, list[Row]]:
        every = self._every
        self._start(self._plans[0])
        past = every + max(1, every // 2)
        self._say(f"{preempted.id}: on its way past the checkpoint of step {every}")
        self._wait(preempted, 0, every, lambda: _at(preempted, 0, past) and _has(preempted, 0, every))
        self._say(f"{preempted.id}: preempting it")
        began = time.monotonic()
        blow = strike(preempted, self._backend)
        self._say(f"{preempted.id}: coming back")
        resumed = self._wait(preempted, blow.attempt, None, lambda: _trains(preempted, blow.attempt))[0]
        back = time.monotonic() - began
        step = (resumed // every + 1) * every  # the first that both runs have
        self._say(f"{preempted.id}: on its way to the checkpoint of step {step}")
        self._wait(preempted, blow.attempt, step, lambda: _has(preempted, blow.attempt, step))
        self._end(preempted)
        self._start(self._plans[1])
        self._say(f"{undisturbed.id}: on its way to the checkpoint of step {step}, undisturbed")
        self._wait(undisturbed, 0, step, lambda: _has(undisturbed, 0, step))
        self._end(undisturbed)
        return blow, rows(preempted, undisturbed, blow, step, back)

    def _start(self, plan: Plan) -> None:
        submit.create(plan)
        try:
            if self._backend == "local":  # whose start returns at the end of the run
                resume = ["-m", "launcher.cli", "resume", plan.run.id, "--backend", "local"]
                quiet = subprocess.DEVNULL
                self._foreground[plan.run.id] = subprocess.Popen(
                    [sys.executable, "-P", *resume],
                    stdin=quiet,
                    stdout=quiet,
                    stderr=quiet,
                    start_new_session=True,
                )
            else:
                BACKENDS[self._backend].start(plan.run, None)
        except LaunchError:
            submit.discard(plan.run)
            raise

    def _end(self, run: RunDir) -> None:
        started = self._foreground.get(run.id)
        if started and lease.holder(run) is None:  # it may be about to take the run
            started.send_signal(signal.SIGHUP)
            _reap(started)
        if run.path.exists():
            with contextlib.suppress(UserError):  # it has ended by itself
                BACKENDS[self._backend].stop(run)
        if started:
            _reap(started)  # its guard looks at the folder once more

    def _wait(self, run: RunDir, after: int, step: int | None, check: Callable[[], Found | None]) -> Found:
        """What `check` finds, in an attempt later than `after`; `step`: of a checkpoint that it looks for.

        Raises LaunchError once it is clear that it will find nothing."""
        limit = self._recipe.resources.max_wait or QUEUE
        deadline, pulse = time.monotonic() + limit, None
        while True:
            started = self._foreground.get(run.id)
            gone = started and started.poll() is not None
            lines = [line for line in read_jsonl(run.attempts) if line.get("attempt", 0) > after]
            end = next((line for line in lines if line.get("event") == "end"), read_json(run.final))
            if found := check():
                return found
            if end:
                raise self._over(run, after, end, step)
            if gone:
                raise LaunchError(f"{run.id} did not start", f"launch resume {run.id} says why.")
            if not lines and time.monotonic() > deadline:
                why = status_of(run).get("reason")
                words = f"; {why}" if why else ""
                raise LaunchError(f"{run.id} has got no place within {limit:g} s{words}")
            if lines:
                pulse = pulse or Pulse()
                beat = _beat(run, after)
                self._check_heart(run, pulse.hung(beat, self._recipe.restart.hang), beat)
                if step is not None and _at(run, after, step + LATE * self._every):
                    told = f"every {self._every} steps, as LAUNCH_CHECKPOINT_EVERY tells it"
                    raise LaunchError(
                        f"{run.id} left no checkpoint at step {step}: its program does not save {told}",
                        "What a program owes the launcher: docs/contract.md.",
                    )
            time.sleep(POLL)

    def _check_heart(self, run: RunDir, hung: str, beat: dict[str, Any] | None) -> None:
        if hung and beat is None:
            raise LaunchError(
                f"the program of {run.id} does not keep the contract: {hung}",
                "Without it nothing can be saved (docs/contract.md).",
            )
        if hung:
            raise LaunchError(f"{run.id}: {hung}")

    def _over(self, run: RunDir, after: int, end: dict[str, Any], step: int | None) -> LaunchError:
        """An attempt has ended, and the drill did not do it."""
        if end.get("state") != "finished":
            return LaunchError(f"{run.id} {end.get('state')}: {end.get('reason')}", f"launch logs {run.id}")
        if _beat(run, after) is None:
            return LaunchError(
                f"the program of {run.id} does not keep the contract: it finished without a heartbeat",
                "Without it nothing can be saved (docs/contract.md).",
            )
        where = f"the checkpoint of step {step}" if step is not None else "it had trained a step more"
        return LaunchError(
            f"{run.id} finished at step {end.get('step')}, before {where} was there",
            f"Drill with more steps, or with --every less than {self._every}.",
        )


def _reap(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _beat(run: RunDir, after: int) -> dict[str, Any] | None:
    beat = read_json(run.heartbeat)
    return beat if beat and beat.get("fence", 0) > after else None


def _at(run: RunDir, after: int, step: int) -> bool:
    return ((_beat(run, after) or {}).get("step") or 0) >= step


def _trains(run: RunDir, after: int) -> tuple[int] | None:
    """The step that it came back at, once it has done a step beyond it."""
    beat = _beat(run, after) or {}
    resumed = beat.get("resumed")
    return (resumed,) if resumed is not None and (beat.get("step") or 0) > resumed else None


def _has(run: RunDir, after: int, step: int) -> bool:
    return any(mark.step == step and mark.fence > after for mark in checkpoints(run))
