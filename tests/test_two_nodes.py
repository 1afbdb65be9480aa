"""Two nodes with two workers each train to the bits of one node with four, preempted on the way."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launcher.cli import submit
from launcher.rundir import RunDir, all_runs, new_run_id, write_json
from launcher.supervisor import control, meeting
from tests import jobs
from tests.launcher.progress import wait

STEPS = 24


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """What a test starts; what is left of it is killed."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()
    for run in all_runs():
        for process in jobs.processes_of(run.path):
            process.kill()


def prepare(data: Path) -> tuple[RunDir, RunDir]:
    """Two runs of the tiny recipe with four workers, as `launch` makes them: on one node, and on two."""
    told = [*jobs.TINY, f"train.data.root={data}", f"train.schedule.iterations={STEPS}"]
    told += ["train.data.workers=0", "resources.gpus=4"]
    plan = submit.plan(Path("recipes/yolof_shapes.yaml"), told, {}, None, "local", dry=False)
    one = plan.run
    submit.create(plan)
    two = plan.run = RunDir(one.path.parent / new_run_id("two"))
    submit.create(plan)
    recipe = yaml.safe_load(two.recipe.read_text())  # what needs a cluster to be asked for
    recipe["resources"] |= {"nodes": 2, "gpus": 2}
    two.recipe.write_text(yaml.safe_dump(recipe))
    write_json(two.run, plan.record | {"id": two.id, "backend": "slurm"})
    return one, two


def start(module: str, run: RunDir, *argv: str) -> subprocess.Popen[bytes]:
    with (run.path.parent / f"{run.id}.window").open("ab") as window:
        command = [sys.executable, "-P", "-m", f"launcher.supervisor.{module}", str(run.path), *argv]
        return subprocess.Popen(command, stdout=window, stderr=window)


def test_two_nodes_end_as_one_does(
    tmp_path: Path, processes: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(jobs.ROOT)
    data = tmp_path / "shapes"
    sizes = ["--train", "32", "--val", "8", "--size", "64"]
    subprocess.run([sys.executable, "-m", "detcore.data.shapes", str(data), *sizes], check=True)

    one, two = prepare(data)
    processes.append(start("guard", one))
    assert processes[0].wait(120) == 0, one.run_log.read_text()

    job = meeting.job_name("here", 0)
    processes += [start("guard", two), start("node", two, "--node", "1", "--job", job)]
    wait("step 6", jobs.at_step(two.path, 6))
    control.preempt(two)
    assert processes[1].wait(120) == 0, two.run_log.read_text()
    meeting.dismiss(two, job)
    assert processes[2].wait(30) == 0

    ends = jobs.attempts(two.path)
    assert [end["state"] for end in ends] == ["preempted", "finished"]
    assert ends[0]["saved"] and ends[1]["resumed"] == ends[0]["step"]
    assert "4 workers on 2 nodes" in two.run_log.read_text()
    jobs.assert_same(jobs.final_state(two.path), jobs.final_state(one.path))
    assert two.metrics.read_bytes() == one.metrics.read_bytes()
