"""What a pass does and says where things are not as they should be: no time left, disks that are full, a
folder that is not the run's newest any more, stores without conditions."""

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from launcher.cli import show, status
from launcher.mirror import Mirror, ownership, pull_run
from launcher.mirror.layout import stays_inside
from launcher.rundir import RunDir, append_json, read_json, write_json
from launcher.storage import StoreSettings
from launcher.storage.base import Version
from launcher.storage.folder import FolderStore
from launcher.supervisor import control
from tests.launcher.conftest import Toy
from tests.launcher.mirrored import ID, KEEP, Mark, add_checkpoint, content, make_run


def mirror_of(run: RunDir, store: FolderStore, token: str = "t", attempt: int = 1) -> Mirror:
    mirror = Mirror(run, store, every=60, keep=KEEP)
    mirror.claim(token, attempt)
    return mirror


def synced(run: RunDir) -> dict[str, object]:
    return read_json(run.synced) or {}


class Slow(FolderStore):
    """Logs do not get through until they may; all that does is noted."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.may = threading.Event()
        self.done: list[str] = []

    def put_file(self, key: str, path: Path, *, if_absent: bool = False, growing: bool = False) -> Version:
        if key.startswith("logs/"):
            self.may.wait(60)
        version = super().put_file(key, path, if_absent=if_absent, growing=growing)
        self.done.append(key)
        return version


def test_when_the_time_is_over_it_is_the_logs_that_stay_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = make_run(tmp_path / "runs", "file:///store"), Slow(tmp_path / "store")
    (run.path / "tensorboard").mkdir()
    (run.path / "tensorboard" / "events.out.tfevents.1").write_bytes(b"board")
    mark = add_checkpoint(run, 10)
    mirror = mirror_of(run, store)
    mirror.start()
    assert not mirror.flush(2)
    assert f"checkpoints/{mark.name}/model.pth" in store.done and "metrics.jsonl" in store.done
    said = synced(run)
    assert said["step"] == 10 and said["behind"] in (1, 2), "the board may have got through"
    assert "logs/attempt-1/rank-0.log" in str(said["missing"]) and "no time" in str(said["error"])
    write_json(run.synced, said | {"since": time.time() - 125})
    monkeypatch.setenv("LAUNCH_RUNS", str(tmp_path / "runs"))
    console = Console(width=150, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(show.run_view(run), show.table(status.listing()))
    console.file.close()
    shown = console.export_text()
    assert "step 10, 2m0" in shown and "no time" in shown
    assert "not in store" in shown and "rank-0.log" in shown
    store.may.set()
    assert mirror.stop(30)
    said = synced(run)
    assert (said["behind"], said["missing"], said["error"]) == (0, [], None)
    first_log = min(i for i, key in enumerate(store.done) if key.startswith(("logs/", "tensorboard/")))
    assert first_log > store.done.index("checkpoints/latest.json") > store.done.index("metrics.jsonl")


def test_a_full_disk_of_the_store_is_said_to_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, store = make_run(tmp_path, ""), FolderStore(tmp_path / "store")
    mirror = mirror_of(run, store)
    failing = {"number": errno.ENOSPC}

    def write_all(fd: int, data: bytes) -> None:
        raise OSError(failing["number"], os.strerror(failing["number"]))

    for number, words in (
        *((errno.ENOSPC, "is full"), (errno.EDQUOT, "is over its quota")),
        *((errno.EROFS, "may only be read"), (errno.EIO, "fails")),
    ):
        failing["number"] = number
        with monkeypatch.context() as patch:
            patch.setattr("launcher.storage.folder.write_all", write_all)
            assert not mirror._pass()
        assert words in str(synced(run)["error"]) and os.strerror(number) in str(synced(run)["error"])
    assert mirror._pass()
    assert not list(store.root.rglob(".*.tmp-*"))


def test_a_folder_that_is_older_publishes_no_last_words(tmp_path: Path) -> None:
    """Stopped before it took the run: what another machine has published since must stay."""
    store = FolderStore(tmp_path / "store" / ID)
    here = make_run(tmp_path / "here", store.url)
    add_checkpoint(here, 10)
    first = mirror_of(here, store)
    assert first._pass()
    first.release()
    elsewhere = pull_run(store.url, StoreSettings(), tmp_path / "elsewhere")
    add_checkpoint(elsewhere, 20, fence=2)
    second = mirror_of(elsewhere, store, "elsewhere", 2)
    assert second._pass()
    second.release()
    before = content(store.root)
    write_json(here.final, {"state": "stopped"})
    append_json(here.metrics, {"step": 11})
    late = Mirror(here, store, every=60, keep=KEEP)
    late.start()
    assert not late.flush(30) and late.lost == "the run has gone on elsewhere since it was here last"
    late.stop(0)
    assert content(store.root) == before, "owner.json, too"
    assert "gone on elsewhere" in str(synced(here)["error"])


def test_last_words_of_the_folder_that_held_the_run_last(tmp_path: Path) -> None:
    run, store = make_run(tmp_path, ""), FolderStore(tmp_path / "store")
    first = mirror_of(run, store)
    assert first._pass()
    write_json(run.final, {"state": "stopped"})
    late = Mirror(run, store, every=60, keep=KEEP)
    late.start()
    assert late.stop(30)
    assert store.get_bytes("final.json")[0] == run.final.read_bytes()


def test_a_stop_of_an_older_folder_leaves_the_store_alone(toy: Callable[..., Toy], tmp_path: Path) -> None:
    """The same through the supervisor: it was stopped in the moment in which it came up again."""
    store = FolderStore(tmp_path / "store")
    run = toy("--steps 100000 --every 3", url=store.url).start()
    run.at(4)
    control.stop(run.run)
    assert run.end() == 0
    other = ownership.Ownership(store)
    other.claim("another machine's", 2)
    store.put_bytes("metrics.jsonl", b"newer")
    other.release()
    run.run.resume_requested.touch()
    assert run.run.stop_requested.exists(), "who stopped it has not taken it back"
    assert run.start().end() == 0 and run.final["state"] == "stopped"
    assert store.get_bytes("metrics.jsonl")[0] == b"newer"
    assert "the store was left as it is: the run has gone on elsewhere" in run.window


def test_a_checkpoint_of_the_same_name_from_elsewhere_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two machines once made the same attempt: what one of them has of it must not keep the rest here."""
    run, store = make_run(tmp_path, ""), FolderStore(tmp_path / "store")
    ours, manifest = add_checkpoint(run, 10), f"checkpoints/{Mark(1, 10).name}/manifest.json"
    add_checkpoint(run, 20)
    mirror = Mirror(run, store, every=60, keep=5)
    mirror.claim("t", 2)
    mirror._record.known()
    for key in (manifest, f"checkpoints/{Mark(1, 20).name}/train.pth"):
        store.put_bytes(key, b"another's")
    newest = add_checkpoint(run, 30, fence=2)
    assert mirror._pass() and mirror._pass() and mirror._push.durable == newest
    assert store.get_bytes(manifest)[0] == b"another's"
    assert caplog.text.count(f"{ours.name} is not mirrored") == 1 and "and is another" in caplog.text


