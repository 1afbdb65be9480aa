"""Data sets that are fetched before a run starts: real runs, and a real store behind a proxy that counts."""

import json
import signal
from collections.abc import Callable, Iterator
from fcntl import LOCK_EX, flock
from pathlib import Path

import pytest
import yaml

from launcher import fetch
from launcher.errors import UserError
from launcher.recipe import load
from launcher.rundir import read_json
from tests.launcher.conftest import Toy, wait
from tests.launcher.proxy import Fault, Proxy, Request, proxied
from tests.launcher.store_fixture import Weed, weed

Make = Callable[..., Toy]
FILES = 30
READS = """
import os, pathlib, sys
found = sorted(path.name for path in pathlib.Path(sys.argv[1]).glob("image-*"))
print("found", len(found), flush=True)
sys.exit(len(found) != int(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    with weed(tmp_path_factory.mktemp("store")) as made:
        yield made


@pytest.fixture
def store(server: Weed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    """A data set of FILES images in a bucket, which everybody reaches through the proxy."""
    server.use(monkeypatch)
    source = tmp_path / "image"
    bucket = server.store("coco")
    for number in range(FILES):
        source.write_bytes(f"image {number}".encode() * 1000)
        bucket.put_file(f"train/image-{number}", source)
    with proxied(server.env["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def bodies(proxy: Proxy) -> list[str]:
    """Objects that were fetched, in their order, without their listing."""
    return [request.path for request in proxy.seen if request.method == "GET" and "image-" in request.path]


def wanted(folder: Path, source: str = "s3://runs/coco/train") -> list[dict[str, str]]:
    return [{"from": source, "to": str(folder)}]


def test_two_runs_fetch_once_and_the_third_asks_nobody(toy: Make, store: Proxy, tmp_path: Path) -> None:
    data = tmp_path / "data" / "coco"
    make = lambda: toy([str(data), str(FILES)], script=READS, fetch=wanted(data))  # noqa: E731
    runs = [make(), make()]

    def waiting() -> bool:
        logs = [run.run.torchrun_log(1) for run in runs]
        return all(log.exists() and "another run fetches" in log.read_text() for log in logs)

    data.mkdir(parents=True)
    with (data / fetch.LOCK).open("a") as lock:
        flock(lock, LOCK_EX)
        for run in runs:
            run.start()
        wait("both to wait for a third", waiting)
    assert [run.end() for run in runs] == [0, 0], [run.window for run in runs]
    assert len(bodies(store)) == FILES == len(set(bodies(store)))
    assert not runs[0].run.heartbeat.exists(), "a program without a heart must not be given one"
    count = len(store.seen)
    assert make().start().end() == 0 and len(store.seen) == count


def test_a_fetch_that_is_killed_goes_on_where_it_was(
    toy: Make, server: Weed, store: Proxy, tmp_path: Path
) -> None:
    """Though the bucket was filled from a folder that had been fetched, and says that all is here."""
    data = tmp_path / "coco"
    held = json.dumps({"schema": 1, "from": "s3://runs/coco/train", "files": FILES}).encode()
    server.store("coco/train").put_bytes(fetch.MARKER, held)
    store.rule = lambda request: Fault(silent=True) if len(bodies(store)) > FILES // 2 else None
    run = toy([str(data), str(FILES)], script=READS, fetch=wanted(data), backoff=0.1).start()
    wait("half of the files", lambda: len(list(data.glob("image-*"))) >= FILES // 2 - 16)
    wait("a fetch that stands still", lambda: len(bodies(store)) > FILES // 2)
    wait("its heart", lambda: (read_json(run.run.heartbeat) or {}).get("phase", "").startswith("fetching"))
    assert read_json(run.run.heartbeat)["step"] is None
    (fetching,) = [process for process in run.workers() if "launcher.fetch" in command_line(process.pid)]
    fetching.signal(signal.SIGSTOP)
    wait("it to stand still", lambda: "State:\tT" in Path(f"/proc/{fetching.pid}/status").read_text())
    there = {path.name for path in data.glob("image-*")}
    store.rule, asked = (lambda request: None), len(bodies(store))
    fetching.signal(signal.SIGKILL)
    assert run.end() == 0, run.window
    again = {Path(path).name for path in bodies(store)[asked:]}
    assert there and not again & there and again | there == {f"image-{n}" for n in range(FILES)}
    assert run.states == ["crashed", "finished"]
    assert not list(data.glob(".*.tmp-*"))


def test_a_stop_ends_a_fetch(toy: Make, store: Proxy, tmp_path: Path) -> None:
    store.rule = lambda request: Fault(silent=True) if "image-" in request.path else None
    run = toy("", fetch=wanted(tmp_path / "coco")).start()
    wait("the fetch", lambda: bodies(store))
    run.run.stop_requested.touch()
    assert run.end() == 0 and run.final["state"] == "stopped" and run.states == ["stopped"]
    run.assert_gone()


def test_what_is_not_allowed_is_said_and_not_tried_again(toy: Make, store: Proxy, tmp_path: Path) -> None:
    def denied(request: Request) -> Fault | None:
        return Fault(status=403, code="AccessDenied") if request.path.startswith("/runs") else None

    store.rule = denied
    run = toy("", fetch=wanted(tmp_path / "coco")).start()
    assert run.end() == 1 and run.states == ["failed"]
    assert "credentials may not do this" in run.final["reason"]


def test_launch_looks_before_it_starts(store: Proxy, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"

    def checked(source: str, to: str = "coco") -> None:
        told = {"program": {"script": "x.py"}, "fetch": [{"from": source, "to": to}]}
        recipe.write_text(yaml.safe_dump(told))
        fetch.check(load(recipe), tmp_path)

    checked("s3://runs/coco/train")
    with pytest.raises(UserError, match="nothing to fetch at s3://runs/cocoo"):
        checked("s3://runs/cocoo")
    with pytest.raises(UserError, match="no bucket 'nowhere'"):
        checked("s3://nowhere/coco")
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / fetch.MARKER).write_text(json.dumps({"schema": 1, "from": "s3://runs/other"}))
    with pytest.raises(UserError, match="holds what was fetched from s3://runs/other"):
        checked("s3://runs/coco/train")


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
