"""Checkpoints written in the background: what they hold, what a second one does, what a killed or full disk
leaves. The states are large and the steps small, so that a write takes longer than what is done meanwhile."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from detcore.checkpoint import newest, sweep
from detcore.config import Train
from detcore.distributed import World
from detcore.recorder import Recorder
from detcore.rundir import Heartbeat, RunDir
from detcore.saving import Saver
from detcore.snapshot import Snapshot
from detcore.writer import Writer
from tests.detcore.conftest import TINY, Run

WIDE = 4000  # 64 MB of weights, and as much momentum


class Training:
    """A model, its optimizer and what saves them. A step sets the last layer to the step's number; before it
    in the files comes a large one."""

    def __init__(self, folder: Path, wide: int = WIDE, **policy: Any) -> None:
        self.run, world = RunDir(folder, fence=1, **policy), World(0, 1, torch.device("cpu"))
        folder.mkdir(exist_ok=True)
        self.model = nn.Sequential(nn.Linear(wide, wide, bias=False), nn.Linear(9, 9, bias=False))
        self.weight = self.model[1].weight
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        for parameter in self.model.parameters():
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        recorder = Recorder(Train.model_validate(TINY), self.run, world, Heartbeat(self.run, active=True))
        recorder.begin(0, 0)
        recorder.heartbeat.enter("training")
        self.saver = Saver(self.run, world, recorder, self.optimizer, saved=None)
        self.number = 0

    def step(self) -> "Training":
        self.number += 1
        with torch.no_grad():
            self.weight.fill_(self.number)
            self.optimizer.state[self.weight]["momentum_buffer"].fill_(self.number)
        return self

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"step": self.number, "optimizer": self.optimizer.state_dict()}, self.model.state_dict()

    def begin(self, must: bool = False) -> None:
        self.saver.begin(self.number, *self.state(), must=must)

    def finish(self) -> None:
        self.saver.finish(self.number, *self.state())

    def saved(self) -> list[int]:
        """The steps on the disk, each of which holds what training had at that step, and nothing later."""
        steps = []
        for folder in sorted(self.run.checkpoints.glob("step-*")):
            step = int(folder.name.split("-")[1])
            weights = torch.load(folder / "model.pth", weights_only=True)
            training = torch.load(folder / "train.pth", weights_only=True)
            momentum = training["optimizer"]["state"][1]["momentum_buffer"]
            assert training["step"] == step
            assert (weights["1.weight"] == step).all() and (momentum == step).all(), folder.name
            steps.append(step)
        return steps


def test_training_goes_on_and_the_checkpoint_is_of_its_step(tmp_path: Path) -> None:
    training = Training(tmp_path / "run").step()
    training.begin()
    training.step().step()
    assert not training.saved(), "it is still being written"
    assert json.loads(training.run.heartbeat.read_text())["phase"] == "training"
    training.saver.wait()
    assert training.saved() == [1] and training.saver.saved == 1
    assert newest(training.run.checkpoints, print) is not None
    training.finish()
    assert training.saved() == [1, 3]


@contextmanager
def phases(run: RunDir) -> Iterator[set[str]]:
    """Those that the heartbeat goes through meanwhile."""
    seen: set[str] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            seen.add(json.loads(run.heartbeat.read_text())["phase"])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("busy", ["wait", "skip"])
def test_the_next_one_waits_or_is_skipped_and_says_so(
    busy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training(tmp_path / "run", busy=busy).step()
    training.begin()
    with phases(training.run) as seen:
        training.step().begin()
    said = capsys.readouterr().out
    if busy == "wait":
        assert "the checkpoint of step 2 waited " in said and "for that of step 1" in said
        assert "saving" in seen
    else:
        assert "skipped the checkpoint of step 2: that of step 1 takes " in said
        assert seen <= {"training"}
    training.step().begin(must=True)
    assert "the checkpoint of step 3 waited" in capsys.readouterr().out, "one that must be is never skipped"
    training.step().finish()
    assert training.saved() == ([2, 3, 4] if busy == "wait" else [1, 3, 4])
    assert json.loads(training.run.heartbeat.read_text())["phase"] == "training"


def test_killed_while_writing(tmp_path: Path) -> None:
    """The older one stays the newest that is whole, and nothing of the other stays."""
    dying = subprocess.run([sys.executable, "-m", "tests.detcore.test_saving", tmp_path / "run"])
    assert dying.returncode == -signal.SIGKILL
    folder, said = tmp_path / "run/checkpoints", []
    assert [path.name for path in folder.glob(".tmp-*/*.pth")] == ["train.pth"]
    found = newest(folder, said.append)
    assert found and found.step == 1 and not said
    sweep(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["latest.json", found.path.name]


def die_while_writing(folder: Path) -> None:
    training = Training(folder).step()
    training.finish()
    training.step().begin()
    while not any(path.stat().st_size for path in folder.glob("checkpoints/.tmp-*/*")):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def test_training_has_its_turn_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """Whoever wants the interpreter's lock gets it ten times as soon as usual; afterwards, as before."""
    training = Training(tmp_path / "run", wide=10).step()
    usual, seen = sys.getswitchinterval(), []
    writer = Writer(training.run, training.optimizer, lambda: seen.append(sys.getswitchinterval()))
    writer.begin(1, *training.state())
    writer.wait(lambda: None)
    assert writer.outcome() is not None
    assert seen == [pytest.approx(usual / 10)] and sys.getswitchinterval() == usual


