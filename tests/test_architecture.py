"""The rules of who may import whom, and what the command line may not import, executed."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "boto3", "botocore", "submitit", "tensorboard", "numpy"}

# From the top downwards: a package or module may import those of its own row and of the rows below it.
LAUNCHER = [
    {"cli"},
    {"backends"},
    {"supervisor"},
    {"fetch"},
    {"mirror", "recipe", "slurm", "activation", "workstation"},
    {"transfer"},
    {"checkpoints", "storage"},
    {"rundir", "environ"},
    {"errors"},
]
DETCORE = [
    {"train"},
    {"saving"},
    {"writer"},
    {"recorder"},
    {"learner", "evaluate", "infer", "convert"},
    {"summary"},
    {"loading", "schedule", "nonfinite", "export", "anatomy"},
    {"data", "models"},
    {"config", "recipe", "check"},
    {"weights", "checkpoint", "snapshot", "distributed", "metrics", "annotations", "scoring"},
    {"backbones", "necks", "ops", "rundir"},
    {"errors"},
]


def imports_of(path: Path, package: str) -> set[str]:
    """First-level modules of `package` that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            names = [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith(f"{package}.")}
    return found


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize(("package", "other"), [("launcher", "detcore"), ("detcore", "launcher")])
def test_the_two_packages_do_not_know_each_other(package: str, other: str) -> None:
    for path in modules(package):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == other for name in names), f"{path} imports {other}"


@pytest.mark.parametrize(("package", "rows"), [("launcher", LAUNCHER), ("detcore", DETCORE)])
def test_imports_go_one_way(package: str, rows: list[set[str]]) -> None:
    level = {name: number for number, row in enumerate(rows) for name in row}
    for path in modules(package):
        own = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        for name in imports_of(path, package):
            if own in level and name in level:
                assert level[name] >= level[own], (
                    f"{path.relative_to(ROOT)} imports {package}.{name}: upwards"
                )


@pytest.mark.parametrize("verb", [["--help"], ["status"], ["status", "--json"], ["logs", "--help"]])
def test_the_command_line_starts_light(verb: list[str], tmp_path: Path) -> None:
    """`launch --help` and `launch status` import nothing heavy; --help not even pydantic."""
    script = (
        "import sys\nfrom launcher.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "finally:\n    print('MODULES', *{name.split('.')[0] for name in sys.modules})\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, *verb],
        capture_output=True,
        text=True,
        env=os.environ | {"LAUNCH_RUNS": str(tmp_path)},
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    loaded = set(run.stdout.split("MODULES", 1)[1].split())
    forbidden = HEAVY | ({"pydantic"} if "--help" in verb else set())
    assert not loaded & forbidden
