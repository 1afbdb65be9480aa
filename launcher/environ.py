"""The environment we are in: which of its variables nobody that we start may inherit, and who we are by it.

cron and containers have few variables, and a container's user may be unknown to its /etc/passwd.
"""

import os
import pwd
from collections.abc import Mapping
from pathlib import Path

EXEC = "LAUNCH_EXEC"  # the name of the `launch exec` that we are in: what it holds is ours
# Of an outer job or an outer torchrun: a worker that inherited them would take itself for somebody else.
# SLURM_CPU_BIND of an outer step pins all workers to its few cores. SLURM_CONF only says where Slurm is.
FOREIGN = ("SLURM_", "SBATCH_", "SRUN_", "PMIX_", "PMI_", "TORCHELASTIC_", "PET_", "LAUNCH_")
FOREIGN_NAMES = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
}
KEPT = {
    *("SLURM_CONF", "LAUNCH_STORAGE", "LAUNCH_RUNS", "LAUNCH_TMUX_SOCKET"),
    *("LAUNCH_QUEUE", "LAUNCH_CPU_SLOTS"),
    EXEC,
}


def clean(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without what belongs to a job, a torchrun or a run around us."""
    return {
        name: value
        for name, value in environ.items()
        if name in KEPT or not (name in FOREIGN_NAMES or name.startswith(FOREIGN))
    }


def user(environ: Mapping[str, str] = os.environ) -> str:
    """The caller's name, or `uid-1000` if nothing says one."""
    for name in ("LOGNAME", "USER"):
        if environ.get(name):
            return environ[name]
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid-{os.getuid()}"


def home(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The caller's home; None if nothing says where that is."""
    if environ.get("HOME"):
        return Path(environ["HOME"])
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return None
