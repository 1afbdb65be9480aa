"""The mirror over 2,000 files with nothing new: how long a pass takes, and what it asks of the store. Also
what its first pass takes, beside a plain loop of puts."""

import json
import os
import tempfile
import time
from pathlib import Path

from bench.measure import Result, in_turn, show, summary
from launcher.mirror import Mirror
from launcher.rundir import RunDir, write_json
from launcher.storage import Store, StoreSettings, open_store
from tests.launcher.proxy import proxied
from tests.launcher.store_fixture import weed

FILES, LIMIT = 2000, 0.030  # seconds that a pass with nothing new may take
ID = "bench-20260101-000000-{:04x}"


def main() -> list[Result]:
    with tempfile.TemporaryDirectory() as name, weed(Path(name, "weed")) as server:
        os.environ |= server.env
        with proxied(server.env["AWS_ENDPOINT_URL"]) as proxy:
            quiet = mirrored(Path(name), 0, proxy.url)
            before = len(proxy.seen)
            again = summary(
                f"a pass over {FILES:,} files with nothing new",
                "<= 1",
                ("the pass", "its limit"),
                [(seconds(quiet), LIMIT) for _ in range(20)],
            )
            asked = [(float(len(proxy.seen) - before), 1.0)]
            none = summary("requests of those passes", "<= 0", ("20 passes", "1"), asked, "requests")
        numbers = iter(range(1, 1000))
        plain = open_store("s3://runs/plain")
        first = in_turn(
            f"the first pass over {FILES:,} files",
            "<= 0.7",
            ("the mirror", lambda: fresh(Path(name), next(numbers))),
            ("one put after another", lambda: one_by_one(Path(name, ID.format(0)), plain)),
            pairs=3,
        )
        return [again, none, first]


def make(root: Path, number: int) -> RunDir:
    run = RunDir(root / ID.format(number))
    for index in range(FILES - 2):
        path = run.code / f"{index % 40}" / f"{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{number} {index}\n" * 100)
    write_json(run.run, {"id": run.id})
    run.recipe.write_text("{}\n")
    return run


def mirrored(root: Path, number: int, endpoint: str | None = None) -> Mirror:
    """A mirror that has sent everything, as the next supervisor of the run finds it."""
    run = make(root, number)
    store = open_store(f"s3://runs/mirror/{run.id}", StoreSettings(endpoint))
    for attempt in (1, 2):
        mirror = Mirror(run, store, every=60, keep=3)
        mirror.claim(f"supervisor {attempt}", attempt)
        assert mirror._pass(), json.dumps(mirror._said)
    return mirror


def seconds(mirror: Mirror) -> float:
    began = time.perf_counter()
    assert mirror._pass()
    return time.perf_counter() - began


def fresh(root: Path, number: int) -> float:
    run = make(root, number)
    mirror = Mirror(run, open_store(f"s3://runs/mirror/{run.id}"), every=60, keep=3)
    mirror.claim("supervisor", 1)
    return seconds(mirror)


def one_by_one(folder: Path, store: Store) -> float:
    began = time.perf_counter()
    for path in folder.rglob("*"):
        if path.is_file():
            store.put_file(path.relative_to(folder).as_posix(), path, growing=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    show(main())
