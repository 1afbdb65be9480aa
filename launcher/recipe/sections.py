"""The launcher's sections of a recipe: their keys, types, defaults, and what each is for."""

import os
import re
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
)

from launcher.storage import StoreSettings

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_MEGABYTES = {"": 1, "M": 1, "G": 1024, "T": 1024**2}


def _seconds(value: object) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", str(value)) if not isinstance(value, bool) else None
    if not match:
        raise ValueError("must be a duration such as 90s, 10m or 2h")
    return float(match[1]) * _UNITS[match[2]]


def hours(length: float) -> str:
    """Seconds as people say them: 24 h, 1.5 h, 90 s."""
    for unit, name in ((3600.0, "h"), (60.0, "min")):
        if length >= unit:
            return f"{length / unit:.3g} {name}"
    return f"{length:g} s"


def _time(value: object) -> float:
    """A duration, or a time as Slurm writes it: HH:MM:SS or D-HH:MM:SS."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", str(value))
    if match:
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return days * 86400.0 + hours * 3600.0 + minutes * 60.0 + seconds
    return _seconds(value)


def _megabytes(value: object) -> int:
    match = re.fullmatch(r"([1-9]\d*)([MGT]?)i?B?", str(value)) if not isinstance(value, bool) else None
    if not match:
        raise ValueError("must be an amount of memory such as 30G or 200000 (MB)")
    return int(match[1]) * _MEGABYTES[match[2]]


def _interval(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"[1-9]\d*it", value):
        return value
    try:
        seconds = _seconds(value)
    except ValueError:
        seconds = 0.0
    if not seconds:
        raise ValueError("must be a time such as 10m or 90s, or a number of steps such as 500it")
    return f"{seconds:g}s" if seconds % 1 else f"{int(seconds)}s"


def _steps(value: object) -> int:
    match = re.fullmatch(r"([1-9]\d*)it", value, re.ASCII) if isinstance(value, str) else None
    if not match:
        raise ValueError("must be a number of steps such as 5000it")
    return int(match[1])


def steps(count: int | None) -> str:
    """5000it: as recipes and the contract spell a number of steps; empty if there is none."""
    return f"{count}it" if count else ""


def _variable_text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _number_or(pattern: str) -> WithJsonSchema:
    return WithJsonSchema(
        {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": pattern}]}
    )


_DURATION = _number_or(r"^\d+(\.\d+)?[smhd]?$")
_INTERVAL = _number_or(r"^\d+(\.\d+)?([smhd]|it)?$")
_TIME = _number_or(r"^(\d+(\.\d+)?[smhd]?|(\d+-)?\d+:\d\d:\d\d)$")
_MEMORY = _number_or(r"^[1-9]\d*[MGT]?i?B?$")
_TEXT = {"anyOf": [{"type": "string"}, {"type": "integer"}]}
Pause = Annotated[float, BeforeValidator(_seconds), _DURATION]
Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0), _DURATION]
Time = Annotated[float, BeforeValidator(_time), Field(gt=0), _TIME]
Megabytes = Annotated[int, BeforeValidator(_megabytes), _MEMORY]
Interval = Annotated[str, BeforeValidator(_interval), _INTERVAL]
Steps = Annotated[
    int,
    BeforeValidator(_steps),
    PlainSerializer(steps),
    WithJsonSchema({"type": "string", "pattern": r"^[1-9]\d*it$"}),
]
Dotted = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
VariableText = Annotated[str, BeforeValidator(_variable_text), WithJsonSchema(_TEXT)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class Program(Section):
    module: Dotted | None = None
    """Python module that torchrun starts in every worker. Give this or `script`."""
    script: str | None = None
    """Path of a Python script, from the working directory. Give this or `module`."""
    check: Dotted | None = None
    """Module that checks the `train` section: `python -m MODULE --check`."""
    args: list[str] = []
    """Arguments of the program."""


class Resources(Section):
    gpus: Annotated[int, Field(ge=1)] = 1
    """GPUs on each node; with `device: cpu` the number of workers."""
    min_gpus: Annotated[int, Field(ge=1)] = 1
    """Fewer GPUs than this, over all nodes, are refused."""
    min_gpus_why: str = ""
    """The reason for `min_gpus`, shown to whoever asks for fewer."""
    nodes: Annotated[int, Field(ge=1)] = 1
    """Machines."""
    device: Literal["cuda", "cpu"] = "cuda"
    cpus: Annotated[int, Field(ge=1)] | None = None
    """CPU cores on each node. Default: one for each worker."""
    memory: Megabytes | None = None
    """Memory on each node: 30G, or a number of MB. Default: the cluster's own."""
    time: Time | None = None
    """Longest time that one allocation lasts; the run goes on in the next. Default: the partition's own."""
    max_wait: Seconds | None = None
    """How long the run may wait for its first start; then it ends, and says so."""
    preemptible: bool = False
    """It may be killed at any time: gives way to runs of higher priority, takes `slurm.preemptible`."""
    priority: int = 0
    """Higher goes first. On Slurm only below 0, as `--nice`: the rest is the cluster's to decide."""


