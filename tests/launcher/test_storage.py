"""What a store promises, held by a folder and by two S3 servers: SeaweedFS, and moto for what it keeps."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.errors import StoreError, UserError
from launcher.storage import (
    Changed,
    Entry,
    NotFound,
    PreconditionFailed,
    Store,
    Version,
    files,
    key_problem,
    open_store,
    reach,
)
from launcher.storage.folder import FolderStore
from tests.launcher.store_fixture import Weed, moto, weed

ODD = ["a.txt", "deep/er/ä b.bin", "100% & more+~=,;'!().txt", "日本/é", 'quo"te<>?#[]{}|^`$@:*']
MIB = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    with weed(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture(scope="module")
def moto_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with moto(tmp_path_factory.mktemp("moto")) as url:
        yield url


@pytest.fixture(params=["folder", "seaweedfs", "moto"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    return opened_store(request, tmp_path, monkeypatch, request.param)


@pytest.fixture(params=["folder", "seaweedfs"])
def sound(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store that keeps what moto does not."""
    return opened_store(request, tmp_path, monkeypatch, request.param)


def opened_store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> Store:
    if kind == "folder":
        return open_store(f"file://{tmp_path}/store")
    server: Weed = request.getfixturevalue("server")
    server.use(monkeypatch)
    if kind == "moto":
        monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("moto_url"))
    return open_store(f"s3://runs/{tmp_path.name}")


def keys(store: Store, prefix: str = "") -> dict[str, int]:
    return {entry.key: entry.size for entry in store.list(prefix)}


def file(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "source"
    path.write_bytes(data)
    return path


def pending(store: Store) -> int:
    """Uploads, or files, that were begun and not ended; they are gone then."""
    return store.sweep()


def test_what_is_put_comes_back(store: Store, tmp_path: Path) -> None:
    store.check()
    contents = {key: key.encode() * 1000 for key in ODD} | {"empty": b""}
    for key, data in contents.items():
        version = store.put_file(key, file(tmp_path, data))
        assert version.size == len(data) and version.etag
    assert keys(store) == {key: len(data) for key, data in contents.items()}
    assert keys(store, "deep/") == {ODD[1]: len(contents[ODD[1]])}
    for entry in store.list():
        data = contents[entry.key]
        assert store.get_bytes(entry.key)[0] == data
        assert store.digest(entry.key) == (len(data), hashlib.sha256(data).hexdigest())
        info = store.get_file(entry.key, tmp_path / "copy", durable=False, expect=entry)
        assert (tmp_path / "copy").read_bytes() == data and info.size == len(data)
        assert store.stat(entry.key).mtime == entry.mtime == info.mtime
    for name in (ODD[1], ODD[1]):
        store.delete(name)
    assert sorted(keys(store)) == sorted({*contents} - {ODD[1]})
    for ask in (store.get_bytes, store.stat, store.digest):
        with pytest.raises(NotFound):
            ask(ODD[1])
    with pytest.raises(NotFound):
        store.get_file(ODD[1], tmp_path / "none")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["copy", "source"], "nothing half"


def test_what_is_known_of_a_file_stays_beside_it(store: Store, tmp_path: Path) -> None:
    for key, size in (("small", 1000), ("big", 17 * MIB)):
        path = file(tmp_path, os.urandom(size))
        os.utime(path, ns=(10**18, 10**18 + 1))
        store.put_file(key, path)
        info = store.stat(key)
        if not isinstance(store, FolderStore):
            assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
            assert info.file_mtime_ns == 10**18 + 1


def test_a_big_file_in_parts(store: Store, tmp_path: Path) -> None:
    data = os.urandom(MIB) * 33 + b"tail"
    path = file(tmp_path, data)
    store.put_file("big", path, if_absent=True)
    store.get_file("big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    assert store.digest("big")[1] == hashlib.sha256(data).hexdigest()
    with pytest.raises(PreconditionFailed):
        store.put_file("big", path, if_absent=True)
    assert pending(store) == 0


def test_conditional_puts(store: Store, tmp_path: Path) -> None:
    assert store.conditional
    first = store.put_bytes("owner", b"1", if_absent=True)
    with pytest.raises(PreconditionFailed):
        store.put_bytes("owner", b"2", if_absent=True)
    with pytest.raises(PreconditionFailed):
        store.put_file("owner", file(tmp_path, b"1"), if_absent=True)
    assert store.get_bytes("owner") == (b"1", first)
    second = store.put_bytes("owner", b"2", if_match=first)
    with pytest.raises(PreconditionFailed):
        store.put_bytes("owner", b"3", if_match=first)
    assert store.get_bytes("owner") == (b"2", second)
    with pytest.raises(PreconditionFailed):
        store.put_bytes("nobody", b"3", if_match=first)
    assert sorted(keys(store)) == ["owner"], "nothing is left of a probe"


def test_of_sixteen_racers_one_wins(store: Store) -> None:
    store.put_bytes("race/0", b"start")
    for number in range(4):
        etag, won = store.get_bytes(f"race/{number}")[1], []
        together = threading.Barrier(16)

        def run(name: int, number: int = number, etag: str = etag, won: list[str] = won,
                together: threading.Barrier = together) -> None:  # fmt: skip
            together.wait()
            for put in (
                lambda: store.put_bytes(f"race/{number}", b"match %d" % name, if_match=etag),
                lambda: store.put_bytes(f"race/{number + 1}", b"absent %d" % name, if_absent=True),
            ):
                try:
                    put()
                    won.append("won")
                except PreconditionFailed:
                    won.append("")

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(run, range(16)))
        assert won.count("won") == 2 and len(won) == 32


def test_more_keys_than_a_page_has(store: Store) -> None:
    names = {f"many/{number % 3}/{number:04d}" for number in range(1005)} | {"many-not", "many/top"}
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: store.put_bytes(name, b"."), names))
    assert set(keys(store)) == names and set(keys(store, "many/")) == names - {"many-not"}
    folders, entries = store.level("many/")
    assert folders == ["many/0/", "many/1/", "many/2/"] and [entry.key for entry in entries] == ["many/top"]
    folders, entries = store.level("ma")
    assert folders == ["many/"] and [entry.key for entry in entries] == ["many-not"]
    assert store.level("nothing/") == ([], [])
    store.delete_many(iter(names - {"many/top"}))
    assert set(keys(store)) == {"many/top"}


