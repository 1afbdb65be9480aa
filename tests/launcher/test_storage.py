"""What a store promises, held by the folder and by a real S3 server alike; and what S3's errors say."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from launcher.errors import StoreAway, StoreError, UserError
from launcher.storage import (
    Changed,
    NotFound,
    PreconditionFailed,
    Store,
    StoreSettings,
    key_problem,
    open_store,
    reach,
)
from tests.launcher.store_fixture import Weed, weed


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    with weed(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == "folder":
        return open_store(f"file://{tmp_path}/store")
    server: Weed = request.getfixturevalue("server")
    server.use(monkeypatch)
    return server.store(tmp_path.name)


def keys(store: Store, prefix: str = "") -> dict[str, int]:
    return {entry.key: entry.size for entry in store.list(prefix)}


def test_what_is_put_comes_back(store: Store, tmp_path: Path) -> None:
    store.check()
    contents = {"a.txt": b"one\n", "empty": b"", "deep/er/ä b.bin": bytes(range(256)) * 1000}
    for key, data in contents.items():
        (tmp_path / "source").write_bytes(data)
        store.put_file(key, tmp_path / "source")
    assert keys(store) == {key: len(data) for key, data in contents.items()}
    assert keys(store, "deep/") == {"deep/er/ä b.bin": 256_000}
    for key, data in contents.items():
        assert store.get_bytes(key)[0] == data
        store.get_file(key, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == data
    store.delete("deep/er/ä b.bin")
    store.delete("deep/er/ä b.bin")
    assert sorted(keys(store)) == ["a.txt", "empty"]
    with pytest.raises(NotFound):
        store.get_bytes("deep/er/ä b.bin")
    with pytest.raises(NotFound):
        store.get_file("deep/er/ä b.bin", tmp_path / "none")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["copy", "source"], "nothing half"


def test_a_big_file_in_parts(store: Store, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 33 + b"tail"
    (tmp_path / "big").write_bytes(data)
    store.put_file("big", tmp_path / "big", if_absent=True)
    store.get_file("big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    with pytest.raises(PreconditionFailed):
        store.put_file("big", tmp_path / "big", if_absent=True)


def test_conditional_puts(store: Store) -> None:
    first = store.put_bytes("owner", b"1", if_absent=True)
    with pytest.raises(PreconditionFailed):
        store.put_bytes("owner", b"2", if_absent=True)
    assert store.get_bytes("owner") == (b"1", first)
    second = store.put_bytes("owner", b"2", if_match=first)
    with pytest.raises(PreconditionFailed):
        store.put_bytes("owner", b"3", if_match=first)
    assert store.get_bytes("owner") == (b"2", second)
    with pytest.raises(PreconditionFailed):
        store.put_bytes("nobody", b"3", if_match=first)


def test_of_many_racers_one_wins(store: Store) -> None:
    store.put_bytes("race/0", b"start")
    for number in range(4):
        etag, won = store.get_bytes(f"race/{number}")[1], []

        def run(name: int, number: int = number, etag: str = etag, won: list[str] = won) -> None:
            for put in (
                lambda: store.put_bytes(f"race/{number}", b"match %d" % name, if_match=etag),
                lambda: store.put_bytes(f"race/{number + 1}", b"absent %d" % name, if_absent=True),
            ):
                try:
                    put()
                    won.append(put.__code__.co_names[0])
                except PreconditionFailed:
                    won.append("")

        racers = [threading.Thread(target=run, args=(name,)) for name in range(6)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert len([name for name in won if name]) == 2 and len(won) == 12


def test_a_growing_file_is_stored_as_long_as_it_was(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"line\n" * 10)
    tamper(monkeypatch, lambda: os.truncate(log, 70))
    store.put_file("log", log, growing=True)
    assert store.get_bytes("log")[0] == b"line\n" * 10


@pytest.mark.parametrize("size", [100, 40 << 20])
def test_a_file_that_gets_shorter_is_not_stored(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    log = tmp_path / "log"
    log.write_bytes(bytes(size))
    tamper(monkeypatch, lambda: os.truncate(log, size - 50))
    with pytest.raises(Changed):
        store.put_file("log", log)
    assert keys(store) == {}
    client = getattr(getattr(store, "bucket", None), "_client", None)
    if client:
        assert "Uploads" not in client.list_multipart_uploads(Bucket="runs"), "no part is left behind"


def tamper(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Have the file changed between the look at its size and the reading."""
    from launcher.storage import files, folder, s3

    @contextmanager
    def opened(path: Path) -> Iterator[object]:
        with files.opened(path) as found:
            act()
            yield found

    monkeypatch.setattr(s3, "opened", opened)
    monkeypatch.setattr(folder, "opened", opened)