class Restart(Section):
    crashes: Annotated[int, Field(ge=0)] = 5
    """Crashes and hangs that a run survives; the next one ends it. Preemptions never count."""
    backoff: Pause = 5.0
    """Pause after the first crash; it doubles with each."""
    hang: Seconds = 600.0
    """An attempt whose heartbeat stands still for so long is stopped and counted as a crash."""
    grace: Seconds = 60.0
    """From the stop signal to SIGKILL: the time there is to save in."""


class Checkpoint(Section):
    every: Interval = "600s"
    """Time (10m, 90s) or steps (500it) between checkpoints."""
    busy: Literal["wait", "skip"] = "wait"
    """What a checkpoint does that is due while the one before is still being written. The last one waits."""
    keep: Annotated[int, Field(ge=1)] = 3
    """How many checkpoints stay, the newest, on disk and in the store."""
    keep_every: Steps | None = None
    """Beside those, the first checkpoint at or beyond each multiple of so many steps (5000it) stays."""


class Fetch(Section):
    source: Annotated[
        str, Field(alias="from", pattern=r"^(s3|file)://"), AfterValidator(lambda url: url.rstrip("/"))
    ]
    """Where a data set lies: s3://bucket/prefix, reached as `storage` says, or file:///folder."""
    to: Annotated[str, Field(min_length=1)]
    """The folder that it is brought to, once per machine; relative to the working directory."""


def apart(fetches: list[Fetch]) -> list[Fetch]:
    """A folder holds one data set: what is fetched into it later would be refused."""
    folders = [os.path.normpath(item.to) for item in fetches]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(f"must not bring two data sets to one folder, {folder}")
    return fetches


class Storage(Section):
    url: str | None = None
    """Where runs are mirrored: s3://bucket/prefix. $LAUNCH_STORAGE if absent."""
    endpoint: str | None = None
    """Address of an S3-compatible store, if it is not AWS."""
    region: str | None = None
    profile: str | None = None
    """Profile in the AWS configuration files that holds the credentials."""
    path_style: bool | None = None
    """Bucket in the path of the address and not in the host. If absent: yes, unless the store is AWS."""
    ca_bundle: str | None = None
    """File of certificates to trust, for a store over https that is signed by your own authority."""
    checksum: Literal["auto", "signed", "etag"] = "auto"
    """What tells that a body arrived whole: the store, by a signed hash, or its etag. Probed if auto."""

    @property
    def settings(self) -> StoreSettings:
        """How to reach the store, as `launcher.storage` takes it: the keys have the same names."""
        return StoreSettings(**self.model_dump(exclude={"url"}))


class Mirror(Section):
    every: Seconds = 10.0
    """Seconds between passes of the mirror."""


_LINE = r"^[^\x00-\x1f\x7f]+$"  # it stands in a line of a batch script
Line = Annotated[str, Field(pattern=_LINE)]
OptionName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
Option = Line | int | float | bool


class Slurm(Section):
    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    constraint: Line | None = None
    exclude: Line | None = None
    """Nodes that are not to be used."""
    reservation: Line | None = None
    come_back: Literal["submit", "requeue"] = "submit"
    """After a preemption: a fresh job at once, or the same job again, with the age it had in the queue."""
    options: dict[OptionName, Option] = {}
    """Any other option of sbatch, by its long name: `mail-user: me@example.org`, `exclusive: true`."""
    preemptible: dict[OptionName, Option] = {}
    """Options laid over the others where `resources.preemptible` is true: `partition: scavenge`."""


class Env(Section):
    conda: str | None = None
    """A conda environment, by name or by path, that the program runs in."""
    venv: str | None = None
    """A Python virtual environment, by path, that the program runs in."""
    modules: list[str] = []
    """Environment modules that are loaded first, in this order."""
    setup: list[str] = []
    """Lines of bash that come last: whatever they export, the program has."""
    vars: dict[Variable, VariableText] = {}
    """Variables for the program."""
    keep: list[Variable] = []
    """Variables of the caller that travel with the run, beside the launcher's own list."""


class Tmux(Section):
    session: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = "launch"
    """The tmux session that windows of runs are opened in."""
