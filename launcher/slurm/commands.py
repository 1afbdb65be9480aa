"""Slurm's commands as functions: an argv, a clean environment, a deadline, and errors in our words.

Times come as seconds since 1970 (SLURM_TIME_FORMAT=%s of scontrol(1) and squeue(1)).
"""

import os
import shutil
import subprocess
from collections.abc import Mapping

from launcher.environ import clean
from launcher.errors import LaunchError, UserError

PATIENCE = 60.0  # seconds for an answer; slurmctld of a big cluster may think for a while
# What a busy or restarting slurmctld makes the commands say: the same request may work later.
AWAY = (
    "Unable to contact slurm controller",
    "Socket timed out",
    "Connection refused",
    "Connection timed out",
    "Slurm backup controller in standby mode",
    "temporarily unable to accept job",
    "Transport endpoint is not connected",
    "Zero Bytes were transmitted or received",
    "Communication connection failure",
    "Message receive failure",
    "Unexpected message received",
)


class SlurmError(LaunchError):
    """Slurm answered, and the answer is no. `message` ends with Slurm's own words."""


class SlurmAway(SlurmError):
    """Slurm did not answer; whether it did what it was asked is not known."""


def here() -> bool:
    """Whether this is a host from which jobs can be submitted."""
    return shutil.which("sbatch") is not None


def require() -> None:
    """Raises UserError if this is no host to submit from."""
    if not here():
        raise UserError(
            "there is no sbatch here: this machine is no submit host of a Slurm cluster",
            "Log in to one, or use `--backend tmux`.",
        )


def environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """`base` (default: ours) without what belongs to a job around us; SLURM_CONF stays (submitit#1814)."""
    if base is not None:  # a job inherits it, so nothing is added
        return clean(base)
    return clean(os.environ) | {"LC_ALL": "C", "SLURM_TIME_FORMAT": "%s"}


def call(*argv: str, patience: float = PATIENCE, environ: Mapping[str, str] | None = None) -> str:
    """What a command prints. Raises SlurmError with its own words, SlurmAway if it got no answer."""
    done = ask(*argv, patience=patience, environ=environ)
    if done.returncode != 0:
        raise failure(argv[0], done.stderr or done.stdout)
    return done.stdout


def ask(
    *argv: str, patience: float = PATIENCE, environ: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """A command, done, whatever came of it. Raises SlurmAway if it took too long, SlurmError, UserError."""
    try:
        return subprocess.run(
            argv,
            env=environment(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=patience,
        )
    except subprocess.TimeoutExpired:
        raise SlurmAway(f"{argv[0]} got no answer from Slurm within {patience:g} s") from None
    except FileNotFoundError:
        require()
        raise SlurmError(f"there is no {argv[0]} here") from None


def failure(command: str, words: str) -> SlurmError:
    """The error that a command's complaint amounts to."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    said = "; ".join(lines)[-400:] or "it said nothing"
    if any(sign.lower() in words.lower() for sign in AWAY):
        return SlurmAway(f"Slurm does not answer: {said}", "Try again when its controller is back.")
    plain = said.removeprefix(f"{command}: ").removeprefix("error: ")
    return SlurmError(f"Slurm's {command} refused: {plain}")


def answers() -> bool:
    """Whether a controller is there; asked briefly, for `--backend auto`."""
    if not here():
        return False
    try:
        call("scontrol", "ping", patience=5.0)
    except SlurmError:
        return False
    return True
