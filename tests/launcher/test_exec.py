"""`launch exec`: any command in the foreground, on a real Slurm and in a workstation's queue."""

import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.supervisor import processes
from tests.lab import Lab
from tests.launcher.conftest import Toy, wait
from tests.launcher.on_slurm import launch, state_of, take_all
from tests.launcher.test_queue import smi
from tests.launcher.test_station import Make, entries, occupy

EXEC = [sys.executable, "-m", "launcher.cli", "exec"]
STATION = ["--backend", "local"]
SLURM = ["--backend", "slurm"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workstation of four GPUs; the file says on which of them processes compute."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return smi(tmp_path, monkeypatch)


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """What a test starts, killed after it."""
    made: list[subprocess.Popen[str]] = []
    yield made
    for one in made:
        one.kill()
        one.communicate()


def start(started: list[subprocess.Popen[str]], *argv: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    started.append(
        subprocess.Popen([*EXEC, *argv], stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)
    )
    return started[-1]


def in_terminal(*argv: str, typed: bytes) -> tuple[int, str]:
    """Exit status and all that a terminal shows, of a shell in which `typed` is typed when it asks."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"PS1": "ready> ", "TERM": "dumb"}
        os.execv(sys.executable, [*EXEC, *argv, "--", "bash", "--norc", "--noprofile"])
    shown, deadline = b"", time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            try:
                shown += os.read(terminal, 4096)
            except OSError:  # nobody has it any more
                break
            if typed and b"ready> " in shown:
                os.write(terminal, typed)
                typed = b""
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()
    finally:
        os.close(terminal)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("asked", [[], ["--gpus", "2"]])
def test_status_and_output_are_the_commands(asked: list[str]) -> None:
    for line, status in (("echo out; echo err >&2; exit 7", 7), ("echo out; kill -SEGV $$", 128 + 11)):
        done = launch("exec", *STATION, *asked, "--", "bash", "-c", line, check=False)
        assert done.returncode == status and done.stdout == "out\n", done.stderr
    assert not asked or not entries()


@pytest.mark.usefixtures("here")
def test_the_gpus_are_those_that_others_leave(here: Path) -> None:
    here.write_text("GPU-1, 4711\n")
    said = launch("exec", *STATION, "--gpus", "2", "--", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES; env")
    assert said.stdout.splitlines()[0] == "GPU-0,GPU-2"
    none = launch("exec", *STATION, "--", "sh", "-c", 'echo "[$CUDA_VISIBLE_DEVICES]"')
    assert none.stdout == "[]\n"


@pytest.mark.usefixtures("here")
def test_nothing_of_a_job_around_us_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("MINE", "kept")
    said = launch("exec", *STATION, "--gpus", "1", "--", "env").stdout.splitlines()
    assert "MINE=kept" in said and not [line for line in said if line.startswith(("SLURM_", "MASTER"))]


@pytest.mark.usefixtures("here")
def test_a_shell_has_the_terminal() -> None:
    """It edits lines, has jobs, hears Ctrl-C itself, and its exit status is passed on."""
    typed = b"echo $((6*7)); sleep 0.1 & fg; exit 5\n"
    status, shown = in_terminal(*STATION, "--gpus", "1", typed=typed)
    assert status == 5 and "\n42\r\n" in shown and "job control" not in shown, shown
    assert not entries()


@pytest.mark.usefixtures("here")
def test_a_killed_shell_leaves_a_terminal_that_echoes() -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "dumb"
        os.execv(sys.executable, [*EXEC, *STATION, "--gpus", "1", "--", "bash", "--norc", "--noprofile"])
    wait("the prompt", lambda: not termios.tcgetattr(terminal)[3] & termios.ECHO, 20)
    (entry,) = entries().values()
    (shell,) = processes.of_command(entry.run)
    shell.signal(signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + 9
    assert termios.tcgetattr(terminal)[3] & termios.ECHO and not entries()
    os.close(terminal)


@pytest.mark.usefixtures("here")
def test_ctrl_c_is_for_the_command() -> None:
    line = "trap 'echo saved; exit 9' INT; echo on; while :; do sleep 0.05; done"
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*EXEC, *STATION, "--gpus", "1", "--", "bash", "-c", line])
    shown = b""
    while b"on\r\n" not in shown:
        shown += os.read(terminal, 4096)
    os.write(terminal, b"\x03")  # Ctrl-C
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    os.close(terminal)
    assert not entries()


@pytest.mark.usefixtures("here")
def test_it_waits_its_turn_and_says_so(started: list[subprocess.Popen[str]]) -> None:
    first = start(started, *STATION, "--gpus", "3", "--", "sh", "-c", "echo on; exec sleep 60")
    assert first.stdout and first.stdout.readline() == "on\n"
    second = start(started, *STATION, "--gpus", "2", "--", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert second.stderr
    assert second.stderr.readline() == "waiting for 2 GPUs: place 1 of 1 in the queue\n"
    first.terminate()
    assert first.wait(20) == 128 + 15, "SIGTERM is passed on"
    assert second.wait(20) == 0 and second.stdout and second.stdout.read() == "GPU-0,GPU-1\n"


@pytest.mark.usefixtures("here")
def test_ctrl_c_ends_the_wait(started: list[subprocess.Popen[str]]) -> None:
    occupy(4, wants={"gpus": 4}, devices=tuple(f"GPU-{number}" for number in range(4)))
    waits = start(started, *STATION, "--gpus", "1", "--", "true")
    assert waits.stderr and "place 1 of 1" in waits.stderr.readline()
    waits.send_signal(signal.SIGINT)
    assert waits.wait(20) == 130 and entries().keys() == {"other"}


@pytest.mark.usefixtures("here")
def test_the_wait_ends_with_a_clear_word() -> None:
    occupy(1, wants={"gpus": 4}, devices=tuple(f"GPU-{number}" for number in range(4)))
    foreseen = launch("exec", *STATION, "--gpus", "4", "--predict-only", "--", "true")
    assert foreseen.stdout == "would start after other\n" and entries().keys() == {"other"}
    done = launch("exec", *STATION, "--gpus", "4", "--max-wait", "1s", "--", "true", check=False)
    assert done.returncode == 1 and done.stderr.endswith("launch: waited 1 s for 4 GPUs\n"), done.stderr
    assert entries().keys() == {"other"}
    assert launch("exec", *STATION, "--predict-only", "--", "true").stdout == "would start now\n"


@pytest.mark.usefixtures("here")
def test_what_a_killed_one_held_is_free_when_its_command_is_gone(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    line = f"trap 'sleep 1; touch {tmp_path}/saved; exit' TERM; echo $$; while :; do sleep 0.05; done"
    dead = start(started, *STATION, "--gpus", "4", "--", "bash", "-c", line)
    assert dead.stdout
    orphan = processes.inspect(int(dead.stdout.readline()))
    dead.kill()
    dead.wait()
    assert orphan and orphan.alive and entries()
    heir = start(started, *STATION, "--gpus", "4", "--", "test", "-e", f"{tmp_path}/saved")
    assert heir.wait(30) == 0 and not orphan.alive and not entries(), heir.communicate()


def test_it_gives_way(
    here: Path, toy: Make, monkeypatch: pytest.MonkeyPatch, started: list[subprocess.Popen[str]]
) -> None:
    """To a run of higher priority; all that it has started hears so."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    asked = ["--gpus", "4", "--preemptible", "--priority", "-1"]
    low = start(started, *STATION, *asked, "--", "sh", "-c", "echo on; sleep 60; true")
    assert low.stdout and low.stdout.readline() == "on\n"
    high: Toy = toy("--steps 2 --every 100", resources={"device": "cuda", "gpus": 2}).start()
    assert low.wait(30) == 128 + 15
    assert f"gives way to {high.run.id}, of priority 0" in low.communicate()[1]
    assert high.end() == 0 and not entries()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--", "no-such-command"], "there is no command `no-such-command` here"),
        (["--", "/no/such/command"], "there is no command `/no/such/command` here"),
        (["--gpus", "5", "--", "true"], "this machine has 4 GPUs"),
        (["--memory", "3X", "--", "true"], "--memory 3X: `resources.memory` must be an amount of memory"),
        (["--nodes", "2", "--", "true"], "this is one machine"),
        (["--gpus", "1"], "COMMAND"),
    ],
)
@pytest.mark.usefixtures("here")
def test_bad_input(argv: list[str], sentence: str, tmp_path: Path) -> None:
    done = launch("exec", *STATION, *argv, check=False)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "queue").exists()


