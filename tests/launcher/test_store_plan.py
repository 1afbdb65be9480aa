"""`store sync` against a real bucket: a table of cases, each with what `aws s3 sync` does and what we do."""

import functools
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest

from launcher import transfer
from launcher.errors import UserError
from launcher.storage import Entry, bucket
from launcher.transfer import Filters
from launcher.transfer.plan import compare, hostile, is_marker, same_time, surplus
from tests.launcher.store_fixture import Weed, weed

OLD, NEW, SAME = -3600.0, 3600.0, None  # a local file's time, seconds from that of the object of its name


@dataclass(frozen=True)
class Case:
    """`up`: folder to bucket, `down`: bucket to folder, `over`: bucket to bucket.

    Files by key: their content, and for local ones their time. `copied` is what we copy; `aws`, what `aws s3
    sync` copies where that is something else (compared once with awscli 1.46, all rows): see the README.
    """

    name: str
    way: str
    source: dict[str, tuple[str, float | None]]
    target: dict[str, tuple[str, float | None]] = field(default_factory=dict)
    options: str = ""
    copied: str = ""  # keys, separated by |
    deleted: str = ""
    aws: str | None = None
    left_by: str = "aws"  # who has put the objects: `aws`, or `us` with a file's time and hash beside it

    def __str__(self) -> str:
        return self.name


A, B = ("one", OLD), ("two", OLD)
TREE = {"a.txt": A, "b.jpg": A, "d/a.txt": A, "d/e/b.jpg": B}
CASES = [
    # what is new, and sizes
    Case("up: all is new", "up", TREE, copied="a.txt|b.jpg|d/a.txt|d/e/b.jpg"),
    Case("down: all is new", "down", TREE, copied="a.txt|b.jpg|d/a.txt|d/e/b.jpg"),
    Case("over: all is new", "over", TREE, copied="a.txt|b.jpg|d/a.txt|d/e/b.jpg"),
    Case("up: one of two is new", "up", {"a": A, "b": A}, {"a": A}, copied="b"),
    Case("up: another size", "up", {"a": ("longer", OLD)}, {"a": A}, copied="a"),
    Case("down: another size", "down", {"a": ("longer", None)}, {"a": ("one", NEW)}, copied="a"),
    Case("over: another size", "over", {"a": ("longer", None)}, {"a": A}, copied="a"),
    Case("up: an empty file", "up", {"empty": ("", OLD)}, copied="empty"),
    Case("up: an empty file again", "up", {"empty": ("", OLD)}, {"empty": ("", OLD)}),
    # times, with equal sizes
    Case("up: older than the object", "up", {"a": A}, {"a": A}),
    Case("up: newer than the object", "up", {"a": ("one", NEW)}, {"a": A}, copied="a"),
    Case("up: older, and another content", "up", {"a": ("eno", OLD)}, {"a": A}),
    Case("down: the object's time", "down", {"a": A}, {"a": ("one", SAME)}),
    Case("down: older here, changed there", "down", {"a": ("eno", None)}, {"a": A}, copied="a", aws=""),
    Case("down: older here, nobody knows", "down", {"a": A}, {"a": A}, copied="a", aws=""),
    Case("down: newer here, changed there", "down", {"a": ("eno", None)}, {"a": ("one", NEW)}, copied="a"),
    Case("down: it was uploaded from here", "down", {"a": A}, {"a": A}, left_by="us"),
    Case("down: ours, newer here, equal", "down", {"a": A}, {"a": ("one", NEW)}, left_by="us", aws="a"),
    Case("down: ours, older here, changed", "down", {"a": ("eno", NEW)}, {"a": A},
         copied="a", left_by="us", aws=""),
    Case("over: the target is newer", "over", {"a": A}, {"a": ("eno", NEW)}),
    Case("over: the source is newer", "over", {"a": ("eno", NEW)}, {"a": A}, copied="a"),
    # contents: aws has no --checksum, and goes by the times
    Case("up: --checksum, older and changed", "up", {"a": ("eno", OLD)}, {"a": A}, "--checksum", "a", aws=""),
    Case("up: --checksum, newer and equal", "up", {"a": ("one", NEW)}, {"a": A}, "--checksum", aws="a"),
    Case("down: --checksum, same time, changed", "down", {"a": ("eno", None)}, {"a": ("one", SAME)},
         "--checksum", "a", aws=""),
    Case("over: --checksum", "over", {"a": ("eno", OLD), "b": B}, {"a": A, "b": B}, "--checksum",
         "a", aws=""),
    # filters
    Case("up: --exclude", "up", TREE, options="--exclude *.jpg", copied="a.txt|d/a.txt"),
    Case("up: * goes through /", "up", TREE, options="--exclude d*", copied="a.txt|b.jpg"),
    Case("up: --include after", "up", TREE, options="--exclude * --include *.jpg", copied="b.jpg|d/e/b.jpg"),
    Case("up: --include before", "up", TREE, options="--include *.jpg --exclude *"),
    Case("up: the last one decides", "up", TREE, options="--exclude * --include d/* --exclude d/e/*",
         copied="d/a.txt"),
    Case("down: one level", "down", TREE, options="--exclude */*", copied="a.txt|b.jpg"),
    Case("down: ? and []", "down", TREE, options="--exclude * --include [ab].t?t", copied="a.txt"),
    # --delete
    Case("up: the surplus stays", "up", {"a": A}, {"a": A, "old": B}),
    Case("up: --delete", "up", {"a": A}, {"a": A, "old": B, "d/old": B}, "--delete", deleted="d/old|old"),
    Case("down: --delete", "down", {"a": A}, {"a": ("one", SAME), "d/old": B}, "--delete", deleted="d/old"),
    Case("over: --delete", "over", {"a": A}, {"old": B}, "--delete", copied="a", deleted="old"),
    Case("up: --delete --exclude protects", "up", {"a": A}, {"a": A, "keep.log": B, "old": B},
         "--delete --exclude *.log", deleted="old"),
    Case("down: --delete --include", "down", {"a": A, "b": A}, {"c": B, "d.x": B},
         "--delete --exclude * --include a --include c", copied="a", deleted="c"),
    # names
    Case("up: spaces and signs", "up", {"a b.txt": A, "d e/f+g=h&i?j#k%20.txt": A, "'q'": A},
         copied="'q'|a b.txt|d e/f+g=h&i?j#k%20.txt"),
    Case("down: spaces and signs", "down", {"a b.txt": A, "d e/f+g=h&i#k%20.txt": A},
         copied="a b.txt|d e/f+g=h&i#k%20.txt"),
    Case("up: Unicode", "up", {"ä/é.txt": A, "日本/語.txt": A, "e\u0301": B},
         copied="e\u0301|ä/é.txt|日本/語.txt"),
    Case("down: Unicode", "down", {"ä/é.txt": A, "日本/語.txt": A}, copied="ä/é.txt|日本/語.txt"),
    Case("over: Unicode and spaces", "over", {"ä é.txt": A}, copied="ä é.txt"),
    # aws relies on listings in the order of bytes, which SeaweedFS's are not
    Case("up: order of a-b, a/b, a.b", "up", {"a-b": A, "a/b": A, "a.b": A}, {"a/b": A, "a-b": A, "a.b": A},
         aws="a-b|a.b"),
]  # fmt: skip


