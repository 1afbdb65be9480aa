"""`launch tensorboard`: TensorBoard over runs, on this machine only, on a free port."""

import importlib.util
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from launcher.cli import status
from launcher.environ import user
from launcher.errors import UserError
from launcher.rundir import find_run, runs_root


def serve(specs: Sequence[str]) -> int:
    """Run TensorBoard until Ctrl-C; its exit status. UserError: not installed, no runs."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("TensorBoard is not installed", "pip install tensorboard")
    folders = [find_run(spec).path for spec in specs] or [runs_root() / row["id"] for row in status.listing()]
    if not folders:
        raise UserError(f"there are no runs in {runs_root()}")
    port = free_port()
    host = socket.gethostname()
    with tempfile.TemporaryDirectory(prefix="launch-tensorboard-") as shown:
        for folder in folders:  # a link per run: they show under their ids, also those that have not begun
            Path(shown, folder.name).symlink_to(folder / "tensorboard")
        click.echo(f"TensorBoard over {len(folders)} runs: http://127.0.0.1:{port}")
        click.echo(f"from another machine: ssh -L {port}:127.0.0.1:{port} {user()}@{host}")
        argv = [sys.executable, "-m", "tensorboard.main", "--logdir", shown]
        argv += ["--host", "127.0.0.1", "--port", str(port), "--reload_multifile", "true"]
        server = subprocess.Popen(argv)
        try:
            return 1 if server.wait() else 0
        except KeyboardInterrupt:
            return 0
        finally:
            server.terminate()
            server.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
