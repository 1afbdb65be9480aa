"""A checkpoint that is whole, and a bomb: its manifest has the right hashes, its .pth wants to run code."""

import hashlib
import json
import pickle
from pathlib import Path

import pytest

from detcore import checkpoint
from detcore.errors import InputError


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_in_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    folder, gone_off = tmp_path / "step-00000010-fence-1", tmp_path / "gone off"
    folder.mkdir()
    files = {}
    for name in ("train.pth", "model.pth"):
        data = pickle.dumps({"step": Bomb(gone_off)}, protocol=2)  # as torch.save does
        (folder / name).write_bytes(data)
        files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = {"schema": 1, "step": 10, "fence": 1, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = checkpoint.newest(tmp_path, print)
    assert found is not None, "nothing that hashes can tell"
    for load in (found.training, found.model):
        with pytest.raises(InputError, match=r"\.pth is not loaded: .* code is not run from there"):
            load()
    assert not gone_off.exists()
    pickle.loads((folder / "train.pth").read_bytes())
    assert gone_off.exists(), "the bomb is one"
