"""Which of the caller's variables travel with a run, and what must never be written down.

A new tmux window does not see the caller's variables, and a run folder is mirrored: so an allow-list is
frozen into run.json, and credentials come by profile or file only.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from launcher.errors import UserError

KEPT = (
    *("AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CA_BUNDLE"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "LAUNCH_STORAGE"),
    *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PATH", "VIRTUAL_ENV", "HOME", "LANG"),
    *("LAUNCH_QUEUE", "LAUNCH_CPU_SLOTS"),
    # where environments are looked for: a window must find the one that was found at launch
    *("CONDA_EXE", "CONDA_ROOT", "CONDA_ENVS_DIRS", "CONDA_ENVS_PATH", "MAMBA_ROOT_PREFIX"),
    *("MODULESHOME", "MODULEPATH"),
)
AWS_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")

_SECRET_NAME = re.compile(
    r"SECRET|PASSW|PASSPHRASE|TOKEN|CREDENTIAL|(API|ACCESS|PRIVATE|SIGNING)_?KEY|(^|_)AUTH($|_)",
    re.IGNORECASE,
)
_NOT_SECRET_NAME = re.compile(r"(_FILE|_PATH|_DIR|TOKENS|TOKENIZERS_PARALLELISM)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS access key ids
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\b\w[\w+.-]*://[^/\s@:]*:[^/\s@]+@"  # user:password@ in a URL
    r"|\bgh[pousr]_[0-9A-Za-z]{30,}|\bhf_[0-9A-Za-z]{30,}|\bX-Amz-Signature="
)


def names_secret(name: str) -> bool:
    """Whether a variable of this name would hold a secret itself (not the path of a file that does)."""
    return bool(_SECRET_NAME.search(name)) and not _NOT_SECRET_NAME.search(name)


def holds_secret(value: object) -> bool:
    return isinstance(value, str) and bool(_SECRET_VALUE.search(value))


def secrets_in(data: object, loc: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where in plain data credentials stand."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from secrets_in(value, (*loc, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from secrets_in(value, (*loc, index))
    elif holds_secret(data):
        yield loc


def frozen_env(environ: Mapping[str, str], keep: Sequence[str] = ()) -> dict[str, str]:
    """The variables that travel with a run: the allow-list and what the recipe's `env.keep` adds.

    Raises UserError when the value of one of them holds credentials."""
    frozen = {name: environ[name] for name in (*KEPT, *keep) if name in environ}
    for name, value in frozen.items():
        if holds_secret(value):
            raise UserError(
                f"{name} holds credentials, and it would be written into the run folder",
                "put them into a profile (AWS_PROFILE) or a file (AWS_SHARED_CREDENTIALS_FILE)",
            )
    return frozen


def check_credentials_travel(environ: Mapping[str, str], backend: str, profile: str | None) -> None:
    """Refuse a run whose store can be reached from here only: no window or job sees secret variables."""
    by_profile = profile or any(environ.get(name) for name in KEPT[:3])
    place = "job of Slurm's" if backend == "slurm" else f"{backend} window"
    if backend != "local" and not by_profile and any(environ.get(name) for name in AWS_SECRETS[:2]):
        raise UserError(
            f"the store's credentials are only in {AWS_SECRETS[0]} and {AWS_SECRETS[1]}, "
            f"which a {place} does not see and which are never written down",
            "put them into a profile (AWS_PROFILE, storage.profile) or a file (AWS_SHARED_CREDENTIALS_FILE)",
        )
