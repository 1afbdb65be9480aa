"""The way back: what is whole is brought, what is not is passed over, and nothing leaves its folder."""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.checkpoints import newest, verify
from launcher.errors import StoreAway, StoreError, Taken, UserError
from launcher.mirror import Mirror, ownership, pull, pull_run, restore
from launcher.rundir import RunDir, append_json, read_json, read_jsonl, write_json
from launcher.storage import Entry, Store, StoreSettings, open_store
from launcher.storage.base import Info
from launcher.storage.folder import FolderStore
from tests.launcher.mirrored import ID, Mark, add_checkpoint, content, make_run
from tests.launcher.store_fixture import Weed, weed


@pytest.fixture(scope="module")
def weed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    with weed(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture
def server(weed_server: Weed, monkeypatch: pytest.MonkeyPatch) -> Weed:
    weed_server.use(monkeypatch)
    return weed_server


def mirrored(run: RunDir, store: Store, release: bool = True) -> None:
    mirror = Mirror(run, store, every=60, keep=5)
    mirror.claim("token", 1)
    mirror.start()
    assert mirror.stop(60)
    if release:
        mirror.release()


@pytest.fixture
def stored(tmp_path: Path) -> tuple[RunDir, FolderStore]:
    """A run with checkpoints 10, 20, 30 in a store, which can then be damaged."""
    store = FolderStore(tmp_path / "bucket" / ID)
    run = make_run(tmp_path / "origin", store.url)
    for step in (10, 20, 30):
        add_checkpoint(run, step)
    mirrored(run, store)
    return run, store


def test_pull_to_an_empty_disk(server: Weed, tmp_path: Path) -> None:
    url = f"s3://runs/lab/{tmp_path.name}/{ID}"
    run = make_run(tmp_path / "origin", url)
    for step in (10, 20, 30):
        add_checkpoint(run, step, size=200_000)
    write_json(run.final, {"state": "stopped"})
    mirrored(run, open_store(url, server.settings))
    pulled = pull_run(url, server.settings, tmp_path / "empty" / "runs")
    assert pulled.path == tmp_path / "empty" / "runs" / ID
    assert content(pulled.path) == content(run.path)
    assert newest(pulled) == Mark(1, 30)
    assert (read_json(pulled.synced) or {})["step"] == 30, "it is still durable"
    assert [path.name for path in pulled.path.parent.iterdir()] == [ID], "nothing else is left there"
    with pytest.raises(UserError, match="is here already") as caught:
        pull_run(url + "/", server.settings, tmp_path / "empty" / "runs")
    assert caught.value.hint == f"launch resume {ID}"
    for wrong in (f"s3://runs/lab/{ID}", "s3://runs/lab", "s3://runs"):
        with pytest.raises(UserError, match="there is no run at s3://runs"):
            pull_run(wrong, server.settings, tmp_path / "else")
    with pytest.raises(UserError, match="no bucket 'nowhere'"):
        pull_run(f"s3://nowhere/{ID}", server.settings, tmp_path / "else")
    assert not (tmp_path / "else").exists()


def in_manifest(**changes: object) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps(json.loads(data) | changes).encode()


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes] | None, str]] = {
    "cut short": ("train.pth", lambda data: data[:-1], "train.pth has 1023 bytes instead of 1024"),
    "a bit": ("model.pth", lambda data: bytes([data[0] ^ 1]) + data[1:], "model.pth does not have the hash"),
    "missing": ("train.pth", None, "train.pth has no bytes instead of 1024"),
    "wrong hash": (
        "manifest.json",
        in_manifest(files={"train.pth": {"size": 1024, "sha256": "0" * 64}}),
        "train.pth does not have the hash",
    ),
    "torn manifest": ("manifest.json", lambda data: data[:40], "torn"),
    "another's": ("manifest.json", in_manifest(step=7), "that of step-00000007-fence-1"),
    "outside": ("manifest.json", in_manifest(files={"../../../x": {"size": 1, "sha256": "0"}}), "outside"),
}


def damage(store: Store, mark: Mark, how: str) -> str:
    name, change, reason = DAMAGE[how]
    key = f"checkpoints/{mark.name}/{name}"
    if change is None:
        store.delete(key)
    else:
        store.put_bytes(key, change(store.get_bytes(key)[0]))
    return reason


