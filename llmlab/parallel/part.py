"""Which part of a whole weight a rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from llmlab.parallel.communicator import Ranks


@dataclass(frozen=True)
class Part:
    """The slice ``start:stop`` of dimension ``dim``, with zeros behind it up to ``size`` rows or columns.

    replicas: how many neighbouring ranks hold this same part.
    """

    dim: int
    start: int
    stop: int
    size: int
    replicas: int = 1

    def take(self, whole: Any) -> Tensor:
        """The part of a tensor, or of a file's slice that is read by indexing."""
        part: Tensor = whole[self.start : self.stop] if self.dim == 0 else whole[:, self.start : self.stop]
        missing = self.size - (self.stop - self.start)
        if missing:
            part = F.pad(part, (0, 0) * (part.dim() - 1 - self.dim) + (0, missing))
        return part


def whole_units(name: str, width: int, unit: int, ranks: Ranks, dim: int, replicate: bool = False) -> Part:
    """An equal share of ``width`` rows or columns, cut between units of ``unit`` (a head's channels).

    replicate: fewer units than ranks are held by several ranks each, as key/value heads are.
    Raises ValueError, with the numbers, where the ranks do not divide the units (nor the units the ranks).
    """
    if width % unit:
        raise ValueError(f"{name}: units of {unit} do not divide its {width} channels")
    units, t = width // unit, ranks.size
    if units % t == 0:
        share = width // t
        return Part(dim, ranks.rank * share, (ranks.rank + 1) * share, share)
    if replicate and t % units == 0:
        first = ranks.rank // (t // units) * unit
        return Part(dim, first, first + unit, unit, replicas=t // units)
    what = f"{units} heads of {unit} channels" if unit > 1 else f"{units} channels"
    way = f", nor are they a whole number of times {units}" if replicate else ""
    raise ValueError(f"{name}: {t} ranks do not divide its {what}{way}")


def padded_rows(rows: int, ranks: Ranks) -> Part:
    """A share of a vocabulary: ceil(rows / t), the last ranks' padded with zeros."""
    share = -(-rows // ranks.size)
    start = min(rows, ranks.rank * share)
    return Part(0, start, min(rows, start + share), share)
