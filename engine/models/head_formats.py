"""Load draft heads from any of the layouts that exist in public, and from this app's own file.

The tensors decide which layout it is, how many heads and layers there are and over which vocabulary; a config.json
beside them is read only for the base model's name, and disagreement is noted. Heads that do not fit the loaded model
are refused with both numbers.
"""

from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import CheckpointMismatchError, ModelNotFoundError
from engine.heads import MedusaHeads
from engine.models.format_medusa import has_medusa_names, medusa_layout
from engine.models.format_vllm import has_vllm_names, vllm_layout
from engine.models.head_assembly import HeadsAssembler, Target, check_finite, check_size
from engine.models.head_layout import HeadLayout
from engine.models.heads_file import load_heads, read_heads_metadata
from engine.models.tensor_files import MODEL_FILES, TensorFiles, read_json, some_names

__all__ = ["HeadsCheckpoint", "Target", "load_any_heads", "read_heads"]

_HEAD_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt", *MODEL_FILES)


@dataclass(frozen=True)
class HeadsCheckpoint:
    """Loaded heads, the layout they came in, the base model they name, and what looked odd but is no error."""

    heads: MedusaHeads
    format: str
    base_name: str | None = None
    notes: list[str] = field(default_factory=list)


def load_any_heads(path: str | Path, *, hidden_size: int, vocab_size: int, base_name: str | None = None) -> MedusaHeads:
    """Load heads from a file or folder in any known layout; see `read_heads`."""
    return read_heads(path, Target(hidden_size, vocab_size, base_name)).heads


def read_heads(path: str | Path, target: Target) -> HeadsCheckpoint:
    """Load heads from a file or folder in any known layout, on the CPU and in the checkpoint's own float type.

    Output matrices that equal the target's `lm_head` become shared output. Raises CheckpointMismatchError for heads
    of another size, vocabulary or layout, and for damaged files.
    """
    file = _find_file(Path(path))
    if _is_native(file):
        return _read_native(file, target)
    source = TensorFiles(file, CheckpointMismatchError)
    layout = _detect(source)
    settings, notes = _read_settings(file)
    base_name = _base_name(settings)
    notes += _count_notes(layout, settings) + _base_notes(base_name, target)
    heads = HeadsAssembler(source, layout, target, base_name).heads()
    return HeadsCheckpoint(heads, layout.format, base_name, notes)


def _is_native(file: Path) -> bool:
    if file.suffix != ".safetensors":
        return False
    try:
        return "heads_config" in read_heads_metadata(file)
    except ModelNotFoundError:
        return False  # the general reader says what is wrong with the file


def _read_native(file: Path, target: Target) -> HeadsCheckpoint:
    base_name = read_heads_metadata(file).get("base_model")
    heads = load_heads(file)
    check_size(file, "hidden size", heads.config.hidden_size, target, base_name)
    check_size(file, "vocabulary", heads.config.vocab_size, target, base_name)
    for name, tensor in heads.state_dict().items():
        check_finite(tensor, name, file)
    return HeadsCheckpoint(heads.requires_grad_(False), "native", base_name, _base_notes(base_name, target))


def _find_file(path: Path) -> Path:
    """Return the file that holds the tensors: `path` itself, or the most likely one in a folder."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointMismatchError(f"There are no heads at {path}: no such file or folder; check the path.")
    for name in _HEAD_FILES:
        if (path / name).is_file():
            return path / name
    others = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".pt", ".bin"))
    if len(others) != 1:
        raise CheckpointMismatchError(
            f"{path} holds {len(others)} checkpoint files and none is called {_HEAD_FILES[0]} or {_HEAD_FILES[1]}; "
            "name the file itself."
        )
    return others[0]


def _detect(source: TensorFiles) -> HeadLayout:
    names = source.names
    is_medusa, is_vllm = has_medusa_names(names), has_vllm_names(names)
    if is_medusa and is_vllm:
        raise CheckpointMismatchError(
            f"{source.path} mixes two layouts, MEDUSA's own and vLLM's; export the heads again as one of them."
        )
    if not is_medusa and not is_vllm:
        raise CheckpointMismatchError(
            f"{source.path} holds no draft heads in a known layout; its tensors are {some_names(names) or 'none'}. "
            "Known are this app's own file, MEDUSA v0.1, MEDUSA version 2, full MEDUSA-2 models and vLLM."
        )
    layout = medusa_layout(names) if is_medusa else vllm_layout(names)
    strays = sorted(set(names) - set(layout.names))
    if strays and layout.format != "medusa-2":
        raise CheckpointMismatchError(
            f"{source.path} holds tensors that are no part of the {layout.format} layout: {some_names(strays)}; "
            "it mixes layouts or belongs to another kind of drafter."
        )
    return layout


def _read_settings(file: Path) -> tuple[dict[str, object], list[str]]:
    """Return config.json beside the tensors; one that cannot be read is noted, for it decides nothing."""
    config = file.parent / "config.json"
    if not config.is_file():
        return {}, []
    try:
        return read_json(config, CheckpointMismatchError), []
    except CheckpointMismatchError as error:
        return {}, [str(error)]


def _base_name(settings: dict[str, object]) -> str | None:
    name = settings.get("base_model_name_or_path") or settings.get("_name_or_path")
    return name if isinstance(name, str) else None


def _count_notes(layout: HeadLayout, settings: dict[str, object]) -> list[str]:
    notes = []
    for names, count, what in (
        (("medusa_num_heads", "num_heads"), layout.num_heads, "heads"),
        (("medusa_num_layers",), layout.num_layers, "residual layers"),
    ):
        told = next((settings[name] for name in names if name in settings), count)
        if told != count:
            notes.append(f"config.json says {told} {what}, the tensors hold {count}; the tensors count.")
    return notes


def _base_notes(base_name: str | None, target: Target) -> list[str]:
    """Note another base model's name; sizes that differ are refused elsewhere, a name alone proves nothing."""
    if not base_name or not target.name:
        return []
    shorter, longer = sorted((_last_part(base_name), _last_part(target.name)), key=len)
    if longer.startswith(shorter):  # a file's name goes on with its quantisation, as in X.Q4_1
        return []
    return [
        f"These heads name {base_name} as their base, the loaded model is {target.name}; "
        "if that is another model, they will guess badly (the text stays right)."
    ]


def _last_part(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].lower()
