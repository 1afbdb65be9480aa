"""A run as jobs of a real Slurm: every way in which a job ends, and what becomes of the run."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.rundir import read_json, read_jsonl
from tests.lab import Lab, Settings
from tests.launcher.on_slurm import TOY, SlurmRun, cluster, launch, parent, state_of, take_all, wait

STEPS, STAY = 60, 30
LONG = f"--steps {STEPS} --every 20 --wait-at {STAY}"  # whatever is to happen to its first attempt finds it
MOVES = "--steps 300 --every 20"


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with cluster(Settings(kill_wait=10)) as made:  # that much there is to save in, on a busy machine, too
        yield made


@pytest.mark.parametrize("proctrack", ["linuxproc", "pgid"])
@pytest.mark.parametrize("user_signal", [False, True], ids=["term", "user-signal"])
def test_preempted_with_grace(user_signal: bool, proctrack: str, request: pytest.FixtureRequest) -> None:
    """Saved in the grace period, 0 steps lost, no orphan, the node handed over before the period is over."""
    with cluster(Settings(user_signal=user_signal, proctrack=proctrack, grace=20)) as lab:
        run = SlurmRun(lab, f"{LONG} --save 0.5")
        run.at(STAY)
        urgent = take_all(lab, 600)
        wait("the first signal", lambda: "asking the program to save" in run.log)
        began = time.monotonic()
        wait("the urgent job to run", lambda: state_of(lab, urgent) == "RUNNING")
        handed_over = time.monotonic() - began
        assert not run.alive(), "the node is somebody else's, and a process of the run lives on it"
        lab.call("scancel", urgent)
        assert run.end()["state"] == "finished"
        print(f"saved at step {run.ends[0]['step']}; node free {handed_over:.1f} s after the signal")
        assert run.ends[0]["state"] == "preempted" and run.ends[0]["saved"] and run.lost_steps() == 0
        assert handed_over < lab.settings.grace
        assert "preempted by Slurm" in run.ends[0]["reason"]
        assert run.starts[1]["returned"]["by"] == "a fresh job"
        run.assert_undisturbed(STEPS)


def test_preempted_without_grace() -> None:
    """KillWait is all there is; Slurm requeues the job as well, and only one of the two goes on."""
    with cluster(Settings(grace=0, kill_wait=12)) as lab:
        run = SlurmRun(lab, LONG)
        run.at(STAY)
        take_all(lab)
        assert run.end()["state"] == "finished"
        assert run.ends[0]["saved"] and run.lost_steps() == 0 and len(run.ends) == 2
        run.assert_undisturbed(STEPS)


def test_requeue_keeps_the_job(lab: Lab) -> None:
    """With come_back: requeue the run goes on in the same job, long before Slurm's hold is over."""
    run = SlurmRun(lab, LONG, slurm={"come_back": "requeue"})
    run.at(STAY)
    take_all(lab)
    assert run.end()["state"] == "finished"
    assert {start["job"] for start in run.starts} == {run.starts[0]["job"]} and len(run.starts) == 2
    returned = run.starts[1]["returned"]
    assert returned["by"] == "requeue, hurried" and returned["seconds"] < returned["slurm_holds"]
    run.assert_undisturbed(STEPS)


def test_scancel_ends_the_run(lab: Lab) -> None:
    run = SlurmRun(lab, LONG)
    run.at(STAY)
    lab.call("scancel", *run.jobs)
    final = run.end()
    assert final["state"] == "stopped" and final["reason"].startswith("cancelled with scancel")
    assert run.ends[0]["saved"] and not run.alive()


def test_a_program_that_does_not_stop_is_cancelled_on_record(lab: Lab) -> None:
    """SIGKILL is ours and comes before Slurm's, so that the end is still written down."""
    run = SlurmRun(lab, f"{LONG} --deaf")
    run.at(STAY)
    lab.call("scancel", *run.jobs)
    assert run.end()["state"] == "stopped" and not run.alive()
    assert "ended without saving" in run.ends[0]["reason"] and run.ends[0]["seconds_to_stop"]


