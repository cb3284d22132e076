"""The few things about a base model that its draft heads depend on: name, sizes, and its output matrix on demand."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine.errors import ModelNotFoundError
from engine.models.gguf_file import GGUFModel
from engine.models.hf_folder import HFFolder
from engine.models.loader import bundled_path

__all__ = ["BaseOutput", "open_base"]

_BUNDLED_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class BaseOutput:
    """A base model as heads see it; `lm_head()` reads the output matrix, float32 [vocab, hidden]."""

    name: str
    hidden_size: int
    vocab_size: int
    lm_head: Callable[[], Tensor]


def open_base(model: str) -> BaseOutput:
    """Open "bundled", a model folder or a .gguf file, reading nothing but its description yet."""
    if model == "bundled":
        return _from_gguf(bundled_path(), _BUNDLED_NAME)
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.suffix == ".gguf":
        return _from_gguf(path, path.stem)
    raise ModelNotFoundError(f"{model} is no model folder and no .gguf file; download the model and name its folder.")


def _from_gguf(path: Path, name: str) -> BaseOutput:
    model = GGUFModel(path)
    config = model.config()
    return BaseOutput(name, config.hidden_size, config.vocab_size, lambda: model.weights().lm_head.dequantize())


def _from_folder(path: Path) -> BaseOutput:
    folder = HFFolder(path)
    config = folder.config()
    return BaseOutput(str(path), config.hidden_size, config.vocab_size, lambda: folder.lm_head().dequantize())
