"""A mirrored run of the toy program that is killed at random moments, and what must be true after each.

After a SIGKILL the run goes on from the newest checkpoint that had been renamed into place; on an empty disk,
from the newest whose manifest had reached the store. Neither is ever torn.
"""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import boto3

from launcher.checkpoints import Mark, checkpoints, newest, verify
from launcher.mirror import pull_run, restore
from launcher.mirror.layout import marks_of
from launcher.mirror.verify import verify as verdicts_of
from launcher.rundir import RunDir, read_json, write_json
from launcher.supervisor import control, processes
from tests.launcher.conftest import Toy, wait
from tests.launcher.store_fixture import Weed

ARGS = "--steps 1000000 --every 20 --pace 0.03 --ballast 17"  # MB: more than one part of an upload
KINDS = ("all", "supervisor", "workers", "supervisor and workers")


def killed_again_and_again(toy: Callable[..., Toy], server: Weed, kills: int, folder: Path) -> None:
    """Raises AssertionError; `folder` is for machines that have nothing."""
    run = toy(ARGS, crashes=10 * kills)
    prefix = f"lab/{folder.name}/{run.run.id}"
    write_json(run.run.run, (read_json(run.run.run) or {}) | {"url": f"s3://runs/{prefix}"})
    run.start()
    # All kinds in turn, and each second one takes everything: then nothing moves while we look.
    for number in range(kills):
        wait("an attempt at work", lambda: has_resumed(run))
        time.sleep(random.uniform(0.0, 2.0))
        kind = KINDS[number // 2 % len(KINDS)] if number % 2 else "all"
        attempt = beat(run)["fence"]
        kill(run, kind)
        before = newest_here(run)
        stored = whole(server, prefix) if kind == "all" else []
        bring_to_an_empty_disk(server, prefix, folder / str(number), stored)
        if kind == "all":
            run.start()
        wait(f"the way back after kill {number} of {kind}", lambda: beat(run)["fence"] > attempt)  # noqa: B023
        wait("where it went on", lambda: has_resumed(run))
        came = beat(run)["resumed"]
        assert came == before.step if kind == "all" else came >= before.step, (kind, came, before)
        for mark in checkpoints(run.run):
            torn = verify(run.run.checkpoints / mark.name)
            assert torn is None or not (run.run.checkpoints / mark.name).exists(), torn
    control.stop(run.run)
    assert run.end() in (0, 1) and run.final["state"] == "stopped"
    assert whole(server, prefix)[0] == newest_here(run)
    pulled = pull_run(f"s3://runs/{prefix}", server.settings, folder / "pulled")
    assert checkpoints(pulled) == whole(server, prefix)
    assert uploads(server, prefix) == []
    for left in (
        *run.run.path.rglob(".tmp-*"),
        *run.run.path.glob(".synced*"),
        *run.run.path.glob(".mirrored*"),
    ):
        raise AssertionError(f"{left} was left")


def whole(server: Weed, prefix: str) -> list[Mark]:
    """What is in the store, newest first: all of it whole, and with metrics that reach it."""
    store = server.store(prefix)
    verdicts = verdicts_of(None, store)
    assert all(verdict.whole for verdict in verdicts), verdicts
    if verdicts:
        metrics = store.get_bytes("metrics.jsonl")[0].splitlines()
        assert json.loads(metrics[-1])["step"] >= verdicts[0].mark.step
    return [verdict.mark for verdict in verdicts]


def uploads(server: Weed, prefix: str) -> list[str]:
    """Unfinished multipart uploads below `prefix`."""
    session = boto3.Session(profile_name=server.env["AWS_PROFILE"])  # the default one remembers others' keys
    client = session.client("s3", endpoint_url=server.env["AWS_ENDPOINT_URL"])
    found = client.list_multipart_uploads(Bucket="runs").get("Uploads", [])
    return [upload["Key"] for upload in found if upload["Key"].startswith(prefix)]


def beat(run: Toy) -> dict[str, int]:
    return read_json(run.run.heartbeat) or {"fence": 0}


def has_resumed(run: Toy) -> bool:
    return beat(run).get("resumed") is not None and run.workers() != []


def newest_here(run: Toy) -> Mark:
    return next(iter(checkpoints(run.run)), Mark(0, 0))


def kill(run: Toy, kind: str) -> None:
    """SIGKILL. Of all, the guard first: it would start another supervisor."""
    doomed = {
        "all": lambda: sorted(processes.of_run(run.run.path), key=lambda process: process.pid),
        "supervisor": lambda: [found for found in [processes.inspect(run.supervisor)] if found],
        "workers": lambda: run.workers(),
    }
    for what in ("workers", "supervisor") if kind == "supervisor and workers" else (kind,):
        for _ in range(3 if what == "all" else 1):
            for process in doomed[what]():
                process.signal(signal.SIGKILL)
    if kind == "all":
        wait("the end of everything", lambda: not processes.of_run(run.run.path), 20)
        assert run.guard
        run.guard.wait(20)


def bring_to_an_empty_disk(server: Weed, prefix: str, folder: Path, stored: list[Mark]) -> None:
    """`stored`: what is in the store while nothing moves; else it is looked up, and may grow meanwhile."""
    store = server.store(prefix)
    there = stored or marks_of(entry.key for entry in store.list())
    empty = RunDir(folder / prefix.rpartition("/")[2])
    empty.path.mkdir(parents=True)
    restore.restore(empty, store)
    found = newest(empty)
    if there:
        assert found is not None and (found == there[0] if stored else found >= there[0])
    shutil.rmtree(folder)
