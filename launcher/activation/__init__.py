"""The environment that a recipe's `env` names: found without a shell, entered by one.

torchrun is started through activate.sh, which enters the environment and then becomes torchrun: what a line
of `env.setup` sets beside variables (`ulimit`, `umask`) holds too, and a signal ends it at any moment. So
nothing depends on which shell starts a job, nor on what is in anybody's ~/.bashrc.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.activation import conda
from launcher.activation.conda import Unusable, python_of
from launcher.recipe.sections import Env

__all__ = ["Activation", "Unusable", "find", "gave_up", "modules_missing"]

SCRIPT = Path(__file__).with_name("activate.sh")
GAVE_UP = 96  # activate.sh's exit status, none of Python's, torchrun's or the shell's own
MARK = "\nlaunch: "  # begins its last line

# Where Environment Modules and Lmod are initialised for bash, beside what $MODULESHOME names.
MODULES_INIT = (
    *("/etc/profile.d/modules.sh", "/etc/profile.d/lmod.sh", "/etc/profile.d/z00_lmod.sh"),
    *("/usr/share/modules/init/bash", "/usr/share/Modules/init/bash", "/usr/local/Modules/init/bash"),
    *("/usr/share/lmod/lmod/init/bash", "/opt/apps/lmod/lmod/init/bash"),
)


@dataclass(frozen=True)
class Activation:
    """`python` runs torchrun and the program; `argv` goes before the command, and is empty without `env`."""

    python: str = sys.executable
    argv: tuple[str, ...] = ()


def find(env: Env, workdir: Path, environ: Mapping[str, str]) -> Activation:
    """How to enter the environment from `workdir`, for somebody with the variables `environ`.

    Starts nothing. Raises Unusable if it is not there."""
    kind, prefix, name, variables = "", "", "", []
    python = sys.executable
    if env.conda is not None:
        found = conda.find(env.conda, workdir, environ)
        kind, prefix, variables = "conda", str(found), conda.variables(found)
        name = prefix if conda.is_path(env.conda) else env.conda
        python = python_of(found, "conda", env.conda)
    elif env.venv is not None:
        found = conda.path(env.venv, workdir, environ)
        kind, prefix = "venv", str(found)
        python = python_of(found, "venv", env.venv)
    if not (kind or env.modules or env.setup):
        return Activation()
    argv = ["bash", "--noprofile", "--norc", str(SCRIPT), str(_modules_init(environ) or "")]
    for part in (env.modules, variables, env.setup):
        argv += [str(len(part)), *part]
    return Activation(python, (*argv, kind, prefix, name))


def modules_missing(env: Env, environ: Mapping[str, str]) -> str:
    """The sentence if the recipe asks for modules and this machine, which may not be the one, has none."""
    if env.modules and not _modules_init(environ):
        return f"this machine has no environment modules, and the recipe asks for {', '.join(env.modules)}"
    return ""


def gave_up(log: str, exit_status: int) -> str:
    """Why activate.sh did not come as far as torchrun, from what it said; nothing if it did."""
    before, mark, sentence = f"\n{log}".rpartition(MARK)
    if exit_status != GAVE_UP or not mark:
        return ""
    words = before.strip().rpartition("\n")[2].strip()
    return f"{sentence.strip()}: {words[:300]}" if words else sentence.strip()


def _modules_init(environ: Mapping[str, str]) -> Path | None:
    own = [Path(environ["MODULESHOME"], "init", "bash")] if environ.get("MODULESHOME") else []
    return next((path for path in (*own, *map(Path, MODULES_INIT)) if path.is_file()), None)
