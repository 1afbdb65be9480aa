"""Jobs as Slurm tells of them: one by scontrol, all of ours by one squeue."""

import re
from dataclasses import dataclass

from launcher.slurm.commands import SlurmError, call

LIVE = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "SUSPENDED",
    "COMPLETING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "STAGE_OUT",
)


@dataclass(frozen=True)
class Job:
    """What `scontrol show job` says. Times: seconds since 1970, by the controller's clock."""

    id: str
    state: str
    reason: str
    restarts: int
    partition: str
    qos: str | None
    run_time: int  # seconds
    time_limit: int | None  # seconds; None: unlimited
    preempt_time: int | None

    @property
    def left(self) -> int | None:
        """Seconds until the time limit, by the controller's clock alone; None: there is none."""
        return None if self.time_limit is None else self.time_limit - self.run_time


@dataclass(frozen=True)
class Queued:
    """A line of squeue. `start`: when Slurm thinks that it will start, seconds since 1970."""

    id: str
    name: str
    state: str
    reason: str
    start: int | None

    @property
    def pending(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING")

    @property
    def held(self) -> bool:
        """Whether it will not start by itself: after too many failed starts, say, or by an admin."""
        return self.state == "REQUEUE_HOLD" or self.reason.startswith("JobHeld")


def show(job: str) -> Job | None:
    """The job, or None if Slurm knows it no more. Raises SlurmAway, SlurmError."""
    try:
        told = call("scontrol", "--oneliner", "show", "job", job)
    except SlurmError as error:
        if "Invalid job id" in error.message:
            return None
        raise
    said = dict(re.findall(r"(\w+)=(\S*)", told))
    return Job(
        id=said.get("JobId", job),
        state=said.get("JobState", "UNKNOWN"),
        reason=said.get("Reason", "None"),
        restarts=int(said.get("Restarts", "0")),
        partition=said.get("Partition", ""),
        qos=said.get("QOS", "(null)").replace("(null)", "") or None,
        run_time=seconds(said.get("RunTime", "0:00")) or 0,
        time_limit=seconds(said.get("TimeLimit", "UNLIMITED")),
        preempt_time=_epoch(said.get("PreemptTime", "None")),
    )


def ended(job: str) -> str:
    """How a job ended, in Slurm's words, from scontrol or else from accounting; "" if neither knows."""
    try:
        if (found := show(job)) is not None:
            return found.state
        told = call("sacct", "--noheader", "--allocations", "--parsable2", "--format=State", f"--jobs={job}")
        return told.splitlines()[-1] if told.strip() else ""
    except SlurmError:
        return ""


def queue(name: str | None = None) -> list[Queued]:
    """Our jobs that are not over, or those of one name: one squeue. Raises SlurmAway, SlurmError."""
    named = [f"--name={name}"] if name else []
    told = call("squeue", "--me", "--noheader", "--format=%A|%T|%S|%r|%j", *named)
    rows = [line.split("|", 4) for line in told.splitlines() if line.count("|") >= 4]
    return [Queued(job, title, state, reason, _epoch(start)) for job, state, start, reason, title in rows]


def seconds(text: str) -> int | None:
    """Slurm's [DAYS-]HOURS:MINUTES:SECONDS or MINUTES:SECONDS; None for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def _epoch(text: str) -> int | None:
    return int(text) if text.isdigit() else None
