"""What tensors hold memory, counted exactly and without a GPU.

A GPU's allocator reports its peak; a CPU's does not. ``TensorAccounting`` watches every tensor operation instead and
adds up the storages that are alive, so a prediction in bytes can be checked on any machine.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind ``tensors``; views of one storage count once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class TensorAccounting(TorchDispatchMode):
    """Counts the bytes of all tensors that operations inside the ``with`` block create.

    live_bytes: alive now; peak_bytes: the most that was alive at once. ``count`` adds tensors made before the block.
    A storage counts once, whatever number of views it has, and stops counting when it is freed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: set[int] = set()

    def count(self, tensors: Iterable[torch.Tensor]) -> None:
        """Add the storages behind ``tensors`` that are not counted yet."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known or storage.nbytes() == 0:
                continue
            self._known.add(key)
            self.live_bytes += storage.nbytes()
            weakref.finalize(storage, self._forget, key, storage.nbytes()).atexit = False
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


class SavedForBackward(saved_tensors_hooks):
    """Counts the bytes that autograd keeps for the backward pass inside the ``with`` block.

    Tensors in ``ignore`` (the parameters, as a rule) do not count.
    """

    def __init__(self, ignore: Iterable[torch.Tensor] = ()) -> None:
        self._ignored = {t.untyped_storage()._cdata for t in ignore}
        self._saved: dict[int, torch.UntypedStorage] = {}
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._ignored:
            self._saved[storage._cdata] = storage
        return tensor

    def __enter__(self) -> Self:  # type: ignore[override]
        super().__enter__()
        return self

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._saved.values())
