"""One attempt on several nodes, as the supervisor on node 0 sees it: torchrun here, an agent on each other.

Orders: `meet`, the agents come up and try to reach us; `start` and `stop` torchrun, each on its own node.
"""

import contextlib
import socket
import time
from collections.abc import Callable
from typing import Any

from launcher.rundir import RunDir, write_json
from launcher.supervisor.attempt import Attempt, Pulse
from launcher.supervisor.meeting import SILENCE, listen, peek, unreachable
from launcher.supervisor.restart import exit_words
from launcher.supervisor.torchrun import PATIENCE, Command, Meeting

PATIENT = 3.0  # seconds of waiting for other nodes that nobody needs to hear of


class Peer:
    """Another node in this attempt, by the file that its agent keeps."""

    def __init__(self, run: RunDir, node: int, job: str, fence: int) -> None:
        self.node = node
        self.said: dict[str, Any] = {}
        self._run, self._mine, self._pulse = run, {"job": job, "fence": fence}, Pulse()

    def look(self) -> None:
        """Words of another job or for another attempt are not news of this one."""
        said = peek(self._run.node(self.node)) or {}
        if self._mine.items() <= said.items():
            self.said = said

    def awaited(self) -> None:
        """From now on it is to move."""
        self._pulse = Pulse()

    @property
    def ready(self) -> bool:
        return self.said.get("state") == "ready"

    @property
    def ended(self) -> bool:
        return self.said.get("state") == "ended"

    @property
    def silent(self) -> bool:
        return self._pulse.still(self.said) > SILENCE

    def trouble(self) -> str:
        """What is wrong with it while it should be at work, or nothing."""
        if error := self.said.get("error"):
            return f"node {self.node}: {error}"
        if self.ended and self.said.get("exit_status"):
            return f"torchrun on node {self.node} {exit_words(self.said['exit_status'])}"
        return f"nothing was heard of node {self.node} for {SILENCE:g} s" if self.silent else ""


class Fleet(Attempt):
    """`running` until torchrun has ended on all nodes, or nothing is heard of those where it has not.

    job: of which the agents are tasks. gpus: of each node. command: what starts torchrun, given a meeting.
    Raises OSError if no port is free.
    """

    def __init__(
        self,
        run: RunDir,
        number: int,
        job: str,
        nodes: int,
        gpus: int,
        grace: float,
        command: Callable[[Meeting], Command],
        say: Callable[[str], None],
    ) -> None:
        super().__init__(run, number, None, node=0)
        self._peers = [Peer(run, node, job, number) for node in range(1, nodes)]
        self._command, self._grace, self._say = command, grace, say
        self._since, self._waiting = time.monotonic(), ""
        self._listener = listen(run, number)
        self._meeting = Meeting(socket.gethostname(), self._listener.getsockname()[1], nodes, 0)
        self._written, self._order = "", "meet"
        self._told = {"schema": 1, "job": job, "fence": number, "nodes": nodes, "gpus": gpus, "grace": grace}
        self._told |= {"host": self._meeting.host, "port": self._meeting.port}
        self._tell()

    @property
    def running(self) -> bool:
        for peer in self._peers:
            peer.look()
        if self._order == "meet":
            self._gather()
        here = super().running
        if self._order == "start":
            self.trouble = next(filter(None, (peer.trouble() for peer in self._peers)), "")
            if self.trouble or not here:
                self._halt("stop")
            if self.trouble and here:
                self._terminate(self._grace)
        self._tell()
        if self._torchrun is None:
            self.exit_status = None if self._order == "meet" else 1
            return self._order == "meet"
        if here or not all(peer.ended or peer.silent for peer in self._peers):
            return True
        self.exit_status = self.exit_status or int(bool(self.trouble))
        return False

    def stop(self, grace: float) -> None:
        self._halt("stop")
        super().stop(grace)
        self._tell()

    def _gather(self) -> None:
        """Start when all are ready; give up when one cannot come, or takes too long."""
        missing = [peer for peer in self._peers if not peer.ready]
        waited = time.monotonic() - self._since
        self.trouble = next((peer.trouble() for peer in missing if peer.ended), "")
        if not missing:
            self.trouble = unreachable(self._meeting.host, self._meeting.port)
        elif waited > PATIENCE:
            self.trouble = f"node {missing[0].node} did not come up within {PATIENCE} s"
        elif waited > PATIENT and not self._waiting:
            self._waiting = f"waiting for {', '.join(f'node {peer.node}' for peer in missing)} to come up"
            self._say(self._waiting)
        if self.trouble:
            self._halt("stop")
        elif not missing:
            self._halt("start")  # frees the port for torchrun
            for peer in self._peers:
                peer.awaited()
            try:
                self._start(self._command(self._meeting))
            except OSError as error:
                self.trouble = f"torchrun did not start: {error}"
                self._halt("stop")

    def _halt(self, order: str) -> None:
        self._order = order
        self._listener.close()

    def _tell(self) -> None:
        """Write what the agents are to do, again and again where the disk is full."""
        if self._written != self._order:
            with contextlib.suppress(OSError):
                write_json(self.run.rendezvous, self._told | {"order": self._order})
                self._written = self._order
