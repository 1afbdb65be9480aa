"""Looks at this machine and at the store, for `launch doctor`: tmux, and whether conditional writes hold."""

import contextlib
import os
import secrets
import subprocess
import time
import urllib.error
import urllib.request
from email.utils import parsedate_to_datetime

from launcher.cli.doctor.findings import Finding, clock
from launcher.errors import LaunchError, StoreAway, StoreError
from launcher.storage import PreconditionFailed, Store, StoreSettings, reach
from launcher.workstation import queue

AWS = "https://s3.amazonaws.com"
PATIENCE = 10.0  # seconds for the store's time of day


def store(url: str | None, settings: StoreSettings) -> list[Finding]:
    """The store of a run: reached, its clock, and whether it keeps two writers apart."""
    if url is None:
        means = "this disk has the only copy of every checkpoint"
        return [Finding("store", "note", "there is none", means, "Set storage.url or LAUNCH_STORAGE.")]
    try:
        found = reach(url, settings)
        made = [
            Finding("store", "good", f"{found.url} lets us in", "runs are mirrored there"),
            conditional_writes(found),
        ]
    except StoreAway as error:
        means = "a run trains on, and its mirror catches up when the store is back; a launch is refused"
        made = [Finding("store", "bad", error.message, means, error.hint or "Check storage.endpoint.")]
    except LaunchError as error:
        made = [Finding("store", "bad", error.message, "no run can start that mirrors there", error.hint)]
    return made + (_clock(settings) if url.startswith("s3://") else [])


def conditional_writes(found: Store) -> Finding:
    """Two attempts of a run must never both own it: that rests on If-None-Match and If-Match."""
    key = f".launch-doctor-{secrets.token_hex(4)}"
    ignored = []
    try:
        first = found.put_bytes(key, b"first", if_absent=True)
        with contextlib.suppress(PreconditionFailed):
            found.put_bytes(key, b"second", if_absent=True)
            ignored.append("If-None-Match")
        found.put_bytes(key, b"third", if_match=found.get_bytes(key)[1])
        with contextlib.suppress(PreconditionFailed):
            found.put_bytes(key, b"fourth", if_match=first)
            ignored.append("If-Match")
    except StoreAway:
        raise
    except StoreError as error:
        means = "a run cannot claim its place in the store"
        do = "Use a store that knows conditional writes, and a key that may write and delete."
        return Finding("conditional writes", "bad", error.message, means, do)
    finally:
        with contextlib.suppress(StoreError):
            found.delete(key)
    if ignored:
        means = "two attempts of a run could both take themselves for its owner and overwrite each other"
        do = "Use a store that honours conditional writes (AWS S3, MinIO, SeaweedFS 4 and newer)."
        return Finding("conditional writes", "bad", f"{' and '.join(ignored)} is ignored", means, do)
    means = "two attempts of a run can never both own it"
    return Finding("conditional writes", "good", "If-None-Match and If-Match are honoured", means)


def _clock(settings: StoreSettings) -> list[Finding]:
    """Ours against the store's, by the Date of any answer; its refusal is as good."""
    env = os.environ.get
    endpoint = settings.endpoint or env("AWS_ENDPOINT_URL_S3") or env("AWS_ENDPOINT_URL") or AWS
    began = time.time()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(endpoint, method="HEAD"), timeout=PATIENCE
        ) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as error:
        date = error.headers["Date"]
    except (OSError, ValueError):
        return []  # that it does not answer is said already
    if not date:
        return []
    slack = (time.time() - began) / 2 + 1  # a Date has whole seconds
    off = parsedate_to_datetime(date).timestamp() + 0.5 - (began + time.time()) / 2
    return [clock(f"the store's clock is {off:+.0f} s off ours (± {slack:.0f})", abs(off) - slack)]


def tmux() -> Finding:
    try:
        version = subprocess.run(["tmux", "-V"], capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        means = "runs go in the foreground and end with their terminal's connection"
        return Finding("tmux", "note", "there is no tmux", means, "Install tmux 3.2 or newer.")
    return Finding("tmux", "good", version, "runs go on in a window when the connection breaks")


def shared() -> Finding:
    """The queue through which the runs of this machine share it."""
    try:
        queue.check()
    except LaunchError as error:
        return Finding("queue", "bad", error.message, "no run can start in tmux", error.hint)
    return Finding("queue", "good", str(queue.folder()), "runs of all users share this machine through it")
