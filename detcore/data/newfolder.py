"""A data set's folder that appears whole or not at all."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from detcore.errors import InputError


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill beside `path`, renamed to it at the end. For command lines: an existing `path` and
    wrong input end the program with a sentence."""
    if path.exists():
        _end(f"{path} exists already; remove it or name another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
    try:
        yield aside
        aside.chmod(0o755)
        aside.rename(path)
    except (InputError, OSError) as error:
        _end(error)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _end(why: object) -> NoReturn:
    print(f"error: {why}", file=sys.stderr)
    sys.exit(InputError.exit_status)
