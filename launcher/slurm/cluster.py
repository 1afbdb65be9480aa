"""The cluster as Slurm describes it: how it takes nodes away, and what its partitions have and allow.

Read from scontrol, sinfo and, where there is accounting, sacctmgr. Settings: slurm.conf(5).
"""

import contextlib
import difflib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from launcher.recipe.sections import hours
from launcher.slurm import profile
from launcher.slurm.commands import SlurmError, call
from launcher.slurm.jobs import seconds

if TYPE_CHECKING:
    from launcher.recipe import Recipe

Wrong = tuple[tuple[str, ...], str]  # a place in the recipe, and what is wrong there
LEAST_KILL_WAIT = 5  # seconds; slurmd gives as many, however short KillWait is
CRED_EXPIRE = 120  # seconds, AuthInfo's default; a requeued job waits as long


@dataclass(frozen=True)
class Partition:
    """Times in seconds; None: no limit. What differs between its nodes is that of the best of them."""

    name: str
    default: bool
    grace: int
    preempt_mode: str
    max_time: int | None
    default_time: int | None
    nodes: int
    priority_tier: int
    state: str
    max_nodes: int | None
    qos: str | None
    gpus: int = 0
    cpus: int = 0
    memory: int = 0  # MB


@dataclass(frozen=True)
class Qos:
    name: str
    grace: int
    preempt_mode: str
    max_time: int | None


@dataclass(frozen=True)
class Cluster:
    """`user_signal`: preemption sends the signal that the job named with --signal, not SIGTERM, first."""

    name: str
    version: str
    kill_wait: int
    preempt_type: str
    preempt_mode: str
    user_signal: bool
    proctrack: str
    requeue_delay: int
    job_requeue: bool
    accounting: bool
    now: int = 0  # seconds since 1970, by the controller's clock
    partitions: dict[str, Partition] = field(default_factory=dict)
    qos: dict[str, Qos] = field(default_factory=dict)

    @property
    def default(self) -> Partition | None:
        return next((one for one in self.partitions.values() if one.default), None)

    def partition(self, named: str | None) -> Partition | None:
        """The partition of that name, or the default one; of `a,b` the first that there is."""
        if not named:
            return self.default
        return next((self.partitions[name] for name in named.split(",") if name in self.partitions), None)

    @property
    def kill_after(self) -> float:
        """Seconds from SIGTERM to SIGKILL when a job is ended, measured ones if they are fewer."""
        measured = profile.kill_after(self.name)
        configured = float(max(self.kill_wait, LEAST_KILL_WAIT))
        return configured if measured is None else min(configured, measured)

    def grace(self, partition: Partition, qos: str | None = None) -> int:
        """GraceTime of a preempted job: its partition's, or with preempt/qos its QOS's."""
        if self.preempt_type != "preempt/qos":
            return partition.grace
        found = self.qos.get(qos or partition.qos or "normal")
        return found.grace if found else 0


def read() -> Cluster:
    """Ask Slurm. Raises SlurmAway, SlurmError."""
    config = call("scontrol", "show", "config")
    partitions = call("scontrol", "--oneliner", "show", "partition")
    nodes = call("sinfo", "--noheader", "--exact", "--format=%R|%G|%c|%m")
    qos = ""
    if "slurmdbd" in _settings(config).get("AccountingStorageType", ""):
        fields = "format=Name,GraceTime,PreemptMode,MaxWall"
        with contextlib.suppress(SlurmError):  # slurmdbd may be away; jobs run without it
            qos = call("sacctmgr", "--noheader", "--parsable2", "show", "qos", fields)
    return parse(config, partitions, nodes, qos)


def parse(config: str, partitions: str, nodes: str = "", qos: str = "") -> Cluster:
    """The cluster that those commands of `read` tell of."""
    said = _settings(config)
    parameters = ",".join(
        said.get(name, "") for name in ("PreemptParameters", "SlurmctldParameters", "SchedulerParameters")
    )
    flags = dict(part.partition("=")[::2] for part in parameters.split(","))
    clock = re.match(r"Configuration data as of (\d+)", config)
    credential = re.search(r"cred_expire=(\d+)", said.get("AuthInfo", ""))
    delay = flags.get("requeue_delay", "")
    have = _equipment(nodes)
    found = [_partition(line, have) for line in partitions.splitlines() if line.startswith("PartitionName=")]
    rows = [line.split("|") for line in qos.splitlines() if line.count("|") == 3]
    return Cluster(
        name=said.get("ClusterName", "cluster"),
        version=said.get("SLURM_VERSION", ""),
        kill_wait=_number(said.get("KillWait", "")) or 30,
        preempt_type=said.get("PreemptType", "preempt/none"),
        preempt_mode=said.get("PreemptMode", "OFF"),
        user_signal="preempt_send_user_signal" in flags or "send_user_signal" in flags,
        proctrack=said.get("ProctrackType", "").removeprefix("proctrack/"),
        requeue_delay=int(delay) if delay.isdigit() else int(credential[1]) if credential else CRED_EXPIRE,
        job_requeue=said.get("JobRequeue", "1") != "0",
        accounting="slurmdbd" in said.get("AccountingStorageType", ""),
        now=int(clock[1]) if clock else 0,
        partitions={one.name: one for one in found},
        qos={name: Qos(name, seconds(grace) or 0, mode, seconds(wall)) for name, grace, mode, wall in rows},
    )


