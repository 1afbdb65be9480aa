"""What queues say of the runs that wait in them: Slurm's, asked by one squeue, and this machine's own."""

import time

from launcher.slurm import jobs
from launcher.slurm.commands import SlurmError

FRESH = 2.0  # seconds for which an answer is good: a followed log asks three times a second
FRESH_HERE = 0.2  # for one listing, and not the next
_here: tuple[float, dict[str, str]] | None = None
_answer: tuple[float, dict[str, list[jobs.Queued]] | None] | None = None


def of_slurm() -> dict[str, list[jobs.Queued]] | None:
    """Our jobs by their name, which is a run's id. None: Slurm does not answer."""
    global _answer
    if _answer is None or time.monotonic() - _answer[0] > FRESH:
        found: dict[str, list[jobs.Queued]] | None = {}
        try:
            for job in jobs.queue():
                assert found is not None
                found.setdefault(job.name, []).append(job)
        except SlurmError:
            found = None
        _answer = (time.monotonic(), found)
    return _answer[1]


def of_machine() -> dict[str, str]:
    """By run folder, where in this machine's queue it waits and for what."""
    from launcher.supervisor import station

    global _here
    if _here is None or time.monotonic() - _here[0] > FRESH_HERE:
        _here = (time.monotonic(), station.queued())
    return _here[1]


def words(job: jobs.Queued) -> str:
    """Why a job waits, and until when Slurm thinks that it does."""
    start = time.strftime("; may start %a %H:%M", time.localtime(job.start)) if job.start else ""
    return f"job {job.id} waits: {job.reason}{start}"
