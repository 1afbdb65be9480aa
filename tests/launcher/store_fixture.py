"""A real SeaweedFS server for tests: `with weed(folder) as server: ...`, in any test module.

It takes a second to start, so a module shares one; a test that wants it calls `server.use(monkeypatch)`: then
stores opened here and processes started here reach it.
"""

import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.storage import Store, StoreSettings, open_store
from launcher.storage.server import is_free

SERVE = "import sys, pathlib, launcher.storage.server as s; s.serve(pathlib.Path(sys.argv[1]))"
UNSET = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3")


class Weed:
    """`launch store serve` in a process of its own; it can be stopped, killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def env(self) -> dict[str, str]:
        """What env.sh exports."""
        lines = [line for line in self.env_sh.read_text().splitlines() if line.startswith("export ")]
        return dict(shlex.split(line)[1].split("=", 1) for line in lines)

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Point this test's environment at the server, as `source env.sh` does."""
        for name, value in self.env.items():
            monkeypatch.setenv(name, value)
        for name in UNSET:
            monkeypatch.delenv(name, raising=False)

    @property
    def env_sh(self) -> Path:
        return self.folder / "env.sh"

    @property
    def settings(self) -> StoreSettings:
        env = self.env
        return StoreSettings(env["AWS_ENDPOINT_URL"], env["AWS_DEFAULT_REGION"], env["AWS_PROFILE"])

    @property
    def secret(self) -> str:
        """What must stand nowhere but in the server's own folder."""
        return (self.folder / "credentials").read_text().split("aws_secret_access_key = ")[1].split()[0]

    @property
    def key(self) -> str:
        """The access key id that belongs to the secret."""
        return (self.folder / "credentials").read_text().split("aws_access_key_id = ")[1].split()[0]

    def store(self, prefix: str = "") -> Store:
        return open_store(f"s3://runs/{prefix}", self.settings)

    def files(self, prefix: str = "") -> dict[str, bytes]:
        """All that is in the bucket below `prefix`."""
        with pytest.MonkeyPatch.context() as patch:
            self.use(patch)
            store, found = self.store(prefix), {}
            for entry in store.list():
                with store.as_file(entry.key) as path:
                    found[entry.key] = path.read_bytes()
            return found

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", SERVE, str(self.folder)],
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            if line.startswith(b"serving"):
                return
            said.append(line.decode())
        raise AssertionError("the server did not start: " + "".join(said))

    def stop(self) -> None:
        """As Ctrl-C does: takes about 2 s."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL; the server inside dies with it."""
        self._end(signal.SIGKILL)

    def _end(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.communicate(timeout=30)
            self.process = None
            self._wait_for_port()

    def _wait_for_port(self) -> None:
        port = int((self.folder / "port").read_text())
        deadline = time.monotonic() + 30
        while not is_free(port) and time.monotonic() < deadline:
            time.sleep(0.05)


@contextmanager
def weed(folder: Path) -> Iterator[Weed]:
    """A running server in `folder`; whatever became of it in between, it is gone at the end."""
    server = Weed(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def moto(folder: Path) -> Iterator[str]:
    """The endpoint of a moto server, which has a bucket `runs` and takes any credentials."""
    argv = [sys.executable, "-m", "moto.server", "--port=0"]
    with (folder / "moto.log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not (said := re.search(r"http://127\.0\.0\.1:\d+", (folder / "moto.log").read_text())):
            assert process.poll() is None and time.monotonic() < deadline, "moto did not start"
            time.sleep(0.05)
        urllib.request.urlopen(urllib.request.Request(f"{said[0]}/runs", method="PUT"), timeout=30).close()
        yield said[0]
    finally:
        process.kill()
        process.wait()
