"""Pure: what a machine has, as probe_task.py tells it, and what that means for a run."""

from typing import Any

from launcher.cli.doctor.findings import Finding

SMALL, LITTLE = 1 << 30, 20 << 30  # bytes free: no checkpoint fits; few do
FILES = 4096  # open files that loaders of data and torch's own sharing may need


def of_node(node: dict[str, Any], device: str, gpus: int | None, cores: int | None) -> list[Finding]:
    """`gpus`, `cores`: how many were asked for there, if any were."""
    return [*_gpus(node, device, gpus), _torch(node), *_disk(node), *_processes(node, cores)]


def _gpus(node: dict[str, Any], device: str, wanted: int | None) -> list[Finding]:
    have = node["gpus"]
    if device == "cpu":
        return []
    if not have["count"]:
        means = "a run with resources.device: cuda fails at its start"
        do = "Install the NVIDIA driver, name nodes that have one, or set resources.device=cpu."
        return [
            Finding(
                "gpus", "bad" if wanted else "note", f"no GPU on {node['host']}: {have['why']}", means, do
            )
        ]
    found = f"{have['count']} {have['name']} on {node['host']}, driver {have['driver']}"
    if have["count"] < (wanted or 0):
        do = f"Set resources.gpus to {have['count']}."
        return [Finding("gpus", "bad", found, f"{wanted} are asked for: a run fails at its start", do)]
    return [Finding("gpus", "good", found, "a run finds what it needs")]


def _torch(node: dict[str, Any]) -> Finding:
    torch = node["torch"]
    if torch["version"] is None:
        found = f"{torch['python']} has no torch on {node['host']}"
        do = f"{torch['python']} -m pip install torch, or name another environment in `env`."
        return Finding("torch", "bad", found, "no run can start", do)
    found = f"torch {torch['version']}"
    if not torch["shutdown_timeout"]:
        means = "its torchrun ends workers 30 s after a signal, saved or not"
        return Finding("torch", "bad", found, means, "Install torch 2.13 or newer.")
    return Finding("torch", "good", found, "torchrun waits for a save as long as it is told to")


def _disk(node: dict[str, Any]) -> list[Finding]:
    made = []
    for place, free in node["free"].items():
        found = f"{free / 2**30:.1f} GiB free in {place}"
        if free < SMALL:
            means, do = "a checkpoint does not fit", "Make room, or set LAUNCH_RUNS to another disk."
            made.append(Finding("disk", "bad", found, means, do))
        elif free < LITTLE:
            means, do = "few checkpoints fit", "Make room, or lower checkpoint.keep."
            made.append(Finding("disk", "note", found, means, do))
        else:
            made.append(Finding("disk", "good", found, "there is room for checkpoints"))
    return made


def _processes(node: dict[str, Any], cores: int | None) -> list[Finding]:
    made = []
    if cores and node["cores"] < cores:
        found = f"{node['cores']} cores may be used, {cores} were asked for"
        means = "workers share cores, and the loading of data slows them down"
        do = "Unset SLURM_CPU_BIND, or have the node's cores counted right."
        made.append(Finding("cores", "note", found, means, do))
    else:
        found = f"{node['cores']} cores may be used" + (f", {cores} were asked for" if cores else "")
        made.append(Finding("cores", "good", found, "no binding holds a run to fewer"))
    if 0 <= node["files"] < FILES:
        found, means = f"{node['files']} open files at most", "many loader workers may fail for want of more"
        made.append(Finding("ulimit", "note", found, means, f"ulimit -n {FILES}, or ask for it."))
    return made
