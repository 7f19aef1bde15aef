"""Linear layers of which each rank holds a part.

    column:  Y_r = X W_rᵀ + b_r       rows of W: each rank computes some of the outputs from the whole input
    row:     Y = Σ_r X_r W_rᵀ + b     columns of W: each rank computes a term of every output from its part of the input

A column layer followed by a row layer needs nothing between them, and one sum behind: Shoeybi et al. 2019, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from llmlab.parallel.communicator import Communicator, Ranks
from llmlab.parallel.exchange import copy_to_ranks, gather_parts, sum_over_ranks, sum_to_parts
from llmlab.parallel.part import Part, whole_units


def ranks_of(mesh: DeviceMesh | Ranks) -> Ranks:
    """The communicator of a mesh, or what already is one."""
    return Communicator(mesh) if isinstance(mesh, DeviceMesh) else mesh


class _ParallelLinear(nn.Module):
    """The part of a linear layer's weight and bias that this rank holds, and which it is."""

    def __init__(self, ranks: Ranks, parts: dict[str, Part], weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.ranks = ranks
        self.parts = parts
        self.weight = nn.Parameter(parts["weight"].take(weight.detach()).clone())
        own = parts["bias"].take(bias.detach()) if bias is not None and "bias" in parts else bias
        self.bias = None if own is None else nn.Parameter(own.detach().clone())

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, bias={self.bias is not None}, rank={self.ranks.rank} of {self.ranks.size}"


class ColumnParallelLinear(_ParallelLinear):
    """Y_r = X W_rᵀ + b_r: the rows of W that make this rank's outputs.

    X [..., in] is replicated; Y_r [..., out/t] is partitioned, or gathered to [..., out].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mesh: DeviceMesh | Ranks,
        unit: int = 1,
        replicate: bool = False,
        copy_input: bool = True,
        gather_output: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """The part of a new ``nn.Linear``; the ranks agree on the whole where their seeds do.

        unit: channels that stay together, such as a head's; replicate: fewer units than ranks are held several times.
        copy_input: sum the input's gradient over the ranks; where layers share one input, only that is copied, once.
        Raises ValueError where the ranks do not divide the units.
        """
        whole = nn.Linear(in_features, out_features, bias, device, dtype)
        self._build(whole, ranks_of(mesh), unit, replicate, copy_input, gather_output, "column")

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        mesh: DeviceMesh | Ranks,
        unit: int = 1,
        replicate: bool = False,
        copy_input: bool = True,
        gather_output: bool = False,
        name: str = "linear",
    ) -> ColumnParallelLinear:
        """This rank's part of a layer that all have."""
        layer = cls.__new__(cls)
        layer._build(linear, ranks_of(mesh), unit, replicate, copy_input, gather_output, name)
        return layer

    def _build(
        self,
        whole: nn.Linear,
        ranks: Ranks,
        unit: int,
        replicate: bool,
        copy_input: bool,
        gather_output: bool,
        name: str,
    ) -> None:
        part = whole_units(name, whole.out_features, unit, ranks, 0, replicate)
        parts = {"weight": part, "bias": part}
        super().__init__(ranks, parts, whole.weight, whole.bias)
        self.copy_input, self.gather_output = copy_input, gather_output
        self.twins = ranks.neighbours(part.replicas) if part.replicas > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        x = copy_to_ranks(x, self.ranks) if self.copy_input else x
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.twins is not None:  # each sees the gradient of its own query heads only
            weight = copy_to_ranks(weight, self.twins)
            bias = None if bias is None else copy_to_ranks(bias, self.twins)
        y = F.linear(x, weight, bias)
        return gather_parts(y, self.ranks) if self.gather_output else y


class RowParallelLinear(_ParallelLinear):
    """Y = Σ_r X_r W_rᵀ + b: the columns of W for this rank's part of the input; the bias is added once, behind the sum.

    X_r [..., in/t] is partitioned; Y [..., out] is replicated, or partitioned along the sequence.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mesh: DeviceMesh | Ranks,
        unit: int = 1,
        scatter_sequence: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """The part of a new ``nn.Linear``; unit as for ColumnParallelLinear.

        scatter_sequence: leave each rank its part of the sequence (dimension -2) in place of the whole sum.
        Raises ValueError where the ranks do not divide the units.
        """
        whole = nn.Linear(in_features, out_features, bias, device, dtype)
        self._build(whole, ranks_of(mesh), unit, scatter_sequence, "row")

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        mesh: DeviceMesh | Ranks,
        unit: int = 1,
        scatter_sequence: bool = False,
        name: str = "linear",
    ) -> RowParallelLinear:
        """This rank's part of a layer that all have."""
        layer = cls.__new__(cls)
        layer._build(linear, ranks_of(mesh), unit, scatter_sequence, name)
        return layer

    def _build(self, whole: nn.Linear, ranks: Ranks, unit: int, scatter_sequence: bool, name: str) -> None:
        part = whole_units(name, whole.in_features, unit, ranks, 1)
        super().__init__(ranks, {"weight": part}, whole.weight, whole.bias)
        self.scatter_sequence = scatter_sequence

    def forward(self, x: Tensor) -> Tensor:
        term, bias = F.linear(x, self.weight), self.bias
        y = sum_to_parts(term, self.ranks) if self.scatter_sequence else sum_over_ranks(term, self.ranks)
        if bias is None:
            return y
        # with a part of the sequence, each rank sees a part of the bias's gradient
        return y + (copy_to_ranks(bias, self.ranks) if self.scatter_sequence else bias)
