"""What a folder holds instead of a model, and what a user can do about that."""

import json
from pathlib import Path

from sagellm.runtime.models.fault import ModelError
from sagellm.runtime.models.files import GGUF_FIX, convert_fix, read_json, refuse_foreign

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS, SHARD_INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth")
_MODEL_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth")
_DOWNLOAD = "give the folder that holds config.json, tokenizer.json and *.safetensors"


def is_model_file(path: Path) -> bool:
    """Whether a file holds weights, or a model's configuration, by its name."""
    return path.name == CONFIG or path.suffix.lower() in _MODEL_FILES


def refuse_file(name: str, path: Path) -> ModelError:
    """The fault of a file that is given where a folder is wanted."""
    if path.suffix.lower() == ".gguf":
        return ModelError(f"model {name}: it is a GGUF file", GGUF_FIX)
    fix = f"give the folder that it is in: {path.parent}"
    return ModelError(f"model {name}: it is a file, and a model is a folder", fix)


def check_config(name: str, path: Path) -> None:
    """Raise ModelError for a folder without config.json, with what it seems to be."""
    if (path / CONFIG).is_file():
        return
    if not any(path.iterdir()):
        raise ModelError(f"model {name}: the folder {path} is empty", _DOWNLOAD)
    if found := _first(path, ("*.gguf",)):
        raise ModelError(f"model {name}: the folder holds a GGUF file ({found})", GGUF_FIX)
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"model {name}: it is a LoRA adapter, not a model", _merge_fix(path))
    if inner := _first(path, (f"*/{CONFIG}",)):
        fix = f"give {path / inner}"
        raise ModelError(f"model {name}: {CONFIG} is missing in {path}, not below it", fix)
    if (path / "params.json").is_file():
        cause = f"model {name}: {CONFIG} is missing; params.json is of the layout of its maker"
        raise ModelError(cause, "download the same model in Hugging Face layout")
    raise ModelError(f"model {name}: {CONFIG} is missing in {path}", _DOWNLOAD)


def check_weights(name: str, path: Path, shards: tuple[str, ...]) -> None:
    """Raise ModelError where weights are pickled, missing, or named outside the folder."""
    for file in shards:
        if Path(file).name != file:
            raise ModelError(f"model {name}: {SHARD_INDEX} names {file!r}, outside its folder")
    absent = [file for file in shards if not (path / file).is_file()]
    if not absent:
        return
    if (path / SHARD_INDEX).is_file():
        of = f", {len(absent)} of {len(shards)}" if len(shards) > 1 else ""
        cause = f"{SHARD_INDEX} names {absent[0]}, which is missing in {path}{of}"
        raise ModelError(f"model {name}: {cause}", "download the missing files")
    if found := _first(path, _PICKLED):
        raise ModelError(
            f"model {name}: only pickled weights ({found}), which can run any code when read",
            convert_fix(path),
        )
    if found := _first(path, ("*.gguf",)):
        raise ModelError(f"model {name}: its weights are a GGUF file ({found})", GGUF_FIX)
    if found := _first(path, ("*.safetensors",)):
        fix = f"rename it to {WEIGHTS}, or add {SHARD_INDEX} if it is one of several"
        raise ModelError(f"model {name}: {WEIGHTS} is missing in {path}; {found} is there", fix)
    raise ModelError(f"model {name}: {WEIGHTS} is missing in {path}", "download it")


def check_tokenizer(name: str, path: Path) -> None:
    """Raise ModelError where tokenizer.json is missing or is something else; it is not parsed."""
    if (path / TOKENIZER).is_file():
        refuse_foreign(name, path / TOKENIZER)
        return
    others = ("tokenizer.model", "vocab.json", "*.tiktoken", "tekken.json")
    found = _first(path, others)
    if found is None:
        cause = f"model {name}: {TOKENIZER} is missing in {path}"
        raise ModelError(cause, "download it, or copy it from the model that this one was made of")
    quoted = repr(str(path))
    code = f"from transformers import AutoTokenizer as T; T.from_pretrained({quoted})"
    raise ModelError(
        f"model {name}: {TOKENIZER} is missing in {path}; {found} is there, which is not read",
        f'pip install transformers sentencepiece, and convert it once: python -c "{code}.'
        f'save_pretrained({quoted})"',
    )


def _first(path: Path, patterns: tuple[str, ...]) -> str | None:
    """The first file that a pattern finds, by name; of patterns with a folder, the folder."""
    for pattern in patterns:
        for found in sorted(path.glob(pattern)):
            return found.relative_to(path).parts[0]
    return None


def _merge_fix(path: Path) -> str:
    try:
        base = read_json(path / "adapter_config.json", str(path)).get("base_model_name_or_path")
    except ModelError:
        base = None
    of = f" ({json.dumps(base)})" if isinstance(base, str) else ""
    return f"merge it into its base model{of} with peft's merge_and_unload, and give that folder"
