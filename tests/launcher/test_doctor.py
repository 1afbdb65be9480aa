"""`launch doctor` on real clusters of both kinds, on a machine without one, and against stores that cheat."""

import json
import shutil
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.doctor import examine
from launcher.cli.doctor.findings import Finding, of_cluster
from launcher.rundir import runs_root
from launcher.slurm import probe as probing
from launcher.slurm import profile
from launcher.slurm.cluster import parse
from launcher.slurm.probe import Blind, probe
from launcher.storage import StoreSettings, open_store
from launcher.storage.folder import FolderStore
from tests.lab import Lab, Settings
from tests.launcher.on_slurm import cluster, launch, wait
from tests.launcher.test_cluster import NEW, OLD, PARTITIONS, QOS

RECIPE = "program: {script: train.py}\nresources: {device: cpu, gpus: 2}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """One that needs no GPU, for there is none."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def checks(findings: list[dict[str, str]]) -> dict[str, dict[str, str]]:
    return {finding["check"]: finding for finding in findings}


def assert_nothing_left(lab: Lab) -> None:
    wait("no job", lambda: not lab.call("squeue", "--noheader", "--name=launch-doctor"))
    assert not list(runs_root().parent.rglob(".doctor-*")) and not runs_root().exists()


def test_a_cluster_whose_signals_reach_all(lab: Lab, recipe: Path, tmp_path: Path) -> None:
    """GraceTime 8, SIGTERM, linuxproc; with a store."""
    recipe.write_text(f"{RECIPE}storage: {{url: {tmp_path}/store}}\n")
    (tmp_path / "store").mkdir()
    said = launch("doctor", str(recipe), "--json")
    told: dict[str, Any] = json.loads(said.stdout)
    assert (
        told["schema"] == 1 and told["cluster"]["name"] == "lab" and told["cluster"]["partition"] == "batch"
    )
    found = checks(told["findings"])
    assert not [one for one in told["findings"] if one["state"] == "bad"]
    assert "GraceTime is 8 s, KillWait 5 s" in found["grace"]["found"] and found["grace"]["state"] == "note"
    assert found["signal"]["found"] == "preemption sends SIGTERM"
    assert "linuxproc" in found["reach"]["found"] and "its workers" in found["reach"]["found"]
    assert "orphans" not in found
    for check in ("folder", "clock", "torch", "disk", "cores", "store", "conditional writes"):
        assert check in found, check
    assert "gpus" not in found  # none was asked for
    kept = profile.read("lab") or {}
    assert kept["reaches"] == ["task", "child", "grandchild"]
    assert 3 < kept["kill_after"] < 10, "SIGKILL comes about KillWait after SIGTERM"
    assert list(open_store(str(tmp_path / "store")).list()) == []
    assert_nothing_left(lab)


def test_a_cluster_whose_signals_reach_few(recipe: Path) -> None:
    """GraceTime 0, own signal, pgid: a worker in a session of its own hears nothing, not even KILL."""
    with cluster(Settings(user_signal=True, proctrack="pgid", grace=0, kill_wait=2)) as lab:
        said = launch("doctor", str(recipe), check=False)
        assert said.returncode == 1, "what is bad is in the exit status"
        for words in (
            "bad   grace",
            "GraceTime is 0 s, KillWait 2 s",
            "Ask for a GraceTime of 60 or more on batch",
            "preemption sends the job's own signal",
            "a step's SIGTERM reaches the supervisor and torchrun\n",
            "SIGKILL did not reach its workers",
        ):
            assert words in "\n".join(line.rstrip() for line in said.stdout.splitlines()), said.stdout
        assert (profile.read("lab") or {})["reaches"] == ["task", "child"]
        assert_nothing_left(lab)


def test_no_node_is_free(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "PATIENCE", 1.0)
    with pytest.raises(Blind, match=r"no node was free within 1 s \(BeginTime\)") as caught:
        probe({"begin": "now+60"}, runs_root(), 5, lambda said: None)
    assert not caught.value.bad, "a full cluster is no fault of the user's"
    assert_nothing_left(lab)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        ("rm", r"the compute node does not see .*/runs: no run could start there"),
        ("hide", "does not have .*python"),
    ],
)
def test_what_the_node_does_not_see(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_it: str, words: str
) -> None:
    """Between submission and start the folder, or the Python, goes away: to the node, it never was there."""
    if break_it == "hide":
        python = tmp_path / "python"
        python.touch(0o755)
        monkeypatch.setattr("sys.executable", str(python))

    def breaks(said: str) -> None:
        for path in runs_root().glob(".doctor-*") if break_it == "rm" else [tmp_path / "python"]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    with pytest.raises(Blind, match=words) as caught:
        probe({"begin": "now+4"}, runs_root(), 5, breaks)
    assert caught.value.bad and caught.value.hint
    assert_nothing_left(lab)


