"""Quantized models in a folder: safetensors for what is stored, JSON for what it means, and no code.

model.safetensors     every tensor of the state, packed, each once
quantization.json     how each quantized layer is read, which names share a tensor, and what model holds them
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmlab.arguments import checked, instance_of
from llmlab.cache import building
from llmlab.config import ModelConfig
from llmlab.model import Transformer
from llmlab.quantization.decoder import call_projections
from llmlab.quantization.linear import QuantizedLinear, read_linear
from llmlab.quantization.places import Places

TENSORS, RECORD = "model.safetensors", "quantization.json"
FORMAT = 1


@checked(model=instance_of(nn.Module))
def save_quantized(model: nn.Module, folder: str | Path) -> Path:
    """Write a model with quantized layers to a new folder, whole or not at all; returns the folder.

    A model of transformers has its configuration written beside the tensors, our Transformer its ModelConfig; any other
    is loaded into a model that the reader gives. Raises ValueError for a model without quantized layers, and
    FileExistsError for a folder that exists.
    """
    target = Path(folder)
    layers = {
        name: module.description() for name, module in model.named_modules() if isinstance(module, QuantizedLinear)
    }
    if not layers:
        raise ValueError(f"model: expected quantized layers, got {type(model).__name__} without any")
    if target.exists():
        raise FileExistsError(f"folder: {target} exists")
    tensors, shared = _each_once(model)
    told = _told(model)
    record = {"format": FORMAT, "model": told, "layers": layers, "shared": shared}
    with building(target) as partial:
        save_file(tensors, partial / TENSORS)
        (partial / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        if told is not None and told["kind"] == "transformers":
            theirs: Any = model
            theirs.config.save_pretrained(partial)
            if getattr(theirs, "generation_config", None) is not None:
                theirs.generation_config.save_pretrained(partial)
    return target


def load_quantized(folder: str | Path, model: nn.Module | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Read a model that ``save_quantized`` wrote, in evaluation mode.

    model: one with the same parts as the model that was saved, whose linear layers and weights are replaced, on the meta
    device if you like; needed only where the folder does not say what holds the layers. device: where the tensors go.
    Raises ValueError for a folder that is missing, damaged or of another format, and for a model with other parts, which is
    then as it was.
    """
    source = Path(folder)
    try:
        record = json.loads((source / RECORD).read_text(encoding="utf-8"))
        # copied, since tensors of the mapped file lie where products round another way in their last bit
        tensors = {name: tensor.clone() for name, tensor in load_file(source / TENSORS, device=str(device)).items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"folder: {source} holds no quantized model: {error}") from None
    if (
        not isinstance(record, dict)
        or record.get("format") != FORMAT
        or not {"model", "layers", "shared"} <= record.keys()
    ):
        raise ValueError(f"folder: expected {RECORD} of format {FORMAT} in {source}")
    model = _new(record["model"], source) if model is None else model
    for name, first in record["shared"].items():
        tensors[name] = tensors[first]
    places = Places(model)
    try:
        for name, description in record["layers"].items():
            own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            places.put(_linear(model, name), read_linear(description, own))
        call_projections(model, places)
        _check_parts(model, tensors)
    except KeyError as error:
        places.restore()
        raise ValueError(f"folder: {source} lacks {error} for a quantized layer") from None
    except BaseException:
        places.restore()
        raise
    model.load_state_dict(tensors, assign=True)
    for name, first in record["shared"].items():
        _share(model, name, first)
    if isinstance(model, Transformer):
        model.fill_positions(device)
    return model.to(device).eval()


def _each_once(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a state, and for each name that shares one of them, under which name it is."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple[int, torch.Size, torch.dtype], str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.dtype)
        if tensor.numel() and key in first:
            shared[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor.contiguous()
    return tensors, shared


def _told(model: nn.Module) -> dict[str, Any] | None:
    """What ``_new`` needs to make an empty model of this kind; None for kinds that it cannot make."""
    from transformers import PreTrainedModel

    if isinstance(model, Transformer):
        return {"kind": "llmlab", "config": dataclasses.asdict(model.config)}
    if isinstance(model, PreTrainedModel):
        return {"kind": "transformers", "class": type(model).__name__}
    return None


def _new(told: dict[str, Any] | None, folder: Path) -> nn.Module:
    """An empty model of the kind that was saved; what no file holds, such as rotary tables, is computed."""
    if told is None:
        raise ValueError(
            f"model: {folder} does not say what holds its layers; expected a model to load them into, got None"
        )
    if told["kind"] == "llmlab":
        pairs = tuple(tuple(pair) for pair in told["config"]["rope_scaling"])  # JSON has lists where they were tuples
        with torch.device("meta"):
            return Transformer(ModelConfig(**told["config"] | {"rope_scaling": pairs}))
    import transformers
    from accelerate import init_empty_weights

    kind = getattr(transformers, told["class"], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"folder: expected a model of transformers in {folder}, got {told['class']!r}")
    with init_empty_weights(include_buffers=False):
        model: Any = kind(transformers.AutoConfig.from_pretrained(folder, local_files_only=True))
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    found: nn.Module = model
    return found


def _linear(model: nn.Module, name: str) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"model: expected a layer {name!r}, got {type(model).__name__} without it") from None
    if not isinstance(module, nn.Linear | QuantizedLinear):
        raise ValueError(f"model: expected a linear layer {name!r}, got {type(module).__name__}")
    return module


def _check_parts(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if odd:
        name = odd[0]
        raise ValueError(
            f"model: {len(odd)} tensors differ from the folder's, such as {name!r}: {expected.get(name)} in the model, "
            f"{found.get(name)} in the folder"
        )


def _share(model: nn.Module, name: str, first: str) -> None:
    """Make two names of a state one parameter again."""
    owner, _, leaf = name.rpartition(".")
    first_owner, _, first_leaf = first.rpartition(".")
    parameter = model.get_submodule(first_owner)._parameters.get(first_leaf)
    if parameter is not None and leaf in model.get_submodule(owner)._parameters:
        setattr(model.get_submodule(owner), leaf, parameter)
