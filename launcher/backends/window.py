"""The first process of a tmux window: the run's guard, and a window that goes when all went well.

tmux 3.3a at times misses that a child has exited, and with `remain-on-exit failed` it then waits for an exit
status for ever. With `off` it needs none: so that is set as the last act of a run that did not fail.
"""

import os
import sys

from launcher.backends.tmux import tmux
from launcher.supervisor import guard


def main() -> int:
    status = guard.main()
    if status == 0:
        tmux("set-option", "-p", "-t", os.environ["TMUX_PANE"], "remain-on-exit", "off", check=False)
    return status


if __name__ == "__main__":
    sys.exit(main())