def test_the_time_limit_is_met_in_the_next_job(lab: Lab) -> None:
    """The run stops before the limit by itself, of a short one after half, and goes on in another job."""
    run = SlurmRun(lab, LONG, resources={"time": "1m"}, restart={"grace": 60})
    assert run.end()["state"] == "finished"
    assert "time limit" in run.ends[0]["reason"] and run.lost_steps() == 0 and run.ends[0]["step"] == STAY
    assert len({start["job"] for start in run.starts}) == len(run.starts) == 2
    run.assert_undisturbed(STEPS)


def test_a_killed_supervisor_comes_back_in_its_job(lab: Lab) -> None:
    run = SlurmRun(lab, LONG)
    run.at(STAY)
    os.kill(run.supervisor(), signal.SIGKILL)
    assert run.end()["state"] == "finished"
    assert {start["job"] for start in run.starts} == {run.starts[0]["job"]} and run.lost_steps() == 0


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_a_killed_guard_takes_the_job_with_it(lab: Lab, nodes: int) -> None:
    """Slurm ends the job and may not see the supervisor: it saves, leaves, and comes back in another job."""
    run = SlurmRun(lab, f"{LONG} --save 0.5", resources={"nodes": nodes})
    run.at(STAY)
    os.kill(parent(run.supervisor()), signal.SIGKILL)
    assert run.end()["state"] == "finished"
    assert "guard was killed" in run.ends[0]["reason"] and run.ends[0]["saved"] and run.lost_steps() == 0
    assert len({start["job"] for start in run.starts}) == 2 and not run.alive()
    run.assert_undisturbed(STEPS)


def test_a_killed_task_is_brought_back_by_the_batch_script(lab: Lab) -> None:
    """Guard and supervisor die at once, as out of memory: another job goes on."""
    run = SlurmRun(lab, LONG)
    run.at(STAY)
    for pid in (parent(run.supervisor()), run.supervisor()):
        os.kill(pid, signal.SIGKILL)
    assert run.end()["state"] == "finished"
    assert len({start["job"] for start in run.starts}) == 2
    run.assert_undisturbed(STEPS)


def test_a_restarted_controller_is_not_noticed(lab: Lab) -> None:
    run = SlurmRun(lab, "--steps 100000")
    run.at(STAY)
    lab.stop("slurmctld")
    try:
        run.at(2 * STAY)
        (line,) = launch("status").stdout.splitlines()[1:]
        assert line.split()[1] in ("training", "saving", "unknown"), line
    finally:
        lab.start("slurmctld")
    wait("the controller", lambda: run.jobs)
    launch("stop", "last")
    assert run.end()["state"] == "stopped" and len(run.starts) == 1 and run.lost_steps() == 0


def test_a_node_that_fails(lab: Lab) -> None:
    """Slurm requeues the job; what it left on the dead node is no hindrance to the next attempt."""
    run = SlurmRun(lab, MOVES)
    run.at(30)
    node = lab.call("squeue", "--noheader", f"--name={run.run.id}", "--format=%N")
    job = run.jobs[0]
    lab.stop(node, signal.SIGKILL)
    try:
        lab.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test", check=True)
        wait("the requeued job", lambda: state_of(lab, job) == "PENDING" or run.final)
        lab.call("scontrol", "update", f"JobId={job}", "StartTime=now")  # its hold is 120 s
        assert run.end()["state"] == "finished"
        run.assert_undisturbed(300)
    finally:
        lab.start(node)
        lab.call("scontrol", "update", f"NodeName={node}", "State=RESUME")


