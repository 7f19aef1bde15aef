"""A short training loop for weights that are rounded, or for the few that are added to frozen ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmlab.arguments import checked, integer, number

Loss = Callable[[nn.Module, Tensor], Tensor]  # of a model and token ids [B, S]


def next_token_loss(model: nn.Module, token_ids: Tensor) -> Tensor:
    """Cross-entropy of each token given those before it, in nats a token; token_ids [B, S]."""
    logits = model(token_ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), token_ids[:, 1:].flatten())


def teacher_loss(teacher: nn.Module) -> Loss:
    """KL(teacher ‖ student) of the next token, in nats a token: the model before quantization teaches the one behind it."""

    def loss(model: nn.Module, token_ids: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = F.log_softmax(teacher(token_ids).logits.flatten(0, 1).float(), -1)
        got = F.log_softmax(model(token_ids).logits.flatten(0, 1).float(), -1)
        return F.kl_div(got, wanted, reduction="batchmean", log_target=True)

    return loss


@checked(
    steps=integer(at_least=1), batch_size=integer(at_least=1), learning_rate=number(above=0), warmup=integer(at_least=0)
)
def train(
    model: nn.Module,
    token_ids: Tensor,
    loss: Loss = next_token_loss,
    *,
    steps: int = 100,
    batch_size: int = 2,
    learning_rate: float = 1e-4,
    warmup: int = 5,
    seed: int = 0,
    report: Callable[[int, float], Any] | None = None,
) -> list[float]:
    """Train what requires a gradient by Adam, with a rate that rises over the warm-up and then falls to 0 on a straight line.

    token_ids: [windows, S], of which each step draws batch_size. Gradients are clipped to norm 1. report(step, loss) is
    called behind each step. Returns the losses, one a step; the model is left in the mode it was in.
    Raises ValueError where nothing requires a gradient, for fewer windows than a batch, and for a loss that is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model: expected parameters that require a gradient, got none")
    if len(token_ids) < batch_size:
        raise ValueError(f"token_ids: expected at least {batch_size} windows for a batch, got {len(token_ids)}")
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (warmup + 1), (steps - step) / max(1, steps - warmup))
    )
    generator = torch.Generator().manual_seed(seed)
    order = torch.tensor([], dtype=torch.long)
    losses: list[float] = []
    for step in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(token_ids), generator=generator)
        batch, order = token_ids[order[:batch_size]], order[batch_size:]
        found = loss(model, batch)
        losses.append(float(found.detach()))
        if not torch.isfinite(found):
            raise ValueError(
                f"loss: expected a finite loss, got {losses[-1]} at step {step}; take a lower learning rate"
            )
        optimizer.zero_grad()
        found.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if report is not None:
            report(step, losses[-1])
    return losses