@functools.cache
def client(server: Weed) -> Any:
    """Another program's way to the bucket."""
    session = boto3.session.Session(profile_name=server.settings.profile, region_name=server.settings.region)
    return session.client("s3", endpoint_url=server.settings.endpoint)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    with weed(tmp_path_factory.mktemp("weed")) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucket, "Access", functools.cache(bucket.Access))  # most of a short call
        yield server


class Lines(transfer.Report):
    def __init__(self) -> None:
        self.done: list[str] = []
        self.problems: list[str] = []

    def line(self, text: str) -> None:
        self.done.append(text)

    def problem(self, text: str) -> None:
        self.problems.append(text)


def arrange(case: Case, server: Weed, folder: Path, prefix: str) -> tuple[str, str]:
    """Make the two places of a case; what to call them."""
    sides = {"source": case.source, "target": case.target}
    local = {"up": "source", "down": "target"}.get(case.way)
    names = {side: str(folder / side) if side == local else f"s3://runs/{prefix}/{side}" for side in sides}
    rows = [(time or 0, side, key, text) for side in sides if side != local
            for key, (text, time) in sides[side].items()]  # fmt: skip
    late = None
    for when, side, key, text in sorted(rows):
        if case.way == "over" and late is not None and when > late:
            time.sleep(1.1)  # the store's clock is the only one that objects have
        late = when
        put(server, f"{prefix}/{side}/{key}", text, when if case.left_by == "us" else None, folder)
    if local:
        (folder / local).mkdir()
        other = server.store(f"{prefix}/{'target' if local == 'source' else 'source'}")
        stored = {entry.key: entry.mtime for entry in other.list()}
        for key, (text, when) in sides[local].items():
            base = stored.get(key, time.time())
            write(folder / local / key, text, base + (when or 0))
            if case.left_by == "us" and when == OLD and sides["source"][key][1] == OLD:
                info = other.stat(key)
                assert info.file_mtime_ns is not None
                os.utime(folder / local / key, ns=(info.file_mtime_ns, info.file_mtime_ns))
    return names["source"], names["target"]


