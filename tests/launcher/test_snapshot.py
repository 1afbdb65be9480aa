"""code/: what git tracks, as it is now, and nothing that should not travel."""

import os
import subprocess
from pathlib import Path

import pytest

from launcher.cli import snapshot


def git(repo: Path, *argv: str) -> None:
    person = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always"]
    subprocess.run(["git", "-C", str(repo), *person, *argv], check=True, capture_output=True)


def files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or path.is_file()
    }


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    repo = tmp_path / "repo"
    (repo / "pkg").mkdir(parents=True)
    git(repo, "init", "-q")
    (repo / "pkg" / "train.py").write_text("committed")
    (repo / "run.sh").write_text("#!/bin/sh\n")
    (repo / "run.sh").chmod(0o755)
    (repo / "räksmörgås\n.txt").write_text("odd name")
    (repo / "deleted.py").write_text("x")
    git(repo, "add", ".")
    git(repo, "commit", "-qm", "x")
    return repo


def test_tracked_files_as_they_are_now(repo: Path, tmp_path: Path) -> None:
    code = tmp_path / "code"
    (repo / "pkg" / "train.py").write_text("changed since")
    (repo / "deleted.py").unlink()
    (repo / "untracked.py").write_text("x")
    said = snapshot.take(repo / "pkg", code)
    assert files(code) == {"pkg/train.py", "run.sh", "räksmörgås\n.txt"}
    assert (code / "pkg" / "train.py").read_text() == "changed since"
    assert os.access(code / "run.sh", os.X_OK)
    assert said["dirty"] and len(said["commit"]) == 40 and said["prefix"] == "pkg"


def test_clean_repository(repo: Path) -> None:
    (repo / "untracked.py").write_text("x")
    assert not snapshot.describe(repo)["dirty"] and snapshot.describe(repo)["prefix"] == ""


def test_no_secrets_even_if_tracked(repo: Path, tmp_path: Path) -> None:
    for name in (".env", ".env.local", "prod.env", "pkg/.env"):
        (repo / name).write_text("PASSWORD=x")
    git(repo, "add", "-f", ".")
    snapshot.take(repo, tmp_path / "code")
    assert not [name for name in files(tmp_path / "code") if "env" in name]


def test_links_stay_inside(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("secret")
    (repo / "out").symlink_to("../outside")
    (repo / "absolute").symlink_to(repo / "run.sh")
    (repo / "inside").symlink_to("pkg/train.py")
    git(repo, "add", ".")
    code = tmp_path / "code"
    snapshot.take(repo, code)
    assert (code / "inside").is_symlink() and (code / "inside").read_text() == "committed"
    assert not {"out", "absolute"} & files(code)


def test_submodules_are_left_out(repo: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    (other / "inner.py").write_text("x")
    git(other, "add", ".")
    git(other, "commit", "-qm", "x")
    git(repo, "submodule", "add", str(other), "sub")
    snapshot.take(repo, tmp_path / "code")
    assert not [name for name in files(tmp_path / "code") if name.startswith("sub")]


def test_outside_of_a_repository_only_the_script(tmp_path: Path) -> None:
    (tmp_path / "work" / "sub").mkdir(parents=True)
    (tmp_path / "work" / "sub" / "train.py").write_text("x")
    (tmp_path / "work" / "other.py").write_text("x")
    said = snapshot.take(tmp_path / "work", tmp_path / "code", "sub/train.py")
    assert files(tmp_path / "code") == {"sub/train.py"}
    assert said == {"commit": None, "dirty": False, "prefix": ""}
    assert snapshot.take(tmp_path / "work", tmp_path / "none") == said and not files(tmp_path / "none")
