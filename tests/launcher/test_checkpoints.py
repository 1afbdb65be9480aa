"""Which checkpoint folders count, in which order, and what makes one unusable."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.checkpoints import Mark, checkpoints, mark_of, newest, verify
from launcher.rundir import RunDir
from tests.launcher.mirrored import add_checkpoint, make_run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path, "")


def test_the_newest_has_the_highest_fence_then_step(run: RunDir) -> None:
    for step, fence in ((30, 1), (20, 2), (900, 1), (25, 2)):
        add_checkpoint(run, step, fence)
    (run.checkpoints / "step-00000099-fence-9").mkdir()  # no manifest: no checkpoint
    (run.checkpoints / "step-99-fence-9").mkdir()
    (run.checkpoints / "step-99-fence-9" / "manifest.json").write_text("{}")
    (run.checkpoints / ".tmp-left").mkdir()
    assert checkpoints(run) == [Mark(2, 25), Mark(2, 20), Mark(1, 900), Mark(1, 30)]
    assert newest(run) == Mark(2, 25)


def test_names_are_taken_at_their_word() -> None:
    assert mark_of("step-00001200-fence-3") == Mark(3, 1200)
    assert Mark(3, 1200).name == "step-00001200-fence-3"
    for name in ("step-1200-fence-3", "step-00001200-fence-03", "step-٠٠٠٠١٢٠٠-fence-3", "step-00001200"):
        assert mark_of(name) is None


def edit(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda d: (d / "train.pth").write_bytes(b"x"), "train.pth has 1 bytes instead of 1024"),
    "a bit": (lambda d: flip(d / "model.pth"), "model.pth does not have the hash"),
    "missing": (lambda d: (d / "train.pth").unlink(), "train.pth is missing"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "it has no manifest"),
    "torn": (lambda d: (d / "manifest.json").write_text('{"schema": 1, "st'), "torn"),
    "a list": (lambda d: (d / "manifest.json").write_text("[]"), "no manifest"),
    "another's": (edit(step=7), "that of step-00000007-fence-1"),
    "outside": (edit(files={"../../x": {"size": 1, "sha256": ""}}), "outside its folder"),
    "nothing": (edit(files={}), "no files"),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_not_whole_is_passed_over(run: RunDir, how: str) -> None:
    add_checkpoint(run, 10)
    folder = run.checkpoints / add_checkpoint(run, 20).name
    assert verify(folder) is None
    breaking, reason = BROKEN[how]
    breaking(folder)
    assert reason in str(verify(folder))
    assert newest(run) == Mark(1, 10)
