"""`env:` of a recipe: environments found without `conda`, entered before torchrun, refused when not there."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import activation
from launcher.activation import Activation, Unusable, conda
from launcher.cli import submit
from launcher.errors import RecipeError
from launcher.recipe import parse, program, resolve
from launcher.recipe.sections import Env
from launcher.rundir import RunDir, read_json
from tests.launcher.conftest import wait
from tests.launcher.test_cli import launch, runs

SHOW = """\
import json, os, sys
print(json.dumps({"prefix": sys.prefix, "python": sys.executable, "umask": os.umask(0), "cwd": os.getcwd(),
                  "env": dict(os.environ)}))
"""
MODULE = """\
echo noise on stdout
module() { case "$2" in nccl/*) export LOADED="$LOADED $2" PYTHONPATH=/opt/nccl:$PYTHONPATH ;;
           *) echo "ERROR: no module $2" >&2; return 1 ;; esac; }
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a program, a home of its own, and no trace of a conda that this machine may have."""
    for folder in ("project", "home"):
        (tmp_path / folder).mkdir()
    (tmp_path / "project" / "show.py").write_text(SHOW)
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    for name in ("CONDA_EXE", "CONDA_ROOT", "CONDA_PREFIX", "MAMBA_ROOT_PREFIX", "MODULESHOME", "BASH_ENV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(conda, "ON_THE_MACHINE", ())
    return tmp_path / "project"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment; it has what is installed where these tests run, torch too."""
    prefix = tmp_path_factory.mktemp("made") / "venv"
    return venv(prefix, torch=True)


def venv(prefix: Path, torch: bool) -> Path:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True)
    if torch:
        (site,) = prefix.glob("lib/python*/site-packages")
        (site / "outer.pth").write_text(sysconfig.get_path("purelib"))
    return prefix


def conda_env(prefix: Path, made: Path) -> Path:
    """What makes a folder a conda environment, around a Python that works."""
    shutil.copytree(made, prefix, symlinks=True)
    (prefix / "conda-meta").mkdir()
    (prefix / "conda-meta" / "state").write_text(
        '{"env_vars": {"STATE": "kept by conda", "NOT": "***unset***"}}'
    )
    hooks = prefix / "etc" / "conda" / "activate.d"
    hooks.mkdir(parents=True)
    (hooks / "a.sh").write_text("export HOOK=${CONDA_PREFIX##*/}\nfalse\n")
    return prefix


def modules(folder: Path) -> dict[str, str]:
    """A stand-in of Environment Modules: what its init script leaves is the function `module`."""
    (folder / "init").mkdir(parents=True)
    (folder / "init" / "bash").write_text(MODULE)
    return {"MODULESHOME": str(folder)}


def recipe(**env: Any) -> Path:
    told = {"program": {"script": "show.py"}, "resources": {"gpus": 1, "device": "cpu"}}
    told |= {"restart": {"crashes": 0, "grace": 5}, "env": env}
    Path("show.yaml").write_text(yaml.safe_dump(told, sort_keys=False))
    return Path("show.yaml")


def enter(env: Env, **environ: str) -> dict[str, Any]:
    """What a program sees that is started through the environment."""
    there = os.environ | environ
    found = activation.find(env, Path.cwd(), there)
    argv = [*found.argv, found.python, "-c", SHOW]
    done = subprocess.run(argv, capture_output=True, text=True, env=there, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_run_in_a_conda_environment(project: Path, made: Path, tmp_path: Path) -> None:
    """Named as people name it; no `conda` anywhere; what its scripts and our lines set is there."""
    prefix = conda_env(tmp_path / "home" / "miniforge3" / "envs" / "det", made)
    lines = [
        'export BOTH="$HOOK, $STATE"',
        "umask 027; cd /",
        "export CUDA_VISIBLE_DEVICES=5",
        "[ -d /x ] && y",
    ]
    path = recipe(
        conda="det", modules=["nccl/2"], setup=lines, vars={"BOTH": "overwritten", "MINE": "$HOME `x`"}
    )
    done = launch(str(path), "--backend", "local", **modules(tmp_path / "modules"))
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = runs()
    said = json.loads(RunDir(folder).rank_log(1, 0).read_text().splitlines()[-1])
    assert said["prefix"] == str(prefix) and said["python"] == str(prefix / "bin" / "python")
    env = said["env"]
    assert env["CONDA_PREFIX"] == str(prefix) and env["CONDA_DEFAULT_ENV"] == "det"
    assert env["PATH"].startswith(f"{prefix}/bin:") and shutil.which("conda", path=env["PATH"]) is None
    assert env["BOTH"] == "det, kept by conda" and env["MINE"] == "$HOME `x`" and "NOT" not in env
    assert env["LOADED"] == " nccl/2" and "/opt/nccl" in env["PYTHONPATH"].split(":")
    assert env["PYTHONPATH"].startswith(f"{folder}/code"), "the snapshot comes before what a module brings"
    assert env["CUDA_VISIBLE_DEVICES"] == "", "the devices are not the environment's to choose"
    assert said["umask"] == 0o027 and said["cwd"] == str(project)
    assert not [name for name in env if name.startswith("__")], "nothing of the script's own is left"
    shown = launch(str(path), "--dry-run").stdout
    assert f"env         modules nccl/2, {prefix}/bin/python, 4 lines of setup" in shown


def test_a_virtual_environment(made: Path) -> None:
    Path("venv").symlink_to(made)
    said = enter(Env(venv="venv"), PYTHONHOME="/nowhere", VIRTUAL_ENV="/another")
    assert said["prefix"].endswith("/project/venv") and said["env"]["VIRTUAL_ENV"] == said["prefix"]
    assert said["env"]["PATH"] == f"{said['prefix']}/bin:/usr/bin:/bin" and "PYTHONHOME" not in said["env"]


def test_it_needs_no_variable_of_the_caller(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a bare environment: no HOME, no PATH but the system's, plain C locale; lines in any script."""
    for name in set(os.environ) - {"PATH"}:
        monkeypatch.delenv(name)
    said = enter(
        Env(venv=str(made), setup=["export WORD='größe\n2'", "if true\nthen export B=1; fi"]), LC_ALL="C"
    )
    assert said["env"]["WORD"] == "größe\n2" and said["env"]["B"] == "1"


def test_nothing_asked_nothing_done() -> None:
    assert activation.find(Env(vars={"A": "1"}), Path.cwd(), {}) == Activation(sys.executable, ())
    assert activation.find(Env(setup=["true"]), Path.cwd(), {}).python == sys.executable


def places(tmp_path: Path) -> dict[str, tuple[Path, Mapping[str, str]]]:
    """Where an environment called `det` may lie, and the variables by which it is found."""
    home = tmp_path / "home"
    return {
        "home": (home / "micromamba" / "envs" / "det", {}),
        "exe": (tmp_path / "c" / "envs" / "det", {"CONDA_EXE": str(tmp_path / "c" / "bin" / "conda")}),
        "mamba": (tmp_path / "m" / "envs" / "det", {"MAMBA_ROOT_PREFIX": str(tmp_path / "m")}),
        "envs path": (tmp_path / "shared" / "det", {"CONDA_ENVS_PATH": f"/none:{tmp_path}/shared"}),
        "condarc": (home / "mine" / "det", {}),
        "listed": (tmp_path / "elsewhere" / "det", {}),
    }


@pytest.mark.parametrize("where", ["home", "exe", "mamba", "envs path", "condarc", "listed"])
def test_where_conda_keeps_them(where: str, tmp_path: Path) -> None:
    prefix, environ = places(tmp_path)[where]
    (prefix / "conda-meta").mkdir(parents=True)
    home = tmp_path / "home"
    if where == "condarc":
        (home / ".condarc").write_text("envs_dirs: [~/mine]\n")
    if where == "listed":
        (home / ".conda").mkdir()
        (home / ".conda" / "environments.txt").write_text(f"/gone/det\n{prefix}\n")
    environ = {"HOME": str(home), **environ}
    assert conda.find("det", tmp_path, environ) == prefix
    with pytest.raises(Unusable, match=r"no conda environment dett here; did you mean `det`\?"):
        conda.find("dett", tmp_path, environ)
    with pytest.raises(Unusable, match=r"no conda environment xyz here; known here: .*det"):
        conda.find("xyz", tmp_path, environ)


def test_base_and_paths(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "miniconda3" / "conda-meta").mkdir(parents=True)
    environ = {"HOME": str(home)}
    assert conda.find("base", tmp_path, environ) == home / "miniconda3"
    assert conda.find("~/miniconda3", tmp_path, environ) == home / "miniconda3"
    assert conda.find("./home/miniconda3", tmp_path, environ) == home / "miniconda3"
    for broken in ("envs_dirs: 3", "- a", "x: [", "envs_dirs: {a: b}"):
        (home / ".condarc").write_text(broken)
        assert conda.find("base", tmp_path, environ) == home / "miniconda3"


def test_what_is_not_there_is_said_before_anything_starts(made: Path, tmp_path: Path) -> None:
    conda_env(tmp_path / "home" / "miniforge3" / "envs" / "det", made)
    empty = venv(tmp_path / "home" / "miniforge3" / "envs" / "empty", torch=False)
    (empty / "conda-meta").mkdir()
    (tmp_path / "bare" / "conda-meta").mkdir(parents=True)
    (tmp_path / "old" / "bin").mkdir(parents=True)
    old = tmp_path / "old" / "bin" / "python"
    old.write_text("#!/bin/sh\necho '[[3, 9], true]'\n")
    old.chmod(0o755)
    for env, column, sentence in (
        ({"conda": "dte"}, "10:10", "there is no conda environment dte here; did you mean `det`?"),
        ({"conda": str(tmp_path / "bare")}, "10:10", "bin/python cannot be run"),
        ({"conda": "empty"}, "10:10", "the environment empty has no torch; install it there"),
        ({"venv": "venv"}, "10:9", f"there is no folder {Path.cwd()}/venv, which `env.venv` names"),
        ({"venv": str(tmp_path / "old")}, "10:9", "has Python 3.9, and 3.11 is the oldest that will do"),
        ({"conda": "det", "venv": "venv"}, "11:9", "`env` names either a `conda` environment or a `venv`"),
        ({"modules": ["cuda/12"]}, "11:3", "this machine has no environment modules"),
    ):
        path = recipe(**env)
        done = launch(str(path), "--backend", "local")
        assert done.returncode == 2 and not runs(), done.stderr
        assert f"launch: show.yaml:{column}: " in done.stderr and sentence in done.stderr, done.stderr
    dry = launch(str(recipe(conda="dte")), "--dry-run")
    assert dry.returncode == 0 and "warning: show.yaml:10:10: there is no conda environment dte" in dry.stderr


def test_on_a_cluster_only_modules_may_be_elsewhere() -> None:
    """Environments lie on disks that all nodes share; what `module` finds differs from node to node."""
    for env, refused in (({"conda": "dte"}, True), ({"modules": ["cuda/12"]}, False)):
        document = resolve(recipe(**env))
        findings = program.check(parse(document), document, here=False)
        with pytest.raises(RecipeError) if refused else contextlib.nullcontext():
            submit._refuse(document, findings, "slurm")
        with pytest.raises(RecipeError):
            submit._refuse(document, findings, "tmux")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            "echo no such disk >&2; false",
            "env.setup[1], `echo no such disk >&2; false`, failed with 1: no such disk",
        ),
        ("exit 0", "env.setup[1], `exit 0`, failed with 0: fine"),
        ("cd /nowhere\ntrue", "env.setup[1], `cd /nowhere`, failed with 1: "),
        ("if then", "env.setup[1], `if then`, failed with "),
        ("exec nosuchprogram", "env.setup[1], `exec nosuchprogram`, failed with 127: "),
    ],
)
def test_a_line_that_fails(line: str, reason: str) -> None:
    done = launch(str(recipe(setup=["echo fine", line])), "--backend", "local")
    assert done.returncode == 1
    (folder,) = runs()
    final = read_json(RunDir(folder).final) or {}
    assert final["state"] == "failed" and reason in final["reason"], final


def test_a_module_that_is_not_there(tmp_path: Path) -> None:
    path = recipe(modules=["nccl/2", "cuda/99"])
    done = launch(str(path), "--backend", "local", **modules(tmp_path / "modules"))
    reason = "env.modules: `module load cuda/99` failed with 1: ERROR: no module cuda/99"
    assert done.returncode == 1 and reason in done.stdout, done.stdout


def test_a_line_that_hangs_is_stopped_like_anything_else() -> None:
    """Nobody waits for it: a signal ends it, and its child goes with it."""
    argv = [sys.executable, "-m", "launcher.cli", str(recipe(setup=["sleep 613"])), "--backend", "local"]
    run = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def sleepers() -> list[Path]:
        return [path for path in Path("/proc").glob("[0-9]*/cmdline") if content(path) == b"sleep\x00613\x00"]

    wait("the line to run", sleepers)
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=60)
    assert "stopped" in said and not sleepers(), said


def content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
