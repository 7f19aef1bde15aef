"""Our decoder gives transformers' logits, for each kind of checkpoint that it loads, in any cut of the sequence into steps."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from llmlab.checkpoint import load_model
from llmlab.config import MODEL_CONFIGS, ModelConfig
from llmlab.kv_cache.paged import PagedCache, StepBatch
from llmlab.model import Transformer
from llmlab.model.rotary import rotary_table

SMALL = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
KINDS = {
    "llama with biases and stretched positions": lambda: LlamaForCausalLM(
        LlamaConfig(**SMALL, rope_parameters=LLAMA3_ROPE, attention_bias=True, mlp_bias=True)
    ),
    "linearly stretched positions, one key head": lambda: LlamaForCausalLM(
        LlamaConfig(**{**SMALL, "num_key_value_heads": 1}, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})
    ),
    "qwen3 with norms of the heads, tied": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=True)
    ),
    "smollm2": lambda: load_model("smollm2-135m", "cpu")[0],
}  # fmt: skip


def shaken(model):
    """Norms and biases begin as ones and zeros, which would hide a forgotten one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def stepwise_logits(model, token_ids, cuts, block_size=16):
    """Logits of every token, computed in steps that end at ``cuts``; what the cache holds beside them is NaN."""
    blocks = -(-len(token_ids) // block_size)
    cache = PagedCache(model.config, 2 * blocks, block_size, torch.device("cpu"), torch.float32)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    table = torch.randperm(2 * blocks)[:blocks][None]
    none = torch.tensor([], dtype=torch.long)
    found = []
    for begin, end in zip([0, *cuts], [*cuts, len(token_ids)], strict=True):
        at = torch.arange(begin, end)
        slots = table[0][at // block_size] * block_size + at % block_size
        if end - begin == 1:
            batch = StepBatch(slots, at, torch.tensor([0]), torch.tensor([end]))
        else:
            batch = StepBatch(slots, at, none, none, torch.tensor([[0, end - begin, 0, begin]]))
        with torch.no_grad():
            found.append(model.logits(model(token_ids[begin:end], cache.attention(batch, table))))
    return torch.cat(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [[], [7, 18, 19, 20], [16, 32]], ids=str)
def test_logits_are_transformers(kind, cuts):
    torch.manual_seed(0)
    theirs = KINDS[kind]()
    theirs = theirs if kind == "smollm2" else shaken(theirs)
    ours = Transformer.from_transformers(theirs)
    token_ids = torch.randint(5, 320, (37,))
    with torch.no_grad():
        expected = theirs(token_ids[None]).logits[0]
    got = stepwise_logits(ours, token_ids, cuts)
    assert expected.std() > 0.01
    assert (got - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))


def test_the_parameters_are_counted_once():
    model = Transformer.from_pretrained("smollm2-135m", device="cpu")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.head.weight is model.embedding.weight


def test_random_weights_keep_the_streams_size_and_vary_the_tokens():
    config = MODEL_CONFIGS["smollm2-135m"]
    model = Transformer.from_config(config, seed=3)
    again = Transformer.from_config(config, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    logits = stepwise_logits(model, torch.randint(5, 30000, (24,)), [])
    assert logits.isfinite().all()
    assert len(set(logits.argmax(-1).tolist())) > 12


@pytest.mark.parametrize("name", ["phi-2", "gpt-j-6b", "opt-13b", "bert-base-cased"])
def test_another_architecture_is_refused_by_what_differs(name):
    with pytest.raises(ValueError, match=r"no Llama-style decoder: .*norm='layer'"):
        Transformer(MODEL_CONFIGS[name])


def test_an_unknown_stretching_is_refused():
    config = {
        **LlamaConfig(**SMALL).to_dict(),
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0},
    }
    with pytest.raises(ValueError, match="expected 'default', 'linear' or 'llama3', got 'yarn'"):
        rotary_table(ModelConfig.from_huggingface(config, "stretched"))
