"""The mirror against a real S3 server: what is in the bucket is always enough to go on from, and what
synced.json says is true, whoever dies.
"""

import ctypes
import logging
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher import mirror as mirror_module
from launcher.checkpoints import kept
from launcher.errors import StoreAway, StoreError, Taken
from launcher.mirror import Mirror, ownership
from launcher.mirror.push import Push
from launcher.mirror.record import Record
from launcher.rundir import RunDir, read_json, write_json
from launcher.storage.base import Version
from launcher.storage.folder import FolderStore
from tests.launcher.mirrored import ID, KEEP, Mark, add_checkpoint, content, durable, make_run, prune
from tests.launcher.store_fixture import Weed, weed


@pytest.fixture(scope="module")
def weed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    with weed(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture
def server(weed_server: Weed, monkeypatch: pytest.MonkeyPatch) -> Weed:
    weed_server.use(monkeypatch)
    return weed_server


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds instead of tens of seconds; the proportions stay."""
    monkeypatch.setattr(ownership, "BEAT", 0.4)
    monkeypatch.setattr(mirror_module, "LONGEST_PAUSE", 0.5)
    monkeypatch.setattr(mirror_module, "SHORTEST_PAUSE", 0.2)


@pytest.fixture
def started() -> Iterator[Callable[..., Mirror]]:
    mirrors = []

    def start(
        run: RunDir, store: FolderStore, token: str = "t", at_least: int = 1, keep: int = KEEP
    ) -> Mirror:
        mirror = Mirror(run, store, every=0.1, keep=keep)
        mirrors.append(mirror)
        mirror.claim(token, at_least)
        mirror.start()
        return mirror

    yield start
    for mirror in mirrors:
        mirror.stop(0)


def wait(what: str, check: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"waited {seconds} s for: {what}"
        time.sleep(0.05)


def keeping(marks: Iterable[Mark]) -> set[Mark]:
    return kept(marks, KEEP, None)


def synced(run: RunDir) -> dict[str, object]:
    return read_json(run.synced) or {}


def in_bucket(server: Weed, prefix: str) -> dict[str, bytes]:
    files = server.files(prefix)
    for key in ("owner.json", "code.json"):
        files.pop(key, None)
    return files


def test_the_bucket_holds_the_folder(server: Weed, tmp_path: Path, started: Callable[..., Mirror]) -> None:
    prefix = f"lab/{tmp_path.name}/{ID}"
    run = make_run(tmp_path, f"s3://runs/{prefix}")
    for name in (".metrics.jsonl.tmp-1", "lease.json"):
        (run.path / name).write_text("not for the store")
    run.submitit.mkdir()
    (run.submitit / "7_submitted.pkl").write_text("a pickle is not for the store")
    (run.path / "link").symlink_to("/etc/passwd")
    (run.path / "back\\slash").write_text("cannot be a key")
    (run.code / ".git").mkdir()
    (run.code / ".git" / "config").write_text("not for the store")
    mirror = started(run, server.store(prefix))
    for step in (10, 20, 30):
        add_checkpoint(run, step)
    (run.path / "stop_requested").touch()
    write_json(run.final, {"state": "stopped"})
    assert mirror.flush(60)
    prune(run)
    expected = {
        key: data
        for key, data in content(run.path).items()
        if key
        not in (".metrics.jsonl.tmp-1", "link", "back\\slash", "code/.git/config", "submitit/7_submitted.pkl")
    }
    found = in_bucket(server, prefix)
    assert found == expected and "code/café.py" in found
    assert durable(found) == [Mark(1, 30), Mark(1, 20)]
    said = synced(run)
    assert (said["step"], said["fence"], said["behind"], said["error"]) == (30, 1, 0, None)
    assert said["away_since"] is None and said["url"] == f"s3://runs/{prefix}"

    # A resume: what said that the run had ended goes, and metrics get shorter.
    (run.path / "stop_requested").unlink()
    run.final.unlink()
    run.metrics.write_bytes(run.metrics.read_bytes()[:20])
    assert mirror.stop(60)
    found = in_bucket(server, prefix)
    assert "stop_requested" not in found and "final.json" not in found
    assert found["metrics.jsonl"] == run.metrics.read_bytes()
    assert server.secret.encode() not in b"".join([*found.values(), *content(run.path).values()])


def test_killed_anywhere_the_bucket_is_good(
    server: Weed, tmp_path: Path, quick: None, started: Callable[..., Mirror]
) -> None:
    prefix = f"lab/{tmp_path.name}/{ID}"
    run = make_run(tmp_path, f"s3://runs/{prefix}")
    argv = [sys.executable, "-m", "tests.launcher.mirrored", str(run.path), f"s3://runs/{prefix}"]
    random.seed(1)
    last, published = Mark(0, 0), 0
    for _ in range(7):
        writer = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        time.sleep(random.uniform(0.05, 1.2))
        writer.kill()
        writer.communicate()
        marks = durable(in_bucket(server, prefix))
        if marks:
            assert marks[0] >= last, "what was durable stays durable"
            published += marks[0] != last
            last = marks[0]
    assert published >= 3, "the test published something"
    prune(run)
    mirror = started(run, server.store(prefix), at_least=last.fence + 1)
    assert mirror.flush(60)
    assert len(durable(in_bucket(server, prefix))) <= KEEP, "what the killed ones left over is swept"


def test_the_server_dies_and_comes_back(
    server: Weed, tmp_path: Path, quick: None, started: Callable[..., Mirror]
) -> None:
    prefix = f"lab/{tmp_path.name}/{ID}"
    run = make_run(tmp_path, f"s3://runs/{prefix}")
    mirror = started(run, server.store(prefix))
    add_checkpoint(run, 10)
    assert mirror.flush(60)
    before = time.time()
    server.kill()
    add_checkpoint(run, 20)
    wait("the mirror to notice", lambda: synced(run)["away_since"])
    said = synced(run)
    assert said["step"] == 10 and said["behind"] >= 4 and before <= said["away_since"] <= time.time()
    assert "does not answer" in str(said["error"])
    assert not mirror.flush(0.5) and mirror.lost is None
    add_checkpoint(run, 30)
    assert synced(run)["away_since"] == said["away_since"]
    server.start()
    wait("the mirror to catch up", lambda: synced(run)["step"] == 30)
    assert mirror.stop(60)
    assert (synced(run)["behind"], synced(run)["away_since"], synced(run)["error"]) == (0, None, None)
    prune(run)
    assert in_bucket(server, prefix) == content(run.path)


def test_the_older_of_two_owners_stops_publishing(
    server: Weed, tmp_path: Path, quick: None, started: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = f"lab/{tmp_path.name}/{ID}"
    run, other = make_run(tmp_path / "a", ""), make_run(tmp_path / "b", "")
    old = started(run, server.store(prefix), "old", 3)
    add_checkpoint(run, 10, fence=3)
    assert old.flush(60)
    new = Mirror(other, server.store(prefix), every=0.1, keep=KEEP)
    with pytest.raises(Taken, match="attempt 3 on"):
        new.claim("new", 1)
    old._pulse.stop()  # as if its machine were frozen ...
    old._owner.confirm = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(ownership, "PATIENCE", 2.0)
    assert new.claim("new", 1) == 4, "a higher fence than any seen in the store"
    new.start()
    assert new.flush(60)
    del old._owner.confirm  # ... and went on
    add_checkpoint(run, 999, fence=3)
    wait("the old owner to see it", lambda: "taken over" in str(synced(run)["error"]))
    assert "taken over by attempt 4" in str(old.lost)
    assert not old.flush(5), "it does not pretend"
    assert not any("step-00000999" in key for key in server.files(prefix))
    assert new.stop(60)
    new.release()
    third = Mirror(make_run(tmp_path / "c", ""), server.store(prefix), every=1, keep=KEEP)
    monkeypatch.setattr(ownership, "PATIENCE", 1000.0)
    assert third.claim("third", 2) == 5, "a run that was given back is taken at once"


def test_a_supervisor_that_comes_back_need_not_wait(
    tmp_path: Path, started: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed and started again in the same folder, under its lease: the owner is known to be dead."""
    run, store = make_run(tmp_path, ""), FolderStore(tmp_path / "store")
    first = started(run, store, "first", 1)
    assert first.stop(60)
    monkeypatch.setattr(ownership, "PATIENCE", 1000.0)
    assert Mirror(run, store, every=1, keep=KEEP).claim("second", 2) == 2


@pytest.mark.parametrize("meanwhile", [False, True])
def test_the_store_is_away_when_the_run_starts(
    server: Weed, tmp_path: Path, quick: None, meanwhile: bool
) -> None:
    """It goes on, and is mirrored later, unless the run was made elsewhere in the meantime."""
    prefix = f"lab/{tmp_path.name}/{ID}"
    run, other = make_run(tmp_path / "a", ""), make_run(tmp_path / "b", "")
    mirror, elsewhere = (Mirror(r, server.store(prefix), every=0.1, keep=KEEP) for r in (run, other))
    server.kill()
    with pytest.raises(StoreAway):
        mirror.claim("here", 2)
    server.start()
    if meanwhile:
        assert elsewhere.claim("elsewhere", 2) == 2
        elsewhere.release()
    add_checkpoint(run, 10, fence=2)
    mirror.start()
    if meanwhile:
        wait("the mirror to see it", lambda: mirror.lost)
        assert durable(server.files(prefix)) == []
    else:
        assert mirror.stop(60)
        assert durable(server.files(prefix)) == [Mark(2, 10)]


def test_a_run_that_ended_before_its_first_attempt(tmp_path: Path) -> None:
    run, store = make_run(tmp_path, ""), FolderStore(tmp_path / "store")
    mirror = Mirror(run, store, every=60, keep=KEEP)
    mirror.start()
    write_json(run.final, {"state": "stopped"})
    assert mirror.stop(30)
    assert "final.json" in {entry.key for entry in store.list()}


def test_the_folder_is_deleted_under_it(tmp_path: Path, quick: None, started: Callable[..., Mirror]) -> None:
    run, store = make_run(tmp_path, ""), FolderStore(tmp_path / "store")
    mirror = started(run, store)
    assert mirror.flush(30)
    shutil.rmtree(run.path)
    assert not mirror.flush(1)
    run.path.mkdir()
    assert mirror.stop(30), "the mirror lives on"
    assert {entry.key for entry in store.list()} >= {"run.json", "recipe.yaml"}, "and deletes nothing"


class Watched(FolderStore):
    """A store that notes what is done to it, and refuses what it is told to refuse."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.done: list[str] = []
        self.refused: set[str] = set()

    def put_file(self, key: str, path: Path, *, if_absent: bool = False, growing: bool = False) -> Version:
        if key in self.refused:
            raise StoreAway("not now")
        version = super().put_file(key, path, if_absent=if_absent, growing=growing)
        self.done.append(f"put {key}")
        return version

    def put_bytes(
        self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None
    ) -> str:
        if key != "owner.json":
            self.done.append(f"put {key}")
        return super().put_bytes(key, data, if_absent=if_absent, if_match=if_match)

    def delete(self, key: str) -> None:
        super().delete(key)
        self.done.append(f"delete {key}")


def test_the_order_of_a_pass(tmp_path: Path, quick: None, started: Callable[..., Mirror]) -> None:
    run, store = make_run(tmp_path, ""), Watched(tmp_path / "store")
    store.refused = {"metrics.jsonl"}
    for step in (10, 20):
        add_checkpoint(run, step)
    mirror = started(run, store)
    assert not mirror.flush(1)
    assert not any("step-" in done for done in store.done), "no checkpoint goes before metrics that reach it"
    store.refused = set()
    assert mirror.flush(30)
    first = next(i for i, done in enumerate(store.done) if "step-" in done)
    assert "put metrics.jsonl" in store.done[:first] and "put code/café.py" in store.done[:first]
    names = [done.rpartition("/")[2] for done in store.done if "step-00000020" in done]
    assert names == ["train.pth", "model.pth", "manifest.json"]
    del store.done[:]
    add_checkpoint(run, 30)
    assert mirror.stop(30)
    gone = [done for done in store.done if done.startswith("delete")]
    assert gone[0] == "delete checkpoints/step-00000010-fence-1/manifest.json" and len(gone) == 3
    assert max(i for i, done in enumerate(store.done) if done.startswith("put checkpoints/step-")) < min(
        i for i, done in enumerate(store.done) if done.startswith("delete")
    ), "nothing is deleted before what replaces it is there"


@contextmanager
def unreadable(*paths: Path) -> Iterator[None]:
    """Nobody may read them, nor may root: this thread lays down CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    libc, modes = ctypes.CDLL(None, use_errno=True), [path.stat().st_mode for path in paths]
    header, now = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # capset(2), version 3
    assert libc.capget(header, now) == 0
    less = (ctypes.c_uint32 * 6)(now[0] & ~0b110, *now[1:])
    for path in paths:
        path.chmod(0)
    assert libc.capset(header, less) == 0
    try:
        yield
    finally:
        assert libc.capset(header, now) == 0
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)


