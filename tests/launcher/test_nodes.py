"""A run on two nodes: guard and supervisor on one, an agent on the other. All of them are processes here."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.rundir import RunDir, read_json, write_json
from launcher.supervisor import control, fleet, meeting, processes
from launcher.supervisor.fleet import Fleet
from launcher.supervisor.torchrun import Command
from tests.launcher.conftest import Toy, wait

Make = Callable[..., Toy]
JOB = meeting.job_name("here", 0)


class Agents:
    """Agents of runs, as a job's tasks would be."""

    def __init__(self) -> None:
        self.found: list[subprocess.Popen[bytes]] = []

    def start(self, run: RunDir, node: int = 1, job: str = JOB) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-P", "-m", "launcher.supervisor.node", str(run.path)]
        self.found.append(subprocess.Popen([*argv, "--node", str(node), "--job", job]))
        return self.found[-1]


@pytest.fixture
def agents() -> Iterator[Agents]:
    made = Agents()
    yield made
    for agent in made.found:
        agent.kill()
        agent.wait()


def two_nodes(toy: Make, args: str, **options: object) -> Toy:
    return toy(args, backend="slurm", resources={"nodes": 2}, **options)


def finish(run: Toy, agent: subprocess.Popen[bytes]) -> None:
    """The run ends well; then node 0's task dismisses the agents."""
    assert run.end() == 0, run.window
    assert agent.poll() is None, "an agent stays until it is dismissed"
    meeting.dismiss(run.run, JOB)
    assert agent.wait(20) == 0
    run.assert_gone()


def test_preempted_run_of_two_nodes_comes_back(toy: Make, agents: Agents) -> None:
    run = two_nodes(toy, "--steps 12 --wait-at 7 --every 100").start()
    agent = agents.start(run.run)
    run.at(7)
    assert sorted(path.name for path in run.run.attempt_logs(1).iterdir()) == [
        *(f"rank-{rank}.log" for rank in range(4)),
        *("torchrun-node-1.log", "torchrun.log"),
    ]
    first = run.workers()
    ports = [read_json(run.run.rendezvous)["port"]]
    agent.send_signal(signal.SIGTERM)  # a cluster tells all tasks, and node 0 decides
    agent.send_signal(signal.SIGUSR2)
    control.preempt(run.run)
    assert not any(process.alive for process in first)
    finish(run, agent)
    assert run.states == ["preempted", "finished"]
    assert run.ends[0]["saved"] and run.ends[1]["resumed"] == 7 and run.final["lost_steps"] == 0
    assert run.final["gpus"] == 4 and "4 workers on 2 nodes" in run.window
    run.assert_undisturbed(12)
    ports.append(read_json(run.run.rendezvous)["port"])
    assert ports[0] != ports[1] and max(ports) < 32768


def test_a_worker_of_the_other_node_crashes(toy: Make, agents: Agents) -> None:
    run = two_nodes(toy, "--steps 12 --wait-at 7 --every 2").start()
    agent = agents.start(run.run)
    run.at(7)
    (rank,) = [
        process
        for process in processes.of_attempts(run.run.path, node=1)
        if b"RANK=3" in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    ]
    rank.signal(signal.SIGKILL)
    finish(run, agent)
    assert run.states == ["crashed", "finished"]
    assert run.ends[0]["reason"] == "rank 3 was killed by SIGKILL; torchrun on node 1 exited with 1"
    run.assert_undisturbed(12)


def test_supervisor_killed(toy: Make, agents: Agents) -> None:
    run = two_nodes(toy, "--steps 12 --wait-at 7 --every 100").start()
    agent = agents.start(run.run)
    run.at(7)
    first = run.workers()
    os.kill(run.supervisor, signal.SIGKILL)
    finish(run, agent)
    assert run.states == ["preempted", "finished"] and run.final["lost_steps"] == 0
    assert not any(process.alive for process in first)
    run.assert_undisturbed(12)


