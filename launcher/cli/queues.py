"""What Slurm says of runs that nobody holds: one squeue for all of them."""

import time

from launcher.slurm import jobs
from launcher.slurm.commands import SlurmError

FRESH = 2.0  # seconds for which an answer is good: a followed log asks three times a second
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


def words(job: jobs.Queued) -> str:
    """Why a job waits, and until when Slurm thinks that it does."""
    start = time.strftime("; may start %a %H:%M", time.localtime(job.start)) if job.start else ""
    return f"job {job.id} waits: {job.reason}{start}"
