"""code.json: what of the snapshot in code/ no object can be, its symbolic links and executable files."""

import json
import os
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import StoreError
from launcher.mirror.layout import CODE, FORM, parents_of, stays_inside
from launcher.storage import Store, key_problem


@dataclass(frozen=True)
class Form:
    """What of the snapshot in code/ objects cannot be; `links` by their path, and where they lead."""

    links: dict[str, str]
    executable: list[str]

    def data(self) -> bytes:
        form = {"schema": 1, "links": self.links, "executable": sorted(self.executable)}
        return json.dumps(form, sort_keys=True).encode()

    def give(self, code: Path, brought: Container[str]) -> None:
        """Make the links that are not here, and files that were just `brought` executable."""
        for name in self.executable:
            if f"{CODE}{name}" in brought:
                mode = (code / name).lstat().st_mode
                (code / name).chmod(mode | (mode & 0o444) >> 2)  # for whoever may read it
        for link, target in self.links.items():
            path = code / link
            through = any((code / parent).is_symlink() for parent in parents_of(link))
            if not through and not os.path.lexists(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.symlink_to(target)


def read(store: Store, keys: Container[str]) -> Form:
    """StoreError if a link would lead out of the snapshot."""
    if FORM not in keys:
        return Form({}, [])
    try:
        said = json.loads(store.get_bytes(FORM)[0])
        form = Form({str(k): str(v) for k, v in said["links"].items()}, [str(k) for k in said["executable"]])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StoreError(f"{FORM} in {store.url} is torn") from error
    for link, target in form.links.items():
        if key_problem(link) or not stays_inside(link, target) or f"{CODE}{link}" in keys:
            raise StoreError(
                f"the store holds a link {link!r} to {target!r}, which is not safe to make",
                "somebody else has written there; nothing was brought",
            )
    return form
