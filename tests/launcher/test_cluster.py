"""A cluster's own description: which settings count, the budget for a save, what nobody can be given."""

import pytest

from launcher.recipe import Recipe
from launcher.slurm import profile
from launcher.slurm.cluster import Cluster, check_asked, parse, save_seconds

# As `scontrol show config` prints them: Slurm 22.05, and 24.05 with accounting and preemption by QOS.
OLD = """Configuration data as of 1795283889
AuthInfo                = socket=/run/munge.socket,cred_expire=30
ClusterName             = old
JobRequeue              = 0
KillWait                = 30 sec
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
ProctrackType           = proctrack/linuxproc
SchedulerParameters     = bf_interval=2,sched_interval=2
SlurmctldParameters     = enable_user_top,preempt_send_user_signal
SLURM_VERSION           = 22.05.8
AccountingStorageType   = accounting_storage/none
"""
NEW = """Configuration data as of 2026-11-21T17:45:44
AuthInfo                = (null)
ClusterName             = new
JobRequeue              = 1
KillWait                = 10 sec
PreemptMode             = REQUEUE
PreemptParameters       = reclaim_licenses,send_user_signal
PreemptType             = preempt/qos
ProctrackType           = proctrack/cgroup
SchedulerParameters     = bf_continue,requeue_delay=15
SlurmctldParameters     = (null)
SLURM_VERSION           = 24.05.2
AccountingStorageType   = accounting_storage/slurmdbd
"""
PARTITIONS = (
    "PartitionName=batch AllowGroups=ALL Default=YES QoS=N/A DefaultTime=01:00:00 GraceTime=8 MaxNodes=2 "
    "MaxTime=1-00:00:00 PriorityTier=1 PreemptMode=REQUEUE State=UP TotalCPUs=64 TotalNodes=4\n"
    "PartitionName=big Default=NO QoS=long DefaultTime=NONE GraceTime=0 MaxNodes=UNLIMITED MaxTime=UNLIMITED "
    "PriorityTier=10 PreemptMode=OFF State=DOWN TotalCPUs=64 TotalNodes=1\n"
)
NODES = (
    "batch|gpu:a100:4(S:0-1),gpu:v100:2(S:1),shard:8|64|256000\n"
    "batch|(null)|128|64000+\nbig|gpu:16|256+|1000000\n"
)
QOS = "normal|00:00:00|cluster|\nlong|00:01:30|requeue|2-00:00:00\n"


def cluster(config: str = OLD) -> Cluster:
    return parse(config, PARTITIONS, NODES, QOS if config == NEW else "")


def recipe(**sections: dict[str, object]) -> Recipe:
    return Recipe.model_validate({"program": {"script": "train.py"}, **sections})


def test_settings_of_an_older_slurm() -> None:
    found = cluster()
    assert (found.name, found.kill_wait, found.proctrack, found.now) == ("old", 30, "linuxproc", 1795283889)
    assert found.user_signal and not found.job_requeue and not found.accounting
    assert found.requeue_delay == 30  # cred_expire, where nothing else says it


def test_settings_of_a_newer_slurm() -> None:
    found = cluster(NEW)
    assert found.user_signal and found.accounting and found.job_requeue
    assert found.requeue_delay == 15
    assert cluster(NEW.replace(",send_user_signal", "")).user_signal is False
    assert parse(NEW.replace(",requeue_delay=15", ""), PARTITIONS).requeue_delay == 120


def test_partitions() -> None:
    batch, big = cluster().partitions.values()
    assert batch.default and (batch.grace, batch.max_time, batch.default_time) == (8, 86400, 3600)
    assert (batch.gpus, batch.cpus, batch.memory, batch.nodes, batch.max_nodes) == (6, 128, 256000, 4, 2)
    assert (big.gpus, big.max_time, big.default_time, big.max_nodes, big.state) == (
        16,
        None,
        None,
        None,
        "DOWN",
    )
    assert big.qos == "long" and batch.qos is None


@pytest.mark.parametrize(
    ("config", "partition", "qos", "seconds"),
    [
        (OLD, "batch", None, 8 + 30 - 2),
        (OLD, "big", None, 30 - 1),
        (OLD.replace("30 sec", "1 sec"), "big", None, 5 - 1),  # slurmd's least
        (OLD, "nowhere,batch", None, 36),
        (OLD, "nowhere", None, None),
        (NEW, "batch", None, 10 - 1),  # preempt/qos: the partition's GraceTime does not count
        (NEW, "batch", "long", 90 + 10 - 2),
        (NEW, "big", None, 90 + 10 - 2),
    ],
)
def test_seconds_to_save_in(config: str, partition: str, qos: str | None, seconds: float | None) -> None:
    assert save_seconds(cluster(config), partition, qos) == seconds


def test_what_was_measured_counts_where_it_is_less() -> None:
    profile.write("old", 12.5, ["task"])
    assert save_seconds(cluster(), "batch") == 8 + 12.5 - 2
    profile.write("old", 55.0, ["task"])
    assert save_seconds(cluster(), "batch") == 36
    profile.path("old").write_text('{"kill_after": null}')
    assert save_seconds(cluster(), "batch") == 36
    assert profile.path("../../etc").parent == profile.path("old").parent


@pytest.mark.parametrize(
    ("sections", "loc", "words"),
    [
        (
            {"slurm": {"partition": "bacth"}},
            "slurm.partition",
            "no partition `bacth` here; did you mean `batch`?",
        ),
        ({"slurm": {"partition": "x"}}, "slurm.partition", "there are: batch, big"),
        ({"resources": {"gpus": 7}}, "resources.gpus", "a node of `batch` has 6 GPUs, the recipe asks for 7"),
        ({"resources": {"nodes": 3}}, "resources.nodes", "gets 2 nodes at most, not 3"),
        ({"resources": {"time": "25h"}}, "resources.time", "`batch` lets a job last 24 h at most, not 25 h"),
        ({"resources": {"cpus": 129}}, "resources.cpus", "has 128 CPU cores, the recipe asks for 129"),
        ({"resources": {"memory": "400G"}}, "resources.memory", "has 256000 MB of memory"),
        ({"resources": {"gpus": 129, "device": "cpu"}}, "resources.gpus", "has 128 CPU cores"),
    ],
)
def test_what_no_node_has(sections: dict[str, dict[str, object]], loc: str, words: str) -> None:
    (found,) = check_asked(cluster(), recipe(**sections))
    assert ".".join(found[0]) == loc and words in found[1]


@pytest.mark.parametrize(
    "sections",
    [
        {"resources": {"gpus": 6, "nodes": 2, "time": "24h", "cpus": 128, "memory": "250G"}},
        {"resources": {"gpus": 16, "time": "99h"}, "slurm": {"partition": "batch,big"}},
        {"resources": {"gpus": 100, "device": "cpu"}},
        {"resources": {"gpus": 16, "preemptible": True}, "slurm": {"preemptible": {"partition": "big"}}},
    ],
)
def test_what_some_node_has(sections: dict[str, dict[str, object]]) -> None:
    assert check_asked(cluster(), recipe(**sections)) == []
