"""A job of Slurm's per stretch of a run: submitted from here, stopped and looked into through Slurm."""

import contextlib
import functools
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator

from launcher.errors import LaunchError, UserError
from launcher.recipe import Recipe, load_frozen
from launcher.recipe.document import Problem
from launcher.rundir import RunDir, ended
from launcher.slurm import cluster, jobs, options
from launcher.slurm.commands import SlurmError, call, require
from launcher.supervisor import control, history
from launcher.supervisor.job.submission import submit

POLL = 0.5  # seconds between looks at the queue


class Slurm:
    def check(self, recipe: Recipe) -> Iterator[Problem]:
        require()
        yield from options.check(recipe)
        wrong = cluster.check_asked(_cluster(), recipe)
        yield from (Problem(loc, words) for loc, words in wrong)
        if not wrong:
            yield from self._refused(recipe)

    def _refused(self, recipe: Recipe) -> Iterator[Problem]:
        """What only sbatch itself knows: accounts, QoS, constraints, limits (sbatch(1), --test-only)."""
        wanted = options.options(recipe)
        try:
            call("sbatch", "--test-only", "--job-name=launch-test", *options.flags(wanted), "--wrap=true")
        except SlurmError as error:
            words = error.message.partition("refused: ")[2]
            if not words:
                raise
            named = [name for name in options.NAMED if name in wanted and name in words.lower()]
            yield Problem(("slurm", *named[:1]), f"Slurm refuses the job: {words}")

    def notes(self, recipe: Recipe) -> list[str]:
        here, wanted = _cluster(), options.options(recipe)
        partition, qos = here.partition(wanted.get("partition")), wanted.get("qos")
        if partition is None:
            return []
        grace = here.grace(partition, qos)
        budget = cluster.save_seconds(here, partition.name, qos) or 0.0
        known = f"GraceTime {grace} s of partition {partition.name} and KillWait {here.kill_wait} s"
        seconds = min(budget, recipe.restart.grace)
        notes = [f"{seconds:g} s to save in when it is preempted: {known}, less a margin"]
        if recipe.resources.max_wait:
            notes.append(
                "with max_wait Slurm ends a job whose node dies, too: `launch resume` goes on with it"
            )
        return notes

    def start(self, run: RunDir, gpus: int | None, nodes: int | None = None) -> None:
        submit(run, load_frozen(run.recipe), "launched", gpus, nodes)

    def close(self, run: RunDir) -> None:
        """Slurm forgets jobs by itself."""

    def attach(self, run: RunDir) -> None:
        """A shell in the run's job, on its first node."""
        running = [job for job in jobs.queue(run.id) if job.state == "RUNNING"]
        if not running:
            raise UserError(f"run {run.id} has no running job", f"`launch logs {run.id}` shows what it said.")
        shell = os.environ.get("SHELL", "/bin/bash")
        argv = ["srun", f"--jobid={running[-1].id}", "--overlap", "--nodes=1", "--ntasks=1", "--pty", shell]
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            print(f"This is no terminal; in one, type: {shlex.join(argv)}")
            return
        subprocess.run(argv)

    def stop(self, run: RunDir) -> None:
        """End the run and its jobs. Raises UserError if it has ended."""
        final = ended(run)
        mine = jobs.queue(run.id)
        if final is not None and not mine:
            raise UserError(f"run {run.id} has ended already ({final.get('state')})")
        run.stop_requested.touch()
        deadline = time.monotonic() + control.patience(run)
        told: set[str] = set()
        while mine := jobs.queue(run.id):
            for job in mine:
                if job.pending or time.monotonic() > deadline:
                    _quietly("scancel", job.id)
                elif job.id not in told:
                    told.add(job.id)
                    _nudge(job.id)
            if time.monotonic() > deadline + control.MARGIN:
                raise LaunchError(f"job {mine[0].id} of {run.id} does not end", f"squeue -j {mine[0].id}")
            time.sleep(POLL)
        if ended(run) is None:  # it never ran, or could not say so
            control.conclude(run)

    def preempt(self, run: RunDir) -> None:
        """End the attempt that runs now, in its job; the supervisor there starts the next one."""
        running = [job for job in jobs.queue(run.id) if job.state == "RUNNING"]
        attempt = history.unfinished(run)
        if not running or attempt is None:
            raise UserError(f"run {run.id} is not running", f"`launch status {run.id}` says why.")
        _nudge(running[-1].id)
        deadline = time.monotonic() + control.patience(run)
        while history.unfinished(run) == attempt:
            if time.monotonic() > deadline:
                raise LaunchError(f"attempt {attempt} of {run.id} did not end")
            time.sleep(POLL)


@functools.cache
def _cluster() -> cluster.Cluster:
    return cluster.read()


def _nudge(job: str) -> None:
    """SIGTERM to the job's first step: the guard hears it, and looks what was asked of the run."""
    _quietly("scancel", "--signal=TERM", f"{job}.0")


def _quietly(*argv: str) -> None:
    with contextlib.suppress(SlurmError):  # it ended meanwhile, or the next look at the queue tells
        call(*argv)