class Unconditional(FolderStore):
    conditional = False


def test_a_store_without_conditions_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mirror = Mirror(make_run(tmp_path, ""), Unconditional(tmp_path / "store"), every=60, keep=KEEP)
    with caplog.at_level(logging.INFO, "launch.mirror"):
        for attempt in (1, 2):
            mirror.claim("t", attempt)
    assert caplog.text.count("ignores the conditions of a put") == 1


def test_links_and_executables_of_the_snapshot_survive(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = FolderStore(tmp_path / "store" / ID)
    run = make_run(tmp_path / "here", store.url)
    tool = run.code / "package" / "tool.sh"
    tool.write_text("#!/bin/sh\necho ran\n")
    tool.chmod(0o755)
    (run.code / "tool").symlink_to("package/tool.sh")
    (run.code / "package" / "up").symlink_to("../café.py")
    (run.code / "folder").symlink_to("package")
    (run.code / "out").symlink_to("../../../etc/passwd")
    mirror = mirror_of(run, store)
    assert mirror._pass() and "'code/out' is not mirrored" in caplog.text
    mirror.release()
    pulled = pull_run(store.url, StoreSettings(), tmp_path / "pulled")
    for folder in (pulled.code, run.code):
        assert os.access(folder / "tool", os.X_OK) and (folder / "tool").readlink() == Path("package/tool.sh")
        assert (folder / "package" / "up").read_text() == "print('ü')\n"
        assert (folder / "folder").is_symlink() and not os.access(folder / "café.py", os.X_OK)
    assert not os.path.lexists(pulled.code / "out") and not (pulled.path / "code.json").exists()
    again = Mirror(pulled, store, every=60, keep=KEEP)
    again.claim("t2", 2)
    before = store.get_bytes("code.json")
    assert again._pass() and store.get_bytes("code.json") == before


@pytest.mark.parametrize(
    ("link", "target", "inside"),
    [
        *(("a", "b", True), ("a/b", "../c", True), ("a/b/c", "../../d/e", True), ("a/b", "..", True)),
        *(("a", "../b", False), ("a/b", "../../c", False), ("a", "/etc/passwd", False), ("a", "", False)),
        *(("a", "b/../../c", False), ("a/b", "c/..", False), ("a", "./b", False), ("a", "b\0", False)),
    ],
)
def test_where_links_may_lead(link: str, target: str, inside: bool) -> None:
    assert stays_inside(link, target) is inside


def test_retention_in_the_store_spares_milestones(tmp_path: Path) -> None:
    run, store = make_run(tmp_path, ""), FolderStore(tmp_path / "store")
    mirror = Mirror(run, store, every=60, keep=1, keep_every=20)
    mirror.claim("t", 1)
    for step in (10, 20, 30, 40, 50):
        add_checkpoint(run, step)
        assert mirror._pass()
    keys = {entry.key for entry in store.list("checkpoints/")}
    assert {key.split("/")[1] for key in keys} - {"latest.json"} == {Mark(1, s).name for s in (20, 40, 50)}
    assert json.loads(store.get_bytes("checkpoints/latest.json")[0])["name"] == Mark(1, 50).name
