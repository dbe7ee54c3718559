"""The base class of this library's errors. Each is defined where it is raised."""


class OfflineOPDError(Exception):
    """Base class of the errors that trl-lopd defines; each of them is a builtin error too, such as `ValueError`."""
