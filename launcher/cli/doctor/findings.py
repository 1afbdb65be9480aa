"""Pure: what a cluster's settings and a probe amount to for a run, in plain words."""

from dataclasses import asdict, dataclass
from typing import Literal

from launcher.recipe.sections import hours
from launcher.slurm.cluster import Cluster, Partition, save_seconds
from launcher.slurm.probe import ROLES, Found

SHORT, TIGHT = (
    10.0,
    30.0,
)  # seconds to save in: below the first a run loses its steps since the last checkpoint
SLOW_DISK = 5.0  # seconds for a file to the node and back
WHO = {"task": "the supervisor", "child": "torchrun", "grandchild": "its workers"}


@dataclass(frozen=True)
class Finding:
    """`means`: for a run. `do`: what to change, if anything."""

    check: str
    state: Literal["good", "note", "bad"]
    found: str
    means: str
    do: str = ""

    def record(self) -> dict[str, str]:
        return asdict(self)


def of_cluster(
    cluster: Cluster, partition: Partition, qos: str | None, wanted: float | None
) -> list[Finding]:
    """`wanted`: seconds to save in that the recipe counts on, if there is one."""
    return [
        _grace(cluster, partition, qos, wanted),
        _preemption(cluster, partition, qos),
        _user_signal(cluster),
        _requeue(cluster),
        _limits(partition),
        *_qos(cluster, qos or partition.qos),
        _accounting(cluster),
    ]


def _grace(cluster: Cluster, partition: Partition, qos: str | None, wanted: float | None) -> Finding:
    grace, left = cluster.grace(partition, qos), save_seconds(cluster, partition.name, qos) or 0.0
    found = f"GraceTime is {grace} s, KillWait {cluster.kill_wait} s"
    means = f"from the first signal of a preemption there are {left:g} s to save in"
    if _mode(cluster, partition, qos) == "OFF":
        means = f"{partition.name} is not preempted; a run that is cancelled has {left:g} s to save in"
        return Finding("grace", "good", found, means)
    do = f"Ask for a GraceTime of 60 or more on {partition.name}; until then, checkpoint.every: 5m or less."
    if left < SHORT:
        return Finding("grace", "bad", found, f"{means}: a model of any size is not saved by then", do)
    if left < TIGHT:
        return Finding("grace", "note", found, f"{means}: enough for a small model", do)
    if wanted and wanted > left:
        means += f"; the recipe's restart.grace of {wanted:g} s is cut to that"
    return Finding("grace", "good", found, means)


def _mode(cluster: Cluster, partition: Partition, qos: str | None) -> str:
    """What becomes of a preempted job: its partition's, or with preempt/qos its QOS's PreemptMode."""
    if cluster.preempt_type == "preempt/none":
        return "OFF"
    if cluster.preempt_type == "preempt/qos":
        found = cluster.qos.get(qos or partition.qos or "normal")
        return (
            found.preempt_mode.upper() if found and found.preempt_mode != "cluster" else cluster.preempt_mode
        )
    return partition.preempt_mode


def _preemption(cluster: Cluster, partition: Partition, qos: str | None) -> Finding:
    mode = _mode(cluster, partition, qos)
    found = f"{cluster.preempt_type}, PreemptMode of {partition.name} is {mode}"
    if mode == "OFF":
        return Finding("preemption", "good", found, "no other job takes a run's nodes away")
    if "REQUEUE" in mode or "CANCEL" in mode:
        return Finding("preemption", "good", found, "a preempted run saves, leaves, and is brought back")
    means = "a preempted run stands still where it is, keeps its memory, and goes on later; nothing is saved"
    return Finding("preemption", "note", found, means, "Set restart.hang to more than such a pause may last.")


def _user_signal(cluster: Cluster) -> Finding:
    if cluster.user_signal:
        means = (
            "the signal that a job names comes first, SIGTERM at the end of GraceTime; both make a run save"
        )
        return Finding("signal", "good", "preemption sends the job's own signal", means)
    means = "SIGTERM comes at the beginning and again at the end of GraceTime; the first makes a run save"
    return Finding("signal", "good", "preemption sends SIGTERM", means)


def _requeue(cluster: Cluster) -> Finding:
    found = f"JobRequeue is {int(cluster.job_requeue)}, a requeued job waits {cluster.requeue_delay} s"
    means = "slurm.come_back: submit does not wait for that, and requeue has the wait lifted"
    return Finding("return", "good", found, means)


