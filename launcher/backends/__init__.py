"""Where a run's guard can live, by name."""

from launcher.backends.base import Backend
from launcher.backends.local import Local
from launcher.backends.slurm import Slurm
from launcher.backends.tmux import Tmux

BACKENDS: dict[str, Backend] = {"local": Local(), "slurm": Slurm(), "tmux": Tmux()}
