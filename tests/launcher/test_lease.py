"""One holder at a time, whoever dies, wherever it is."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launcher.errors import Taken
from launcher.rundir import RunDir, append_json, read_json, write_json
from launcher.supervisor import lease
from launcher.supervisor.lease import Lease, highest_fence, holder

HOLD = """
import sys, time
from pathlib import Path
from launcher.supervisor.lease import Lease
from launcher.rundir import RunDir
Lease(RunDir(Path(sys.argv[1]))).take()
print("taken", flush=True)
time.sleep(600)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "r-20260101-000000-0000")
    run.path.mkdir()
    write_json(run.run, {})
    return run


def test_taken_while_the_holder_lives_and_free_when_it_is_dead(run: RunDir) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE)
    try:
        assert other.stdout and other.stdout.readline() == b"taken\n"
        held = holder(run)
        assert held and held.here and held.alive and held.pid == other.pid
        with pytest.raises(Taken, match=f"held by process {other.pid}"):
            Lease(run).take()
    finally:
        other.kill()
        other.communicate()
    held = holder(run)
    assert held and held.alive is False
    Lease(run).take()


def test_release_and_theft(run: RunDir) -> None:
    mine = Lease(run)
    mine.take()
    assert mine.beat(now=True)
    said = read_json(run.lease) or {}
    write_json(run.lease, said | {"token": "somebody's"})
    assert not mine.beat(now=True), "it says so, and does not take it back"
    mine.release()
    assert (read_json(run.lease) or {})["token"] == "somebody's"
    write_json(run.lease, said)
    mine.release()
    assert holder(run) is None


def test_reused_pid_is_not_its_holder(run: RunDir) -> None:
    Lease(run).take()
    said = read_json(run.lease) or {}
    write_json(run.lease, said | {"start": said["start"] - 1})
    held = holder(run)
    assert held and held.alive is False


def test_holder_elsewhere_counts_by_its_counter(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SILENCE", 1.5)
    monkeypatch.setattr(lease, "BEAT", 0.2)
    Lease(run).take()
    elsewhere = (read_json(run.lease) or {}) | {"host": "elsewhere", "boot": "another"}
    write_json(run.lease, elsewhere)
    held = holder(run)
    assert held and not held.here and held.alive is None

    done = threading.Event()

    def move() -> None:
        counter = 0
        while not done.wait(0.2):
            counter += 1
            write_json(run.lease, elsewhere | {"counter": counter})

    mover = threading.Thread(target=move)
    mover.start()
    with pytest.raises(Taken, match="on elsewhere"):
        Lease(run).take()
    done.set()
    mover.join()
    watched = []
    began = time.monotonic()
    Lease(run).take(watched.append)
    assert time.monotonic() - began >= 1.5 and watched[0].host == "elsewhere"
    held = holder(run)
    assert held and held.here and held.alive


def test_fence_is_above_every_trace_of_an_attempt(run: RunDir) -> None:
    assert highest_fence(run) == 0
    # A bucket may hold anything under these names.
    run.attempts.write_text('{"attempt": "x"}\n{"attempt": null}\n{"attempt": 12345678901234567890}\n')
    (run.logs / "attempt-9999999999").mkdir(parents=True)
    assert highest_fence(run) == 0
    append_json(run.attempts, {"event": "start", "attempt": 2})
    assert highest_fence(run) == 2
    run.attempt_logs(3).mkdir(parents=True)
    assert highest_fence(run) == 3
    (run.checkpoints / "step-00000010-fence-7").mkdir(parents=True)
    mine = Lease(run)
    mine.take()
    assert mine.fence == 7
    assert mine.raise_fence(8) and (read_json(run.lease) or {})["fence"] == 8


def test_of_many_at_once_one_gets_it(run: RunDir) -> None:
    Lease(run).take()
    write_json(run.lease, (read_json(run.lease) or {}) | {"start": 1})  # its holder is dead
    others = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(6)
    ]
    try:
        deadline = time.monotonic() + 60
        while sum(other.poll() is None for other in others) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        winner = next(other for other in others if other.poll() is None)
        assert winner.stdout and winner.stdout.readline() == b"taken\n"
        held = holder(run)
        assert held and held.pid == winner.pid
    finally:
        for other in others:
            other.kill()
            other.communicate()
