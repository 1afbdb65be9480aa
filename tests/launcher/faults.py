"""A working directory and a place in a bucket for tests of faults, with neighbours that nothing may touch.

Commands reach the store through a proxy that goes wrong as it is told; what is stored is looked at past it.
"""

import contextlib
import errno
import functools
import hashlib
import io
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore import auth

from launcher.cli import main
from launcher.storage import Store, StoreSettings, bucket, files, open_store, s3
from launcher.storage.server import PROFILE
from launcher.transfer.uploads import folder as records
from tests.launcher import store_fixture
from tests.launcher.proxy import Fault, Proxy, Request, proxied
from tests.launcher.store_fixture import Weed, weed

LAUNCH = [sys.executable, "-m", "launcher.cli"]
MB = 1 << 20
BIG = 17 * MB  # goes in two parts
REACHED_BY = ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE")
NO_HANG = 60.0  # seconds after which no command may still be at work, on a machine that has time for it

READER = """
import json, pathlib, sys
import launcher.storage.server as server
make = server._credentials
def with_reader(folder):
    make(folder)
    config = json.loads((folder / "s3.json").read_text())
    config["identities"].append({"name": "reader", "actions": ["Read:runs", "List:runs"],
                                 "credentials": [{"accessKey": "reader", "secretKey": "looks-only"}]})
    (folder / "s3.json").write_text(json.dumps(config))
server._credentials = with_reader
server.serve(pathlib.Path(sys.argv[1]))
"""
Hashes = dict[str, str]
Process = subprocess.Popen[str]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def filled(root: Path, sizes: Mapping[str, int], seed: int = 0) -> Hashes:
    """Files of random bytes, and their hashes."""
    chance, made = random.Random(seed), {}
    for name, size in sizes.items():
        path, data = root / name, chance.randbytes(size)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        made[name] = sha256(data)
    return made


def hashes(root: Path) -> Hashes:
    """All files below `root`."""
    found = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): sha256(path.read_bytes()) for path in found}


def temporary(root: Path) -> list[str]:
    return [str(path) for path in root.rglob("*.tmp-*")]


class Place:
    """`here` is the working directory, `url` the place in the bucket."""

    def __init__(self, server: Weed, proxy: Proxy, folder: Path) -> None:
        self.server, self.proxy, self.here = server, proxy, folder / "here"
        self.prefix = folder.name
        self.url = f"s3://runs/{self.prefix}"
        self.here.mkdir()

    @property
    def client(self) -> Any:
        env = self.server.env
        session = boto3.Session(profile_name=env["AWS_PROFILE"])  # the default one remembers others' keys
        return session.client("s3", endpoint_url=env["AWS_ENDPOINT_URL"])

    def store(self, *argv: str, status: int = 0) -> str:
        """One command, in this process; all that was said."""
        said = io.StringIO()
        both = contextlib.redirect_stdout(said), contextlib.redirect_stderr(said)
        with both[0], both[1], pytest.raises(SystemExit) as end:
            main.main(["store", *argv])
        assert (end.value.code or 0) == status, (argv, said.getvalue())
        return said.getvalue()

    def begin(self, *argv: str, **options: Any) -> Process:
        """A command in a process of its own."""
        pipe, command = subprocess.PIPE, [*LAUNCH, "store", *argv]
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **options)

    def end(self, process: Process, within: float = 240) -> tuple[int, str]:
        """Exit status and all that was said. A command that hangs, or shows a traceback, fails the test."""
        try:
            out, err = process.communicate(timeout=within)
        finally:
            process.kill()
        assert "Traceback" not in err, err
        return process.returncode, out + err

    def put(self, root: Path, below: str = "") -> None:
        """Store all files of a folder, past the proxy."""
        store = self.direct(f"{self.prefix}/{below}")
        for path in root.rglob("*"):
            if path.is_file():
                store.put_file(path.relative_to(root).as_posix(), path)

    def stored(self, prefix: str = "") -> Hashes:
        """What is in the bucket here."""
        store = self.direct(prefix)
        return {entry.key: store.digest(entry.key)[1] for entry in store.list()}

    def uploads(self) -> list[tuple[str, str]]:
        """Key and id of unfinished uploads, here and at the neighbour's."""
        answer = self.client.list_multipart_uploads(Bucket="runs", Prefix=self.prefix)
        return sorted((upload["Key"], upload["UploadId"]) for upload in answer.get("Uploads", ()))

    def direct(self, prefix: str = "") -> Store:
        """The store past the proxy."""
        env = self.server.env
        settings = StoreSettings(env["AWS_ENDPOINT_URL"], env["AWS_DEFAULT_REGION"], env["AWS_PROFILE"])
        return open_store(f"s3://runs/{prefix or self.prefix}", settings)


