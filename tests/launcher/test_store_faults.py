"""`launch store sync` when the network, the store, the disk, the clock or the files themselves go wrong.

Each row: what is stored or brought is right by its hash, or an error names what is not; no command hangs; and
nothing else is touched (faults.py looks at the neighbours). Commands that are killed: test_store_cli.py.
"""

import hashlib
import itertools
import os
import random
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.storage.probes import PROBE
from tests.launcher.faults import (
    BIG,
    MB,
    NO_HANG,
    Place,
    always,
    filled,
    hashes,
    may_only_read,
    of,
    placed,
    provided,
    small_disk,
    temporary,
    two_keys,
    wrong_clock,
)
from tests.launcher.proxy import Fault, Request, only_first
from tests.launcher.store_fixture import Weed

Rule = Callable[[Request], Fault | None]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    with two_keys(tmp_path_factory.mktemp("weed")) as running:
        yield running


@pytest.fixture
def place(server: Weed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with placed(server, tmp_path, monkeypatch) as made:
        yield made


def nothing(request: Request) -> None:
    """Goes wrong."""


def first_of(*rules: Rule) -> Rule:
    return lambda request: next((fault for rule in rules if (fault := rule(request))), None)


# --- files that change


def test_big_files_that_change_while_they_are_sent(place: Place) -> None:
    ways = {"grows", "shrinks", "is-rewritten"}
    made = filled(place.here / "up", dict.fromkeys(ways, BIG) | {"other": 1000})
    changed = set()

    def change(request: Request) -> None:
        for way in ways - changed:
            if of("PUT", way, "partNumber=2")(request):
                changed.add(way)
                with (place.here / "up" / way).open("r+b") as file:
                    if way == "grows":
                        file.seek(0, os.SEEK_END)
                    if way == "shrinks":
                        file.truncate(BIG - MB)
                    else:
                        file.write(b"other")

    place.proxy.rule = change
    said = place.store("sync", "up", place.url, status=1)
    assert all(f"upload failed: up/{way} to {place.url}/{way}: the file " in said for way in ways)
    assert changed == ways and place.stored() == {"other": made["other"]}
    place.store("sync", "up", place.url)
    assert place.stored() == hashes(place.here / "up")


@pytest.mark.soak
def test_small_files_that_are_written_all_the_time(place: Place) -> None:
    """Each of them holds one letter, so what was torn is seen."""
    names, stop, size = [f"file-{number}" for number in range(20)], threading.Event(), 500_000
    filled(place.here / "up", dict.fromkeys(names, 0))

    def write() -> None:
        for turn in itertools.count():
            for name in names:
                if stop.wait(0.002):
                    return
                with (place.here / "up" / name).open("r+b") as file:
                    file.truncate(size + turn % 3)
                    file.write(bytes([65 + turn % 26]) * (size + turn % 3))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(10):
            _, said = place.end(place.begin("cp", "--recursive", "up", place.url))
            store = place.direct()
            stored = {entry.key: store.get_bytes(entry.key)[0] for entry in store.list()}
            assert all(name in stored or f"up/{name}" in said for name in names)
            assert all(len({*body} - {0}) <= 1 for body in stored.values()), "no letter beside another"
    finally:
        stop.set()
        writer.join()
    place.store("cp", "--recursive", "up", place.url)
    assert place.stored() == hashes(place.here / "up")


# --- on the way


def test_bits_that_flip_on_their_way_up(place: Place) -> None:
    sizes = {
        "small-once": 100_000,
        "big-once": BIG,
        "small-always": 100_000,
        "big-always": BIG,
        "other": 1000,
    }
    made = filled(place.here / "up", sizes)
    flip = Fault(flip_request=True)
    place.proxy.rule = first_of(
        only_first(1, flip, of("PUT", "/small-once")), always(flip, of("PUT", "/small-always")),
        only_first(1, flip, of("PUT", "/big-once", "partNumber=1")), always(flip, of("PUT", "/big-always")),
    )  # fmt: skip
    said = place.store("sync", "up", place.url, status=1)
    assert "up/small-always" in said and "up/big-always" in said and "2 failed" in said
    assert place.stored() == {name: made[name] for name in ("small-once", "big-once", "other")}
    place.proxy.rule = nothing
    place.store("sync", "up", place.url)
    assert place.stored() == made


def test_bits_that_flip_and_answers_that_are_cut_on_their_way_down(place: Place) -> None:
    kinds = ("once", "cut", "always")
    made = filled(place.here / "up", {f"{size}-{kind}": 100_000 if size == "small" else BIG
                                      for size in ("small", "big") for kind in kinds})  # fmt: skip
    place.put(place.here / "up")
    before = filled(place.here / "down", {"small-always": 500, "big-always": 500}, seed=1)
    flip, cut = Fault(flip_response=True), Fault(cut=50_000)
    place.proxy.rule = first_of(
        only_first(1, flip, of("GET", "/small-once")), only_first(1, flip, of("GET", "/big-once")),
        only_first(1, cut, of("GET", "/small-cut")), only_first(2, cut, of("GET", "/big-cut")),
        always(flip, of("GET", "-always")),
    )  # fmt: skip
    said = place.store("sync", place.url, "down", status=1)
    assert "small-always" in said and "big-always" in said and "2 failed" in said
    assert hashes(place.here / "down") == made | before, "what was there stays"
    place.proxy.rule = nothing
    place.store("sync", place.url, "down")
    assert hashes(place.here / "down") == made


@pytest.mark.parametrize("lengths", [(8, 8, 1), (6, 5, 5), (5, 6, 5)])
def test_a_bit_that_flips_in_what_another_program_sent_in_parts(
    place: Place, lengths: tuple[int, ...]
) -> None:
    """Its etag is made of the parts' MD5s. Where they are not of one length it tells us nothing, and what
    came is taken: at once, or if it comes the same again."""
    data, at, parts = random.Random(0).randbytes(sum(lengths) * MB), 0, []
    goal = {"Bucket": "runs", "Key": f"{place.prefix}/theirs"}
    upload = place.client.create_multipart_upload(**goal)["UploadId"]
    for number, length in enumerate(lengths, start=1):
        body, at = data[at : at + length * MB], at + length * MB
        sent = place.client.upload_part(**goal, UploadId=upload, PartNumber=number, Body=body)
        parts.append({"PartNumber": number, "ETag": sent["ETag"]})
    place.client.complete_multipart_upload(**goal, UploadId=upload, MultipartUpload={"Parts": parts})
    if lengths == (8, 8, 1):
        place.proxy.rule = only_first(1, Fault(flip_response=True), of("GET", "/theirs"))
    place.store("sync", place.url, "down")
    assert hashes(place.here / "down") == {"theirs": hashlib.sha256(data).hexdigest()}
    # A store that knows no parts is believed.
    place.proxy.rule = always(Fault(501, "NotImplemented"), of("HEAD", "/theirs", "partNumber=1"))
    place.store("sync", place.url, "again")
    assert hashes(place.here / "again") == hashes(place.here / "down")
    assert any(place.proxy.rule(request) for request in place.proxy.seen)


def test_answers_that_are_lost(place: Place) -> None:
    """The store has done it, and we do not hear of it; or it answers 200 with an error, as S3 does where it
    has begun to answer before it was done."""
    made = filled(place.here / "up", {"small": 1000, "lost": BIG, "said": BIG})
    lost = Fault(lost=True)
    rules = [
        only_first(1, lost, of("PUT", "/small")), only_first(1, lost, of("POST", "/lost", "uploads")),
        only_first(1, lost, of("PUT", "/lost", "partNumber=2")),
        only_first(1, lost, of("POST", "/lost", "uploadId=")),
        only_first(1, Fault(200, "InternalError"), of("POST", "/said", "uploadId=")),
    ]  # fmt: skip
    place.proxy.rule = first_of(*rules)
    place.store("sync", "up", place.url)
    assert place.stored() == made


@pytest.mark.soak
def test_an_error_that_always_says_200(place: Place) -> None:
    filled(place.here / "up", {"big": BIG})
    place.proxy.rule = always(Fault(200, "InternalError"), of("POST", "uploadId="))
    said = place.store("cp", "up/big", f"{place.url}/new", status=1)
    assert "InternalError" in said and place.stored() == {}
    place.proxy.rule = nothing
    place.store("cp", "up/big", f"{place.url}/big")
    assert place.stored() == hashes(place.here / "up")


# --- a store in trouble


@pytest.mark.parametrize("files", [50, pytest.param(201, marks=pytest.mark.soak)])
def test_thirty_percent_slow_down(place: Place, files: int) -> None:
    """Which answers it hits is drawn once for all: by the object, and how often that was asked for. Not
    those to the probes, whose keys are new ones each time."""
    made = filled(place.here / "up", {f"d{n % 7}/file-{n}": 2000 + n for n in range(files)})
    asked: Counter[str] = Counter()

    def rule(request: Request) -> Fault | None:
        name = f"{request.method} {Path(request.path.partition('?')[0]).name}"
        asked[name] += 1
        drawn = hashlib.sha256(f"{name} {asked[name]}".encode()).digest()[0]
        return Fault(503) if drawn < 77 and PROBE not in name else None

    place.proxy.rule = rule
    place.store("sync", "up", place.url)
    place.store("sync", place.url, "down")
    assert place.stored() == made == hashes(place.here / "down")
    assert max(asked.values()) > 2


IMPATIENT = """
import launcher.storage.connections as connections
connections.SILENCE = connections.PATIENCE = {seconds}
"""


@pytest.mark.parametrize("seconds", [0.5, pytest.param(15.0, marks=pytest.mark.soak)])
def test_a_store_that_hangs_or_trickles(
    place: Place, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once; but for a soak not all, and with less patience than they have."""
    made = filled(place.here / "up", {f"file-{n}": 3000 for n in range(20)})
    big = filled(place.here / "big", {"big": BIG})
    for name in ("gets", "trickled", "listing"):
        place.put(place.here / "up", name)
    silent, trickle, url = Fault(silent=True), Fault(trickle=True), place.url
    rows: dict[str, tuple[Rule, list[str]]] = {
        "all": (always(silent, lambda request: "/all" in request.path), ["up", f"{url}/all"]),
        "puts": (always(silent, of("PUT", "/puts/file-")), ["up", f"{url}/puts"]),
        "parts": (always(silent, of("PUT", "partNumber")), ["big", f"{url}/parts"]),
        "gets": (always(silent, of("GET", "/gets/file-")), [f"{url}/gets", "gets"]),
        "trickled": (always(trickle, of("GET", "/trickled/file-")), [f"{url}/trickled", "trickled"]),
        "listing": (always(trickle, of("GET", "list-type", "listing")), [f"{url}/listing", "listing"]),
    }
    place.proxy.rule = first_of(*(rule for rule, _ in rows.values()))
    folder = place.here.parent / "impatient"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(IMPATIENT.format(seconds=seconds))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    names = rows if seconds > 1 else ("all", "parts", "listing")
    begun = {name: place.begin("sync", *rows[name][1]) for name in names}
    for name, process in begun.items():
        status, said = place.end(process, NO_HANG if names is rows else 240)
        assert status == 1 and "does not answer" in said, (name, said)
        assert hashes(place.here / name) == {}
    assert not temporary(place.here)
    place.proxy.rule = nothing
    for name in ("all", "puts", "parts"):
        assert place.stored(f"{place.prefix}/{name}") == {}
    place.store("sync", "big", f"{url}/parts")
    assert place.stored(f"{place.prefix}/parts") == big
    place.store("sync", f"{url}/gets", "gets")
    assert hashes(place.here / "gets") == made


@pytest.mark.parametrize("back", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_the_server_is_killed(place: Place, back: bool) -> None:
    """In the middle of a sync; it comes back at once, or after the command has given up."""
    made = filled(place.here / "up", {f"file-{n}": 20_000 for n in range(60)} | {"big": BIG})
    puts: list[Request] = []

    def rule(request: Request) -> None:
        puts.extend([request] if of("PUT")(request) else [])
        if of("PUT")(request) and len(puts) == 30:
            place.server.kill()
            if back:
                place.server.start()

    place.proxy.rule = rule
    status, said = place.end(place.begin("sync", "up", place.url))
    if not back:
        assert status == 1 and "does not answer" in said and "not tried" in said
        place.server.start()
    assert status == 0 or "does not answer" in said
    place.store("sync", "up", place.url)
    assert place.stored() == made


# --- credentials, rights, clock


def test_credentials_that_have_expired(place: Place) -> None:
    made = filled(place.here / "up", {"a": 1000, "b": 1000})
    expired = Fault(403, "ExpiredToken")
    place.proxy.rule = lambda request: expired
    for argv in (["sync", "up", place.url], ["cp", "up/a", f"{place.url}/a"], ["ls", place.url],
                 ["cp", f"{place.url}/x", "x"], ["sync", place.url, "down"]):  # fmt: skip
        said = place.store(*argv, status=1)
        assert "the credentials are refused" in said and "ExpiredToken" in said, (argv, said)
    assert place.stored() == {} and not (place.here / "down").exists()
    place.proxy.rule = always(expired, of("PUT"))
    said = place.store("sync", "up", place.url, status=1)
    assert "up/a" in said and "ExpiredToken" in said
    place.proxy.rule = nothing
    place.store("sync", "up", place.url)
    assert place.stored() == made


def test_credentials_that_run_out_during_a_transfer(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    made = filled(place.here / "up", {f"file-{n}": 1000 for n in range(20)})
    calls = provided(place.server, place.here.parent, 901, monkeypatch)  # a second on, botocore wants others
    place.proxy.rule = lambda request: time.sleep(0.1)
    place.store("sync", "up", place.url)
    assert place.stored() == made and len(calls.read_text()) > 1


def test_credentials_that_are_old_when_they_come(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(place.here / "up", {"a": 1000})
    provided(place.server, place.here.parent, -5, monkeypatch)
    said = place.store("sync", "up", place.url, status=1)
    assert "no usable credentials" in said and place.server.secret not in said


def test_a_clock_that_is_wrong(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    made = filled(place.here / "up", {"a": 1000})
    place.put(place.here / "up")
    for argv in (["sync", "up", f"{place.url}/new"], ["cp", "up/a", f"{place.url}/new"],
                 ["cp", f"{place.url}/a", "a"], ["sync", place.url, "down"], ["ls", place.url]):  # fmt: skip
        with wrong_clock(monkeypatch):
            assert "refuses this machine's clock" in place.store(*argv, status=1)
    assert place.stored() == made and [path.name for path in place.here.iterdir()] == ["up"]


def test_credentials_that_may_only_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    made = filled(place.here / "up", {"a": 1000, "b": 1000})
    place.put(place.here / "up")
    filled(place.here / "up", {"a": 2000, "big": BIG})
    may_only_read(place.here.parent, monkeypatch)
    for argv in (["sync", "up", place.url, "--delete"], ["cp", "up/big", f"{place.url}/"],
                 ["rm", f"{place.url}/a"], ["mv", f"{place.url}/a", "moved"]):  # fmt: skip
        said = place.store(*argv, status=1)
        assert "the credentials may not do this in the bucket 'runs'" in said, (argv, said)
    place.store("sync", place.url, "down")
    place.server.use(monkeypatch)
    assert hashes(place.here / "down") == made == place.stored()


# --- disks


def test_a_disk_that_fills_up(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(place.here / "up", {"big": BIG, "medium": 900_000, **{f"file-{n}": 100_000 for n in range(10)}})
    place.put(place.here / "up")
    stored = place.stored()
    with small_disk(place.here / "disk", monkeypatch) as disk:
        before = filled(disk, {"big": 200_000, "mine": 1000}, seed=1)
        said = place.store("sync", place.url, "disk", status=1)
        assert "No space left on device" in said and "not tried" in said
        here = hashes(disk)
        assert not temporary(disk) and before.items() <= here.items()
        assert all(here[name] == stored[name] for name in here if name not in before)


@pytest.mark.soak
def test_a_limit_on_the_size_of_files(place: Place) -> None:
    made = filled(place.here / "up", {"big": BIG, "small": 1000})
    place.put(place.here / "up")
    before = filled(place.here / "down", {"big": 500}, seed=1)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MB, MB))

    status, said = place.end(place.begin("sync", place.url, "down", preexec_fn=limit))
    assert status == 1 and "big" in said and "File too large" in said
    assert hashes(place.here / "down") == before | {"small": made["small"]} and not temporary(place.here)


# --- commands that are killed


@pytest.mark.soak
def test_killed_at_random(place: Place) -> None:
    made = filled(place.here / "up", {"big": 2 * BIG, **{f"file-{n}": 3000 for n in range(60)}})
    for argv in (["sync", "up", place.url], ["sync", place.url, "down"]):
        for turn in range(40):
            process = place.begin(*argv)
            time.sleep(random.uniform(0.3, 3.0))
            process.send_signal(signal.SIGTERM if turn % 3 == 0 else signal.SIGKILL)
            place.end(process)
        place.store(*argv)
    assert place.stored() == made == hashes(place.here / "down")
