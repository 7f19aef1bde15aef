"""A Llama of random weights for ranks to cut, and what their runs took."""

import torch
from torch.nn import functional as F

from llmlab.config import MODEL_CONFIGS

DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
LLAMA = MODEL_CONFIGS["llama-3-8b"]
# hidden, feed-forward, query heads, key/value heads; layers of a rank; tokens of a micro-batch
SHAPES = {
    "cuda": ((LLAMA.hidden_size, LLAMA.intermediate_size, LLAMA.num_heads, LLAMA.num_kv_heads), 4, 2048),
    "cpu": ((256, 704, 8, 4), 4, 256),
}
VOCABULARY = 4096


def config_of(p, device):
    """The shape of a Llama of so many layers a rank."""
    from transformers import LlamaConfig

    (D, width, heads, kv_heads), layers, _ = SHAPES[device]
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=D, intermediate_size=width, num_attention_heads=heads, num_key_value_heads=kv_heads,
        num_hidden_layers=p * layers, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip


def model_of(p, device):
    """A Llama of so many layers a rank, the same on every rank."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config_of(p, device)).to(DTYPES[device])


def cross_entropy(logits, ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def steps(by_rank):
    """Seconds of each run, from the first operation of any rank to the last of any."""
    return [max(r["ended"] for r in run) - min(r["began"] for r in run) for run in zip(*by_rank, strict=True)]