def test_one_unreadable_file_keeps_no_checkpoint_here(tmp_path: Path) -> None:
    run, store = make_run(tmp_path, ""), Watched(tmp_path / "store")
    push = Push(run, store, Record(run.mirrored, store), keeping, lambda: None)
    good = add_checkpoint(run, 10)
    locked = [run.rank_log(1, 0), run.code / "package"]
    with unreadable(*locked), pytest.raises(StoreError) as caught:
        push.send()
    for path in locked:
        assert f"{path.relative_to(run.path)} could not be read" in str(caught.value)
    assert push.durable == good and push.behind() and "put code/café.py" in store.done
    push.send()
    assert not push.behind()
    add_checkpoint(run, 30)
    with unreadable(run.metrics), pytest.raises(StoreError, match=r"metrics.jsonl could not"):
        push.send()
    assert push.durable == good, "none goes before metrics that reach its step"


def test_a_pass_ends_when_the_run_is_not_held(tmp_path: Path, server: Weed, quick: None) -> None:
    """The claim for the next attempt failed in the middle of it: whose the run is now is not known."""
    run = make_run(tmp_path, "")
    mirror = Mirror(run, server.store(f"lab/{tmp_path.name}/{ID}"), every=60, keep=KEEP)
    assert mirror.claim("here", 1) == 1
    mirror._confirm()
    server.kill()
    with pytest.raises(StoreAway):
        mirror._owner.claim("here", 2)
    server.start()
    with pytest.raises(StoreAway, match="could not be claimed"):
        mirror._confirm()
    assert mirror.claim("here", 2) == 2
    mirror._confirm()


