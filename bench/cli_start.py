"""How long a person waits for the command line: `launch --help`, and `launch status` over 1,000 runs."""

import json
import os
import sys
import tempfile
from pathlib import Path

from bench.measure import Result, in_turn, show, wall

LAUNCH = str(Path(sys.executable).parent / "launch")
READ_ALL = (
    "import json, sys, pathlib\n"
    "[json.loads(path.read_text()) for path in pathlib.Path(sys.argv[1]).glob('*/final.json')]"
)


def main() -> list[Result]:
    """Both claims of the command line's start-up time."""
    with tempfile.TemporaryDirectory() as folder:
        runs = ended_runs(Path(folder), 1000)
        environment = os.environ | {"LAUNCH_RUNS": str(runs)}
        return [
            in_turn(
                "`launch --help` costs little more than importing what it is made of",
                "<= 1.5",
                ("launch --help", lambda: wall([LAUNCH, "--help"])),
                (
                    "import click, rich.console, yaml",
                    lambda: wall([sys.executable, "-c", "import click, rich.console, yaml"]),
                ),
                pairs=15,
            ),
            in_turn(
                "`launch status` over 1,000 ended runs",
                "<= 3",
                ("launch status", lambda: wall([LAUNCH, "status"], env=environment)),
                (
                    "launch --help + reading 1,000 files",
                    lambda: wall([LAUNCH, "--help"]) + wall([sys.executable, "-c", READ_ALL, str(runs)]),
                ),
                pairs=9,
            ),
        ]


def ended_runs(root: Path, count: int) -> Path:
    """Folders as a run leaves them when it has ended, with the one file that a listing reads."""
    for number in range(count):
        name = f"yolof-20260101-{number:06d}-0000"
        (root / name).mkdir()
        final = {
            "schema": 1,
            "id": name,
            "name": "yolof",
            "state": "finished",
            "reason": "all steps are done",
            "step": 22500,
            "of": 22500,
            "attempts": 2,
            "created": 1.76e9 + number,
            "ended": 1.76e9 + number + 36000,
            "metrics": {"AP": 0.377, "AP50": 0.569},
            "gpus": 8,
            "lost_steps": 0,
            "url": f"s3://runs/somebody/recipes/yolof_r50_1x/{name}",
            "synced": {"step": 22500, "behind": 0},
        }
        (root / name / "final.json").write_text(json.dumps(final))
    return root


if __name__ == "__main__":
    show(main())
