"""Every error that the package raises on purpose. The text is one sentence: what is wrong, and what to do."""

from __future__ import annotations


class EquipError(Exception):
    """Base class. `exit_code` is what the command line answers: 1 failure, 2 usage."""

    exit_code: int = 1


class UsageError(EquipError):
    """An option or argument is malformed, unknown, or contradicts another one."""

    exit_code = 2


class BudgetError(EquipError):
    """The budget is out of range, or too small for the tokens that must be kept."""

    exit_code = 2


class ModelFileError(EquipError):
    """The file is missing, empty, truncated, or not a GGUF model."""


class DownloadError(EquipError):
    """A model could not be fetched, or what arrived is not what the hub, or the list of models, names."""


class UnsupportedModelError(EquipError):
    """A property of the model rules the request out."""


class ContextFullError(EquipError):
    """Policy `none`, and no slot is left."""


class BackendError(EquipError):
    """The native library is missing or does not fit, or compute failed."""


class OutOfMemoryError(EquipError):
    """The model or the cache does not fit into the memory that is free."""


class CancelledError(EquipError):
    """`Session.cancel()` was called while the session was at work; it stays usable."""


class RewindError(EquipError):
    """The position lies before the newest evicted one; nothing changed."""


class StateError(EquipError):
    """A saved session is damaged, or of another model, policy or shape; or its file cannot be read or written."""