def put(server: Weed, key: str, text: str, age: float | None, folder: Path) -> None:
    """An object, as another program has left it or, with a file's time, as we do."""
    if age is None:
        client(server).put_object(Bucket="runs", Key=key, Body=text.encode())
    else:
        write(folder / "was", text, time.time() + age)
        server.store().put_file(key, folder / "was")


def write(path: Path, text: str, mtime: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (mtime, mtime))


def rules(words: list[str]) -> list[tuple[bool, str]]:
    pairs = itertools.pairwise(words)
    return [(word == "--include", value) for word, value in pairs if word in ("--include", "--exclude")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sync_as_aws_does_but_for_what_it_misses(
    case: Case, server: Weed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.use(monkeypatch)
    source, target = arrange(case, server, tmp_path, tmp_path.name)
    words, told = case.options.split(), Lines()
    asked: Any = {option: f"--{option}" in words for option in ("delete", "checksum")}
    asked["filters"] = Filters(rules(words))
    dry = transfer.sync(source, target, dry_run=True, **asked)
    summary = transfer.sync(source, target, report=told, **asked)
    copied = [line.split(f" to {target}/")[1] for line in told.done if not line.startswith("delete: ")]
    deleted = [line.split(f"{target}/")[1] for line in told.done if line.startswith("delete: ")]
    assert "|".join(sorted(copied)) == case.copied
    assert "|".join(sorted(deleted)) == case.deleted
    assert summary.complete and not told.problems
    assert (dry.done, dry.deleted, dry.same) == (summary.done, summary.deleted, summary.same)
    again = transfer.sync(source, target, **asked)
    assert (again.done, again.deleted) == (0, 0) or "newer" in case.name, "what was brought is up to date"


def test_empty_folders_markers_and_2500_keys(
    server: Weed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty folders are nothing, objects that stand for folders are passed over, and listings have pages."""
    server.use(monkeypatch)
    source, back = tmp_path / "source", tmp_path / "back"
    for number in range(2500):
        write(source / f"{number % 7}" / f"{number:04}", str(number), time.time() - 3600)
    (source / "empty" / "er").mkdir(parents=True)
    url = f"s3://runs/{tmp_path.name}/many"
    assert transfer.sync(str(source), url).done == 2500
    for marker in ("", "empty/", "0/"):
        client(server).put_object(Bucket="runs", Key=f"{tmp_path.name}/many/{marker}", Body=b"")
    assert transfer.sync(str(source), url + "/", delete=True) == transfer.Summary(same=2500)
    assert transfer.sync(url, str(back)).done == 2500
    assert (back / "3" / "0010").read_text() == "10"
    assert transfer.sync(url, str(back), delete=True) == transfer.Summary(same=2500)


def test_filters_by_themselves() -> None:
    only = Filters([(False, "*"), (True, "*.jpg"), (False, "old/*")])
    assert [key for key in ("a.jpg", "d/a.jpg", "a.txt", "old/a.jpg") if only.take(key)] == [
        "a.jpg",
        "d/a.jpg",
    ]
    assert not only.skip_folder("old/"), "where anything is included, all folders are looked into"
    without = Filters([(False, "lost+found/*"), (False, "*.tmp")])
    assert without.skip_folder("lost+found/") and not without.skip_folder("a/")
    for pattern in ("", "/data/*"):
        with pytest.raises(UserError, match="matches nothing"):
            Filters([(False, pattern)])


def test_what_is_hostile() -> None:
    bad = ["../a", "/a", "a//b", "a/./b", "a\\b", "a\0b", "", "a/", "x" * 300]
    assert len(hostile(bad, into_folder=False)) == len(bad)
    assert hostile(["a", "a/b", "ab"], into_folder=False) == []
    (said,) = hostile(["a", "a/b/c", "ab"], into_folder=True)
    assert "'a' and 'a/b/c'" in said
    assert is_marker(Entry("a/", 0)) and is_marker(Entry("", 0)) and not is_marker(Entry("a/", 1))


def test_times_are_compared_as_finely_as_they_are_told() -> None:
    assert (
        same_time(1.5, 1.5) and same_time(1.5, 1.0) and not same_time(1.5, 1.25) and not same_time(1.0, 2.0)
    )
    here, there = {"a": Entry("a", 1, 5.0)}, {"a": Entry("a", 1, 7.0)}
    assert compare(here, there, exact=False).same == 1
    assert compare(here, there, exact=True).look == [(here["a"], "a")]


def test_a_link_in_the_source_protects_what_lies_under_its_name() -> None:
    assert surplus({"a": Entry("a", 1)}, ["a", "b", "link", "link/x", "linked"], ["link"]) == ["b", "linked"]
