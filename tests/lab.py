"""A real Slurm cluster on one machine, for tests and for trying things: munged, slurmctld, two slurmd.

    python tests/lab.py                brings it up, says how to use it, tears it down at Ctrl-C
    python tests/lab.py --grace 0 --user-signal --proctrack pgid --accounting

Two nodes of sixteen pretend cores and eight pretend GPUs each; `batch` is preempted by `urgent`. Its own
munge, ports and folder, so that it needs no rights and touches no cluster that is there. As an ordinary user
it works where Debian's `slurm-wlm munge` are; accounting needs `slurmdbd mariadb-server`, too.

Settings from slurm.conf(5), gres.conf(5), slurmdbd.conf(5), munged(8).
"""

import argparse
import contextlib
import ctypes
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
FOR_ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacctmgr")
NODES, CORES, GPUS = ("lab1", "lab2"), 16, 8
UP = 60.0  # seconds within which a daemon must answer


def missing(accounting: bool = False) -> list[str]:
    """The programs that a lab needs and this machine lacks."""
    wanted = PROGRAMS + (FOR_ACCOUNTING if accounting else ())
    return [name for name in wanted if _which(name) is None]


@dataclass(frozen=True)
class Settings:
    """What of a cluster changes how a run is preempted. Times in seconds."""

    user_signal: bool = False
    proctrack: str = "linuxproc"
    grace: int = 8
    kill_wait: int = 5
    accounting: bool = False
    forgets: int = 60  # seconds after which an ended job is known to accounting only


