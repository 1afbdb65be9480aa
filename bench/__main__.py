"""Run every bench and write docs/benchmarks.md, with the machine and the commit they were measured on."""

import importlib
import os
import pkgutil
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

import bench
from bench.measure import table

NOT_BENCHES = {"__main__", "beside", "measure"}


def main() -> int:
    names = [module.name for module in pkgutil.iter_modules(bench.__path__) if module.name not in NOT_BENCHES]
    sections = []
    all_hold = True
    for name in names:
        print(f"== bench.{name}", flush=True)
        module = importlib.import_module(f"bench.{name}")
        results = module.main()
        if not results:  # not on this machine
            continue
        all_hold &= all(result.holds for result in results)
        print(table(results), flush=True)
        sections.append(f"## `python -m bench.{name}`\n\n{module.__doc__.strip()}\n\n{table(results)}\n")
    Path("docs/benchmarks.md").write_text(f"{heading()}\n\n" + "\n".join(sections))
    return 0 if all_hold else 1


def heading() -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return (
        "# Benchmarks\n\n"
        f"Written by `make bench` on {time.strftime('%Y-%m-%d')} at commit {commit}: {os.cpu_count()} cores, "
        f"{platform.machine()}, Python {platform.python_version()}, {gpus()}. Both sides of a ratio "
        "come from one run, measured in turn; the figures are medians. Trust the ratios, not the seconds."
    )


def gpus() -> str:
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(names) or "no GPU"


if __name__ == "__main__":
    sys.exit(main())
