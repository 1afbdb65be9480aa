"""Real runs of the toy program: run folders, the guard as a process, and looking at what is alive."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.recipe import load, load_frozen
from launcher.rundir import RunDir, new_run_id, read_json, runs_root, write_json
from launcher.supervisor import history, processes
from tests.lab import Lab, Settings
from tests.launcher.on_slurm import cluster
from tests.launcher.progress import Progress, wait

TOY = Path(__file__).with_name("toy.py")


class Toy(Progress):
    """A run of tests/launcher/toy.py, with a guard as its own process where `start` is called."""

    def __init__(
        self,
        args: str | list[str],
        name: str = "toy",
        backend: str = "local",
        script: str | None = None,
        url: str | None = None,
        resources: dict[str, object] | None = None,
        fetch: list[dict[str, str]] | None = None,
        **restart: object,
    ) -> None:
        self.run = RunDir(runs_root() / new_run_id(name))
        self.run.path.mkdir(parents=True)
        source, program = self.run.path / "source.yaml", TOY
        if script is not None:
            program = self.run.path / "program.py"
            program.write_text(script)
        wants = {
            "program": {"script": str(program), "args": args.split() if isinstance(args, str) else args},
            "resources": {"gpus": 2, "device": "cpu"} | (resources or {}),
            "mirror": {"every": 1},
            "fetch": fetch or [],
            "restart": {"crashes": 5, "backoff": 0.1, "hang": 60, "grace": 20} | restart,
        }
        source.write_text(yaml.safe_dump(wants))
        recipe = load(source)
        source.unlink()
        self.run.recipe.write_text(recipe.dump())
        names = ("PATH", "LAUNCH_QUEUE", "LAUNCH_CPU_SLOTS", "CUDA_VISIBLE_DEVICES")
        frozen = {name: told for name, told in os.environ.items() if name in names or name.startswith("AWS_")}
        record = {"schema": 1, "id": self.run.id, "name": name, "recipe_hash": recipe.hash(), "url": url}
        record |= {"workdir": str(self.run.path.parent), "backend": backend, "created": time.time()}
        write_json(self.run.run, record | {"git": None, "env": frozen})
        self.guard: subprocess.Popen[bytes] | None = None

    def start(self) -> "Toy":
        argv = [sys.executable, "-P", "-m", "launcher.supervisor.guard", str(self.run.path)]
        with (self.run.path.parent / f"{self.run.id}.window").open("ab") as window:
            self.guard = subprocess.Popen(argv, stdout=window, stderr=window, start_new_session=True)
        return self

    def end(self, seconds: float = 90) -> int:
        """Wait for the guard; its exit status."""
        assert self.guard is not None
        return self.guard.wait(seconds)

    def at(self, step: int, attempt: int = 1) -> None:
        """And until all other workers have begun, too: they do not keep step."""
        super().at(step, attempt)
        told = load_frozen(self.run.recipe).resources
        count = told.gpus * (told.nodes if (read_json(self.run.run) or {})["backend"] == "slurm" else 1)
        logs = [self.run.rank_log(attempt, rank) for rank in range(count)]
        wait("all workers", lambda: all(log.exists() and log.stat().st_size for log in logs))

    @property
    def window(self) -> str:
        return (self.run.path.parent / f"{self.run.id}.window").read_text()

    @property
    def supervisor(self) -> int:
        return int((read_json(self.run.lease) or {})["pid"])

    @property
    def final(self) -> dict[str, Any]:
        return read_json(self.run.final) or {}

    @property
    def ends(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.run.attempts.read_text().splitlines()]
        return [line for line in lines if line["event"] == "end"]

    @property
    def states(self) -> list[str]:
        return [end.state for end in history.load(self.run)]

    def workers(self, attempt: int | None = None) -> list[processes.Process]:
        return processes.of_attempts(self.run.path, attempt)

    def assert_gone(self) -> None:
        """Nothing of the run is alive, except a guard in its last instructions."""
        wait("the last process to go", lambda: not processes.of_run(self.run.path), 10)


def sessions(found: list[processes.Process]) -> set[int]:
    """The sessions that processes are in: another way than their environment to find what belongs to them."""
    return {os.getsid(process.pid) for process in found}


def in_sessions(wanted: set[int]) -> list[int]:
    """Living processes in any of the sessions."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and processes.inspect(int(path.name)):
            try:
                session = os.getsid(int(path.name))
            except ProcessLookupError:
                continue
            found += [int(path.name)] if session in wanted else []
    return found


@pytest.fixture
def toy() -> Iterator[Callable[..., Toy]]:
    """Makes runs; whatever is left of them is killed after the test."""
    made: list[Toy] = []

    def make(args: str = "", **options: Any) -> Toy:
        made.append(Toy(args, **options))
        return made[-1]

    yield make
    for run in made:
        for _ in range(3):  # a guard first, or it would start another supervisor
            for process in sorted(processes.of_run(run.run.path), key=lambda process: process.pid):
                process.signal(signal.SIGKILL)
        if run.guard:
            run.guard.wait()


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with cluster(Settings()) as made:
        yield made


@pytest.fixture
def lab(module_lab: Lab) -> Lab:
    """A Slurm cluster of this module's own, whose user we are, with no job of the test before."""
    module_lab.clear()
    return module_lab