def test_an_agent_that_never_comes_is_named(
    toy: Make, agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is what the agent of another job, or of an earlier attempt, has said taken for its words."""
    monkeypatch.setattr(fleet, "PATIENCE", 0.5)
    monkeypatch.setattr(fleet, "PATIENT", 0.1)
    run = two_nodes(toy, "").run
    run.nodes.mkdir()
    said: list[str] = []
    for job, fence in (("7.0", 3), ("8.0", 2)):
        write_json(run.node(1), {"schema": 1, "job": job, "fence": fence, "state": "ready", "counter": 1})
        attempt = Fleet(run, 3, "8.0", 2, 2, 20.0, lambda meeting: pytest.fail("it started"), said.append)
        wait("the end", lambda attempt=attempt: not attempt.running, 10)
        assert attempt.trouble == "node 1 did not come up within 0.5 s" and attempt.exit_status == 1
    assert said == ["waiting for node 1 to come up"] * 2


def test_an_agent_that_dies_is_noticed(toy: Make, agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of it here is no concern of ours; the attempt ends, and says why."""
    monkeypatch.setattr(fleet, "SILENCE", 4.0)
    run = two_nodes(toy, "").run
    write_json(run.lease, {"schema": 1, "fence": 1, "counter": 1})
    agent = agents.start(run)
    sleep = Command(("sleep", "600"), dict(os.environ), run.path)
    attempt = Fleet(run, 1, JOB, 2, 2, 2.0, lambda meeting: sleep, print)
    wait("the start", lambda: attempt.running and (read_json(run.rendezvous) or {}).get("order") == "start")
    wait("both", lambda: attempt.running and (read_json(run.node(1)) or {}).get("state") == "running")
    agent.kill()
    wait("the end", lambda: not attempt.running, 30)
    assert attempt.trouble == "nothing was heard of node 1 for 4 s"
    assert attempt.exit_status, "and torchrun here is ended"


LAST_ONE_FAILS = """
import os, pathlib, sys, time
last = os.environ["RANK"] == "3"
while last and not pathlib.Path(os.environ["LAUNCH_RUN_DIR"], "others_are_done").exists():
    time.sleep(0.1)
sys.exit(last)
"""


def test_node_0_is_not_left_waiting_for_one_that_failed(toy: Make, agents: Agents) -> None:
    """Its torchrun waits at the end for all others', inside its store, where it hears no SIGTERM."""
    run = two_nodes(toy, "", script=LAST_ONE_FAILS, crashes=0, grace=300).start()
    agent = agents.start(run.run)
    wait("the workers", lambda: all(run.run.rank_log(1, rank).exists() for rank in range(4)))
    wait("the end of node 0's", lambda: len(processes.of_attempts(run.run.path, node=0)) == 1)
    (run.run.path / "others_are_done").touch()
    assert run.end(120) == 1, "the grace period is for those who save"
    assert run.final["reason"].endswith("rank 3 exited with 1; torchrun on node 1 exited with 1")
    meeting.dismiss(run.run, JOB)
    assert agent.wait(20) == 0


def test_stopped_while_the_nodes_meet(toy: Make) -> None:
    run = two_nodes(toy, "").run
    attempt = Fleet(run, 1, JOB, 2, 2, 20.0, lambda meeting: pytest.fail("it started"), print)
    assert attempt.running
    attempt.stop(20.0)
    assert not attempt.running and attempt.exit_status == 1 and not attempt.trouble
    assert read_json(run.rendezvous)["order"] == "stop"


def test_an_agent_of_another_job_or_attempt_does_nothing(toy: Make, agents: Agents) -> None:
    run = two_nodes(toy, "").run
    told = {"schema": 1, "job": "7.0", "fence": 3, "order": "meet", "nodes": 2, "gpus": 1, "grace": 5.0}
    write_json(run.rendezvous, told | {"host": socket.gethostname(), "port": 1})
    run.nodes.mkdir()
    meeting.dismiss(run, "7.0")
    agent = agents.start(run, job="8.0")
    wait("its first words", lambda: (read_json(run.node(1)) or {}).get("counter", 0) >= 2)
    assert read_json(run.node(1))["state"] == "waiting" and agent.poll() is None
    # Of its own job, but it was not there when they met: it must not join in late.
    write_json(run.rendezvous, told | {"job": "8.0", "order": "start", "host": "nowhere.invalid", "port": 1})
    write_json(run.lease, {"schema": 1, "fence": 3, "counter": 9})
    counter = read_json(run.node(1))["counter"]
    wait("a move", lambda: read_json(run.node(1))["counter"] > counter)
    assert read_json(run.node(1))["state"] == "waiting"
    # A name that it cannot resolve is said at once, and what node 0 is to print.
    write_json(run.rendezvous, told | {"job": "8.0", "fence": 4, "host": "nowhere.invalid", "port": 1})
    wait("an answer", lambda: read_json(run.node(1))["state"] == "ended")
    assert "cannot resolve nowhere.invalid" in read_json(run.node(1))["error"]
    meeting.dismiss(run, "8.0")
    assert agent.wait(20) == 0


def test_ports_lie_below_the_ephemeral_range_and_change(toy: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = two_nodes(toy, "").run
    with meeting.listen(run, 1) as first, meeting.listen(run, 1) as again, meeting.listen(run, 2) as next_:
        ports = [held.getsockname()[1] for held in (first, again, next_)]
    assert len(set(ports)) == 3, "a port that is taken is passed over"
    assert all(20000 <= port < 32768 for port in ports)
    assert meeting._ports(1024) == range(20000, 32768) and meeting._ports(15000)[-1] == 14999