def test_sbatch_that_lost_the_answer_makes_one_job(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job was accepted, sbatch said that it timed out: it is found by its name, not made twice."""
    real = lab.call("which", "sbatch")
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    lost = "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2"
    fake.write_text(
        f'#!/bin/sh\ncase "$*" in *test-only*) exec {real} "$@";; esac\n{real} "$@" && {lost}; exit 1\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    run = SlurmRun(lab, "--steps 20")
    assert len(read_jsonl(run.run.jobs)) == 1
    assert run.end()["state"] == "finished" and len(run.starts) == 1


def test_stop_preempt_and_resume_elsewhere(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    run = SlurmRun(lab, "--steps 200 --pace 0.05")
    run.at(20)
    launch("preempt", "last")
    run.at(25, attempt=2)
    assert len(run.jobs) == 1 and run.ends[0]["state"] == "preempted"
    launch("stop", "last")
    assert run.final["state"] == "stopped" and not run.jobs and not run.alive() and run.lost_steps() == 0
    assert launch("resume", "last", "--backend", "local", "--gpus", "1").returncode == 0
    assert run.final["state"] == "finished" and (read_json(run.run.run) or {})["backend"] == "local"
    run.assert_undisturbed(200)


def test_stopping_a_run_that_waits(lab: Lab) -> None:
    urgent = take_all(lab, 600)
    wait("the urgent job to run", lambda: state_of(lab, urgent) == "RUNNING")
    run = SlurmRun(lab, LONG)
    assert "queued" in launch("status").stdout
    wait("why", lambda: any(why in launch("status", "last").stdout for why in ("Resources", "Priority")))
    launch("stop", "last")
    assert not run.jobs and run.final["state"] == "stopped" and not run.starts
    lab.call("scancel", urgent)


def test_waiting_longer_than_asked(lab: Lab) -> None:
    """Slurm itself takes the job from the queue; status says why there is none."""
    urgent = take_all(lab, 600)
    wait("the urgent job to run", lambda: state_of(lab, urgent) == "RUNNING")
    run = SlurmRun(lab, LONG, resources={"time": "1m", "max_wait": "3s"})
    wait("Slurm to give up", lambda: not run.jobs)
    assert "max_wait" in launch("status", "last").stdout
    lab.call("scancel", urgent)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--partition", "btach"], "there is no partition `btach`"),
        (["--gpus", "9", "resources.device=cuda"], "8"),
        (["--time", "25h"], "24"),
        (["--nodes", "3"], "nodes"),
        (["--constraint", "a100"], "Slurm refuses the job"),
        (["slurm.options.signal=USR1"], "the launcher sets itself"),
        (["env.conda=nowhere"], "nowhere"),
    ],
)
def test_bad_input(lab: Lab, tmp_path: Path, argv: list[str], sentence: str) -> None:
    """One block per mistake, no traceback, nothing submitted and nothing left."""
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(
        f"program: {{script: {Path(__file__).with_name('toy.py')}}}\nresources: {{device: cpu}}\n"
    )
    done = launch(str(recipe), "--backend", "slurm", *argv, check=False)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list((tmp_path / "runs").glob("*")) and "toy" not in lab.call("squeue", "--format=%j")


def test_slurm_away_and_no_submit_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(
        f"program: {{script: {Path(__file__).with_name('toy.py')}}}\nresources: {{device: cpu}}\n"
    )
    with cluster(Settings()) as lab:
        lab.stop("slurmctld")
        done = launch(str(recipe), "--backend", "slurm", check=False)
        assert done.returncode == 1 and "Slurm does not answer" in done.stderr, done.stderr
        monkeypatch.setenv("PATH", "/nowhere")
        done = launch(str(recipe), "--backend", "slurm", check=False)
        assert done.returncode == 2 and "no submit host" in done.stderr, done.stderr
    assert not list((tmp_path / "runs").glob("*"))


def test_with_accounting(tmp_path: Path) -> None:
    """An unknown account is refused by name; a job that only accounting remembers is told by its end."""
    with cluster(Settings(accounting=True, forgets=2)) as lab:
        source = tmp_path / "toy.yaml"
        toy = Path(__file__).with_name("toy.py")
        source.write_text(f"program: {{script: {toy}}}\nresources: {{device: cpu}}\n")
        done = launch(str(source), "--backend", "slurm", "--account", "nobody", check=False)
        assert done.returncode == 2 and "--account nobody" in done.stderr and "account" in done.stderr
        assert not list((tmp_path / "runs").glob("*"))
        run = SlurmRun(lab, LONG)
        run.at(STAY)
        take_all(lab)
        assert run.end()["state"] == "finished" and run.lost_steps() == 0
        urgent = take_all(lab, 600)
        wait("the urgent job to run", lambda: state_of(lab, urgent) == "RUNNING")
        waiting = SlurmRun(lab, LONG, name="waiting")
        lab.call("scancel", *waiting.jobs)
        job = read_jsonl(waiting.run.jobs)[0]["job"]
        wait("Slurm to forget the job", lambda: not lab.call("scontrol", "show", "job", job))
        wait("accounting to know", lambda: "CANCELLED" in launch("status", waiting.run.id).stdout)


def test_two_nodes(lab: Lab) -> None:
    """One task a node; preempted they save together, and come back together."""
    run = SlurmRun(lab, LONG, resources={"nodes": 2})
    run.at(STAY)
    take_all(lab)
    assert run.end()["state"] == "finished"
    assert run.ends[0]["saved"] and run.lost_steps() == 0 and not run.alive()
    logs = {path.name for path in run.run.attempt_logs(2).glob("rank-*.log")}
    assert logs == {f"rank-{rank}.log" for rank in range(4)}
    run.assert_undisturbed(STEPS)


def test_status_asks_slurm_once(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many runs wait; and not at all where none does."""
    urgent = take_all(lab, 600)
    wait("the urgent job to run", lambda: state_of(lab, urgent) == "RUNNING")
    runs = [SlurmRun(lab, "--steps 3", name=f"run{number}") for number in range(3)]
    real, asked = lab.call("which", "squeue"), tmp_path / "asked"
    spy = tmp_path / "bin" / "squeue"
    spy.parent.mkdir()
    spy.write_text(f'#!/bin/sh\necho >> {asked}\nexec {real} "$@"\n')
    spy.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{spy.parent}:{os.environ['PATH']}")
        assert launch("status").stdout.count("queued") == len(runs)
        assert asked.read_text().count("\n") == 1
    for run in runs:
        launch("stop", run.run.id)
    lab.call("scancel", urgent)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{spy.parent}:{os.environ['PATH']}")
        assert launch("status").stdout.count("stopped") == len(runs)
        assert asked.read_text().count("\n") == 1


def test_a_dry_run_shows_the_script_that_a_launch_submits(lab: Lab, tmp_path: Path) -> None:
    """To the letter but for the run's id; and it leaves neither a job nor a file."""
    recipe, options = tmp_path / "toy.yaml", ("--backend", "slurm", "--partition", "batch", "--time", "1h")
    recipe.write_text(f"program: {{script: {TOY}, args: [--steps, '2']}}\nresources: {{device: cpu}}\n")
    dry = launch(str(recipe), *options, "--dry-run")
    plan = json.loads(launch(str(recipe), *options, "--json").stdout)
    assert "s to save in when it is preempted: GraceTime 8 s of partition batch" in dry.stderr
    assert "#SBATCH --partition=batch" in dry.stdout and any("GraceTime" in note for note in plan["notes"])
    assert not (tmp_path / "runs").exists() and not lab.call("squeue", "--noheader")
    launch(str(recipe), *options)
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "submitit" / "job.sh").read_text() == plan["script"].replace(plan["run"]["id"], run.name)
    launch("stop", "last")