@contextmanager
def two_keys(folder: Path) -> Iterator[Weed]:
    """A server that knows a second identity, which may only read. What a command costs most is kept."""

    @functools.cache
    def made(settings: StoreSettings, *env: str | None) -> Any:
        return access(settings)

    access = bucket.Access
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucket, "Access", lambda settings: made(settings, *map(os.environ.get, REACHED_BY)))
        patch.setattr(store_fixture, "SERVE", READER)
        with weed(folder) as running:
            yield running


@contextmanager
def placed(server: Weed, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """At its end: what belongs to others is as it was, and nothing of ours lies about."""
    if server.process is None:  # killed by a test that then failed
        server.start()
    server.use(monkeypatch)
    for name in ("state", "tmp", "next"):
        (folder / name).mkdir()
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    monkeypatch.setenv("TMPDIR", str(folder / "tmp"))
    monkeypatch.setenv("COLUMNS", "1000")  # so that sentences stay in one piece
    with proxied(server.env["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        place = Place(server, proxy, folder)
        monkeypatch.chdir(place.here)
        client, beside = place.client, f"{folder.name}-next"
        begun = [(key, client.create_multipart_upload(Bucket="runs", Key=key)["UploadId"])
                 for key in (f"{beside}/upload", f"{folder.name}/upload")]  # fmt: skip
        client.put_object(Bucket="runs", Key=f"{beside}/x", Body=b"of others")
        (folder / "next" / "x").write_bytes(b"of others")
        yield place
        assert place.uploads() == sorted(begun), "a stranger's uploads, and none of ours"
        assert place.stored(beside) == hashes(folder / "next") == {"x": sha256(b"of others")}
        assert not any(".launch-probe-" in key for key in place.stored())
        assert not any((folder / "tmp").iterdir()) and not temporary(folder)
        assert not records().exists() or not any(records().iterdir()), "no upload is thought to be under way"


PROVIDER = """
import datetime, json, pathlib, sys
calls = pathlib.Path(sys.argv[1])
calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
left = float(sys.argv[2])
until = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=left)
print(json.dumps({"Version": 1, "AccessKeyId": sys.argv[3], "SecretAccessKey": sys.argv[4],
                  "SessionToken": "", "Expiration": until.isoformat()}))
"""


def provided(server: Weed, folder: Path, seconds: float, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Credentials come from a program, and are good for so long; a file that gets longer with its calls."""
    folder = folder / "provider"
    folder.mkdir()
    (folder / "program.py").write_text(PROVIDER)
    program, calls = folder / "program.py", folder / "calls"
    words = [sys.executable, program, calls, seconds, server.key, server.secret]
    (folder / "config").write_text(f"[profile short]\ncredential_process = {' '.join(map(str, words))}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", f"{folder}/config")
    monkeypatch.setenv("AWS_PROFILE", "short")
    return calls


def may_only_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's second identity, under the profile of its owner."""
    path = folder / "reader"
    path.write_text(f"[{PROFILE}]\naws_access_key_id = reader\naws_secret_access_key = looks-only\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))


@contextmanager
def wrong_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What botocore takes for the time is an hour off."""
    now = auth.get_current_datetime
    with monkeypatch.context() as patch:
        patch.setattr(auth, "get_current_datetime", lambda *args: now(*args) + timedelta(hours=1))
        yield


@contextmanager
def small_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of 1 MB: a real one or, where none may be mounted, writes that fail as they would there."""
    folder.mkdir()
    left = MB

    def write_at(fd: int, data: bytes, offset: int) -> None:
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        files.write_at(fd, data, offset)

    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder]
    real = subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode == 0
    if not real:
        monkeypatch.setattr(s3, "write_at", write_at)
    try:
        yield folder
    finally:
        if real:
            subprocess.run(["umount", "-l", folder], check=True)


def of(method: str, *words: str) -> Callable[[Request], bool]:
    """Requests by their method and what their path has in it; the probes of what a store can do are none."""

    def match(request: Request) -> bool:
        meant = request.method == method and all(word in request.path for word in words)
        return meant and ".launch-probe-" not in request.path

    return match


def always(fault: Fault, match: Callable[[Request], bool]) -> Callable[[Request], Fault | None]:
    return lambda request: fault if match(request) else None
