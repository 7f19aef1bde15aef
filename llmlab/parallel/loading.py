"""Reading a checkpoint part by part, so that no rank ever holds the whole model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from llmlab.checkpoint import PACKAGED_MODELS, CheckpointError, cached_folder
from llmlab.parallel.part import Part
from llmlab.parallel.plan import Style, parallelize


class WeightFiles:
    """The tensors of a checkpoint's safetensors files, read slice by slice; bytes_read counts what was read."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors
        self.bytes_read = 0

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, part: Part | None = None) -> Tensor:
        """A tensor, or a rank's part of it. Raises CheckpointError for a name that is not there."""
        if name not in self._tensors:
            raise CheckpointError(f"the checkpoint has no tensor {name!r}")
        file = self._tensors[name]
        tensor: Tensor = part.take(file.get_slice(name)) if part else file.get_tensor(name)
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor


@contextlib.contextmanager
def open_weights(folder: Path) -> Iterator[WeightFiles]:
    """The safetensors files of a folder. Raises CheckpointError where there are none, or one is missing."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}")
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(folder / name, "pt")) for name in names]
        yield WeightFiles({key: file for file in files for key in file.keys()})  # noqa: SIM118  # it is no dict


def checkpoint_folder(name: str) -> Path:
    """Where a checkpoint's files are: of a packaged model, or a folder. Raises ValueError for another name."""
    if name in PACKAGED_MODELS:
        return cached_folder(name)
    if (Path(name) / "config.json").is_file():
        return Path(name)
    raise ValueError(f"name: expected one of {', '.join(PACKAGED_MODELS)} or the folder of a checkpoint, got {name!r}")


def empty_causal_lm(folder: Path) -> Any:
    """transformers' model of a folder's config: parameters on the meta device, buffers real; tied weights are one."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model.eval()


def parts_of(model: nn.Module) -> dict[str, Part]:
    """For each parameter of which a rank holds a part: which."""
    return {
        f"{name}.{key}": part
        for name, module in model.named_modules()
        for key, part in getattr(module, "parts", {}).items()
    }


def load_parallel(
    name: str, mesh: DeviceMesh, plan: Mapping[str, Style] | None = None, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, int]:
    """A causal language model of transformers of which this rank reads, and holds, its part only.

    name: a packaged model, or a checkpoint's folder with safetensors. plan: as for ``parallelize``. Returns the model
    in evaluation mode, and the bytes that were read. Raises ValueError and TypeError as ``parallelize``,
    CheckpointError for files that are missing.
    """
    folder = checkpoint_folder(name)
    model = empty_causal_lm(folder)

    def fill(parallel: nn.Module) -> None:
        parts, made = parts_of(parallel), dict[int, nn.Parameter]()
        with open_weights(folder) as files:
            for owner, module in parallel.named_modules():
                for key, parameter in list(module.named_parameters(recurse=False)):
                    full = f"{owner}.{key}"
                    if id(parameter) not in made:
                        tensor = files.take(full, parts.get(full)).to(mesh.device_type, dtype)
                        made[id(parameter)] = nn.Parameter(tensor)
                    setattr(module, key, made[id(parameter)])
            model.bytes_read = files.bytes_read

    parallelize(model, mesh, plan, fill)
    return model.to(mesh.device_type), int(model.bytes_read)
