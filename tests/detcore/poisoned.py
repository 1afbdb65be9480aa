"""detcore.train on images that are not numbers: on the last rank, in the steps that $POISONED names. In step
$PREEMPTED that rank gets a SIGTERM.

torchrun ... -m tests.detcore.poisoned
"""

import os
import signal
import sys
from collections.abc import Iterator

from detcore import stop, train
from detcore.data.feed import Feed, Inputs

step_of = Feed.step


def poisoned(self: Feed, step: int) -> Iterator[Inputs]:
    last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
    if last and str(step) == os.environ["PREEMPTED"]:
        os.kill(os.getpid(), signal.SIGTERM)
    for part in step_of(self, step):
        bad = last and str(step) in os.environ["POISONED"].split(",")
        yield part._replace(images=part.images * float("nan")) if bad else part


if __name__ == "__main__":
    stop.install()
    Feed.step = poisoned
    status = train.main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as detcore.train does where it fails
