"""Checkpoints on disk: the newest whole one is found, whatever lies beside it."""

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from torch.serialization import get_crc32_options

from detcore.checkpoint import newest, save, sweep
from detcore.rundir import Heartbeat, RunDir

STATE = {"step": 1}
MODEL = {"weight": torch.arange(1000.0)}


def put(folder: Path, step: int, fence: int = 1, keep: int = 10, keep_every: int | None = None) -> Path:
    run = RunDir(folder, fence, keep=keep, keep_every=keep_every, recipe_hash="abc", git_commit="def")
    return save(run, step, {"step": step}, MODEL, lambda: None).path


@pytest.fixture
def said() -> list[str]:
    return []


def test_what_is_saved_is_found(tmp_path: Path, said: list[str]) -> None:
    path = put(tmp_path, 7)
    found = newest(tmp_path / "checkpoints", said.append)
    assert found and (found.step, found.fence, found.path) == (7, 1, path) and not said
    assert torch.equal(found.model()["weight"], MODEL["weight"]) and found.training() == {"step": 7}
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["recipe_hash"], manifest["git_commit"]) == ("abc", "def")
    assert manifest["files"]["model.pth"]["size"] == (path / "model.pth").stat().st_size


def test_longer_than_what_is_written_at_a_time(tmp_path: Path, said: list[str]) -> None:
    """In pieces, each sent off to the disk. The weights are a zip file that any program reads, and torch.save
    elsewhere in this one is as it was."""
    weights = {"small": torch.ones(3), "large": torch.arange(9e6), "last": torch.arange(3e6)}
    moved: list[None] = []
    save(RunDir(tmp_path, 1), 7, {"step": 7}, weights, lambda: moved.append(None))
    found = newest(tmp_path / "checkpoints", said.append)
    assert found and not said and len(moved) > 3
    model = found.model()
    assert model.keys() == weights.keys() and all(torch.equal(model[key], weights[key]) for key in weights)
    assert ZipFile(found.path / "model.pth").testzip() is None and get_crc32_options()


def test_a_later_attempt_is_newer_even_at_an_earlier_step(tmp_path: Path, said: list[str]) -> None:
    put(tmp_path, 90, fence=1)
    put(tmp_path, 50, fence=2)
    found = newest(tmp_path / "checkpoints", said.append)
    assert found and (found.fence, found.step) == (2, 50)


@pytest.mark.parametrize("damage", ["short", "flipped", "manifest", "other", "missing", "no manifest"])
def test_damaged_ones_are_passed_over_and_said(damage: str, tmp_path: Path, said: list[str]) -> None:
    put(tmp_path, 1)
    bad = put(tmp_path, 2)
    model = bad / "model.pth"
    if damage == "short":
        model.write_bytes(model.read_bytes()[:-100])
    elif damage == "flipped":
        content = bytearray(model.read_bytes())
        content[len(content) // 2] ^= 1
        model.write_bytes(content)
    elif damage == "manifest":
        (bad / "manifest.json").write_text((bad / "manifest.json").read_text()[:-30])
    elif damage == "other":
        (bad / "manifest.json").write_text(
            (tmp_path / "checkpoints/step-00000001-fence-1/manifest.json").read_text()
        )
    elif damage == "missing":
        model.unlink()
    else:
        (bad / "manifest.json").unlink()
    found = newest(tmp_path / "checkpoints", said.append)
    assert found and found.step == 1
    if damage != "no manifest":  # that one is no checkpoint at all
        assert len(said) == 1 and bad.name in said[0]
    assert put(tmp_path, 2) == bad, "the same attempt may save the step again"
    found = newest(tmp_path / "checkpoints", said.append)
    assert found and found.step == 2


def test_one_that_the_disk_cannot_read_is_passed_over_and_said(tmp_path: Path, said: list[str]) -> None:
    put(tmp_path, 1)
    bad = put(tmp_path, 2)
    manifest = json.loads((bad / "manifest.json").read_text())
    manifest["files"]["train.pth"]["size"] = 0
    (bad / "manifest.json").write_text(json.dumps(manifest))
    (bad / "train.pth").unlink()
    (bad / "train.pth").symlink_to("/proc/self/mem")  # a file of no bytes whose first read is an EIO
    found = newest(tmp_path / "checkpoints", said.append)
    assert found and found.step == 1
    assert said == [f"checkpoint {bad.name} is passed over: train.pth cannot be read (Input/output error)"]


def test_old_ones_go_and_leftovers_are_swept(tmp_path: Path, said: list[str]) -> None:
    for step in range(1, 6):
        put(tmp_path, step, keep=2)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == [
        "step-00000004-fence-1",
        "step-00000005-fence-1",
    ]
    (folder / ".tmp-abc").mkdir()
    (folder / ".tmp-abc/model.pth").write_bytes(b"half")
    (folder / "notes").mkdir()
    sweep(folder)
    assert not list(folder.glob(".tmp-*")) and (folder / "notes").exists()
    assert json.loads((folder / "latest.json").read_text())["name"] == "step-00000005-fence-1"
    assert newest(tmp_path / "none", said.append) is None


def test_spaced_ones_stay_and_the_one_that_latest_names(tmp_path: Path, said: list[str]) -> None:
    folder = tmp_path / "checkpoints"
    for step in (4, 8, 13, 17, 22):
        put(tmp_path, step, keep=1, keep_every=10)
    assert sorted(path.name[5:13] for path in folder.glob("step-*")) == ["00000013", "00000022"]
    (folder / f".latest.json.tmp-{os.getpid()}").mkdir()  # in the way: the hint cannot be written
    put(tmp_path, 26, keep=1)
    assert sorted(path.name[5:13] for path in folder.glob("step-*")) == ["00000022", "00000026"]
    assert json.loads((folder / "latest.json").read_text())["name"] == "step-00000022-fence-1"
    found = newest(folder, said.append)
    assert found and found.step == 26


@contextmanager
def small_disk() -> Iterator[None]:
    """No file can be longer than 3,000 bytes; no more than what is tested may run under it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_leaves_the_last_one(tmp_path: Path, said: list[str]) -> None:
    put(tmp_path, 1, keep=1)
    with small_disk(), pytest.raises(OSError, match="too large"):
        put(tmp_path, 2, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").glob("*step*")] == ["step-00000001-fence-1"]
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))
    found = newest(tmp_path / "checkpoints", said.append)
    assert found and found.step == 1


def test_fence_without_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAUNCH_ATTEMPT", raising=False)
    assert RunDir.of_attempt(tmp_path).fence == 1
    put(tmp_path, 3, fence=6)
    assert RunDir.of_attempt(tmp_path).fence == 7


def test_no_step_is_claimed_before_it_is_known(tmp_path: Path) -> None:
    heartbeat = Heartbeat(RunDir(tmp_path, fence=2), active=True)
    heartbeat.enter("starting", of=40)
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (beat["fence"], beat["of"], beat["step"], beat["resumed"]) == (2, 40, None, None)
    heartbeat.enter("starting", step=30, resumed=30)
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (beat["of"], beat["step"], beat["resumed"]) == (40, 30, 30)