def test_an_object_that_is_written_between_a_look_and_the_reading(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_bytes("log", b"older, and longer")
    look = store.stat

    def late(key: str) -> object:
        info = look(key)
        monkeypatch.setattr(store, "stat", look)
        store.put_bytes(key, b"newer")
        return info

    monkeypatch.setattr(store, "stat", late)
    store.get_file("log", tmp_path / "brought")
    assert (tmp_path / "brought").read_bytes() == b"newer"


def test_a_folders_file_that_changes_while_it_is_brought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path / "store")
    store.put_file("data", file(tmp_path, bytes(3 * MIB)))
    target = tmp_path / "brought"

    def rewrite() -> None:
        with (tmp_path / "store" / "data").open("r+b") as stored:
            stored.write(b"other")

    with tampered(monkeypatch, rewrite), pytest.raises(Changed):
        store.get_file("data", target)
    assert not target.exists()
    store.get_file("data", target)
    assert target.read_bytes()[:5] == b"other"


@pytest.mark.parametrize("size", [100, 17 * MIB])
def test_a_file_that_changes_meanwhile(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    path = file(tmp_path, bytes(size))

    def append() -> None:
        with path.open("ab") as log:
            log.write(b"more")

    def rewrite() -> None:
        with path.open("r+b") as log:
            log.write(b"other")

    for act in (append, rewrite, lambda: os.truncate(path, size - 50)):
        with tampered(monkeypatch, act), pytest.raises(Changed):
            store.put_file("log", path)
    assert keys(store) == {} and pending(store) == 0
    path.write_bytes(bytes(size))
    with tampered(monkeypatch, append):
        version = store.put_file("log", path, growing=True)
    assert version == Version(size, store.put_file("same", file(tmp_path, bytes(size))).etag)
    assert store.digest("log") == (size, hashlib.sha256(bytes(size)).hexdigest())


def test_a_file_that_was_just_written_to_may_be_in_the_middle_of_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, writes = file(tmp_path, b"half a write"), iter([b"more of it, and", b"all"])

    def sleep(seconds: float) -> None:
        if data := next(writes, b""):
            path.write_bytes(data)
        else:
            monkeypatch.setattr(files, "MOMENT", 0.0)  # it is over

    monkeypatch.setattr(files, "MOMENT", 60.0)
    monkeypatch.setattr(files.time, "sleep", sleep)
    store.put_file("settled", path)
    assert store.get_bytes("settled")[0] == b"all"
    monkeypatch.setattr(files, "MOMENT", 60.0)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    with pytest.raises(Changed, match="all the time"):
        store.put_file("never", path)
    assert keys(store) == {"settled": 3}
    assert store.put_file("log", path, growing=True).size == 3


@contextmanager
def tampered(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> Iterator[None]:
    """Have the file changed between the look at its size and the reading."""
    from launcher.storage import folder, s3

    @contextmanager
    def opened(path: Path, still: bool = False) -> Iterator[object]:
        with files.opened(path, still) as found:
            act()
            yield found

    with monkeypatch.context() as patch:
        for module in (s3, folder):
            patch.setattr(module, "opened", opened)
        yield


@pytest.mark.parametrize("size", [100, 17 * MIB])
def test_a_log_grows_in_the_store(store: Store, tmp_path: Path, size: int) -> None:
    data = os.urandom(size + 300)
    log = file(tmp_path, data[:size])
    old = store.put_file("log", log, growing=True)
    log.write_bytes(data)
    new = store.grow_file("log", log, old)
    assert new.size == len(data)
    assert store.digest("log") == (len(data), hashlib.sha256(data).hexdigest())
    store.get_file("log", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    assert store.grow_file("log", log, new).size == len(data), "nothing new"
    with pytest.raises(PreconditionFailed):
        store.grow_file("log", log, old)
    log.write_bytes(data[: size - 1])
    with pytest.raises(Changed):
        store.grow_file("log", log, new)
    assert store.digest("log")[0] == len(data) and pending(store) == 0


def test_a_log_that_was_begun_anew_does_not_grow(store: Store, tmp_path: Path) -> None:
    log = file(tmp_path, os.urandom(6 * MIB))
    base = store.put_file("log", log, growing=True)
    log.write_bytes(os.urandom(7 * MIB))
    with pytest.raises(Changed):
        store.grow_file("log", log, base)
    assert store.stat("log").size == base.size
    store.put_bytes("log", b"by somebody else")
    with pytest.raises(PreconditionFailed):
        store.grow_file("log", log, base)


def test_copies(sound: Store, tmp_path: Path) -> None:
    other = open_store(f"file://{tmp_path}/other")
    path = file(tmp_path, os.urandom(17 * MIB))
    os.utime(path, ns=(10**18, 10**18 + 7))
    sound.put_file("here/a b", path)
    (entry,) = sound.list()
    for target, source in ((sound, sound), (other, sound), (sound, other)):
        name = "here/a b" if source is sound else "copied/ü"
        target.copy("copied/ü", source, name, expect=entry if source is sound else None)
        target.get_file("copied/ü", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == path.read_bytes()
    if not isinstance(sound, FolderStore):
        sound.copy("again", sound, "here/a b")
        known = sound.stat("again")
        assert (known.sha256, known.file_mtime_ns) == (sound.digest("here/a b")[1], 10**18 + 7)
    with pytest.raises(NotFound):
        sound.copy("x", sound, "nothing")


def test_the_object_that_was_listed_is_there_no_more(store: Store, tmp_path: Path) -> None:
    store.put_bytes("doc", b"first")
    (entry,) = store.list()
    store.put_bytes("doc", b"second one")
    with pytest.raises(PreconditionFailed):
        store.get_file("doc", tmp_path / "doc", expect=entry)
    with pytest.raises(NotFound):
        store.get_file("gone", tmp_path / "doc", expect=Entry("gone", 5))
    assert not [path for path in tmp_path.iterdir() if "doc" in path.name]


def test_what_unfinished_puts_have_left_is_swept(store: Store, tmp_path: Path) -> None:
    store.put_bytes("mine/kept", b"1")
    for name in ("mine/a", "mine/b", "theirs/c"):
        if isinstance(store, FolderStore):
            left = store.path(name)
            left.parent.mkdir(exist_ok=True)
            left.with_name(f".{left.name}.tmp-1234").touch()
        else:
            store.bucket.ask("create_multipart_upload", store._key(name))  # type: ignore[attr-defined]
    assert [store.sweep("mine/"), store.sweep("mine/"), store.sweep()] == [2, 0, 1]
    assert keys(store) == {"mine/kept": 1}


def test_links_and_pipes_are_not_followed(store: Store, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError):
        store.put_file("link", tmp_path / "link")
    with pytest.raises(StoreError):
        store.put_file("pipe", tmp_path / "pipe")
    assert keys(store) == {}


BAD = [
    "",
    "/etc/passwd",
    "../up",
    "a/../../b",
    "a//b",
    "./a",
    "a\\b",
    "a\0b",
    "a\nb",
    "a/",
    "x" * 300,
    "\udcff",
]


@pytest.mark.parametrize("key", BAD)
def test_keys_that_leave_their_folder(sound: Store, key: str, tmp_path: Path) -> None:
    assert key_problem(key)
    path = file(tmp_path, b"x")
    for use in (
        lambda: sound.put_bytes(key, b"x"),
        lambda: sound.put_file(key, path),
        lambda: sound.get_file(key, tmp_path / "x"),
        lambda: sound.delete_many([key]),
        lambda: sound.copy("x", sound, key),
    ):
        with pytest.raises(StoreError, match="cannot be stored"):
            use()


@pytest.mark.parametrize("url", ["s3://", "s3:///prefix", "gs://bucket/x", "file://host/x", "s3://runs/../x"])
def test_addresses_that_name_no_store(url: str) -> None:
    with pytest.raises(UserError, match="is not the address of a store"):
        open_store(url)


def test_asking_a_folder_makes_none(tmp_path: Path) -> None:
    store = reach(f"file://{tmp_path}/new/store")
    assert list(store.list()) == [] and list(tmp_path.iterdir()) == []
    store.put_bytes("a/b", b"c")
    assert (tmp_path / "new" / "store" / "a" / "b").read_bytes() == b"c"
    (tmp_path / "file").touch()
    for place in (f"{tmp_path}/file", f"{tmp_path}/file/store", "/proc/store"):
        with pytest.raises(UserError, match=f"{place} cannot be written to"):
            reach(f"file://{place}")
