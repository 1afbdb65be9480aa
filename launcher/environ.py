"""Variables that belong to a job, a torchrun or a run around us: nobody that we start may inherit them."""

from collections.abc import Mapping

# Of an outer job or an outer torchrun: a worker that inherited them would take itself for somebody else.
# SLURM_CPU_BIND of an outer step pins all workers to its few cores. SLURM_CONF only says where Slurm is.
FOREIGN = ("SLURM_", "SBATCH_", "SRUN_", "PMIX_", "PMI_", "TORCHELASTIC_", "PET_", "LAUNCH_")
FOREIGN_NAMES = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
}
KEPT = {"SLURM_CONF", "LAUNCH_STORAGE", "LAUNCH_RUNS", "LAUNCH_TMUX_SOCKET"}


def clean(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without what belongs to a job, a torchrun or a run around us."""
    return {
        name: value
        for name, value in environ.items()
        if name in KEPT or not (name in FOREIGN_NAMES or name.startswith(FOREIGN))
    }
