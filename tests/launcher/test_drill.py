"""`launch drill` with the toy program: what keeps its promises passes, what cheats is found out."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from launcher.cli.drill.blow import strike
from launcher.rundir import RunDir, read_json, runs_root
from launcher.supervisor import processes
from tests.lab import Lab, Settings
from tests.launcher.conftest import TOY, Toy, wait
from tests.launcher.on_slurm import SlurmRun, cluster, launch
from tests.launcher.test_tmux import server  # noqa: F401 - ends this test's tmux server

ALL = ["saved", "steps lost", "resumed at", "state", "orphans", "node free", "back"]


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with cluster(Settings(kill_wait=20)) as made:  # that much there is to save in, on a busy machine, too
        yield made


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")


def drill(args: str, *options: str, script: str = str(TOY)) -> subprocess.CompletedProcess[str]:
    return launch("drill", recipe(args, script), *options, check=False)


def recipe(args: str, script: str = str(TOY)) -> str:
    told = {
        "program": {"script": script, "args": args.split()},
        "resources": {"gpus": 1, "device": "cpu"},
        "restart": {"backoff": 0.1, "grace": 20, "hang": 60},
    }
    Path("toy.yaml").write_text(yaml.safe_dump(told))
    return "toy.yaml"


def broken(done: subprocess.CompletedProcess[str]) -> set[str]:
    """The rows that did not hold."""
    return {row["what"] for row in json.loads(done.stdout)["rows"] if row["held"] is False}


def left() -> list[RunDir]:
    return [RunDir(path) for path in runs_root().glob("drill-*")]


def test_all_is_held_in_a_window() -> None:
    done = drill("--steps 100000 --pace 0.05", "--backend", "tmux")
    assert done.returncode == 0, done
    lines = done.stdout.splitlines()[2:]
    assert [line.split("  ")[0] for line in lines] == ALL and all(
        line.rstrip().endswith("held") for line in lines
    )
    assert "coming back" in done.stderr and not left(), "both runs are deleted"


def test_all_is_held_on_slurm(lab: Lab) -> None:
    done = drill("--steps 100000 --pace 0.05", "--backend", "slurm", "--every", "15", "--json")
    assert done.returncode == 0, done
    told = json.loads(done.stdout)
    assert [row["what"] for row in told["rows"]] == ALL and told["held"] and told["kept"] == []
    step = int(told["rows"][3]["promised"].rpartition("at step ")[2])
    assert "scontrol requeue" in told["kind"] and step > 15 and step % 15 == 0
    assert "by a fresh job" in told["rows"][-1]["seen"]
    assert not left()
    wait("no job", lambda: not lab.call("squeue", "--noheader"))


def test_a_job_that_slurm_does_not_requeue(lab: Lab) -> None:
    run = SlurmRun(lab, "--steps 100000 --pace 0.05")
    run.at(3)
    lab.call("scontrol", "update", f"JobId={run.jobs[0]}", "Requeue=0", check=True)
    blow = strike(run.run, "slurm")
    assert "it keeps its job" in blow.kind and blow.free and blow.orphans == [] and run.ends[0]["saved"]
    launch("stop", "last")


def test_who_cheats_is_found_out() -> None:
    """It leaves without saving, and does not go on from what was saved before."""
    done = drill("--steps 100000 --pace 0.05 --careless --forgetful", "--backend", "local", "--json")
    assert done.returncode == 1 and broken(done) == {"saved", "steps lost", "state"}, done
    assert "differs in metrics.jsonl, train.pth" in done.stdout
    kept = left()
    assert {run.id for run in kept} == set(json.loads(done.stdout)["kept"]) and len(kept) == 2
    assert all(read_json(run.final) and not processes.of_run(run.path) for run in kept)


def test_who_does_not_save_as_often_as_told_is_found_out() -> None:
    done = drill("--steps 100000 --pace 0.02 --every 100000", "--backend", "local")
    assert done.returncode == 1 and "no checkpoint at step 10" in done.stderr, done
    assert all(run.id in done.stderr and not processes.of_run(run.path) for run in left())


@pytest.mark.parametrize(
    ("program", "hang", "sentence"),
    [
        ("pass", "60s", "finished without a heartbeat"),
        ("import time; time.sleep(600)", "3s", "no heartbeat within 3 s"),
    ],
)
def test_a_program_without_the_contract(program: str, hang: str, sentence: str) -> None:
    Path("plain.py").write_text(program)
    done = drill("", "--backend", "local", f"restart.hang={hang}", script="plain.py")
    assert done.returncode == 1 and "contract" in done.stderr and sentence in done.stderr, done
    assert "Traceback" not in done.stderr and not done.stdout


def test_a_run_too_short_to_be_drilled() -> None:
    done = drill("--steps 12", "--backend", "local")
    assert done.returncode == 1 and "finished at step 12" in done.stderr and "--every less" in done.stderr, (
        done
    )


def test_no_place_in_time(toy: Callable[..., Toy], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCH_CPU_SLOTS", "2")
    toy("--steps 100000").start().at(1)
    done = drill("--steps 100000", "--backend", "local", "--max-wait", "1s")
    assert done.returncode == 1 and "1 s" in done.stderr and "Traceback" not in done.stderr, done


def test_ctrl_c_leaves_nothing() -> None:
    argv = [sys.executable, "-m", "launcher.cli", "drill", recipe("--steps 100000"), "--backend", "local"]
    with subprocess.Popen([*argv, "--every", "1000"], stderr=subprocess.PIPE) as drilling:
        wait("a run that trains", lambda: any(run.heartbeat.exists() for run in left()))
        (run,) = left()
        drilling.send_signal(signal.SIGINT)
        assert drilling.wait(60) == 130
    assert not left() and not processes.of_run(run.path)


def test_bad_input_starts_nothing() -> None:
    done = launch("drill", recipe(""), "--backend", "local", "resources.gpsu=1", check=False)
    assert done.returncode == 2 and "gpsu" in done.stderr and not left(), done