def test_a_refused_probe_says_so_and_the_rest_is_told(lab: Lab, recipe: Path) -> None:
    recipe.write_text(f"{RECIPE}slurm: {{constraint: nonsense}}\n")
    said = launch("doctor", str(recipe), "--json", check=False)
    found = checks(json.loads(said.stdout)["findings"])
    assert said.returncode == 1
    assert found["probe"]["state"] == "bad" and "Invalid feature specification" in found["probe"]["found"]
    assert {"grace", "limits", "store"} <= set(found)
    assert_nothing_left(lab)


def test_wrong_input_is_a_sentence(lab: Lab, recipe: Path) -> None:
    said = launch("doctor", "--partition", "bacth", check=False)
    assert said.returncode == 2 and "there is no partition `bacth`" in said.stderr and "urgent" in said.stderr
    recipe.write_text("program: {script: train.py}\nresources:\n  gpus: 9\n")
    said = launch("doctor", str(recipe), check=False)
    assert said.returncode == 2
    assert "recipe.yaml:3:9: a node of `batch` has 8 GPUs, the recipe asks for 9" in said.stderr


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A PATH with nothing of Slurm's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    yield folder


def test_a_machine_without_slurm(commands: Path, recipe: Path) -> None:
    said = launch("doctor", str(recipe), "--json")
    told = json.loads(said.stdout)
    found = checks(told["findings"])
    assert told["cluster"] is None
    assert found["slurm"]["state"] == "note" and found["tmux"]["found"] == "there is no tmux"
    assert {"torch", "disk", "cores", "store"} <= set(found)
    assert not runs_root().exists()
    recipe.write_text("program: {script: train.py}\nresources: {gpus: 3}\n")
    said = launch("doctor", str(recipe), "--json", check=False)
    assert said.returncode == 1 and checks(json.loads(said.stdout)["findings"])["gpus"]["state"] == "bad"


def test_the_environment_of_the_recipe_is_looked_into(commands: Path, recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(f"{RECIPE}env:\n  venv: {tmp_path}/venv\n")
    said = launch("doctor", str(recipe), check=False)
    assert said.returncode == 2 and "recipe.yaml:4:9: " in said.stderr, said.stderr
    venv.create(tmp_path / "venv")
    found = checks(json.loads(launch("doctor", str(recipe), "--json", check=False).stdout)["findings"])
    assert (
        found["torch"]["state"] == "bad"
        and f"{tmp_path}/venv/bin/python has no torch" in found["torch"]["found"]
    )


def test_a_controller_that_is_away(commands: Path, recipe: Path) -> None:
    for name in ("sbatch", "scontrol"):
        script = commands / name
        script.write_text(
            "#!/bin/sh\necho 'slurm_load_ctl_conf error: Unable to contact slurm controller' >&2\nexit 1\n"
        )
        script.chmod(0o755)
    said = launch("doctor", str(recipe), "--json", check=False)
    found = checks(json.loads(said.stdout)["findings"])
    assert said.returncode == 1 and found["slurm"]["state"] == "bad" and "torch" in found


class Careless(FolderStore):
    """Conditions mean nothing to it, and it takes whatever comes."""

    conditional = verifies = False


def test_what_a_store_does_not_keep(tmp_path: Path) -> None:
    found = examine.conditional_writes(Careless(tmp_path))
    assert found.state == "note" and found.found == "If-None-Match and If-Match are ignored" and found.do
    assert examine.integrity(Careless(tmp_path), "auto").state == "good"
    assert examine.integrity(Careless(tmp_path), "signed").state == "bad"
    sound = open_store(str(tmp_path))
    assert {examine.conditional_writes(sound).state, examine.integrity(sound, "signed").state} == {"good"}
    assert list(sound.list()) == []


def test_a_store_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "knows")
    nowhere = StoreSettings(endpoint="http://127.0.0.1:9", region="us-east-1")
    (found,) = examine.store("s3://bucket", nowhere)
    assert found.state == "bad" and "does not answer" in found.found
    (found,) = examine.store("gopher://hole", StoreSettings())
    assert found.state == "bad" and "gopher://hole" in found.found
    (found,) = examine.store(None, StoreSettings())
    assert found.state == "note" and "LAUNCH_STORAGE" in found.do


def grace(config: str, partition: str, wanted: float | None = None, partitions: str = PARTITIONS) -> Finding:
    found = parse(config, partitions, "", QOS)
    return of_cluster(found, found.partitions[partition], None, wanted)[0]


def test_what_a_grace_time_means() -> None:
    assert grace(OLD, "batch").state == "good"
    assert (
        "cut" in grace(OLD, "batch", wanted=60.0).means
        and "cut" not in grace(OLD, "batch", wanted=20.0).means
    )
    assert grace(OLD, "big").means == "big is not preempted; a run that is cancelled has 29 s to save in"
    none = PARTITIONS.replace("GraceTime=8", "GraceTime=0")
    assert grace(OLD.replace("30 sec", "5 sec"), "batch", partitions=none).state == "bad"
    assert grace(OLD, "batch", partitions=none).state == "note"
    assert "GraceTime is 0 s, KillWait 10 s" in grace(NEW, "batch").found, "preempt/qos: the QOS's counts"
