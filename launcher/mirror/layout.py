"""What of a run folder goes to the store, and what it is there. Names only."""

from collections.abc import Iterable, Iterator

from launcher.checkpoints import MANIFEST, Mark, mark_of

NOT_MIRRORED = {
    *("lease.json", "synced.json", "mirrored.json", "owner.json", "resume_requested"),
    *("code/.git", "checkpoints"),  # checkpoints go their own way
    *("rendezvous.json", "nodes"),  # of this moment, and of these machines
    "submitit",  # pickles: whoever could write them into a bucket would run code where they are loaded
}
LAST = "checkpoints/latest.json"  # names a checkpoint, so it follows them
STATES = ("stop_requested", "final.json")  # their absence says something: what is gone here goes there
CODE, FORM = "code/", "code.json"  # what objects cannot say of the snapshot: its links and executables
LATER = ("logs/", "tensorboard/", "inference/")  # a run goes on without them: they follow the checkpoints


def grows(key: str) -> bool:
    """Whether the file is appended to: then what was sent of it stays right while it is written."""
    return key.endswith((".jsonl", ".log")) or ".tfevents." in key


def stays_inside(link: str, target: str) -> bool:
    """Whether a symbolic link at `link`, a path below a folder, leads to something below that folder.

    `..` may only stand at the front, where it counts from the link's own folder: after a name it would count
    from wherever a link of that name leads to.
    """
    parts = target.split("/")
    up = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    inside = up <= link.count("/") and not any(part in ("", ".", "..") for part in parts[up:])
    return inside and target.isprintable()


def marks_of(keys: Iterable[str]) -> list[Mark]:
    """The checkpoints whose manifests are among the keys, newest first."""
    folders = (key.split("/") for key in keys if key.startswith("checkpoints/"))  # of thousands, a few
    names = (parts[1] for parts in folders if len(parts) == 3 and parts[2] == MANIFEST)
    return sorted((mark for mark in map(mark_of, names) if mark), reverse=True)


def parents_of(key: str) -> Iterator[str]:
    """The "folders" that a key is in, the innermost first."""
    while "/" in key:
        key = key.rpartition("/")[0]
        yield key
