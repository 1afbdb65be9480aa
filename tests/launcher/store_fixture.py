"""A real SeaweedFS server for tests: `with weed(folder) as server: ...`, in any test module.

Inside the block `os.environ` points at the server, so that stores opened here and processes started here
reach it; `server.env` holds the same variables for processes that get an environment of their own.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.storage import Store, StoreSettings, open_store

SERVE = "import sys, pathlib, launcher.store_server as s; s.serve(pathlib.Path(sys.argv[1]))"
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

    @property
    def env_sh(self) -> Path:
        return self.folder / "env.sh"

    @property
    def settings(self) -> StoreSettings:
        env = self.env
        return StoreSettings(env["AWS_ENDPOINT_URL"], env["AWS_DEFAULT_REGION"], env["AWS_PROFILE"])

    def store(self, prefix: str) -> Store:
        return open_store(f"s3://runs/{prefix}", self.settings)

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
            self.process.wait(30)
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None
            self._wait_for_port()

    def _wait_for_port(self) -> None:
        from launcher.store_server import _is_free

        port = int((self.folder / "port").read_text())
        deadline = time.monotonic() + 30
        while not _is_free(port) and time.monotonic() < deadline:
            time.sleep(0.05)


@contextmanager
def weed(folder: Path) -> Iterator[Weed]:
    """A running server in `folder`, and os.environ pointing at it."""
    server, before = Weed(folder), dict(os.environ)
    server.start()
    try:
        os.environ.update(server.env)
        for name in UNSET:
            os.environ.pop(name, None)
        yield server
    finally:
        server.kill()
        os.environ.clear()
        os.environ.update(before)
