"""Who may publish a run: `owner.json` in the store, taken and kept by conditional writes.

The holder moves a counter. An observer calls it dead when the counter has stood still for `PATIENCE` seconds
of the observer's own clock; no two clocks are compared. A holder that comes back late finds that its
conditional write fails, and has lost the run for good.
"""

import contextlib
import json
import socket
import threading
import time
from typing import Any

from launcher.checkpoints import fence_of
from launcher.errors import StoreError, Taken
from launcher.storage import NotFound, PreconditionFailed, Store

KEY = "owner.json"
BEAT = 4.0  # seconds between two moves of the counter
PATIENCE = 20.0  # seconds without a move after which the holder is called dead


class Ownership:
    """One supervisor's hold on one run in the store. Safe to use from several threads."""

    def __init__(self, store: Store) -> None:
        self.lost: str | None = None
        self.predecessor: str | None = None  # the token of who held the run before the last claim()
        self._store = store
        self._lock = threading.RLock()
        self._etag: str | None = None  # of our own last owner.json; None: not held
        self._doc: dict[str, Any] = {}
        self._confirmed = 0.0  # monotonic time of the last write that succeeded

    @property
    def held(self) -> bool:
        return self._etag is not None and self.lost is None

    def claim(self, token: str, at_least: int, dead: str | None = None) -> int:
        """Take the run; return the fence to use: `at_least`, or more if the store has seen that one.

        `dead` is the token of a holder that is known to be dead; any other one is watched until it has stood
        still for PATIENCE seconds. Raises Taken if it moves, StoreAway.
        """
        with self._lock:
            self._etag = None
            while True:
                owner, etag = read_owner(self._store) or ({"token": token}, None)
                ours = owner.get("token") == token
                if not ours and owner.get("token") != dead:
                    watch(self._store, owner)
                fence = max(at_least, fence_of(owner.get("fence")) + (0 if ours else 1))
                try:
                    self._write(token, fence, etag)
                    self.predecessor = owner.get("token") if etag else None
                    return fence
                except PreconditionFailed:
                    continue  # somebody moved it meanwhile: look again, and watch them

    def beat(self) -> None:
        """Move the counter. `lost` is set if the run is somebody else's."""
        with self._lock:
            if self.held:
                self._move()

    def confirm(self) -> bool:
        """Whether the run is held: known from the last beats, or else asked of the store now."""
        with self._lock:
            if self.held and time.monotonic() - self._confirmed >= 2 * BEAT:
                self._move()
            return self.held

    def release(self) -> None:
        """Say that nobody holds the run any more, so that the next one need not wait."""
        with self._lock:
            if self.held:
                self._move(ended=True)
                self._etag = None

    def _move(self, ended: bool = False) -> None:
        try:
            self._write(self._doc["token"], self._doc["fence"], etag=self._etag, ended=ended)
        except PreconditionFailed:
            found = read_owner(self._store)
            self.lost = f"the run was taken over {_by(found[0]) if found else 'in the store'}"

    def _write(self, token: str, fence: int, etag: str | None, ended: bool = False) -> None:
        doc = {"schema": 1, "token": token, "fence": fence, "counter": self._doc.get("counter", 0) + 1,
               "host": socket.gethostname(), "ended": ended}  # fmt: skip
        data = json.dumps(doc).encode()
        self._etag = self._store.put_bytes(KEY, data, if_absent=etag is None, if_match=etag)
        self._doc, self._confirmed = doc, time.monotonic()


def read_owner(store: Store) -> tuple[dict[str, Any], str] | None:
    """owner.json and its etag; a file that is no object counts as an owner of whom nothing is known."""
    try:
        data, etag = store.get_bytes(KEY)
    except NotFound:
        return None
    try:
        owner = json.loads(data)
    except ValueError:
        owner = None
    return (owner if isinstance(owner, dict) else {}), etag


def watch(store: Store, owner: dict[str, Any]) -> None:
    """Return once `owner` is known to be gone. Raises Taken if its counter moves, StoreAway."""
    deadline = time.monotonic() + PATIENCE
    while not owner.get("ended") and time.monotonic() < deadline:
        time.sleep(1.0)
        found = read_owner(store)
        if found is None:
            return
        if found[0] != owner and not found[0].get("ended"):
            raise Taken(
                f"the run in {store.url} is held {_by(found[0])}",
                "stop it there first: `launch stop`, or `launch preempt`",
            )
        owner = found[0]


def _by(owner: dict[str, Any]) -> str:
    host = "".join(c for c in str(owner.get("host", "another machine"))[:64] if c.isprintable())
    return f"by attempt {fence_of(owner.get('fence'))} on {host}"


class Pulse:
    """The thread that keeps the hold on a run: a pass of the mirror may be long, the counter cannot wait."""

    def __init__(self, ownership: Ownership) -> None:
        self._ownership = ownership
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="ownership", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()

    def _beat(self) -> None:
        while not self._end.wait(BEAT) and self._ownership.lost is None:
            # The mirror's own pass meets the same trouble, and tells it.
            with contextlib.suppress(StoreError):
                self._ownership.beat()
