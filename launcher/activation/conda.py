"""Where conda, mamba and micromamba keep environments, looked up in their files: `conda` is often no command.

Folders and files: conda's documentation, "Managing environments" and "Configuration"; mamba's, "Concepts".
"""

import contextlib
import difflib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from launcher.environ import home
from launcher.errors import LaunchError

AT_HOME = (
    *("miniconda3", "anaconda3", "miniforge3", "mambaforge", "micromamba"),
    *(".conda", ".local/share/mamba"),
)
ON_THE_MACHINE = ("/opt/conda", "/opt/miniconda3", "/opt/miniforge3", "/opt/anaconda3")
UNSET = "***unset***"  # conda's own word for a variable that `conda env config vars unset` took away


class Unusable(LaunchError):
    """There is no such environment, or none that can be used. `key`, under `env`, is what names it."""

    def __init__(self, key: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.key = key


def find(name: str, workdir: Path, environ: Mapping[str, str]) -> Path:
    """The prefix of the environment that is called `name`, or lies there. Raises Unusable."""
    if is_path(name):
        return path(name, workdir, environ)
    known: dict[str, Path] = {}
    for each, prefix in _prefixes(environ):
        known.setdefault(each, prefix)
    if name in known:
        return known[name]
    if not known:
        raise Unusable("conda", f"there is no conda here to look for {name} in; give the environment's path")
    near = difflib.get_close_matches(name, known, 1, 0.5)
    others = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(sorted(known))}"
    raise Unusable("conda", f"there is no conda environment {name} here; {others}")


def is_path(text: str) -> bool:
    return "/" in text or text.startswith(("~", "."))


def path(text: str, workdir: Path, environ: Mapping[str, str]) -> Path:
    """A path as the recipe writes it: `~` is home, the rest goes from the working directory."""
    own = home(environ)
    if own and (text == "~" or text.startswith("~/")):
        return own / text[2:]
    return Path(os.path.normpath(workdir / text))


def python_of(prefix: Path, key: str, name: str) -> str:
    """The interpreter in `prefix`. Raises Unusable."""
    python = prefix / "bin" / "python"
    if not prefix.is_dir():
        raise Unusable(key, f"there is no folder {prefix}, which `env.{key}` names")
    if not (python.is_file() and os.access(python, os.X_OK)):
        raise Unusable(key, f"{name} is no environment with a Python: {python} cannot be run")
    return str(python)


def variables(prefix: Path) -> list[str]:
    """NAME=VALUE of what `conda env config vars set` keeps for the environment."""
    try:
        said = json.loads((prefix / "conda-meta" / "state").read_bytes())["env_vars"]
        return [f"{name}={value}" for name, value in said.items() if value != UNSET]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []


def _prefixes(environ: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    """(name, prefix) of all environments there are; of two with one name the first counts."""
    for root in _roots(environ):
        if (root / "conda-meta").is_dir():
            yield "base", root
        yield from _below(root / "envs")
    for folder in _folders(environ):
        yield from _below(folder)
    own = home(environ)
    with contextlib.suppress(OSError):
        listed = (own / ".conda" / "environments.txt").read_text(errors="replace") if own else ""
        for line in filter(None, map(str.strip, listed.splitlines())):
            if Path(line, "conda-meta").is_dir():
                yield Path(line).name, Path(line)


def _roots(environ: Mapping[str, str]) -> Iterator[Path]:
    """Where conda or one of its kin may be installed."""
    if environ.get("CONDA_EXE"):
        yield Path(environ["CONDA_EXE"]).parent.parent
    for name in ("CONDA_ROOT", "MAMBA_ROOT_PREFIX"):
        if environ.get(name):
            yield Path(environ[name])
    own = home(environ)
    if own:
        yield from (own / name for name in AT_HOME)
    yield from map(Path, ON_THE_MACHINE)


def _folders(environ: Mapping[str, str]) -> Iterator[Path]:
    """Folders of environments that the user told conda of."""
    told = environ.get("CONDA_ENVS_DIRS") or environ.get("CONDA_ENVS_PATH") or ""
    yield from map(Path, filter(None, told.split(os.pathsep)))
    own = home(environ)
    if own is None:
        return
    try:
        settings = yaml.safe_load((own / ".condarc").read_text(errors="replace"))
        listed = settings.get("envs_dirs") or []
    except (OSError, yaml.YAMLError, AttributeError):
        return
    for folder in listed if isinstance(listed, list) else []:
        yield path(str(folder), own, environ)


def _below(folder: Path) -> Iterator[tuple[str, Path]]:
    with contextlib.suppress(OSError):
        for prefix in sorted(folder.iterdir()):
            if (prefix / "conda-meta").is_dir():
                yield prefix.name, prefix
