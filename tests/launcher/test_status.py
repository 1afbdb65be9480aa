"""What `launch status` says of runs, from the files that they leave."""

import json
import os
import socket
import time
from pathlib import Path

import pytest
from rich.console import Console

from launcher.cli import show, status
from launcher.rundir import RunDir, append_json, write_json
from launcher.supervisor import lease, processes

ID = "toy-20260101-120000-{:04x}"


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "runs"
    root.mkdir()
    monkeypatch.setenv("LAUNCH_RUNS", str(root))
    return root


def make_run(root: Path, number: int = 0, created: float = 1.0, **record: object) -> RunDir:
    run = RunDir(root / ID.format(number))
    run.path.mkdir()
    about = {"id": run.id, "name": "toy", "created": created, "resources": {"gpus": 4}, "url": None}
    write_json(run.run, about | record)
    return run


def end(run: RunDir, state: str = "finished", **more: object) -> None:
    write_json(
        run.final, {"schema": 1, "id": run.id, "state": state, "step": 10, "of": 10, "attempts": 1} | more
    )


def hold(run: RunDir, **changes: object) -> None:
    """As the supervisor would, by this very process."""
    me = processes.inspect(os.getpid())
    assert me is not None
    said = {"schema": 1, "host": socket.gethostname(), "boot": lease.boot(), "pid": me.pid, "start": me.start}
    write_json(run.lease, said | {"token": "t", "fence": 1, "counter": 1, "ended": False} | changes)


def shown(width: int = 150) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(show.table(status.listing()))
    console.file.close()
    return console.export_text()


def test_a_running_run_tells_its_phase_and_progress(runs: Path) -> None:
    run = make_run(runs)
    hold(run)
    append_json(run.attempts, {"event": "start", "attempt": 1, "gpus": 2, "time": 1.0})
    assert status.row(run)["state"] == "starting"
    beat = {"fence": 1, "phase": "evaluating", "step": 50, "of": 200, "loss": 0.5, "eta": 61.0, "resumed": 0}
    write_json(run.heartbeat, beat)
    row = status.row(run)
    assert (row["state"], row["phase"], row["step"], row["of"], row["gpus"]) == (
        "running",
        "evaluating",
        50,
        200,
        2,
    )
    assert all(word in shown() for word in ("evaluating", "50/200  25%", "0.500", "1m01s", "no mirror"))
    run.stop_requested.touch()
    assert status.row(run)["state"] == "stopping"


def test_between_attempts_a_run_is_coming_back_and_counts_the_steps_lost(runs: Path) -> None:
    run = make_run(runs)
    hold(run)
    append_json(run.attempts, {"event": "start", "attempt": 1})
    append_json(
        run.attempts,
        {"event": "end", "attempt": 1, "state": "crashed", "reason": "boom", "step": 17, "resumed": 0},
    )
    row = status.row(run)
    assert (row["state"], row["reason"], row["step"]) == ("coming back", "crashed: boom", 17)
    append_json(run.attempts, {"event": "start", "attempt": 2})
    write_json(run.heartbeat, {"fence": 2, "phase": "training", "step": 12, "resumed": 10})
    assert status.row(run)["lost_steps"] == 7


def test_the_heartbeat_of_an_earlier_attempt_is_not_taken_for_this_one(runs: Path) -> None:
    run = make_run(runs)
    hold(run)
    for attempt in (1, 2):
        append_json(run.attempts, {"event": "start", "attempt": attempt})
    write_json(run.heartbeat, {"fence": 1, "phase": "training", "step": 12, "loss": 1.0})
    row = status.row(run)
    assert (row["state"], row["phase"], row["loss"]) == ("starting", None, None)


def test_nobody_runs_it(runs: Path) -> None:
    run = make_run(runs)
    hold(run, pid=2**22 + 1)  # no such process can be
    append_json(run.attempts, {"event": "start", "attempt": 1})
    row = status.row(run)
    assert row["state"] == "lost" and row["reason"] == f"nobody runs it; launch resume {run.id}"
    assert status.row(make_run(runs, 1, created=time.time()))["state"] == "starting"


def test_a_machine_that_was_started_anew_has_lost_its_runs(runs: Path) -> None:
    run = make_run(runs)
    hold(run, boot="an earlier one/pid:[1]")
    assert status.row(run)["state"] == "lost"
    hold(run, boot="an earlier one/pid:[1]", host="elsewhere")
    assert status.row(run)["state"] != "lost", "only watching its counter could tell"


def test_what_is_durable_and_since_when_it_is_not(runs: Path) -> None:
    run = make_run(runs, url="s3://b/x")
    hold(run)
    write_json(run.synced, {"step": 7, "behind": 3, "away_since": time.time() - 125, "error": "it is gone"})
    assert status.row(run)["durable"]["step"] == 7
    assert "step 7; behind for 2m0" in shown() and "it is gone" in shown()


def test_all_that_runs_and_the_last_twenty(runs: Path) -> None:
    active = make_run(runs, 0, created=time.time())
    for number in range(1, 30):
        end(make_run(runs, number))
    rows = status.listing()
    assert [row["id"] for row in rows] == [active.id, *(ID.format(number) for number in range(10, 30))]
    assert len(status.listing(everything=True)) == 30
    assert "toy" in shown() and "No runs" not in shown()


def test_an_ended_run_costs_one_file(runs: Path) -> None:
    for number in range(5):
        run = make_run(runs, number)
        end(run, metrics={"AP": 0.3771}, lost_steps=0)
        run.run.unlink()  # final.json is enough
        run.path.joinpath("attempts.jsonl").mkdir()  # and opening this would fail
    assert [row["state"] for row in status.listing()] == ["finished"] * 5
    assert "AP 0.377" in shown()


def test_torn_and_foreign_files_do_no_harm(runs: Path) -> None:
    run = make_run(runs)
    run.final.write_text('{"state": "fini')
    run.heartbeat.write_text("[]")
    run.attempts.write_text('{"event": "start", "attempt": 1}\n{"event": "en')
    (runs / "notes.txt").write_text("x")
    (runs / ".toy-20260101-120000-beef.new").mkdir()
    assert [row["id"] for row in status.listing()] == [run.id]
    assert shown()


def test_details_join_starts_and_ends_of_attempts(runs: Path) -> None:
    run = make_run(runs, url="s3://b/u/r/x", recipe="r.yaml", user="me", host="h", backend="tmux")
    append_json(run.attempts, {"event": "start", "attempt": 1, "time": 100.0, "gpus": 4})
    ended = {
        "event": "end",
        "attempt": 1,
        "time": 160.0,
        "state": "preempted",
        "reason": "preempted by SIGTERM",
    }
    append_json(run.attempts, ended | {"step": 30, "resumed": 0, "saved": True})
    folder = run.checkpoints / "step-00000030-fence-1"
    folder.mkdir(parents=True)
    write_json(folder / "manifest.json", {"step": 30, "fence": 1, "files": {"a": {"size": 5}}})
    (run.checkpoints / "step-00000040-fence-1").mkdir()  # without a manifest it is none
    run.logs.mkdir()
    run.run_log.write_text("first words\nlast words\n")
    end(run, "stopped", reason="stopped by the user", url="s3://b/u/r/x", synced={"step": 10})
    told = status.details(run)
    assert [row["step"] for row in told["checkpoints"]] == [30]
    assert json.loads(json.dumps(told)) == told
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(show.details(run, told))
    console.file.close()
    text = console.export_text()
    for words in (
        "stopped by the user",
        "preempted by SIGTERM; saved",
        "0-30",
        "1m00s",
        "s3://b/u/r/x",
        "last words",
    ):
        assert words in text
