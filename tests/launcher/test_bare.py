"""`launch` from cron and from a container's entry point: no terminal, hardly a variable, perhaps no user."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import environ
from launcher.cli import submit
from launcher.storage import open_store
from tests.launcher.conftest import wait

LAUNCH = str(Path(sys.executable).with_name("launch"))
NOBODY = 12345
AS_NOBODY = ["unshare", "--user", f"--map-user={NOBODY}"]  # a user that no /etc/passwd knows
WORDS = """\
import getpass, sys
print("größe ✓ 漢字", getpass.getuser(), flush=True)
sys.stdout.buffer.write(b"\\xff\\xfe no letters\\n")
"""


def may_be_nobody() -> bool:
    return (
        bool(shutil.which("unshare"))
        and subprocess.run([*AS_NOBODY, "true"], capture_output=True).returncode == 0
    )


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """All the variables there are, and a recipe to start."""
    (tmp_path / "words.py").write_text(WORDS)
    told = f"program: {{script: {tmp_path}/words.py}}\nresources: {{gpus: 1, device: cpu}}\n"
    told += "restart: {crashes: 0, grace: 5s}\nenv: {vars: {WORD: ü}}\n"
    (tmp_path / "größe.yaml").write_text(told)
    (tmp_path / "tmux").mkdir()
    names = {name: os.environ[name] for name in ("LAUNCH_RUNS", "LAUNCH_TMUX_SOCKET")}
    return {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TMUX_TMPDIR": str(tmp_path / "tmux"), **names}


@pytest.mark.parametrize("backend", ["local", "tmux"])
def test_a_run_from_next_to_nothing(backend: str, bare: dict[str, str], tmp_path: Path) -> None:
    if backend == "tmux" and not shutil.which("tmux"):
        pytest.skip("needs tmux")
    nobody = may_be_nobody()

    def launch(*argv: str) -> str:
        done = subprocess.run(
            [*(AS_NOBODY if nobody else []), LAUNCH, *argv],
            env=bare,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.decode(errors="replace")

    try:
        said = launch(str(tmp_path / "größe.yaml"), "--backend", backend, "--name", "bare")
        wait("the end", lambda: "finished" in launch("status", "last"))
        said = launch("logs", "last")
    finally:
        if backend == "tmux":
            tmux = ["tmux", "-L", bare["LAUNCH_TMUX_SOCKET"], "kill-server"]
            subprocess.run([*(AS_NOBODY if nobody else []), *tmux], env=bare, capture_output=True)
    user = f"uid-{NOBODY}" if nobody else environ.user({})
    assert f"größe ✓ 漢字 {user}\n" in said and "no letters" in said
    (run,) = json.loads(launch("status", "--json"))["runs"]
    record = json.loads(Path(bare["LAUNCH_RUNS"], run["id"], "run.json").read_text())
    assert record["user"] == user and record["workdir"] == "/"


def test_letters_that_the_locale_lacks(bare: dict[str, str], tmp_path: Path) -> None:
    """Python told to take the plain C locale at its word: the recipe's name is shown as well as it can be."""
    ascii_only = bare | {"PYTHONUTF8": "0", "PYTHONCOERCELOCALE": "0", "PYTHONIOENCODING": "ascii"}
    argv = [LAUNCH, "validate", str(tmp_path / "größe.yaml")]
    done = subprocess.run(argv, env=ascii_only, capture_output=True, text=True)
    assert done.returncode == 0 and "gr????e.yaml: good" in done.stdout, done.stderr


def test_without_any_stream(bare: dict[str, str], tmp_path: Path) -> None:
    """A starter that closes all three: the run's files must not get their numbers."""
    line = 'exec "$0" "$@" <&- >&- 2>&-'
    argv = ["bash", "-c", line, LAUNCH, str(tmp_path / "größe.yaml"), "--backend", "local", "--name", "mute"]
    assert subprocess.run(argv, env=bare, cwd=tmp_path).returncode == 0
    (run,) = Path(bare["LAUNCH_RUNS"]).iterdir()
    assert "größe ✓ 漢字" in (run / "logs" / "run.log").read_text(errors="replace")


def test_a_user_without_name_and_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    assert environ.user({}) == "uid-4000000" and environ.home({}) is None
    assert environ.user({"USER": "ada"}) == "ada" and environ.home({"HOME": "/h"}) == Path("/h")
    for name in ("LOGNAME", "USER", "HOME"):
        monkeypatch.delenv(name, raising=False)
    assert environ.user() == "uid-4000000"
    open_store("~/store")  # a folder of that name: nothing better can be meant
    assert submit.repository(Path("/")) is None
