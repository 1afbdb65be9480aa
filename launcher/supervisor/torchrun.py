"""Pure: a recipe, a run and an attempt -> the argv, environment and working directory of torchrun.

torchrun gets `--max-restarts=0` (the supervisor is the one place that decides) and the plain program behind
rank.py, which gives every worker a log of its own. Reasons and measurements: docs/contract.md.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import fetch
from launcher.activation import Activation
from launcher.environ import clean, user
from launcher.recipe.sections import steps
from launcher.rundir import RunDir
from launcher.supervisor import rank

if TYPE_CHECKING:
    from launcher.recipe import Recipe

PATIENCE = 120  # seconds that nodes wait for each other
FETCHING = 6 * 3600  # and where one of them may have a data set to fetch first


@dataclass(frozen=True)
class Meeting:
    """Where the torchruns of several nodes meet, at node 0, and which of them this is."""

    host: str
    port: int
    nodes: int
    node: int

    def options(self, patience: int) -> list[str]:
        """Static: the launcher numbers the nodes, so that every attempt has the same ranks on node 0."""
        return [
            *(f"--nnodes={self.nodes}", f"--node-rank={self.node}"),
            *(f"--master-addr={self.host}", f"--master-port={self.port}"),
            f"--rdzv-conf=timeout={patience}",
        ]


@dataclass(frozen=True)
class Command:
    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: Path


def command(
    recipe: "Recipe",
    run: RunDir,
    attempt: int,
    gpus: int,
    record: Mapping[str, Any],
    base: Mapping[str, str],
    grace: float | None = None,
    activation: Activation | None = None,
    meeting: Meeting | None = None,
) -> Command:
    """What starts attempt `attempt` of `run` on `gpus` workers; with a `meeting`, that many on each node.

    `record` is run.json's object, `base` the environment of the caller, `grace` the seconds from a stop
    signal to SIGKILL, if not the recipe's, `activation` how the environment of `env` is entered. Nothing is
    looked up or started.
    """
    activation = activation or Activation()
    python = activation.python
    workdir = Path(record["workdir"])
    program, paths = _program(recipe, run, record)
    budget = save_budget(grace or recipe.restart.grace)
    argv = [
        *activation.argv,
        *(python, "-P", "-m", "torch.distributed.run"),
        *(meeting.options(FETCHING if recipe.fetch else PATIENCE) if meeting else ["--nnodes=1"]),
        *(f"--nproc-per-node={gpus}", "--max-restarts=0"),
        f"--log-dir={os.devnull}",  # else it leaves a folder in /tmp at every start; the logs are rank.py's
        # -I -S: rank.py needs no packages, and starts in a few ms without them
        *("--no-python", python, "-I", "-S", rank.__file__),
        *(python, "-u", *program, *recipe.program.args),
    ]
    frozen = dict(record.get("env", {}))
    if record.get("backend") == "slurm":
        frozen.pop("CUDA_VISIBLE_DEVICES", None)  # Slurm says which: `base` has it
    env = clean(base) | frozen | recipe.env.vars
    env.setdefault("USER", user(env))  # torch and others ask for it, and fail where nothing else says it
    if gpus > 1:
        env.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own default, which it warns of
    if recipe.resources.device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    env.pop("PYTHONSAFEPATH", None)
    if recipe.program.module:
        env["PYTHONSAFEPATH"] = "1"  # the working directory must not shadow the snapshot
    env |= {
        "PYTHONPATH": ":".join([*paths, *filter(None, [env.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "LAUNCH_RUN_DIR": str(run.path),
        "LAUNCH_RUN_ID": run.id,
        "LAUNCH_ATTEMPT": str(attempt),
        "LAUNCH_SAVE_BUDGET": f"{budget:g}",
        # --shutdown-timeout would do the same, and is an error for a torchrun that does not know it (2.11)
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(budget)),
        "LAUNCH_CHECKPOINT_EVERY": recipe.checkpoint.every,
        "LAUNCH_CHECKPOINT_BUSY": recipe.checkpoint.busy,
        "LAUNCH_CHECKPOINT_KEEP": str(recipe.checkpoint.keep),
        "LAUNCH_CHECKPOINT_KEEP_EVERY": steps(recipe.checkpoint.keep_every),
        "LAUNCH_RECIPE_HASH": record.get("recipe_hash") or recipe.hash(),
        "LAUNCH_GIT_COMMIT": (record.get("git") or {}).get("commit") or "",
    }
    if meeting:
        env["LAUNCH_NODE"] = str(meeting.node)
    if recipe.fetch and fetch.missing(recipe, workdir):
        argv = fetch.first(run, argv)
    return Command(tuple(argv), env, workdir)


def save_budget(grace: float) -> float:
    """Seconds of `grace` that the program has; the rest is for killing what is left."""
    return max(grace - 2, grace / 2)


def _program(recipe: "Recipe", run: RunDir, record: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The program's own arguments of python, and what PYTHONPATH begins with: the snapshot in code/."""
    workdir, git = Path(record["workdir"]), record.get("git") or {}
    here = run.code / (git.get("prefix") or "")  # the working directory, as it is in the snapshot
    paths = [here, run.code]
    beside = [] if git.get("commit") else [workdir]  # of no repository: only the script itself was copied
    if recipe.program.module:
        return ["-m", recipe.program.module], _unique([*paths, *beside])
    assert recipe.program.script is not None
    script = here / recipe.program.script
    if ".." in script.parts or not script.is_relative_to(run.code):  # not in the snapshot
        script = workdir / recipe.program.script
    beside = [(workdir / recipe.program.script).parent for _ in beside]
    return [str(script)], _unique([script.parent, *paths, *beside])


def _unique(paths: Sequence[Path]) -> list[str]:
    return list(dict.fromkeys(map(str, paths)))
