"""A job of Slurm's as the place of a run: what its end means, by facts that Slurm tells, and the way back.

The table of what `scontrol show job` says at the moment of a signal was measured with Slurm 22.05:
RUNNING with a PreemptTime: preempted with grace. More restarts than when we began: Slurm itself requeues the
job (grace 0, or `scontrol requeue`). COMPLETING otherwise: cancelled. RUNNING and no PreemptTime: somebody
signalled the step, and the place is still ours.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from launcher.recipe import Recipe
from launcher.rundir import RunDir, read_jsonl
from launcher.slurm import cluster, jobs
from launcher.slurm.commands import SlurmAway, SlurmError, call
from launcher.supervisor.job.way_back import RETRY, come_back, requeues
from launcher.supervisor.meeting import dismiss, job_name
from launcher.supervisor.place import Verdict
from launcher.supervisor.signals import PREEMPTED

ASK = 60.0  # seconds between looks at the time limit, which an admin may move
KILL_WAIT = 30.0  # seconds, slurm.conf(5)'s default
PAPERWORK = 1.5  # seconds to write down how an attempt ended, before SIGKILL
MARGIN = 10.0  # seconds before a time limit that the way out takes, beside the save


def verdict(job: jobs.Job | None, restarts: int) -> Verdict:
    """Pure: what it means that a signal came, by what Slurm says of the job. None: it knows it no more.

    Where the job is ending already, KillWait is all there is: no grace comes before it."""
    if job is None:
        return Verdict("preempt", "Slurm no longer knows the job", leave=True)
    if job.restarts > restarts:
        return Verdict("preempt", "preempted by Slurm without grace, or requeued", leave=True, ending=True)
    if job.preempt_time is not None:
        return Verdict("preempt", "preempted by Slurm", leave=True, ending=job.state != "RUNNING")
    if job.state == "RUNNING":
        return Verdict("preempt", PREEMPTED)
    if job.reason == "TimeLimit" or job.state == "TIMEOUT" or (job.left is not None and job.left <= 0):
        return Verdict("preempt", "the job's time limit", leave=True)
    if job.state in ("COMPLETING", "CANCELLED"):
        return Verdict("stop", "cancelled with scancel", ending=True)
    if job.state == "SUSPENDED":
        return Verdict("preempt", PREEMPTED)
    return Verdict("preempt", f"Slurm ended the job: {job.state}", leave=True)


class Allocation:
    """The Place of a supervisor in job `job`, which has been restarted `restarts` times."""

    def __init__(self, run: RunDir, recipe: Recipe, job: str, restarts: int, guard: int) -> None:
        self._run, self._recipe, self._job, self._restarts = run, recipe, job, restarts
        self._cluster: cluster.Cluster | None = None
        self._partition: str | None = None
        self._qos: str | None = None
        self._end: float | None = None  # of the allocation, on our monotonic clock
        self._needed = 0.0  # seconds before it at which to stop
        self._asked = 0.0
        self._asking: threading.Thread | None = None
        self._lost: Verdict | None = None  # it was being taken away when we looked
        self._guard = guard

    def enter(self, wait: Callable[[str], bool]) -> Mapping[str, str]:
        with contextlib.suppress(SlurmError):
            self._look()  # a supervisor before us may have died of the very signal
            if self._cluster is None:
                self._cluster = cluster.read()
                if not self._lost:  # else the one that waits is where we go on
                    self._cancel_others()
        return {}

    def grace(self, wanted: float) -> float:
        known = self._cluster and cluster.save_seconds(self._cluster, self._partition, self._qos)
        return min(wanted, known) if known else wanted

    def last_seconds(self) -> float:
        kill_after = self._cluster.kill_after if self._cluster else KILL_WAIT
        return max(kill_after - PAPERWORK, kill_after / 2)

    def parting(self) -> Verdict | None:
        """The time limit, as late as is safe: twice what the slowest of the last stops took, and a margin."""
        now = time.monotonic()
        if self._orphaned:
            return Verdict("preempt", "its guard was killed, and the job is over with it", leave=True)
        if self._lost:
            return self._lost
        if now - self._asked > ASK and not (self._asking and self._asking.is_alive()):
            self._asking = threading.Thread(target=self._look_again, daemon=True)
            self._asking.start()
        if self._end is None or now < self._end - self._needed:
            return None
        return Verdict("preempt", f"the job's time limit comes in {self._end - now:.0f} s", leave=True)

    def explain(self) -> Verdict:
        while True:
            try:
                return verdict(jobs.show(self._job), self._restarts)
            except SlurmAway:
                time.sleep(RETRY)  # until it answers, or the grace period is over
            except SlurmError as error:
                return Verdict("preempt", f"signalled, and {error.message}", leave=True)

    def come_back(self, verdict: Verdict) -> None:
        if requeues(self._recipe) and not self._orphaned and not self._requeued():
            return  # that ends the job at once: it is the last act of its task
        come_back(self._run, self._recipe, self._job, verdict.reason)

    def leave(self, again: bool) -> None:
        """The job's devices stay the job's."""

    def last_act(self, ended: bool) -> None:
        if self._orphaned:  # its last act was this
            dismiss(self._run, job_name(self._job, self._restarts))
        if ended:
            with contextlib.suppress(SlurmError):
                self._cancel_others()

    def about(self) -> dict[str, Any]:
        grace = self.grace(self._recipe.restart.grace)
        told: dict[str, Any] = {"job": self._job, "restarts": self._restarts, "save_budget": grace}
        began = [row for row in read_jsonl(self._run.attempts) if row.get("job") == self._job]
        if not began or began[-1].get("restarts") != self._restarts:
            told |= self._return()
        return told

    def _return(self) -> dict[str, Any]:
        """How this job came to go on with the run, how long it took, how long Slurm would have held it."""
        ends = [row for row in read_jsonl(self._run.attempts) if row.get("event") == "end"]
        if not ends:
            return {}
        why = next((row for row in read_jsonl(self._run.jobs) if row.get("job") == self._job), {}).get("why")
        after = round(max(0.0, time.time() - ends[-1].get("time", time.time())), 1)
        hold = self._cluster.requeue_delay if self._cluster else 0
        saved = round(max(0.0, hold - after), 1)
        way = "a fresh job" if not self._restarts else "requeue, hurried" if saved else "Slurm's requeue"
        return {"returned": {"by": way, "why": why, "seconds": after, "slurm_holds": hold, "saved": saved}}

    def _before_limit(self, limit: int) -> float:
        """Seconds before a time limit at which to stop; of a short one, half is for work."""
        lines = read_jsonl(self._run.attempts)
        took = [row["seconds_to_stop"] for row in lines if row.get("seconds_to_stop")]
        save = 2 * max(took[-3:]) if took else self._recipe.restart.grace
        return min(save + MARGIN, self._recipe.restart.grace + MARGIN, limit / 2)

    @property
    def _orphaned(self) -> bool:
        """Whether the job ends without us: its task was the guard. Only cgroups would end us with it."""
        return os.getppid() != self._guard

    def _look(self) -> None:
        """Learn partition and time left. Raises SlurmError."""
        self._asked = time.monotonic()
        job = jobs.show(self._job)
        if job is not None:
            self._partition, self._qos = job.partition, job.qos
            found = verdict(job, self._restarts)
            self._lost = found if found.leave or found.wish == "stop" else None
            self._end = None
            if job.left is not None:
                self._end = self._asked + job.left
                self._needed = self._before_limit(job.left + job.run_time)

    def _look_again(self) -> None:
        with contextlib.suppress(SlurmError):
            self._look()

    def _requeued(self) -> bool:
        """Whether Slurm requeues this job by itself."""
        try:
            job = jobs.show(self._job)
        except SlurmError:
            return False
        return job is not None and job.restarts > self._restarts

    def _cancel_others(self) -> None:
        """A job of this run that waits while we hold it has come twice: Slurm requeued it, too."""
        others = [job.id for job in jobs.queue(self._run.id) if job.pending and job.id != self._job]
        if others:
            call("scancel", *others)