def test_none_without_its_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = Training(tmp_path / "run", wide=10).step()
    training.run.metrics.mkdir()  # no line can be written
    training.begin()
    training.saver.wait()
    assert "no checkpoint of step 1 could be written" in capsys.readouterr().out
    assert not training.saved() and training.saver.saved is None
    training.run.metrics.rmdir()
    training.finish()
    assert training.saved() == [1]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    training = Training(tmp_path / "run", wide=10).step()
    training.finish()
    with torch.no_grad():
        training.step().weight[3, 4] = torch.inf
    training.finish()
    assert (training.saver.saved, training.saver.broken) == (1, 2) and training.saved() == [1]
    with torch.no_grad():
        training.step().weight.fill_(3e38)  # finite, and their sum is not
    training.saver.broken = None
    training.finish()
    assert (training.saver.saved, training.saver.broken) == (3, None)


def test_copies_have_memory_of_their_own_once() -> None:
    flat = torch.arange(100_000.0)
    module = nn.BatchNorm2d(3)
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state = {"views": [flat[:10], flat[10:].view(2, -1)], "module": module.state_dict(), "image": image}
    snapshot = Snapshot(torch.optim.SGD(module.parameters(), lr=0.1))
    first = snapshot.take(state)
    flat.zero_()
    assert first["views"][0].tolist() == list(range(10))
    assert first["views"][0].untyped_storage().nbytes() == 40, "torch.save would write all of what is shared"
    assert first["image"].is_contiguous(memory_format=torch.channels_last)
    assert first["module"]._metadata == state["module"]._metadata
    again = snapshot.take(state | {"image": image[:1]})
    assert again["views"][1].data_ptr() == first["views"][1].data_ptr(), "memory is used again"
    assert again["views"][1].eq(0).all() and torch.equal(again["image"], image[:1])


def test_a_full_disk_ends_nothing_and_is_said(tiny: dict[str, Any], new_run: Callable[..., Run]) -> None:
    """Two ranks, of which one alone knows. At the end the outcome tells the truth."""
    tiny["data"]["workers"] = 0
    tiny["evaluation"] = {"every": None}
    run = new_run("full", tiny, every="2it")
    process = run.start(ranks=2)
    psutil.Process(process.pid).rlimit(psutil.RLIMIT_FSIZE, (20_000, 20_000))  # also that of its workers
    run.wait(run.reached(5), process)
    assert "no checkpoint of step 2 could be written" in run.log()
    process.terminate()
    process.wait(timeout=120)
    outcome = run.read("outcome.json")
    assert (outcome["state"], outcome["saved"]) == ("stopped", False), run.log()
    assert f"no checkpoint of step {outcome['step']} could be written" in run.log()
    assert not any((run.folder / "checkpoints").iterdir())


def test_the_last_one_is_there_however_many_were_skipped(
    tiny: dict[str, Any], new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAUNCH_CHECKPOINT_BUSY", "skip")
    tiny["data"]["workers"] = 0
    tiny["schedule"] |= {"iterations": 8, "steps": []}
    tiny["evaluation"] = {"every": None}
    run = new_run("run", tiny, every="1it").finish(ranks=2)
    assert run.final()["train.pth"]["step"] == 8 and run.read("outcome.json")["saved"]
    saved, skipped = run.log().count("saved step-"), run.log().count("skipped the checkpoint of step")
    assert saved + skipped == 8, run.log()


if __name__ == "__main__":
    die_while_writing(Path(sys.argv[1]))
