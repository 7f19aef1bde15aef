"""QLoRA from scratch: the quantized weights stay frozen, and a correction of low rank is trained on top of them.

    Y = X Wᵀ + (α / r) X Aᵀ Bᵀ          W = dequantize(codes) [out, in], frozen; A [r, in], B [out, r]

B begins as 0, so that the first step starts from the quantized model (Hu et al. 2022, arXiv:2106.09685; Dettmers et al.
2023, arXiv:2305.14314).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmlab.arguments import checked, integer, number
from llmlab.quantization.linear import QuantizedLinear


class Dequantizable(Protocol):
    """A quantized weight [out, in]: a tensor of any format here, or a module that holds one."""

    def dequantize(self) -> Tensor:
        """The values that its codes stand for."""


class FrozenLinear(torch.autograd.Function):
    """X Wᵀ, whose backward pass dequantizes W again: between the passes only the codes are held."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Dequantizable) -> Tensor:
        ctx.base = base
        return F.linear(x, base.dequantize().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        (gradient,) = gradients
        return gradient @ ctx.base.dequantize().to(gradient.dtype), None


class LoRALinear(nn.Module):
    """A frozen quantized linear layer and a trainable correction of rank r: Y = X Wᵀ + b + (α / r) X Aᵀ Bᵀ.

    X [..., in], Y [..., out]; A [r, in], B [out, r] in fp32 or the dtype that is given. Gradients reach A, B and X only.
    """

    bias: Tensor | None

    def __init__(
        self,
        base: Dequantizable,
        rank: int = 16,
        alpha: float = 16.0,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """base: the quantized weight [out, in], a module or a tensor. bias: b [out], which is frozen too.

        Raises ValueError for a rank below 1 or above what the weight allows, and for an alpha that is not positive.
        """
        super().__init__()
        integer(at_least=1)("rank", rank)
        number(above=0)("alpha", alpha)
        weight = base.dequantize()
        if rank > min(weight.shape):
            raise ValueError(
                f"rank: expected at most {min(weight.shape)} for a weight {list(weight.shape)}, got {rank}"
            )
        self.base = base
        if isinstance(base, nn.Module):
            base.requires_grad_(False)
        self.out_features, self.in_features = weight.shape
        self.scaling = alpha / rank
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.A = nn.Parameter(torch.empty(rank, self.in_features, dtype=dtype, device=weight.device))
        self.B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = FrozenLinear.apply(x, self.base)
        correction = F.linear(F.linear(x.to(self.A.dtype), self.A), self.B) * self.scaling
        y = y + correction.to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """An ordinary linear layer with W + (α / r) B A, in the dtype of the dequantized W."""
        weight = self.base.dequantize()
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device=weight.device, dtype=weight.dtype
        )
        linear.weight.copy_(weight + (self.scaling * self.B @ self.A).to(weight.dtype))
        if self.bias is not None:
            linear.bias.copy_(self.bias)
        return linear

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={len(self.A)}"


@checked(rank=integer(at_least=1), alpha=number(above=0))
def add_lora(model: nn.Module, rank: int = 16, alpha: float = 16.0, targets: Iterable[str] | None = None) -> list[str]:
    """Freeze a model whose layers ``quantize_model`` has quantized, and put a trainable correction on each of them.

    targets: last parts of the names of the layers to take, such as "q_proj"; None: every quantized layer.
    Returns the layers' names; ``llmlab.quantization.training.train`` then trains the corrections, and nothing else.
    Raises ValueError where there is no such layer; nothing has changed then.
    """
    wanted = None if targets is None else set(targets)
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) is QuantizedLinear and (wanted is None or name.rpartition(".")[2] in wanted)
    }
    if not layers:
        named = "" if wanted is None else f" named {sorted(wanted)}"
        raise ValueError(f"model: expected quantized linear layers{named}, got none; quantize_model makes them")
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, LoRALinear(layer, rank, alpha, layer.bias))
    return list(layers)


def merge_lora(model: nn.Module) -> int:
    """Put an ordinary linear layer with the correction added in the place of each LoRALinear; returns how many.

    The merged weights are no longer on a grid: to store them in few bits they must be rounded again, which loses a part
    of what was learned.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, LoRALinear)
        model.set_submodule(name, module.merged())
    return len(names)
