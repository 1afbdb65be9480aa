"""Draws docs/status.svg: what `launch status` and `launch status RUN` show of the runs under $LAUNCH_RUNS."""

import re
import sys
from pathlib import Path

from rich.console import Console

from launcher.cli import show, status
from launcher.rundir import find_run


def main(run: str) -> None:
    console = Console(record=True, width=118, force_terminal=True, highlight=False)
    console.print("[bold]$ launch status[/]", show.table(status.listing()), sep="\n")
    console.print(f"\n[bold]$ launch status {run}[/]", show.run_view(find_run(run)), sep="\n")
    picture = console.export_svg(title="launch")
    # A picture in a page loads no fonts, so their addresses would only be dead links.
    Path("docs/status.svg").write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "last")