@pytest.mark.usefixtures("here")
def test_a_run_inside_has_what_the_command_was_given(tmp_path: Path) -> None:
    """It does not wait for devices that the command around it holds."""
    recipe = tmp_path / "toy.yaml"
    toy = Path(__file__).with_name("toy.py")
    recipe.write_text(f"program: {{script: {toy}, args: [--steps, '3']}}\nresources: {{gpus: 1}}\n")
    inner = [sys.executable, "-m", "launcher.cli", str(recipe), "--backend", "local"]
    done = launch("exec", *STATION, "--gpus", "4", "--", *inner, check=False)
    assert done.returncode == 0 and "waiting" not in done.stderr, done.stderr
    refused = launch("exec", *STATION, "--gpus", "1", "--", *EXEC, "--gpus", "1", "--", "true", check=False)
    assert refused.returncode == 2 and "inside of `launch exec`" in refused.stderr


def test_on_slurm(lab: Lab) -> None:
    line = "echo $CUDA_VISIBLE_DEVICES; echo $SLURM_CPUS_PER_TASK $SLURM_JOB_NAME; exit 7"
    asked = ["--gpus", "2", "--cpus", "3", "--memory", "100M", "--time", "1h", "--partition", "batch"]
    done = launch("exec", *SLURM, *asked, "--max-wait", "24h", "--", "bash", "-c", line, check=False)
    gpus, about = done.stdout.splitlines()
    assert done.returncode == 7 and len(gpus.split(",")) == 2 and about == "3 launch-exec-bash", done.stderr
    none = launch("exec", *SLURM, "--", "sh", "-c", 'echo "[$CUDA_VISIBLE_DEVICES]"')
    assert none.stdout == "[]\n"
    assert launch("exec", *SLURM, "--", "sh", "-c", "kill -TERM $$", check=False).returncode == 143
    wait("no job", lambda: not lab.call("squeue", "--noheader"))


