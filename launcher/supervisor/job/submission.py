"""Submits a run's job through submitit, once: what sbatch did not answer is looked up before it is retried.

The job's name is the run's id, which no other run has: whatever job carries it is ours. submitit writes the
batch script and the pickle that the job begins with. Where we differ from stock submitit, and why:
- no --signal: the launcher stops before a time limit by itself, and a preemption sends SIGTERM then, always;
- a job inherits an allow-listed environment and nothing else (submitit#1814), for Slurm writes it to disk;
- srun gets a process group of its own (set -m): with proctrack/pgid a job that has ended waits 3 s for what
  srun leaves in the script's, and nobody else has the node;
- when the step is over, the batch script looks whether somebody has to bring the run back (last_resort.py).
"""

import os
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from launcher.environ import clean
from launcher.recipe import Recipe
from launcher.rundir import RunDir, append_json, read_json, read_jsonl
from launcher.slurm import jobs
from launcher.slurm.commands import SlurmAway, call, require
from launcher.slurm.options import options
from launcher.supervisor.guard import marks
from launcher.supervisor.job.task import task

LOOK = 60.0  # seconds in which a controller that did not answer sbatch must say whether it took the job
TRIES = 3
NOT_TAKEN = ("Unable to contact slurm controller", "Connection refused", "temporarily unable to accept")
OF_THE_CALLER = (
    *("HOME", "USER", "LOGNAME", "SHELL", "PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR"),
    *("XDG_CONFIG_HOME", "SLURM_CONF"),  # the first has what `launch doctor` found out
)
NOT_OF_THE_CALLER = {"CUDA_VISIBLE_DEVICES"}  # the job's own come from Slurm


class Uncertain(SlurmAway):
    """Slurm may have the job or not: the run's folder must stay."""

    uncertain = True


def submit(run: RunDir, recipe: Recipe, why: str, gpus: int | None = None, nodes: int | None = None) -> str:
    """Submit a job for `run`; its id, which is noted in jobs.jsonl with `why`.

    Raises SlurmError with Slurm's own words if it refuses, SlurmAway if it is not there, Uncertain.
    """
    require()
    wanted = options(recipe, gpus, nodes, first=not run.attempts.exists())
    executor = _executor(run, wanted)
    job: str = executor.submit(task, str(run.path), gpus).job_id
    line = {"job": job, "why": why, "time": time.time(), "gpus": gpus, "nodes": nodes}
    append_json(run.jobs, line | {"deadline": wanted.get("deadline")})
    return job


def script(run: RunDir, recipe: Recipe) -> str:
    """The batch script, as a dry run shows it."""
    executor = _executor(run, options(recipe, first=True))
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def _executor(run: RunDir, wanted: dict[str, str]) -> Any:
    import submitit

    class Executor(submitit.SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1  # it would ask for srun, which a dry run can do without

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            lines = super()._make_submission_file_text(command, uid).splitlines()
            unwanted = ("#SBATCH --signal", "#SBATCH --wckey", "#SBATCH --time=None")
            return "\n".join(line for line in lines if not line.startswith(unwanted)) + "\n"

        def _submit_command(self, command: str) -> Any:
            path = Path(self.folder) / "job.sh"
            path.write_text(self._make_submission_file_text(command, ""))
            return submitit.SlurmJob(self.folder, _sbatch(run, path), tasks=list(range(self._num_tasks())))

    per_task = f"--cpus-per-task={wanted['cpus-per-task']}"  # which srun of Slurm 22.05 does not pass on
    resort = [sys.executable, "-P", "-m", "launcher.supervisor.job.last_resort", str(run.path)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        executor = Executor(folder=run.submitit, python=shlex.join([sys.executable, "-P"]))
    executor.update_parameters(
        job_name=run.id,
        nodes=int(wanted["nodes"]),
        stderr_to_stdout=True,
        setup=["set -m", f"trap {shlex.quote(shlex.join(resort) + ' $?')} EXIT"],
        srun_args=["--ntasks-per-node=1", per_task, "--cpu-bind=none", "--input=none"],
        additional_parameters={"time": None} | {name: value or True for name, value in wanted.items()},
    )
    return executor


def _sbatch(run: RunDir, script: Path) -> str:
    """The id of the one job that came of it."""
    # Not only those that we wrote down: whoever submitted the last may have died before he could.
    known = {str(row.get("job")) for row in read_jsonl(run.jobs)} | {job.id for job in jobs.queue(run.id)}
    for _ in range(TRIES):
        try:
            return call("sbatch", "--parsable", str(script), environ=_environment(run)).split(";")[0].strip()
        except SlurmAway as away:
            if any(words in away.message for words in NOT_TAKEN):
                raise
            if job := _taken(run, known):
                return job
    raise SlurmAway(f"sbatch got no answer {TRIES} times, and no job came of it", "Try again later.")


def _taken(run: RunDir, known: set[str]) -> str | None:
    """The job that sbatch made though it could not say so, if it did (submitit#1659)."""
    until = time.monotonic() + LOOK
    while time.monotonic() < until:
        try:
            return next((job.id for job in jobs.queue(run.id) if job.id not in known), None)
        except SlurmAway:
            time.sleep(1.0)
    raise Uncertain(
        f"sbatch got no answer, and whether Slurm has the job {run.id} cannot be asked now",
        f"`launch status {run.id}` shows it once Slurm answers; `launch resume {run.id}` submits again.",
    )


def _environment(run: RunDir) -> dict[str, str]:
    """What the job inherits: the variables frozen with the run, the caller's own few, the run's marks."""
    frozen = (read_json(run.run) or {}).get("env", {})
    caller = {name: os.environ[name] for name in OF_THE_CALLER if name in os.environ}
    kept = {name: value for name, value in (caller | frozen).items() if name not in NOT_OF_THE_CALLER}
    return clean(kept) | marks(run)
