"""`launch rm`: delete a run that has ended, here and, if told, in the store."""

import shutil

from launcher.errors import Taken, UserError
from launcher.recipe import load_frozen
from launcher.rundir import RunDir, read_json
from launcher.supervisor import lease


def remove(run: RunDir, in_store: bool) -> None:
    """The store first, so that an interrupted removal can be run again. Raises UserError, StoreError."""
    from launcher.backends import BACKENDS
    from launcher.supervisor import processes

    holder = lease.holder(run)
    if (holder and holder.alive is not False) or processes.of_run(run.path):
        raise UserError(f"run {run.id} is running", f"launch stop {run.id}")
    if in_store:
        _remove_in_store(run)
    BACKENDS[(read_json(run.run) or {}).get("backend", "local")].close(run)
    aside = run.path.with_name(f".{run.id}.removed")  # nobody sees half a run
    try:
        run.path.rename(aside)
        shutil.rmtree(aside)
    except OSError as error:
        raise UserError(f"cannot delete {run.path}: {error.strerror or error}") from None


def _remove_in_store(run: RunDir) -> None:
    from launcher.mirror.ownership import read_owner, watch
    from launcher.storage import reach

    url = (read_json(run.run) or {}).get("url")
    if not url:
        raise UserError(f"run {run.id} was not mirrored: there is no store to delete it in")
    store = reach(url, load_frozen(run.recipe).storage.settings)
    owner = read_owner(store)
    ours = (read_json(run.synced) or {}).get("token")  # nobody here holds the run any more
    if owner and owner[0].get("token") != ours:
        try:
            watch(store, owner[0])  # it may have moved to another machine
        except Taken as taken:
            raise UserError(taken.message, "launch stop, there") from None
    # A manifest says that all of its checkpoint is there: so it goes first.
    keys = [entry.key for entry in store.list()]
    for manifests in (True, False):
        store.delete_many(key for key in keys if key.endswith("/manifest.json") is manifests)
    store.sweep()