def test_a_broken_checkpoint_is_not_published(
    tmp_path: Path, started: Callable[..., Mirror], caplog: pytest.LogCaptureFixture
) -> None:
    run, store = make_run(tmp_path, ""), Watched(tmp_path / "store")
    add_checkpoint(run, 10)
    os.truncate(run.checkpoints / add_checkpoint(run, 20).name / "model.pth", 5)
    with caplog.at_level(logging.WARNING, "launch.mirror"):
        assert started(run, store).stop(30)
    assert "step-00000020-fence-1 is not mirrored: model.pth has 5 bytes" in caplog.text
    assert synced(run)["step"] == 10
    assert not any("step-00000020" in entry.key for entry in store.list())


def test_a_checkpoint_that_lost_a_file_in_the_store_is_sent_again(
    tmp_path: Path, started: Callable[..., Mirror]
) -> None:
    run, store = make_run(tmp_path, ""), FolderStore(tmp_path / "store")
    mark = add_checkpoint(run, 10)
    assert started(run, store, "first", 1).stop(30)
    before = content(tmp_path / "store" / "checkpoints")
    store.delete(f"checkpoints/{mark.name}/model.pth")
    assert started(run, store, "second", 2).stop(30)
    assert content(tmp_path / "store" / "checkpoints") == before
    assert synced(run)["step"] == 10


def test_a_checkpoint_deleted_here_while_it_is_sent(tmp_path: Path, started: Callable[..., Mirror]) -> None:
    """The program prunes when it likes: half a checkpoint in the store gets no manifest, and goes."""
    run, store = make_run(tmp_path, ""), Watched(tmp_path / "store")
    doomed = add_checkpoint(run, 10)
    put_file = store.put_file

    def put_and_prune(key: str, path: Path, **how: bool) -> Version:
        version = put_file(key, path, **how)
        if key.endswith("00000010-fence-1/train.pth"):
            prune(run, keep=0)
        return version

    store.put_file = put_and_prune  # type: ignore[method-assign]
    mirror = started(run, store)
    assert mirror.flush(30)
    assert synced(run)["step"] is None
    assert not any(doomed.name in entry.key for entry in store.list())
    add_checkpoint(run, 20)
    assert mirror.stop(30)
    assert synced(run)["step"] == 20
    assert not any(doomed.name in entry.key for entry in store.list())