class Lab:
    """`with Lab(Settings()) as lab:`; `lab.env` is what a user of it has in his environment."""

    def __init__(self, settings: Settings = Settings(), folder: Path | None = None) -> None:
        self.settings = settings
        self._own = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="slurm-lab-"))
        self.conf = self.folder / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        ports = _free_ports(4 + len(NODES))
        self._ports = dict(zip(("slurmctld", "slurmdbd", "mariadb", *NODES), ports, strict=False))

    @property
    def env(self) -> dict[str, str]:
        path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
        return {"SLURM_CONF": str(self.conf), "PATH": path}

    def __enter__(self) -> "Lab":
        try:
            self._configure()
            self._munge()
            if self.settings.accounting:
                self._accounting()
            self.start("slurmctld")
            for node in NODES:
                self.start(node)
            self._wait("both nodes to be idle", self._idle)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _idle(self) -> bool:
        told = self.call("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()
        return set(told) >= set(NODES)

    def call(self, *argv: str, check: bool = False) -> str:
        """What a command of Slurm's says on this cluster."""
        done = subprocess.run(argv, env=os.environ | self.env, capture_output=True, text=True, timeout=60)
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def start(self, daemon: str) -> None:
        """(Re)start `slurmctld` or a node's slurmd."""
        argv = ["slurmctld", "-D"] if daemon == "slurmctld" else ["slurmd", "-D", "-N", daemon]
        self._spawn(daemon, [_found(argv[0]), "-f", str(self.conf), *argv[1:]])

    def stop(self, daemon: str, number: int = signal.SIGTERM) -> None:
        """End a daemon, as a crash or a shutdown of its machine would."""
        process = self._daemons.pop(daemon)
        process.send_signal(number)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def clear(self, seconds: float = UP) -> None:
        """Cancel what runs and what waits, and see it gone."""
        self.call("scancel", "--user", getpass.getuser())
        self._wait("jobs to end", lambda: not self.call("squeue", "-h"), seconds, strict=False)

    def close(self) -> None:
        """Cancel what runs, end the daemons and what they started, delete the folder."""
        if "slurmctld" in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.clear(10)
        for name in [*NODES, "slurmctld", "slurmdbd", "mariadb", "munged"]:
            if name in self._daemons:
                self.stop(name)
        for pid in _stepds(self.conf):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._own:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _spawn(self, name: str, argv: list[str], **env: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                argv,
                env=os.environ | self.env | env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def _munge(self) -> None:
        home = self.folder / "munge"
        home.mkdir(mode=0o755)
        key = home / "key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {
            "key-file": key,
            "socket": home / "socket",
            "pid-file": home / "pid",
            "log-file": home / "log",
        }
        options = [f"--{name}={path}" for name, path in (files | {"seed-file": home / "seed"}).items()]
        self._spawn("munged", [_found("munged"), "--foreground", "--force", *options])
        self._wait("munged", lambda: files["socket"].exists())

    def _accounting(self) -> None:
        data = self.folder / "mariadb"
        who = getpass.getuser()
        common = [f"--datadir={data}", f"--user={who}"]
        subprocess.run(
            ["mariadb-install-db", "--no-defaults", "--auth-root-authentication-method=normal", *common],
            check=True,
            capture_output=True,
        )
        pipe = data / "socket"
        self._spawn(
            "mariadb",
            [
                _found("mariadbd"),
                "--no-defaults",
                *common,
                f"--socket={pipe}",
                "--bind-address=127.0.0.1",
                f"--port={self._ports['mariadb']}",
                f"--pid-file={data}/pid",
            ],
        )
        ask = ["mariadb", "--no-defaults", f"--socket={pipe}", "-u", "root", "-e"]
        grant = (
            "CREATE USER lab@127.0.0.1 IDENTIFIED BY 'lab'; GRANT ALL ON *.* TO lab@127.0.0.1;"
            "CREATE USER lab@localhost IDENTIFIED BY 'lab'; GRANT ALL ON *.* TO lab@localhost;"
        )
        self._wait("MariaDB", lambda: subprocess.run([*ask, grant], capture_output=True).returncode == 0)
        conf = self.folder / "slurmdbd.conf"
        conf.touch(0o600)
        conf.write_text(
            f"AuthType=auth/munge\nAuthInfo=socket={self.folder}/munge/socket\nDbdHost=localhost\n"
            f"DbdPort={self._ports['slurmdbd']}\nSlurmUser={who}\nStorageType=accounting_storage/mysql\n"
            f"StorageHost=127.0.0.1\nStoragePort={self._ports['mariadb']}\nStorageUser=lab\nStoragePass=lab\n"
            f"StorageLoc=lab\nLogFile={self.folder}/slurmdbd.log\nPidFile={self.folder}/slurmdbd.pid\n"
        )
        self._spawn("slurmdbd", [_found("slurmdbd"), "-D"], SLURM_CONF=str(self.conf))
        self._wait(
            "slurmdbd", lambda: "cluster" in self.call("sacctmgr", "-i", "add", "cluster", "lab").lower()
        )
        self.call("sacctmgr", "-i", "add", "account", "lab", "Cluster=lab", check=True)
        self.call("sacctmgr", "-i", "add", "user", who, "Account=lab", check=True)

    def _configure(self) -> None:
        s, user = self.settings, getpass.getuser()
        for name in ("state", "spool-lab1", "spool-lab2", "log"):
            (self.folder / name).mkdir()
        storage = (
            f"AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=localhost\n"
            f"AccountingStoragePort={self._ports['slurmdbd']}\nAccountingStorageEnforce=associations\n"
            f"AccountingStoragePass={self.folder}/munge/socket\n"
            if s.accounting else "AccountingStorageType=accounting_storage/none\n"
        )  # fmt: skip
        host = f"NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1"
        nodes = "".join(
            f"NodeName={node} {host} Port={self._ports[node]} CPUs={CORES} RealMemory=64000 Gres=gpu:{GPUS}\n"
            for node in NODES
        )
        everywhere = f"Nodes={','.join(NODES)} MaxTime=24:00:00 DefaultTime=1:00:00 State=UP"
        partitions = (
            f"PartitionName=batch Default=YES PriorityTier=1 GraceTime={s.grace} {everywhere}\n"
            f"PartitionName=urgent PriorityTier=10 PreemptMode=OFF {everywhere}\n"
        )
        controller = "preempt_send_user_signal" if s.user_signal else ""
        parameters = ",".join(filter(None, ["enable_user_top", controller]))
        self.conf.write_text(f"""ClusterName=lab
SlurmctldHost={socket.gethostname()}(127.0.0.1)
SlurmctldPort={self._ports["slurmctld"]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge/socket
CredType=cred/munge
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool-%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd-%n.pid
SlurmctldLogFile={self.folder}/log/slurmctld
SlurmdLogFile={self.folder}/log/%n
SlurmdParameters=config_overrides
SlurmctldParameters={parameters}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ProctrackType=proctrack/{s.proctrack}
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait={s.kill_wait}
InactiveLimit=0
SlurmdTimeout=20
ReturnToService=2
MinJobAge={s.forgets}
UnkillableStepTimeout=60
{storage}{nodes}{partitions}""")
        gres = [f"NodeName={node} Name=gpu File=/dev/tty[0-{GPUS - 1}]\n" for node in NODES]
        (self.folder / "gres.conf").write_text("".join(gres))

    def _wait(self, what: str, check: Callable[[], bool], seconds: float = UP, strict: bool = True) -> None:
        deadline = time.monotonic() + seconds
        while not check():
            died = [name for name, process in self._daemons.items() if process.poll() is not None]
            if (died or time.monotonic() > deadline) and strict:
                tails = "".join(
                    f"\n--- {path.name}\n{path.read_text()[-2000:]}"
                    for path in [*self.folder.glob("*.out"), *self.folder.glob("log/*")]
                )
                raise RuntimeError(f"the lab waited for {what}; dead: {died or 'none'}{tails}")
            if time.monotonic() > deadline:
                return
            time.sleep(0.1)


def _end_with_parent() -> None:
    """However whoever brought the lab up is ended, it goes down with him (PR_SET_PDEATHSIG, prctl(2))."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _found(name: str) -> str:
    path = _which(name)
    assert path is not None, f"{name} is not installed"
    return path


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _stepds(conf: Path) -> Iterator[int]:
    """slurmstepd processes of this lab: they carry its SLURM_CONF."""
    needle = f"SLURM_CONF={conf}".encode()
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):
                if needle in (path / "environ").read_bytes().split(b"\0") and int(path.name) != os.getpid():
                    yield int(path.name)


def main() -> int:
    parser = argparse.ArgumentParser(description="A Slurm cluster on this machine, until Ctrl-C.")
    parser.add_argument("--user-signal", action="store_true", help="preemption sends the job's own signal")
    parser.add_argument("--proctrack", choices=["linuxproc", "pgid"], default="linuxproc")
    parser.add_argument("--grace", type=int, default=8, help="GraceTime, seconds")
    parser.add_argument("--accounting", action="store_true", help="with slurmdbd and MariaDB")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if lacking := missing(args.accounting):
        print(f"missing: {', '.join(lacking)}; apt-get install slurm-wlm munge", file=sys.stderr)
        return 2
    settings = Settings(args.user_signal, args.proctrack, args.grace, accounting=args.accounting)
    with Lab(settings, args.folder and args.folder.absolute()) as lab:
        print(
            f"up. In another terminal:\n\n  export SLURM_CONF={lab.conf}\n  sinfo\n\nCtrl-C ends it.",
            flush=True,
        )
        with contextlib.suppress(KeyboardInterrupt):
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