def save_seconds(cluster: Cluster, partition: str | None, qos: str | None = None) -> float | None:
    """Seconds from the first signal of a preemption until SIGKILL, less a margin; None: no such partition."""
    found = cluster.partition(partition)
    if found is None:
        return None
    grace = cluster.grace(found, qos)
    whole = grace + cluster.kill_after
    return max(whole - (2.0 if grace else 1.0), whole / 2)


def check_asked(cluster: Cluster, recipe: "Recipe") -> list[Wrong]:
    """What the recipe asks for and no node or partition can give."""
    slurm, resources = recipe.slurm, recipe.resources
    named = str(slurm.partition or "")
    loc: tuple[str, ...] = ("slurm", "partition")
    if resources.preemptible and "partition" in slurm.preemptible:
        named, loc = str(slurm.preemptible["partition"]), ("slurm", "preemptible", "partition")
    names = [name for name in named.split(",") if name]
    unknown = [name for name in names if name not in cluster.partitions]
    if unknown:
        return [(loc, f"there is no partition `{name}` here{_near(cluster, name)}") for name in unknown]
    chosen = [cluster.partitions[name] for name in names] or [one for one in [cluster.default] if one]
    if not chosen:
        return [(loc, f"this cluster has no default partition; name one: {', '.join(cluster.partitions)}")]
    where = " and ".join(f"`{one.name}`" for one in chosen)
    found: list[Wrong] = []
    cores = resources.cpus or resources.gpus

    def need(key: str, asked: int, most: int | None, words: str) -> None:
        if most is not None and asked > most:
            found.append((("resources", key), words.format(asked=asked, most=most or "no", where=where)))

    if resources.device == "cuda":
        most = max(one.gpus for one in chosen)
        need("gpus", resources.gpus, most, "a node of {where} has {most} GPUs, the recipe asks for {asked}")
    words = "a node of {where} has {most} CPU cores, the recipe asks for {asked}"
    need("cpus" if resources.cpus else "gpus", cores, max(one.cpus for one in chosen) or None, words)
    words = "a node of {where} has {most} MB of memory, the recipe asks for {asked}"
    need("memory", resources.memory or 0, max(one.memory for one in chosen) or None, words)
    most = max(one.nodes if one.max_nodes is None else min(one.nodes, one.max_nodes) for one in chosen)
    need("nodes", resources.nodes, most, "a job in {where} gets {most} nodes at most, not {asked}")
    limits = [one.max_time for one in chosen if one.max_time is not None]
    if resources.time and len(limits) == len(chosen) and resources.time > max(limits):
        sentence = f"{where} lets a job last {hours(max(limits))} at most, not {hours(resources.time)}"
        found.append((("resources", "time"), sentence))
    return found


def _near(cluster: Cluster, name: str) -> str:
    near = difflib.get_close_matches(name, cluster.partitions, 1, 0.5)
    return f"; did you mean `{near[0]}`?" if near else f"; there are: {', '.join(cluster.partitions)}"


def _settings(config: str) -> dict[str, str]:
    """`Name = value` lines; what Slurm calls (null) is left out."""
    pairs = re.findall(r"^(\w+)\s*= (.*?)\s*$", config, re.MULTILINE)
    return {name: value for name, value in pairs if not value.startswith("(null")}


def _partition(line: str, have: dict[str, tuple[int, int, int]]) -> Partition:
    said = dict(re.findall(r"(\w+)=(\S*)", line))
    name = said["PartitionName"]
    gpus, cpus, memory = have.get(name, (0, 0, 0))
    return Partition(
        name=name,
        default=said.get("Default") == "YES",
        grace=_number(said.get("GraceTime", "0")),
        preempt_mode=said.get("PreemptMode", "OFF"),
        max_time=seconds(said.get("MaxTime", "")),
        default_time=seconds(said.get("DefaultTime", "")),
        nodes=_number(said.get("TotalNodes", "0")),
        priority_tier=_number(said.get("PriorityTier", "1")),
        state=said.get("State", "UP"),
        max_nodes=int(said["MaxNodes"]) if said.get("MaxNodes", "").isdigit() else None,
        qos=said["QoS"] if said.get("QoS", "N/A") != "N/A" else None,
        gpus=gpus,
        cpus=cpus,
        memory=memory,
    )


def _equipment(nodes: str) -> dict[str, tuple[int, int, int]]:
    """GPUs, cores and MB of a node, the most that a partition has on any."""
    best: dict[str, tuple[int, int, int]] = {}
    for row in (line.split("|") for line in nodes.splitlines() if line.count("|") == 3):
        # gpu:8, gpu:a100:8(S:0-1), several of them with commas between; other kinds of gres beside them
        gpus = sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", row[1]))
        new = (gpus, _number(row[2]), _number(row[3]))
        gpus, cpus, memory = map(max, new, best.get(row[0], new))
        best[row[0]] = (gpus, cpus, memory)
    return best


def _number(text: str) -> int:
    """The number that a value begins with (`5 sec`, `64000+`), or 0."""
    match = re.match(r"\d+", text)
    return int(match[0]) if match else 0
