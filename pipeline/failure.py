"""What ends a command though the user's settings are right; its message says all that a traceback could."""

from __future__ import annotations

# Exit codes (contract 4). 75 is EX_TEMPFAIL of sysexits.h.
DONE, FAILED, USER_MUST_ACT, REQUEUE = 0, 1, 2, 75


class FailedError(RuntimeError):
    """Nobody's mistake, so that a user has no setting to change.

    Attributes:
        code: the command's exit code.
    """

    code = FAILED


class TrainingError(FailedError):
    """Training cannot go on; the last checkpoint is intact."""


class LostRanksError(TrainingError):
    """Other ranks are gone, or do not answer: the same command goes on from the last checkpoint."""

    code = REQUEUE


class ParityError(FailedError):
    """An export that does not give what its checkpoint gives."""
