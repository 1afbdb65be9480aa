"""The command that starts an attempt: from the snapshot, with nothing of an outer job."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli import snapshot
from launcher.recipe import Recipe, load
from launcher.rundir import RunDir
from launcher.supervisor.torchrun import Command, command


def make(tmp_path: Path, gpus: int = 2, **sections: Any) -> Recipe:
    told = {"program": {"module": "detcore.train"}, "resources": {"gpus": gpus, "device": "cpu"}} | sections
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(told))
    return load(path)


def build(tmp_path: Path, recipe: Recipe, base: dict[str, str] | None = None, **record: Any) -> Command:
    run = RunDir(tmp_path / "r-20260101-000000-0000")
    record = {"workdir": str(tmp_path), "recipe_hash": "h", "git": {"commit": "c", "prefix": ""}} | record
    return command(recipe, run, 3, recipe.resources.gpus, record, base or {})


def test_what_the_contract_promises(tmp_path: Path) -> None:
    policy = {"every": "500it", "busy": "skip", "keep": 2, "keep_every": "5000it"}
    told = build(tmp_path, make(tmp_path, restart={"grace": "30s"}, checkpoint=policy))
    assert "--nproc-per-node=2" in told.argv and "--max-restarts=0" in told.argv
    assert told.env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "28", "torchrun kills before the supervisor does"
    run = tmp_path / "r-20260101-000000-0000"
    assert (
        told.env
        | {
            "LAUNCH_RUN_DIR": str(run),
            "LAUNCH_RUN_ID": run.name,
            "LAUNCH_ATTEMPT": "3",
            "LAUNCH_SAVE_BUDGET": "28",
            "LAUNCH_CHECKPOINT_EVERY": "500it",
            "LAUNCH_CHECKPOINT_BUSY": "skip",
            "LAUNCH_CHECKPOINT_KEEP": "2",
            "LAUNCH_CHECKPOINT_KEEP_EVERY": "5000it",
            "LAUNCH_RECIPE_HASH": "h",
            "LAUNCH_GIT_COMMIT": "c",
            "PYTHONPATH": str(run / "code"),
        }
        == told.env
    )
    assert told.cwd == tmp_path


def test_nothing_of_an_outer_job(tmp_path: Path) -> None:
    outer = {
        **{"SLURM_CPU_BIND": "x", "SBATCH_X": "x", "PMIX_RANK": "1", "RANK": "5", "MASTER_PORT": "1"},
        **{"PET_NPROC_PER_NODE": "9", "TORCHELASTIC_RUN_ID": "x", "LAUNCH_ATTEMPT": "9"},
    }
    outer |= {"LAUNCH_CHECKPOINT_KEEP_EVERY": "5it"}
    told = build(tmp_path, make(tmp_path), outer | {"SLURM_CONF": "/etc/slurm.conf", "MINE": "kept"})
    assert not {name for name in outer if not name.startswith("LAUNCH_")} & told.env.keys()
    assert told.env["SLURM_CONF"] == "/etc/slurm.conf" and told.env["MINE"] == "kept"
    assert told.env["LAUNCH_ATTEMPT"] == "3" and not told.env["LAUNCH_CHECKPOINT_KEEP_EVERY"]


def test_recipe_over_run_over_caller(tmp_path: Path) -> None:
    recipe = make(tmp_path, env={"vars": {"A": "recipe"}})
    told = build(
        tmp_path, recipe, {"A": "caller", "B": "caller", "C": "caller"}, env={"A": "run", "B": "run"}
    )
    assert (told.env["A"], told.env["B"], told.env["C"]) == ("recipe", "run", "caller")


def test_threads_of_many_workers_do_not_fight(tmp_path: Path) -> None:
    assert build(tmp_path, make(tmp_path)).env["OMP_NUM_THREADS"] == "1"
    assert build(tmp_path, make(tmp_path), {"OMP_NUM_THREADS": "4"}).env["OMP_NUM_THREADS"] == "4"
    assert "OMP_NUM_THREADS" not in build(tmp_path, make(tmp_path, gpus=1)).env


@pytest.mark.parametrize("repository", [True, False])
def test_program_is_run_from_the_snapshot(tmp_path: Path, repository: bool) -> None:
    """A script and what it imports come from code/, whatever the working directory holds by now."""
    work = tmp_path / "repo" / "sub"
    work.mkdir(parents=True)
    (work / "train.py").write_text("import helper; print(helper.words, __file__)")
    (work / "helper.py").write_text("words = 'as launched'")
    if repository:
        git = ["git", "-C", str(tmp_path / "repo")]
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "add", "."], check=True)
        person = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run([*git, *person, "commit", "-qm", "x"], check=True)
    code = tmp_path / "r-20260101-000000-0000" / "code"
    said = snapshot.take(work, code, "train.py")
    if repository:
        (work / "helper.py").write_text("words = 'changed since'")
    recipe = make(tmp_path, program={"script": "train.py"})
    told = build(tmp_path, recipe, workdir=str(work), git=said)
    program = told.argv[told.argv.index("-u") - 1 :]
    done = subprocess.run(program, env=told.env, cwd=told.cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["as", "launched"] and str(code) in done.stdout


def test_working_directory_does_not_shadow_the_snapshot(tmp_path: Path) -> None:
    code = tmp_path / "r-20260101-000000-0000" / "code"
    code.mkdir(parents=True)
    (code / "prog.py").write_text("print('snapshot')")
    (tmp_path / "prog.py").write_text("print('working directory')")
    told = build(tmp_path, make(tmp_path, program={"module": "prog"}))
    program = told.argv[told.argv.index("-u") - 1 :]
    done = subprocess.run(program, env=told.env, cwd=told.cwd, capture_output=True, text=True)
    assert done.stdout == "snapshot\n", done.stderr


def test_no_word_of_a_rank_is_lost(tmp_path: Path) -> None:
    """Words before a native crash are in the rank's own log, and so is Python's dying word."""
    told = build(tmp_path, make(tmp_path))
    tail = told.argv.index(sys.executable, 1)
    rank = list(told.argv[tail : tail + 4])
    crash = "import faulthandler, os; faulthandler.enable(); print('here'); os.abort()"
    done = subprocess.run(
        [*rank, sys.executable, "-c", crash], env=told.env | {"RANK": "1"}, capture_output=True
    )
    assert done.returncode == -6 and done.stdout == done.stderr == b""
    log = (tmp_path / "r-20260101-000000-0000" / "logs" / "attempt-3" / "rank-1.log").read_text()
    assert log.startswith("Fatal Python error: Aborted") or log.startswith("here")
