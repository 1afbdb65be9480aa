"""What a transfer is to do, decided from two listings alone: nothing is asked and nothing is changed here."""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

from launcher.storage import Entry, key_problem

NEARLY = 1e-6  # seconds: what a float of today keeps of a file's nanoseconds


@dataclass
class Plan:
    """`copy` and `look` hold (object of the source, key in the target); those of `look` may be equal."""

    copy: list[tuple[Entry, str]] = field(default_factory=list)
    look: list[tuple[Entry, str]] = field(default_factory=list)
    same: int = 0


def compare(
    source: Mapping[str, Entry], target: Mapping[str, Entry], *, exact: bool, checksum: bool = False
) -> Plan:
    """What `sync` has to do, by size and time.

    `exact`: the target's times are set to the source's by us (a folder), so any other time is looked into;
    else only a source that is newer than the target is copied. `checksum`: equal sizes say nothing.
    """
    plan = Plan()
    for key in sorted(source):
        entry, there = source[key], target.get(key)
        if there is None or there.size != entry.size:
            plan.copy.append((entry, key))
        elif checksum or (exact and not same_time(entry.mtime, there.mtime)):
            plan.look.append((entry, key))
        elif not exact and entry.mtime > there.mtime:
            plan.copy.append((entry, key))
        else:
            plan.same += 1
    return plan


def surplus(source: Mapping[str, Entry], target: Iterable[str], links: Iterable[str]) -> list[str]:
    """What of the target --delete takes away. A link of the source hides what it leads to: that stays."""
    hidden = set(links)
    spared = (key for key in target if key not in source and key not in hidden)
    return sorted(key for key in spared if not (hidden and above(key, hidden)))


def same_time(one: float, other: float) -> bool:
    """Whether two times are one, also where S3 told one of them in whole seconds (a HEAD does)."""
    if abs(one - other) < NEARLY:
        return True
    return int(one) == int(other) and (one.is_integer() or other.is_integer())


def hostile(keys: Iterable[str], *, into_folder: bool) -> list[str]:
    """Sentences about the keys that must not be written anywhere: a bucket may hold any."""
    taken, said = set(keys), []
    for key in sorted(taken):
        if problem := key_problem(key):
            said.append(f"the key {key!r}: {problem}")
        elif into_folder and (file := above(key, taken)):
            said.append(f"the keys {file!r} and {key!r}: a file and a folder of one name")
    return said


def is_marker(entry: Entry) -> bool:
    """An empty object that stands for a folder, as consoles make them."""
    return entry.size == 0 and (entry.key.endswith("/") or not entry.key)


def above(key: str, names: Container[str]) -> str | None:
    """The one of `names` that is a folder on the way to `key`, or None."""
    end = key.find("/")
    while end != -1:
        if key[:end] in names:
            return key[:end]
        end = key.find("/", end + 1)
    return None