def test_links_and_pipes_are_not_followed(store: Store, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError):
        store.put_file("link", tmp_path / "link")
    with pytest.raises(StoreError):
        store.put_file("pipe", tmp_path / "pipe")
    assert keys(store) == {}


@pytest.mark.parametrize(
    "key",
    [
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
    ],
)
def test_keys_that_leave_their_folder(store: Store, key: str, tmp_path: Path) -> None:
    assert key_problem(key)
    with pytest.raises(StoreError):
        store.put_bytes(key, b"x")
    with pytest.raises(StoreError):
        store.get_file(key, tmp_path / "x")


@pytest.mark.parametrize("url", ["s3://", "s3:///prefix", "gs://bucket/x", "file://host/x", "s3://runs/../x"])
def test_addresses_that_name_no_store(url: str) -> None:
    with pytest.raises(UserError, match="is not the address of a store"):
        open_store(url)


def test_the_answer_to_a_conditional_put_was_lost(
    server: Weed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """boto3 sends it again and gets a 412 for our own object: that is no failure."""
    server.use(monkeypatch)
    with answers_lost(server) as (endpoint, lost):
        store = open_store(f"s3://runs/{tmp_path.name}", StoreSettings(endpoint, "us-east-1"))
        assert store.conditional and store.verifies in (True, False)
        lost[0] = 1
        etag = store.put_bytes("owner", b"token 1", if_absent=True)
    direct = server.store(tmp_path.name)
    assert direct.get_bytes("owner") == (b"token 1", etag)
    with answers_lost(server) as (endpoint, lost):
        store = open_store(f"s3://runs/{tmp_path.name}", StoreSettings(endpoint, "us-east-1"))
        assert store.conditional and store.verifies in (True, False)
        lost[0] = 1
        etag = store.put_bytes("owner", b"token 2", if_match=etag)
    assert direct.get_bytes("owner") == (b"token 2", etag)


@contextmanager
def answers_lost(server: Weed) -> Iterator[tuple[str, list[int]]]:
    """The endpoint of a proxy that passes requests on, and how many of its next answers are lost."""
    port = int(server.settings.endpoint.rpartition(":")[2])  # type: ignore[union-attr]
    listener = socket.create_server(("127.0.0.1", 0))
    left = [0]

    def pump(source: socket.socket, target: socket.socket, answers: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if answers and left[0] and not data.startswith(b"HTTP/1.1 100"):
                    left[0] -= 1
                    break
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            if answers:
                end.close()

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            upstream = socket.create_connection(("127.0.0.1", port))
            threading.Thread(target=pump, args=(client, upstream, False), daemon=True).start()
            threading.Thread(target=pump, args=(upstream, client, True), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", left
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def check_fails(url: str, settings: StoreSettings, *words: str, error: type[StoreError] = StoreError) -> None:
    with pytest.raises(error) as caught:
        open_store(url, settings).check()
    said = f"{caught.value.message} {caught.value.hint}"
    assert "\n" not in said and all(word in said for word in words), said
    assert isinstance(caught.value, StoreAway) == (error is StoreAway)


def test_errors_are_clear_sentences(server: Weed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server.use(monkeypatch)
    where = server.settings.endpoint.removeprefix("http://")  # type: ignore[union-attr]
    check_fails("s3://nowhere/x", server.settings, "no bucket 'nowhere'", where, "storage.url")
    check_fails("s3://runs/x", StoreSettings(server.settings.endpoint, profile="nobody"), "nobody", "profile")
    wrong = tmp_path / "credentials"
    wrong.write_text((server.folder / "credentials").read_text().replace(server.secret, "AnotherSecret"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(wrong))
    check_fails("s3://runs/x", server.settings, "credentials are refused", "'runs'", where)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.delenv("AWS_PROFILE")
    check_fails("s3://runs/x", StoreSettings(server.settings.endpoint), "no usable credentials", where)
    server.use(monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    away = StoreSettings(f"http://user:pass@127.0.0.1:{port}", "us-east-1")
    with pytest.raises(StoreAway) as caught:
        open_store("s3://runs/x", away).check()
    assert f"127.0.0.1:{port} does not answer" in caught.value.message and "pass" not in caught.value.message


def test_asking_a_folder_makes_none(tmp_path: Path) -> None:
    store = reach(f"file://{tmp_path}/new/store")
    assert list(store.list()) == [] and list(tmp_path.iterdir()) == []
    store.put_bytes("a/b", b"c")
    assert (tmp_path / "new" / "store" / "a" / "b").read_bytes() == b"c"
    (tmp_path / "file").touch()
    for place in (f"{tmp_path}/file", f"{tmp_path}/file/store", "/proc/store"):
        with pytest.raises(UserError, match=f"{place} cannot be written to"):
            reach(f"file://{place}")


def test_importing_costs_nothing() -> None:
    code = "import sys, launcher.storage; print([m for m in ('boto3', 'botocore') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