def test_a_shell_on_slurm(lab: Lab) -> None:
    status, shown = in_terminal(*SLURM, "--gpus", "1", typed=b"echo $((6*7)) $SLURM_JOB_ID; exit 5\n")
    assert status == 5 and "\n42 " in shown, shown
    wait("no job", lambda: not lab.call("squeue", "--noheader"))


def test_the_wait_on_slurm_ends_with_a_clear_word(lab: Lab) -> None:
    urgent = take_all(lab, 600)
    wait("the urgent job to run", lambda: state_of(lab, urgent) == "RUNNING")
    foreseen = launch("exec", *SLURM, "--gpus", "4", "--predict-only", "--", "true").stdout
    assert foreseen.startswith("would start ") and "now" not in foreseen
    done = launch("exec", *SLURM, "--gpus", "4", "--max-wait", "2s", "--", "true", check=False)
    assert done.returncode == 1 and "launch: waited 2 s for 4 GPUs" in done.stderr, done.stderr
    wait("no other job", lambda: lab.call("squeue", "--noheader", "--format=%A") == urgent)
    lab.call("scancel", urgent)
    wait("the cluster to be free", lambda: not lab.call("squeue", "--noheader"))
    assert launch("exec", *SLURM, "--gpus", "4", "--predict-only", "--", "true").stdout == "would start now\n"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--", "no-such-command"], "there is no command `no-such-command` here"),
        (["--gpus", "9", "--", "true"], "a node of `batch` has 8 GPUs"),
        (["--partition", "btach", "--", "true"], "there is no partition `btach`"),
    ],
)
def test_bad_input_on_slurm(lab: Lab, argv: list[str], sentence: str) -> None:
    done = launch("exec", *SLURM, *argv, check=False)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not lab.call("squeue", "--noheader")
