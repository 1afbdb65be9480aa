"""How several nodes find each other through the run folder they share, and over the network at node 0.

rendezvous.json is the supervisor's, nodes/node-K.json that of node K's task (docs/contract.md, "Several
nodes"). A folder may be shared by NFS, which remembers for a while what was not there: so it is listed before
a file in it is looked at (nfs(5), "Directory entry caching").
"""

import contextlib
import ipaddress
import os
import socket
import zlib
from pathlib import Path
from typing import Any

from launcher.rundir import RunDir, read_json, write_json

SILENCE = 30.0  # seconds without a move after which a node, or the supervisor, counts as dead
CONNECT = 10.0  # seconds for a connection between two nodes
FIRST_PORT = 20000
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def job_name(job: object, restarts: object) -> str:
    """What tells the tasks of one start of a job from those of any other."""
    return f"{job}.{restarts}"


def peek(path: Path) -> dict[str, Any] | None:
    """The object in a file that another node replaces."""
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        list(entries)
    return read_json(path)


def dismiss(run: RunDir, job: str) -> None:
    """Node 0's task is done with the run, however it ended: the other nodes' may go."""
    with contextlib.suppress(OSError):  # they go by themselves after a while
        run.nodes.mkdir(exist_ok=True)
        write_json(run.node(0), {"schema": 1, "job": job, "state": "gone"})


def dismissed(run: RunDir, job: str) -> bool:
    said = peek(run.node(0)) or {}
    return said.get("job") == job and said.get("state") == "gone"


def listen(run: RunDir, attempt: int) -> socket.socket:
    """Hold a port for an attempt: another one than its last, of those that no connection gets by chance.

    Ports of the ephemeral range are taken at any moment; one port for all is another run's on this node
    (NVIDIA/enroot#243, pytorch#126510). Raises OSError if none is free.
    """
    ports = _ports(int(PORT_RANGE.read_text().split()[0]))
    first = zlib.crc32(run.id.encode()) + attempt
    both = socket.has_dualstack_ipv6()
    for number in range(len(ports)):
        port = ports[(first + number) % len(ports)]
        try:
            family = socket.AF_INET6 if both else socket.AF_INET
            return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)
        except OSError:
            continue
    raise OSError(f"no port from {ports[0]} to {ports[-1]} is free")


def _ports(ephemeral: int) -> range:
    """Ports below the ephemeral range, or, where that leaves none, those from FIRST_PORT on."""
    return range(min(FIRST_PORT, max(1024, ephemeral - 4096)), ephemeral) or range(FIRST_PORT, 32768)


def unreachable(host: str, port: int) -> str:
    """Why this node cannot talk to node 0 at `host`, in a sentence; nothing if it can."""
    me = socket.gethostname()
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        return f"{me} cannot resolve {host}, the name of node 0: {error.strerror}"
    if host != me and all(ipaddress.ip_address(address).is_loopback for address in found):
        return f"on {me} the name of node 0, {host}, means {', '.join(found)}: itself; see its /etc/hosts"
    try:
        socket.create_connection((host, port), timeout=CONNECT).close()
    except OSError as error:
        return f"{me} cannot reach node 0 at {host}:{port}: {error.strerror or error}"
    return ""
