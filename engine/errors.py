"""The engine's one tree of errors.

Every message names the value received and the remedy, because the page and the command line show it unchanged.
"""

__all__ = [
    "CheckpointMismatchError",
    "ContextLengthError",
    "EngineError",
    "InvalidParameterError",
    "ModelNotFoundError",
    "OutOfMemoryError",
    "UnsupportedDeviceError",
]


class EngineError(Exception):
    """Anything the engine refuses or fails at, told in a sentence a person can act on."""


class ModelNotFoundError(EngineError):
    """The named model is neither bundled nor a readable folder or file."""


class CheckpointMismatchError(EngineError):
    """Heads and backbone do not belong together; the message holds both numbers."""


class OutOfMemoryError(EngineError):
    """The device ran out of memory; the message says what would need less."""


class ContextLengthError(EngineError):
    """The prompt leaves no room for an answer in the model's context."""


class InvalidParameterError(EngineError, ValueError):
    """A setting is outside its allowed range; the message holds the range."""


class UnsupportedDeviceError(EngineError):
    """The requested device or weight format cannot run on this machine."""