def _limits(partition: Partition) -> Finding:
    longest = "no limit" if partition.max_time is None else hours(partition.max_time)
    default = partition.default_time or partition.max_time
    found = f"{partition.name}: {partition.nodes} nodes of {partition.gpus} GPUs, {partition.cpus} cores, "
    found += f"{partition.memory} MB; MaxTime {longest}"
    if partition.state != "UP":
        do = "Name another one with --partition."
        return Finding(
            "limits", "bad", found, f"{partition.name} is {partition.state}: nothing starts there", do
        )
    if default is None:
        return Finding("limits", "good", found, "a run goes on in one allocation until it is finished")
    means = f"without resources.time an allocation lasts {hours(default)}; the run goes on in the next one"
    return Finding("limits", "good", found, means)


def _qos(cluster: Cluster, name: str | None) -> list[Finding]:
    qos = cluster.qos.get(name or "normal")
    if qos is None:
        return []
    found = f"QOS {qos.name}: GraceTime {qos.grace} s, PreemptMode {qos.preempt_mode}"
    if qos.max_time is None:
        return [Finding("qos", "good", found, "it sets no limit of its own to an allocation's time")]
    return [Finding("qos", "good", found, f"an allocation lasts {hours(qos.max_time)} at most")]


def _accounting(cluster: Cluster) -> Finding:
    if cluster.accounting:
        return Finding("accounting", "good", "slurmdbd is there", "accounts and QOS are checked by Slurm")
    means = "nothing is lost: what became of a run is in its own folder; Slurm ignores account and qos"
    return Finding("accounting", "good", "there is no slurmdbd", means)


def of_probe(cluster: Cluster, found: Found) -> list[Finding]:
    return [*_signals(cluster, found), _folder(found), _clock(found)]


def _signals(cluster: Cluster, found: Found) -> list[Finding]:
    track = f"proctrack/{cluster.proctrack}"
    if not found.reached:
        do = "Ask who runs the cluster why `scancel --signal=TERM JOB.0` reaches no task."
        means = "a run hears of its preemption only when it is killed: it falls back to its last checkpoint"
        return [Finding("reach", "bad", f"{track}: a step's SIGTERM reached nobody", means, do)]
    people = " and ".join(WHO[role] for role in found.reached)
    means = "the supervisor stops torchrun and its workers, so each is told once and in time"
    if "grandchild" in found.reached:
        means = "torchrun and the workers hear it as well as the supervisor, which is prepared for it"
    made = [Finding("reach", "good", f"{track}: a step's SIGTERM reaches {people}", means)]
    if found.kill_after is None:
        made.append(
            Finding("kill", "note", "no SIGTERM came with the cancellation", "the budget is KillWait's")
        )
    else:
        words = f"SIGKILL came {found.kill_after:g} s after SIGTERM; KillWait is {cluster.kill_wait} s"
        means = f"the time to save in counts {cluster.kill_after:g} s for it"
        made.append(Finding("kill", "good", words, means))
    if found.outlived:
        alive = " and ".join(WHO[role] for role in ROLES if role in found.outlived)
        means = (
            "what is alive at SIGKILL keeps its GPU; the supervisor therefore ends its workers before that"
        )
        do = "Ask for ProctrackType=proctrack/cgroup."
        made.append(Finding("orphans", "note", f"{track}: SIGKILL did not reach {alive}", means, do))
    return made


def _folder(found: Found) -> Finding:
    words = f"a file was seen on {found.node['host']} and its answer here within {found.round_trip:.1f} s"
    if found.round_trip > SLOW_DISK:
        means = "`launch status` and `launch stop` are late by as much, for the disk's cache"
        return Finding("folder", "note", words, means, "Put LAUNCH_RUNS on a disk that caches less.")
    return Finding("folder", "good", words, "runs can be watched and stopped from here")


def _clock(found: Found) -> Finding:
    words = f"the clock of {found.node['host']} is {found.clock:+.1f} s off ours (± {found.clock_error:.1f})"
    return clock(words, abs(found.clock) - found.clock_error)


def clock(words: str, off: float) -> Finding:
    if off > 300:
        means = "times in `launch status` are wrong, and S3 refuses requests from 15 minutes on"
        return Finding("clock", "bad", words, means, "Have the clock set (chrony, ntp).")
    if off > 5:
        return Finding("clock", "note", words, "times in `launch status` are off by as much; nothing else is")
    return Finding("clock", "good", words, "times can be trusted")
