"""Everything that turns messages into tokens. These are the names that the app may use."""

from engine.engine import Engine
from engine.errors import (
    CheckpointMismatchError,
    ContextLengthError,
    EngineError,
    InvalidParameterError,
    ModelNotFoundError,
    OutOfMemoryError,
    UnsupportedDeviceError,
)
from engine.records import DecodeStep, EngineInfo, GenerationChunk, GenerationResult
from engine.sampling import SamplingParams

__all__ = [
    "CheckpointMismatchError",
    "ContextLengthError",
    "DecodeStep",
    "Engine",
    "EngineError",
    "EngineInfo",
    "GenerationChunk",
    "GenerationResult",
    "InvalidParameterError",
    "ModelNotFoundError",
    "OutOfMemoryError",
    "SamplingParams",
    "UnsupportedDeviceError",
]