@pytest.mark.parametrize("how", DAMAGE)
def test_the_newest_whole_checkpoint_is_used(
    stored: tuple[RunDir, FolderStore], tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    reason = damage(stored[1], Mark(1, 30), how)
    run = make_run(tmp_path / "here", "")
    with caplog.at_level(logging.INFO, "launch.mirror"):
        restore.restore(run, stored[1])
    assert newest(run) == Mark(1, 20)
    assert "passed over checkpoint step-00000030-fence-1" in caplog.text and reason in caplog.text
    pulled = pull_run(stored[1].url, StoreSettings(), tmp_path / "pulled")
    assert newest(pulled) == Mark(1, 20)
    assert not (pulled.checkpoints / Mark(1, 30).name).exists()
    assert not list(tmp_path.rglob(".tmp-*")) and not list(tmp_path.glob("**/x"))


def test_none_is_whole(stored: tuple[RunDir, FolderStore], tmp_path: Path) -> None:
    for step in (10, 20, 30):
        damage(stored[1], Mark(1, step), "a bit")
    with pytest.raises(StoreError, match="none of the 3 checkpoints"):
        pull_run(stored[1].url, StoreSettings(), tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_what_is_here_wins_unless_the_store_is_ahead(tmp_path: Path) -> None:
    """The run went on elsewhere, from step 20 to 40: its checkpoint comes with metrics that reach it."""
    store = FolderStore(tmp_path / "bucket")
    elsewhere, here = make_run(tmp_path / "elsewhere", ""), make_run(tmp_path / "here", "")
    add_checkpoint(here, 20)
    append_json(here.metrics, {"step": 25, "loss": 0.5})  # past the checkpoint: made again elsewhere
    here.rank_log(1, 0).write_text("what this disk saw")
    (here.code / "café.py").unlink()
    for step, fence in ((20, 1), (30, 2), (40, 2)):
        add_checkpoint(elsewhere, step, fence)
    elsewhere.attempts.unlink()
    for number in (1, 2):
        append_json(elsewhere.attempts, {"event": "start", "attempt": number})
        append_json(elsewhere.attempts, {"event": "end", "attempt": number})
    write_json(elsewhere.final, {"state": "stopped"})
    mirrored(elsewhere, store)
    append_json(here.attempts, {"event": "start", "attempt": 3})
    restore.restore(here, store)
    assert newest(here) == Mark(2, 40)
    assert here.metrics.read_bytes() == elsewhere.metrics.read_bytes()
    assert [(line["attempt"], line["event"]) for line in read_jsonl(here.attempts)] == [
        *((1, "start"), (1, "end"), (2, "start"), (2, "end"), (3, "start"))
    ]
    assert here.rank_log(1, 0).read_text() == "what this disk saw"
    assert (here.code / "café.py").is_file() and not here.final.exists()
    assert not (here.path / "owner.json").exists()

    # Nothing newer there: what is here stays, also if it is longer or shorter.
    add_checkpoint(here, 50, 3)
    append_json(here.metrics, {"step": 60, "loss": 0.1})
    before = content(here.path)
    restore.restore(here, store)
    assert content(here.path) == before


def test_a_checkpoint_broken_here_is_brought_again(stored: tuple[RunDir, FolderStore]) -> None:
    run, store = stored
    (run.checkpoints / Mark(1, 30).name / "train.pth").write_bytes(b"broken")
    restore.restore(run, store)
    assert newest(run) == Mark(1, 30) and not list(run.checkpoints.glob(".tmp-*"))


class Failing(FolderStore):
    """Goes away after so many objects."""

    left = 0
    lock = threading.Lock()  # many are brought at once

    def get_file(self, key: str, path: Path, *, durable: bool = True, expect: Entry | None = None) -> Info:
        with self.lock:
            if self.left == 0:
                raise StoreAway("gone")
            self.left -= 1
        return super().get_file(key, path, durable=durable, expect=expect)


def test_cut_off_after_any_object(stored: tuple[RunDir, FolderStore], tmp_path: Path) -> None:
    """Whatever was brought is whole; the next try brings the rest; metrics never lag behind a checkpoint."""
    store, number = Failing(stored[1].root), 0
    while True:
        run = make_run(tmp_path / str(number), "")
        store.left = number
        try:
            restore.restore(run, store)
            break
        except StoreAway:
            for folder in run.checkpoints.glob("step-*"):
                assert verify(folder) is None and len(read_jsonl(run.metrics)) == 3
            store.left = 1000
            restore.restore(run, store)
        assert newest(run) == Mark(1, 30) and len(read_jsonl(run.metrics)) == 3
        assert not list(run.path.rglob(".tmp-*"))
        store.left = number
        with pytest.raises(StoreAway), pytest.MonkeyPatch.context() as patch:
            patch.setattr(pull, "reach", lambda url, settings: store)
            pull_run(store.url, StoreSettings(), tmp_path / "pulled")
        assert not (tmp_path / "pulled").exists(), "a pull leaves all or nothing"
        number += 1
    assert number >= 3


class Hostile(FolderStore):
    """A listing that somebody else has written into; S3 allows any key."""

    more = ""

    def list(self, prefix: str = "") -> Iterator[Entry]:
        yield from super().list(prefix)
        yield Entry(self.more, 5)


@pytest.mark.parametrize(
    "key",
    [
        "/etc/cron.d/x",
        "../../x",
        "code/../../x",
        "a\0b",
        "a\\..\\b",
        "a\nb",
        "run.json/x",
        "code",
        "logs//x",
        "x/",
    ],
)
def test_hostile_keys(
    stored: tuple[RunDir, FolderStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    store = Hostile(stored[1].root)
    store.more = key
    monkeypatch.setattr(pull, "reach", lambda url, settings: store)
    with pytest.raises(StoreError, match="not safe to write"):
        pull_run(store.url, StoreSettings(), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    run = make_run(tmp_path / "here", "")
    before = content(run.path)
    with pytest.raises(StoreError, match="not safe to write"):
        restore.restore(run, store)
    assert content(run.path) == before


def test_no_pickle_comes_from_a_store(stored: tuple[RunDir, FolderStore], tmp_path: Path) -> None:
    """A job of Slurm's begins with one in submitit/: one that somebody else wrote must not get there."""
    for key in ("submitit/7_submitted.pkl", "submitit/job.sh"):
        stored[1].put_bytes(key, b"run me")
    here = make_run(tmp_path / "here", "")
    restore.restore(here, stored[1])
    pulled = pull_run(stored[1].url, StoreSettings(), tmp_path / "pulled")
    assert newest(here) == newest(pulled) == Mark(1, 30)
    assert not here.submitit.exists() and not pulled.submitit.exists()


def test_a_run_that_is_held_is_not_pulled(
    stored: tuple[RunDir, FolderStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(ownership, "BEAT", 0.4)
    run, store = stored
    mirror = Mirror(run, store, every=60, keep=5)
    mirror.claim("another", 7)
    mirror.start()
    with pytest.raises(Taken, match="held by attempt 7 on"):
        pull_run(store.url, StoreSettings(), tmp_path / "runs")
    assert "watching for up to 20 s" in capsys.readouterr().err
    mirror.stop(30)  # its supervisor died without a word
    monkeypatch.setattr(ownership, "PATIENCE", 2.0)
    assert newest(pull_run(store.url, StoreSettings(), tmp_path / "runs")) == Mark(1, 30)


def test_a_run_that_was_moved_goes_on_where_it_is(stored: tuple[RunDir, FolderStore], tmp_path: Path) -> None:
    stored[1].root.parent.rename(tmp_path / "moved")
    url = f"file://{tmp_path}/moved/{ID}"
    pulled = pull_run(url, StoreSettings(), tmp_path / "runs")
    assert (read_json(pulled.run) or {})["url"] == url


def test_a_finished_run_is_not_pulled(stored: tuple[RunDir, FolderStore], tmp_path: Path) -> None:
    stored[1].put_bytes("final.json", b'{"state": "finished"}')
    with pytest.raises(UserError, match="nothing to resume"):
        pull_run(stored[1].url, StoreSettings(), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_not_the_run_it_claims_to_be(stored: tuple[RunDir, FolderStore], tmp_path: Path) -> None:
    stored[1].put_bytes("run.json", json.dumps({"id": "../../elsewhere"}).encode())
    with pytest.raises(StoreError, match="no whole run"):
        pull_run(stored[1].url, StoreSettings(), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_place_that_cannot_be_written(stored: tuple[RunDir, FolderStore], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/runs cannot be written: Not a directory"):
        pull_run(stored[1].url, StoreSettings(), tmp_path / "file" / "runs")
    run = make_run(tmp_path / "here", "")
    run.checkpoints.write_text("a file where a folder belongs")
    with pytest.raises(StoreError, match="checkpoints cannot be written"):
        restore.restore(run, stored[1])
