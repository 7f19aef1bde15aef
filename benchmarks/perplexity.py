"""Held-out perplexity: the same windows of the same text for every model that is compared."""

import torch
from torch.nn import functional as F

from llmlab.text import corpus


def windows_of(tokenizer, split, count=None, length=512):
    """The first ``count`` windows of a split's tokens, or all of them: [windows, length]."""
    token_ids = torch.tensor(tokenizer(corpus(split), verbose=False)["input_ids"])
    whole = len(token_ids) // length
    return token_ids[: whole * length].view(whole, length)[:count]


@torch.no_grad()
def log_perplexity(model, windows, batch=2):
    """Mean nats a token, each predicted from those before it in its window."""
    device = next(model.parameters()).device
    total = 0.0
    for token_ids in windows.to(device).split(batch):
        logits = model(token_ids).logits[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten(), reduction="sum"))
    return total / (len(windows) * (windows.shape[1] - 1))
