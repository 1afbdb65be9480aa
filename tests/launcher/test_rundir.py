"""Run folders: what a reader sees of writes that were cut, and which run a user means."""

import json
import os
from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.rundir import (
    RunDir,
    all_runs,
    append_json,
    find_run,
    new_run_id,
    read_json,
    read_jsonl,
    runs_root,
    write_json,
)


def make(id: str, created: float = 0.0) -> RunDir:
    run = RunDir(runs_root() / id)
    run.path.mkdir(parents=True)
    write_json(run.run, {"created": created})
    return run


def test_find_run() -> None:
    a = make("yolof-20260101-000000-00aa")
    b = make("yolof-20260102-000000-00bb")
    c = make("yolof-long-20251231-000000-00cc")
    (runs_root() / "notes").mkdir()
    (runs_root() / "yolof-20260103-000000-00dd").mkdir()  # no run.json: not yet a run
    assert all_runs() == [c, a, b]
    assert find_run("last") == b
    assert find_run("yolof-20260101") == a
    assert find_run("yolof-long") == c
    assert find_run(b.id) == b
    with pytest.raises(UserError, match=r"any of 2 runs: yolof-20260102-000000-00bb, yolof-20260101"):
        find_run("yolof")
    with pytest.raises(UserError, match="no run 'yolox'") as error:
        find_run("yolox")
    assert b.id in error.value.hint


def test_last_of_two_in_one_second() -> None:
    first, second = make("z-20260101-000000-0001", 1.0), make("a-20260101-000000-0000", 2.0)
    assert all_runs()[-1] == first and find_run("last") == second


def test_no_runs_at_all() -> None:
    assert all_runs() == []
    with pytest.raises(UserError, match="there are no runs"):
        find_run("last")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "-rf", "a b", "x" * 81])
def test_name_that_would_leave_its_folder(name: str) -> None:
    with pytest.raises(UserError, match="cannot name a run"):
        new_run_id(name)


def test_id_knows_its_name() -> None:
    assert RunDir(Path("/runs") / new_run_id("yolof_r50.1x-b")).name == "yolof_r50.1x-b"


def test_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1} and os.listdir(tmp_path) == ["x.json"]  # noqa: PTH208


def test_torn_files_are_no_news(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert read_json(path) is None
    path.write_text('{"a": ')
    assert read_json(path) is None
    path.write_text("[1]")
    assert read_json(path) is None


def test_torn_line_is_dropped_and_the_next_line_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    assert read_jsonl(path) == []
    append_json(path, {"n": 1})
    with path.open("a") as file:
        file.write(json.dumps({"n": 2})[:4])
    assert read_jsonl(path) == [{"n": 1}]
    append_json(path, {"n": 3})
    assert read_jsonl(path) == [{"n": 1}, {"n": 3}]
