"""What ends a run though the user's settings are right; its message says all that a traceback could."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is intact."""
