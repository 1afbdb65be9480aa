"""`launch store ls|cp|mv|rm|sync`: what the arguments mean, what is refused, what is left when it is cut."""

import contextlib
import fcntl
import functools
import io
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from launcher import transfer
from launcher.cli import main
from launcher.errors import LaunchError
from launcher.storage import StoreSettings, bucket, open_store
from launcher.transfer.uploads import folder as records
from tests.launcher.proxy import Fault, Proxy, Request, proxied
from tests.launcher.store_fixture import Weed, weed

LAUNCH = [sys.executable, "-m", "launcher.cli", "store"]
REACHED_BY = ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    @functools.cache
    def made(settings: StoreSettings, *env: str | None) -> Any:
        return access(settings)

    access = bucket.Access  # takes most of a short call's time
    with weed(tmp_path_factory.mktemp("weed")) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucket, "Access", lambda settings: made(settings, *map(os.environ.get, REACHED_BY)))
        yield server


@pytest.fixture(autouse=True)
def here(server: Weed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and the server's environment."""
    server.use(monkeypatch)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def proxy(server: Weed, here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with proxied(server.env["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A prefix of this test's own."""
    return f"s3://runs/{tmp_path.name}"


def launch(*argv: str, status: int = 0) -> tuple[str, str]:
    """One command, in this process; stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        main.main(["store", *argv])
    assert (end.value.code or 0) == status, (argv, out.getvalue(), err.getvalue())
    return out.getvalue(), err.getvalue()


def tree(files: dict[str, str], root: Path | None = None) -> None:
    for name, text in files.items():
        path = (root or Path()) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def local(root: str) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in Path(root).rglob("*") if path.is_file()}


def stored(url: str) -> dict[str, str]:
    store = open_store(url)
    return {entry.key: store.get_bytes(entry.key)[0].decode() for entry in store.list()}


# --- what the arguments name


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (["cp", "d/f", "{url}/new"], "new"),
        (["cp", "d/f", "{url}/new/"], "new/f"),
        (["cp", "./d/../d/f", "{url}/"], "f"),
        (["cp", "--recursive", "d", "{url}"], "f|e/g"),
        (["cp", "--recursive", "d/", "{url}/new"], "new/f|new/e/g"),
        (["cp", "d", "{url}/new/", "--recursive"], "new/f|new/e/g"),
        (["sync", "d", "{url}/new"], "new/f|new/e/g"),
        (["cp", "d", "{url}", "--recursive", "--exclude", "*", "--include=e/*"], "e/g"),
        (["cp", "d", "{url}", "--include=e/*", "--recursive", "--exclude", "*"], ""),
        (["cp", "d/f", "{url}/", "--dryrun"], ""),
    ],
)
def test_up(argv: list[str], key: str, url: str) -> None:
    tree({"d/f": "1", "d/e/g": "2"})
    out, err = launch(*[word.format(url=url) for word in argv])
    assert set(stored(url)) == set(key.split("|")) - {""}
    verb = "(dry run) upload: d/" if "--dryrun" in argv else "upload: "
    assert all(line.startswith(verb) and f" to {url}/" in line for line in out.splitlines())
    assert f"{len(out.splitlines())} copied" in err


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["cp", "{url}/d/f", "."], "f"),
        (["cp", "{url}/d/f", "new"], "new"),
        (["cp", "{url}/d/f", "new/"], "new/f"),
        (["cp", "{url}/d/f", "there"], "there/f"),
        (["cp", "{url}/d", "there/new", "--recursive"], "there/new/f|there/new/e/g"),
        (["sync", "{url}/d/", "."], "f|e/g"),
        (["mv", "{url}/d/f", "x/y"], "x/y"),
    ],
)
def test_down(argv: list[str], name: str, url: str) -> None:
    for key in ("f", "e/g", "../dd/no"):
        open_store(f"{url}/{'d' if '..' not in key else 'dd'}").put_bytes(key.rpartition("../dd/")[2], b"1")
    Path("there").mkdir()
    launch(*[word.format(url=url) for word in argv])
    assert set(local(".")) == set(name.split("|"))
    assert ("d/f" in stored(url)) == (argv[0] != "mv")


def test_between_buckets_and_between_folders(url: str) -> None:
    tree({"a/1": "one", "a/b/2": "two"})
    launch("sync", "a", f"{url}/a")
    assert "copy: " in launch("cp", "--recursive", f"{url}/a", f"{url}/b")[0]
    assert "move: " in launch("mv", f"{url}/b/1", f"{url}/c/")[0]
    launch("mv", "--recursive", f"{url}/a", f"{url}/moved/")
    assert stored(url) == {"b/b/2": "two", "c/1": "one", "moved/1": "one", "moved/b/2": "two"}
    launch("sync", "a", "b")
    assert launch("sync", "a", "b")[0] == "", "times were taken over"
    launch("mv", "a", "c/", "--recursive")
    assert local(".") == {"b/1": "one", "b/b/2": "two", "c/1": "one", "c/b/2": "two"}


def test_rm(url: str) -> None:
    tree({"a": "1", "d/b": "2", "d/c.log": "3", "dd": "4"})
    launch("sync", ".", url)
    launch("rm", f"{url}/a")
    assert launch("rm", f"{url}/d/", "--recursive", "--exclude", "*.log")[0] == f"delete: {url}/d/b\n"
    assert set(stored(url)) == {"d/c.log", "dd"}, "a prefix is a folder, not the beginning of a name"
    launch("rm", "d", "--recursive", "--include", "*")
    launch("rm", "a")
    assert local(".") == {"dd": "4"}
    launch("rm", "--recursive", url)
    assert stored(url) == {}


def test_ls(url: str, tmp_path: Path) -> None:
    tree({"a b": "1", "d/é": "22", "dd": ""})
    launch("sync", ".", url)
    buckets, _ = launch("ls")
    assert any(line.endswith(" runs") for line in buckets.splitlines())
    assert f"{'PRE':>30} {tmp_path.name}/" in launch("ls", "s3://runs")[0]
    for place in (f"{url}/", "."):
        lines = launch("ls", place)[0].splitlines()
        assert [line[20:] for line in lines] == ["       PRE d/", "         1 a b", "         0 dd"]
        time.strptime(lines[1][:19], "%Y-%m-%d %H:%M:%S")
    assert [line[20:] for line in launch("ls", f"{url}/d")[0].splitlines()] == [
        "       PRE d/",
        "         0 dd",
    ]
    assert launch("ls", f"{url}/d/", "--recursive")[0].endswith(f"         2 {tmp_path.name}/d/é\n")
    assert launch("ls", f"{url}/none", status=1) == ("", "")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["cp", "d", "{url}/"], "d is a folder"),
        (["cp", "{url}/d/", "."], "is a folder"),
        (["cp", "{url}/none", "."], "there is no object"),
        (["cp", "none", "{url}/"], "there is no file none"),
        (["cp", "link", "{url}/"], "link is a symbolic link"),
        (["cp", "--recursive", "d/f", "{url}/"], "d/f is a file"),
        (["sync", "none", "{url}"], "there is no folder none"),
        (["sync", "d", "d/e"], "one lies inside the other"),
        (["mv", "--recursive", "{url}/d", "{url}/d/"], "the same"),
        (["cp", "d/f", "d"], "the same"),
        (["cp", "d/f", "gs://b/k"], "neither s3://BUCKET/KEY nor a path"),
        (["cp", "d/f", "s3://"], "it has no bucket"),
        (["cp", "d/f", "s3://runs/a/../b"], "'.' or '..'"),
        (["sync", "d", "{url}", "--exclude", "/d/*"], "matches nothing"),
        (["sync", "d", "{url}", "--delete", "--exclude", "*"], "nothing is deleted"),
        (["sync", "{url}/none", "d", "--delete"], "nothing is deleted"),
        (["rm", "{url}/none"], "there is no object"),
        (["ls", "none"], "there is no none"),
    ],
)
def test_what_cannot_be_meant_is_refused(argv: list[str], said: str, url: str) -> None:
    tree({"d/f": "1"})
    Path("link").symlink_to("d/f")
    out, err = launch(*[word.format(url=url) for word in argv], status=2)
    assert out == "" and said in err, err
    assert local("d") == {"f": "1"} and stored(url) == {}


# --- what cannot be transferred, and what must not


def test_a_failure_is_told_and_the_rest_is_done_but_for_deletes(url: str) -> None:
    tree({"a": "1", "d/b": "2"})
    open_store(url).put_bytes("surplus", b"")
    os.mkfifo("pipe")
    (Path(os.fsdecode(b"not-utf8-\xff"))).write_text("")
    Path("back\\slash").write_text("")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
        out, err = launch("sync", ".", url, "--delete", status=1)
    assert set(stored(url)) == {"a", "d/b", "surplus"}
    assert len(out.splitlines()) == 2 and err.count("not read: ") == 4
    assert "2 copied" in err and "4 failed, 1 not deleted" in err


def test_links_are_not_followed_and_protect_their_name(url: str) -> None:
    tree({"a": "1"})
    Path("loop").symlink_to(".")
    Path("to-a").symlink_to("a")
    store = open_store(url)
    for key in ("loop/a", "to-a", "b"):
        store.put_bytes(key, b"")
    out, err = launch("sync", ".", url, "--delete")
    assert out == f"upload: a to {url}/a\ndelete: {url}/b\n" and err.count("is not followed") == 2
    assert set(stored(url)) == {"a", "loop/a", "to-a"}


@pytest.fixture(scope="module")
def hostile_bucket() -> Iterator[Any]:
    """moto keeps any key, as some stores do."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


BAD = ["../escaped", "/absolute", "a//b", "a/../../escaped", "back\\slash", "a/./b", "c/bell\a", "d/"]


@pytest.mark.parametrize("bad", [*BAD, "good/below"])
def test_a_hostile_bucket(bad: str, hostile_bucket: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", hostile_bucket)
    client = boto3.session.Session().client("s3")
    client.create_bucket(Bucket="evil")
    for key in ("p/good", f"p/{bad}"):
        client.put_object(Bucket="evil", Key=key, Body=b"x")
    before = sorted(path.name for path in here.parent.iterdir())
    for verb in (["sync"], ["cp", "--recursive"], ["mv", "--recursive"]):
        out, err = launch(*verb, "s3://evil/p", "target", status=1)
        assert "nothing done" in err and out == "" and not any(here.iterdir()), (verb, err)
    assert sorted(path.name for path in here.parent.iterdir()) == before
    launch("sync", "s3://evil/p", "target", "--exclude", "*", "--include", "good")
    assert local(".") == {"target/good": "x"}
    launch("rm", "s3://evil/p", "--recursive")
    assert client.list_objects_v2(Bucket="evil")["KeyCount"] == 0, "it can be emptied all the same"


@pytest.mark.parametrize(
    "way", ["a link as folder", "a link as file", "a file as folder", "a folder as file"]
)
def test_what_lies_in_the_way(way: str, url: str, here: Path) -> None:
    store = open_store(url)
    store.put_bytes("a", b"new")
    store.put_bytes("d/e/f", b"new")
    tree({"outside/f": "old", "target/keep": "old"})
    if way == "a link as folder":
        Path("target/d").mkdir()
        Path("target/d/e").symlink_to(here / "outside")
    elif way == "a link as file":
        Path("target/a").symlink_to(here / "outside/f")
    elif way == "a file as folder":
        tree({"target/d": "old"})
    else:
        tree({"target/a/x": "old"})
    was = local(".")
    for verb in (["sync", "--delete"], ["cp", "--recursive"]):
        _, err = launch(*verb, url, "target", status=1)
        assert "nothing done" in err and way.split()[1] in err
        assert local(".") == was


def test_a_link_put_in_the_way_during_the_transfer(url: str, here: Path) -> None:
    """Checked once, used later: each folder is opened from the one above, so a link is never followed."""
    store = open_store(url)
    for key in ("a/f", "b/f"):
        store.put_bytes(key, b"new")
    tree({"outside/f": "old"})

    class Evil(transfer.Report):
        def begin(self, files: int, size: int) -> None:
            Path("target").mkdir()
            Path("target/b").symlink_to(here / "outside")

        def problem(self, text: str) -> None:
            said.append(text)

    said: list[str] = []
    summary = transfer.sync(url, "target", report=Evil())
    assert (summary.done, summary.failed) == (1, 1) and "not a folder any more" in said[0]
    assert local("outside") == {"f": "old"}


def test_a_bar_where_somebody_watches(here: Path) -> None:
    """On a terminal, which no name may steer."""
    tree({"a/1": "one", "a/2\x1b[31m": "two"})
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*LAUNCH, "sync", "a", "b"], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # its end
        while piece := os.read(ours, 65536):
            said += piece
    os.close(ours)
    assert process.wait(30) == 1
    assert b"copy: a/1 to b/1" in said and b"1/1" in said and b"2\\x1b[31m: its name" in said


# --- cut short


def test_a_file_that_vanishes_or_changes_is_a_failure(url: str, here: Path) -> None:
    tree({"d/a": "1", "d/b": "2"})

    class Late(transfer.Report):
        def begin(self, files: int, size: int) -> None:
            Path("d/a").unlink()

        def problem(self, text: str) -> None:
            said.append(text)

    said: list[str] = []
    summary = transfer.sync("d", url, report=Late())
    assert (summary.done, summary.failed) == (1, 1) and "d/a" in said[0] and "vanished" in said[0]


def uploads(url: str) -> list[str]:
    """Keys of the unfinished multipart uploads."""
    answer = client().list_multipart_uploads(Bucket="runs", Prefix=url.removeprefix("s3://runs/"))
    return [upload["Key"].rpartition("/")[2] for upload in answer.get("Uploads", [])]


def client() -> Any:
    return boto3.session.Session().client("s3")


@contextlib.contextmanager
def stuck(proxy: Proxy, method: str, words: str, *argv: str) -> "Iterator[subprocess.Popen[str]]":
    """A command whose second request of this kind is never answered."""
    seen, met = [], threading.Event()

    def rule(request: Request) -> Fault | None:
        if request.method != method or words not in request.path or met.is_set():
            return None
        seen.append(request)
        if len(seen) < 2:
            return None
        met.set()
        return Fault(silent=True)

    proxy.rule = rule
    pipe = subprocess.PIPE
    process = subprocess.Popen([*LAUNCH, *argv], stdout=pipe, stderr=pipe, text=True)
    try:
        assert met.wait(60)
        yield process
    finally:
        process.kill()
        process.communicate()


def big(path: str) -> None:
    """Three parts."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("wb") as file:
        file.truncate(40 << 20)


def test_what_cannot_be_stored_is_no_trouble_in_a_target(url: str) -> None:
    tree({"up/a": "1", "down/back\\slash": "2"})
    os.mkfifo("down/pipe")
    launch("sync", "up", url)
    launch("sync", url, "down")
    assert Path("down/a").read_text() == "1" and Path("down/pipe").is_fifo()
    _, err = launch("sync", url, "down", "--delete", status=1)
    assert "pipe" in err and Path("down/back\\slash").exists()
    out, err = launch("ls", "down", status=1)
    assert out.endswith(" 1 a\n") and err.count("not listed: ") == 2
    assert launch("ls", "down/a")[0].endswith(" 1 a\n")


@pytest.mark.parametrize("place", ["s3:/runs/x", "-"])
def test_what_only_looks_like_a_path_is_refused(place: str) -> None:
    tree({"a": "1"})
    _, err = launch("cp", "a", place, status=2)
    assert "s3://BUCKET/KEY" in err or "pipe" in err
    assert [path.name for path in Path().iterdir()] == ["a"]


def temporary() -> list[Path]:
    return list(Path().rglob(".*.tmp-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order(number: signal.Signals, url: str, proxy: Proxy) -> None:
    """Also where the store does not answer: nothing of an upload stays, and the rest is for the next time."""
    big("up/big")
    tree({"up/small": "1"})
    with stuck(proxy, "PUT", "partNumber=", "sync", "up", url) as process:
        assert uploads(url) == ["big"]
        process.send_signal(number)
        _, err = process.communicate(timeout=12)  # the store may be silent for longer
    assert process.returncode == 128 + number and "Traceback" not in err, err
    assert "stopped: " in err and "1 not tried" in err and "run it again" in err
    assert uploads(url) == [] and set(stored(url)) <= {"small"}


def test_a_signal_is_heard_before_the_first_file(url: str, proxy: Proxy) -> None:
    """The store is silent when it is first looked at."""
    big("up/big")
    with stuck(proxy, "PUT", "", "sync", "up", url) as process:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=12)
    assert process.returncode == 130 and "stopped: " in err and "1 not tried" in err, err


def test_after_sigkill_the_next_command_cleans_up(url: str, proxy: Proxy) -> None:
    """Uploads of dead processes are aborted, also one that never heard its id; those of living ones stay."""
    big("up/big")
    tree({"other/a": "1"})
    with stuck(proxy, "PUT", "partNumber=", "sync", "up", url) as process:
        launch("cp", "other/a", f"{url}/x")
        assert uploads(url) == ["big"], "its process lives"
        process.kill()
    assert uploads(url) == ["big"] and len(list(records().iterdir())) == 1
    launch("cp", "other/a", f"{url}/y")
    assert uploads(url) == [] and not any(records().iterdir())

    key = f"{url.removeprefix('s3://runs/')}/big"
    for name in (key, f"{key}-of-others"):
        client().create_multipart_upload(Bucket="runs", Key=name)
    record = {"bucket": proxy.url.removeprefix("http://") + "/runs", "key": key, "upload": None}
    (records() / "0.json").write_text(json.dumps(record))
    launch("cp", "other/a", f"{url}/z")
    assert uploads(url) == ["big-of-others"] and not any(records().iterdir())


def test_a_download_that_was_cut_leaves_nothing_for_long(url: str, proxy: Proxy) -> None:
    big("up/big")
    launch("sync", "up", url)
    with stuck(proxy, "GET", "/big", "sync", url, "down") as process:
        assert len(temporary()) == 1
        process.terminate()
        process.communicate(timeout=12)
    assert process.returncode == 143 and not temporary(), "in order"
    with stuck(proxy, "GET", "/big", "sync", url, "down") as process:
        process.kill()
    assert len(temporary()) == 1 and not Path("down/big").exists()
    held = Path("down/.of-a-living.tmp-0123456789ab")
    with held.open("w+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        launch("sync", url, "down")
    assert temporary() == [held] and Path("down/big").stat().st_size == 40 << 20


def test_a_store_that_goes_away_ends_it(url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the beginning by one error; later, when as many in a row as are asked at once have had no answer."""
    tree({f"d/{number}": "some" for number in range(100)})
    launch("sync", "d", url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    out, err = launch("cp", "--recursive", "d", f"{url}/x", status=1)
    assert "does not answer" in err and err.count("127.0.0.1") == 1 and out == ""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    proxy.rule = lambda request: None if "list-type" in request.path else Fault(cut=0)
    _, err = launch("sync", url, "down", status=1)
    assert "0 copied" in err and "not tried" in err and err.count("download failed: ") < 50


def test_an_error_of_the_store_is_told_in_a_line() -> None:
    tree({"d/a": "1", "d/b": "2"})
    _, err = launch("sync", "d", "s3://no-such-bucket/x", status=1)
    assert "no-such-bucket" in err and "AWS_PROFILE" in err and "storage.url" not in err
    out, err = launch("cp", "--recursive", "d", "s3://no-such-bucket/x", status=1)
    assert err.count("no-such-bucket") == 1 and out == ""
    with pytest.raises(LaunchError):
        transfer.sync("d", "s3://no-such-bucket/x")