def test_a_resumed_run_waits_and_goes_on(lab: Lab) -> None:
    """What ended its last life neither shows nor counts, and the job that brings it back may be preempted."""
    run = SlurmRun(lab, f"{LONG} 45")
    run.at(STAY)
    launch("stop", "last")
    urgent = take_all(lab, 600)
    wait("the urgent job to run", lambda: state_of(lab, urgent) == "RUNNING")
    launch("resume", "last", "--backend", "slurm")
    assert "queued" in launch("status", "last").stdout
    assert "is job" in launch("resume", "last", "--backend", "slurm", check=False).stderr
    lab.call("scancel", urgent)
    run.at(45, attempt=2)
    take_all(lab)
    assert run.end()["state"] == "finished" and run.lost_steps() == 0 and len(run.starts) == 3
    run.assert_undisturbed(STEPS)


def test_an_option_cannot_leave_its_line(lab: Lab, tmp_path: Path) -> None:
    recipe = tmp_path / "toy.yaml"
    toy = Path(__file__).with_name("toy.py")
    for slurm in (
        r'{options: {comment: "one\nscancel -u me"}}',
        "{options: {job_name: x}}",
        r'{partition: "a\nb"}',
    ):
        recipe.write_text(f"program: {{script: {toy}}}\nresources: {{device: cpu}}\nslurm: {slurm}\n")
        done = launch(str(recipe), "--backend", "slurm", check=False)
        assert done.returncode == 2 and "toy.yaml:3:" in done.stderr, done.stderr
