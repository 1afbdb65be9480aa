"""The errors that people see. Everything else is a bug and shows its traceback.

LaunchError              something failed                        exit status 1
├── UserError            the input was wrong                     exit status 2
│   └── RecipeError      a recipe, with file:line:column
├── Taken                another supervisor holds the run        exit status 1
└── StoreError           the store refused, or is not what it must be
    └── StoreAway        the store cannot be reached right now; try again later
"""


class LaunchError(Exception):
    """A failure told in one sentence, with what to do about it in `hint`."""

    exit_status = 1
    uncertain = False  # whether what was asked for may have been done all the same

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UserError(LaunchError):
    """Wrong input: nothing was started, nothing is left behind."""

    exit_status = 2


class RecipeError(UserError):
    """One or more mistakes in a recipe; `message` holds a block per mistake."""


class Taken(LaunchError):
    """The run is held by another supervisor, which is named."""


class StoreError(LaunchError):
    """The store answered, and the answer is final (no such bucket, wrong credentials, ...)."""


class StoreAway(StoreError):
    """The store did not answer, or not sensibly; the same request may work later."""
