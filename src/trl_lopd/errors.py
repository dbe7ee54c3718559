"""The errors that this library defines. Each is a builtin error too, such as `ValueError`."""

from __future__ import annotations


class OfflineOPDError(Exception):
    """Base class of the errors that trl-lopd defines. Each is also a builtin error, such as `ValueError`."""


class TableError(OfflineOPDError, ValueError):
    """A table that cannot be trained on; the message names the row, the column, the value and the remedy."""


class ShardError(OfflineOPDError, ValueError):
    """A store that cannot be used with these arguments; the message names the place, the reason and the remedy."""


class TeacherConsistencyError(OfflineOPDError, ValueError):
    """The teacher that scored the table is not known to be the one that wrote the student's SFT data."""


class ServerError(OfflineOPDError, RuntimeError):
    """
    A server cannot be used: it refuses or does not answer, its answers are wrong, or it serves another model.

    Attributes:
        row (`int`, *optional*): Index, in the call of `score` or `sample`, of the sequence or prompt that failed.
    """

    def __init__(self, message: str, row: int | None = None):
        super().__init__(message)
        self.row = row
