"""What ranks say to each other: collectives that leave their input alone, and a log of what they moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

# torch 2.13 renames both and warns of the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "send"]


@dataclass(frozen=True)
class Message:
    """One collective, or one tensor sent.

    num_bytes: of the whole tensor: what is reduced, what is gathered, what is scattered.
    """

    kind: Kind
    num_bytes: int
    size: int  # ranks that took part, t

    @property
    def sent_bytes(self) -> float:
        """Bytes that each rank sends in a ring: 2 (t - 1)/t of the tensor for an all-reduce, (t - 1)/t for its halves."""
        if self.kind == "send":
            return self.num_bytes
        share = (self.size - 1) / self.size
        return (2 if self.kind == "all_reduce" else 1) * share * self.num_bytes


class Ranks(Protocol):
    """What the layers need of the ranks; a lab plays it without processes."""

    rank: int
    size: int

    def neighbours(self, size: int) -> Ranks: ...
    def all_reduce(self, x: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor: ...
    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor: ...
    def reduce_scatter(self, x: Tensor, dim: int = -1) -> Tensor: ...


class Communicator:
    """The ranks of one dimension of a mesh. A collective returns a new tensor; alone, a rank moves nothing.

    rank: this process's number in it. size: how many there are, t. log: what was moved, in order.
    """

    def __init__(self, mesh: DeviceMesh | dist.ProcessGroup) -> None:
        """mesh: one dimension of a mesh, or a process group. Raises ValueError for a mesh of more dimensions."""
        if isinstance(mesh, DeviceMesh):
            if mesh.ndim != 1:
                raise ValueError(f"mesh: expected one dimension, got {mesh.ndim}: take one, as in mesh['ranks']")
            mesh = mesh.get_group()
        elif not isinstance(mesh, dist.ProcessGroup):
            raise TypeError(f"mesh: expected a DeviceMesh or a process group, got {type(mesh).__name__} {mesh!r}")
        self.group = mesh
        self.rank = dist.get_rank(mesh)
        self.size = dist.get_world_size(mesh)
        self.log: list[Message] = []
        self._neighbours: dict[int, Communicator] = {}

    def neighbours(self, size: int) -> Communicator:
        """The ``size`` consecutive ranks among which this one is. All of them must ask."""
        if size not in self._neighbours:
            first = self.rank // size * size
            members = dist.get_process_group_ranks(self.group)[first : first + size]
            self._neighbours[size] = Communicator(dist.new_group(members, use_local_synchronization=True))
        return self._neighbours[size]

    def all_reduce(self, x: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        """The sum (or largest) over the ranks of x [...], the same on all of them."""
        reduced = x.clone(memory_format=torch.contiguous_format)
        if self.size > 1:
            self._note("all_reduce", reduced)
            dist.all_reduce(reduced, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, self.group)
        return reduced

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """The ranks' x side by side along ``dim``, in the order of the ranks; all have the same shape."""
        if self.size == 1:
            return x.clone()
        gathered = x.new_empty((self.size, *x.shape))
        self._note("all_gather", gathered)
        _all_gather(gathered.flatten(0, 1) if x.dim() else gathered, x.contiguous(), self.group)
        return torch.cat(gathered.unbind(0), dim)

    def reduce_scatter(self, x: Tensor, dim: int = -1) -> Tensor:
        """This rank's part along ``dim`` of the sum over the ranks of x. Raises ValueError where t does not divide it."""
        if self.size == 1:
            return x.clone()
        parts = torch.stack(split(x, self.size, dim))
        self._note("reduce_scatter", parts)
        scattered = torch.empty_like(parts[0])
        _reduce_scatter(scattered, parts.flatten(0, 1), group=self.group)
        return scattered

    def _note(self, kind: Kind, x: Tensor) -> None:
        self.log.append(Message(kind, x.numel() * x.element_size(), self.size))


def split(x: Tensor, size: int, dim: int) -> tuple[Tensor, ...]:
    """x in ``size`` equal parts along ``dim``. Raises ValueError where they would not be equal."""
    if x.shape[dim] % size:
        raise ValueError(f"{size} ranks do not divide dimension {dim} of a tensor of shape {tuple(x.shape)}")
    return x.chunk(size, dim)
