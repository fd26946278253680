"""What ends a command though the user's settings are right; its message says all that a traceback could."""

from __future__ import annotations


class FailedError(RuntimeError):
    """Nobody's mistake, so that a user has no setting to change: exit code 1."""


class TrainingError(FailedError):
    """Training cannot go on; the last checkpoint is intact."""


class ParityError(FailedError):
    """An export that does not give what its checkpoint gives."""
