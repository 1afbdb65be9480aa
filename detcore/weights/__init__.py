"""Weights from elsewhere: found, fetched and verified, read without trusting them, renamed, loaded.

catalogue   known files, by name          fetch    a name, path, address or package -> a file here
reading     a file -> tensors             keys     other projects' names -> ours, with those of `backbones`,
loading     into a backbone or a detector          `torchvision` and `tensorflow`

`catalogue` and `fetch` import no torch, so that a recipe can be checked quickly.
"""

from detcore.errors import InputError
from detcore.weights.catalogue import CATALOGUE

__all__ = ["CATALOGUE", "WeightsError"]


class WeightsError(InputError):
    """Weights that cannot be had, are damaged or do not fit."""
