"""What this machine has to share, and what of it other people's processes use.

GPUs by nvidia-smi(1), named by UUID: CUDA and nvidia-smi may count them in different orders. Workers on the
CPU by $LAUNCH_CPU_SLOTS, if it is set: else the kernel shares its time among as many as come. Cores and
memory are counted for the runs that ask for them; nothing enforces that a run keeps to what it asked for.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import LaunchError, UserError
from launcher.workstation.order import GPUS

if TYPE_CHECKING:
    from launcher.recipe.sections import Resources

SLOTS = "LAUNCH_CPU_SLOTS"
WORKERS, CORES, MEMORY = "workers", "cpus", "memory"
KINDS = (GPUS, WORKERS, CORES, MEMORY)
PATIENCE = 15.0  # seconds for nvidia-smi; without its persistence daemon it takes some


def wants(resources: "Resources", workers: int) -> dict[str, int]:
    """What a run with so many workers takes from its machine."""
    kind = GPUS if resources.device == "cuda" else WORKERS
    asked = {kind: workers, CORES: resources.cpus, MEMORY: resources.memory}
    return {kind: amount for kind, amount in asked.items() if amount}


def totals() -> dict[str, int]:
    """What there is of each counted kind; one that is missing is unlimited. UserError for a bad setting."""
    found = {CORES: len(os.sched_getaffinity(0)), MEMORY: _memory()}
    slots = os.environ.get(SLOTS)
    if slots:
        if not slots.isdecimal():
            raise UserError(f"{SLOTS} is {slots!r}", "It is the number of CPU workers that run at a time.")
        found[WORKERS] = int(slots)
    return found


def lacking(wanted: Mapping[str, int], there: Mapping[str, int]) -> dict[str, str]:
    """By kind, what this machine will never have for such a run; a kind that is not `there` is unlimited."""
    return {
        kind: f"this machine has {_have(kind, there[kind])}, the recipe asks for {words({kind: amount})}"
        for kind, amount in wanted.items()
        if amount > there.get(kind, amount)
    }


def words(wanted: Mapping[str, int]) -> str:
    """4 GPUs, 8 cores and 30 GB of memory."""
    units = {GPUS: "GPU", WORKERS: "CPU worker", CORES: "core"}
    said = [
        f"{amount / 1024:.4g} GB of memory"
        if kind == MEMORY
        else f"{amount} {units[kind]}{'s' * (amount != 1)}"
        for kind, amount in wanted.items()
    ]
    return " and ".join(filter(None, [", ".join(said[:-1]), said[-1]]))


def _have(kind: str, amount: int) -> str:
    slots = {WORKERS: f"{amount or 'no'} slot{'s' * (amount != 1)} for CPU workers ({SLOTS})"}
    return slots.get(kind) or (words({kind: amount}) if amount else "no GPUs")


def gpus() -> tuple[str, ...]:
    """The GPUs that a program started from here could use: the driver's, as CUDA_VISIBLE_DEVICES orders and
    hides them. LaunchError if nvidia-smi fails."""
    rows = _ask("--query-gpu=index,uuid")
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    if mask is None:
        return tuple(uuid for _, uuid in rows)
    visible: list[str] = []
    for part in mask.split(","):
        name = part.strip()
        meant = [
            uuid for index, uuid in rows if name == index or (name[:4] == "GPU-" and uuid.startswith(name))
        ]
        if len(meant) != 1:  # CUDA ignores all that follows an invalid one, too
            break
        visible += [uuid for uuid in meant if uuid not in visible]
    return tuple(visible)


def busy() -> frozenset[str]:
    """The GPUs on which processes compute, whosever they are. LaunchError if nvidia-smi fails."""
    return frozenset(uuid for uuid, _ in _ask("--query-compute-apps=gpu_uuid,pid"))


def _ask(query: str) -> Sequence[tuple[str, str]]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    argv = [tool, query, "--format=csv,noheader"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        raise LaunchError("nvidia-smi does not answer") from None
    if done.returncode != 0:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:] or [f"it exited with {done.returncode}"]
        raise LaunchError(f"nvidia-smi failed: {last[0]}")
    rows = [line.split(",", 1) for line in done.stdout.splitlines()]
    return [(row[0].strip(), row[1].strip()) for row in rows if len(row) == 2]


def _memory() -> int:
    """MB of memory, of proc(5)'s meminfo."""
    first = Path("/proc/meminfo").read_text().splitlines()[0]
    return int(first.split()[1]) // 1024
