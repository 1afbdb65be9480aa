"""`launch verify`: what it says of whole and broken checkpoints, how it ends, and that a resume agrees."""

import json
from pathlib import Path

import pytest

from launcher.checkpoints import newest
from launcher.cli.main import _main
from launcher.mirror import Mirror, restore
from launcher.recipe import load
from launcher.rundir import RunDir
from launcher.storage.folder import FolderStore
from tests.launcher.conftest import TOY
from tests.launcher.mirrored import ID, Mark, add_checkpoint, content, make_run

Out = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    store = FolderStore(tmp_path / "store" / ID)
    made = make_run(tmp_path / "runs", store.url)
    made.recipe.write_text(f"program: {{script: {TOY}}}\n")
    made.recipe.write_text(load(made.recipe).dump())
    for step in (10, 20, 30):
        add_checkpoint(made, step)
    mirror = Mirror(made, store, every=60, keep=5)
    mirror.claim("token", 1)
    assert mirror._pass()
    mirror.release()
    return made


def stored(run: RunDir) -> FolderStore:
    return FolderStore(run.path.parents[1] / "store" / ID)


def spoil(folder: Path, mark: Mark, name: str = "train.pth") -> None:
    path = folder / "checkpoints" / mark.name / name
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def verify(*argv: str) -> int:
    return _main(["verify", *argv])


def test_all_is_whole(run: RunDir, capsys: Out) -> None:
    before = content(run.path), content(stored(run).root)
    assert verify("demo") == 0
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()[1:4]] == ["30", "20", "10"]
    assert f"a resume goes on from {Mark(1, 30).name}" in shown.out and not shown.err
    assert verify(stored(run).url) == 0
    assert (content(run.path), content(stored(run).root)) == before


def test_what_is_broken_and_how(run: RunDir, capsys: Out) -> None:
    spoil(run.path, Mark(1, 30))
    spoil(stored(run).root, Mark(1, 20))
    add_checkpoint(run, 40)
    assert verify(ID) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "30 1 0.0 MB broken: train.pth does not have the hash that its manifest says whole" in shown
    assert "20 1 0.0 MB whole broken: train.pth" in shown
    assert f"not in the store: {Mark(1, 40).name}" in shown
    assert verify("last", "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["resume"] == Mark(1, 40).name and told["run"] == ID
    assert [(row["step"], row["here"] == "whole", row["store"]) for row in told["checkpoints"]][:2] == [
        (40, True, None),
        (30, False, "whole"),
    ]
    assert verify(stored(run).url, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["resume"] == Mark(1, 30).name and told["run"] is None


def test_nothing_to_go_on_from(run: RunDir, capsys: Out) -> None:
    for mark in (Mark(1, 10), Mark(1, 20), Mark(1, 30)):
        spoil(run.path, mark, "model.pth")
        spoil(stored(run).root, mark, "manifest.json")
    assert verify(ID) == 1
    shown = capsys.readouterr().out
    assert "none of them can be resumed from" in shown and "torn" in shown
    empty = make_run(run.path.parent.with_name("else"), "")
    assert restore.restore(empty, stored(run)) is None and newest(empty) is None


def test_wrong_input_and_a_store_that_is_gone(run: RunDir, capsys: Out, tmp_path: Path) -> None:
    assert verify("nothing") == 2
    assert verify((tmp_path / "nowhere").as_uri()) == 2
    assert "there is no run at" in capsys.readouterr().err
    (tmp_path / "store").rename(tmp_path / "moved")
    (tmp_path / "store").write_text("no folder any more")
    assert verify(ID) == 1
    shown = capsys.readouterr().out
    assert "the store could not be read" in shown and "30" in shown and "a resume goes on from" in shown


@pytest.mark.parametrize("broken", ["here", "store"])
def test_a_resume_takes_what_verify_says(
    run: RunDir, broken: str, capsys: Out, caplog: pytest.LogCaptureFixture
) -> None:
    """The newest is broken here, or in the store, and what is older on the other side is good."""
    newer = add_checkpoint(run, 50, fence=2)
    store = stored(run)
    mirror = Mirror(run, store, every=60, keep=5)
    mirror.claim("token", 2)
    assert mirror._pass()
    here = make_run(run.path.parent.with_name("here"), store.url)
    if broken == "here":
        for entry in list(store.list(f"checkpoints/{newer.name}/")):
            store.delete(entry.key)
        add_checkpoint(here, 50, fence=2)
        spoil(here.path, newer)
    else:
        add_checkpoint(here, 20)
        spoil(store.root, newer)
    restore.restore(here, store)
    assert newest(here) == Mark(1, 30)
    assert f"passed over checkpoint {newer.name}" in caplog.text and "does not have the hash" in caplog.text
    assert verify(store.url, "--json") == (broken == "store")
    assert json.loads(capsys.readouterr().out)["resume"] == Mark(1, 30).name
