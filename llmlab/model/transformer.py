"""A Llama-style decoder that can be read in one go, and runs a step of many sequences at once.

A step is a flat list of T tokens of any sequences; what lies before each token is the attention's business, which is
handed in. Covers Llama, SmolLM2, Mistral and Qwen3: RMSNorm, rotary positions, grouped queries, SwiGLU.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmlab.checkpoint import load_model
from llmlab.config import ModelConfig
from llmlab.kernels import kernels_for
from llmlab.model.rotary import rotary_table


class Attention(Protocol):
    """Keys and values of all sequences, and how the tokens of this step attend to them."""

    def __call__(self, layer: Layer, qkv: Tensor, cos_sin: Tensor) -> Tensor:
        """Store the step's keys and values, and mix: [T, (H + 2 H_kv) d] -> [T, H d]."""


class Layer(nn.Module):
    """One block of attention and SwiGLU; the projections that read one input are one matrix."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        D, F, d = config.hidden_size, config.intermediate_size, config.head_size
        self.index = index
        self.eps = config.norm_eps
        self.input_norm = nn.Parameter(torch.ones(D))
        self.qkv = nn.Linear(D, (config.num_heads + 2 * config.num_kv_heads) * d, bias=config.qkv_bias)
        self.q_norm = nn.Parameter(torch.ones(d)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(d)) if config.qk_norm else None
        self.output = nn.Linear(config.num_heads * d, D, bias=config.output_bias)
        self.mlp_norm = nn.Parameter(torch.ones(D))
        self.gate_up = nn.Linear(D, 2 * F, bias=config.mlp_bias)
        self.down = nn.Linear(F, D, bias=config.mlp_bias)

    def forward(self, stream: Tensor, attention: Attention, cos_sin: Tensor, ops: Any) -> None:
        """Add to the stream [T, D] in place: stream += attention(norm(stream)), then stream += mlp(norm(stream))."""
        qkv = ops.norm_linear(stream, self.input_norm, self.eps, self.qkv.weight, self.qkv.bias)
        ops.add_linear(stream, attention(self, qkv, cos_sin), self.output.weight, self.output.bias)
        gated = ops.norm_swiglu(stream, self.mlp_norm, self.eps, self.gate_up.weight, self.gate_up.bias)
        ops.add_linear(stream, gated, self.down.weight, self.down.bias)


class Transformer(nn.Module):
    """Token ids to hidden states, and hidden states to logits."""

    cos_sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        """Raises ValueError for an architecture with other parts."""
        super().__init__()
        _check_supported(config)
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
        self.register_buffer("cos_sin", rotary_table(config), persistent=False)

    @classmethod
    def from_config(
        cls, config: ModelConfig, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> Transformer:
        """A model of this shape with random weights, scaled so that the stream keeps its size and greedy tokens vary."""
        model = cls._empty(config, torch.device(device), dtype)
        generator = torch.Generator(device).manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                else:
                    width = 1.0 if name.startswith("embedding") else parameter.shape[1] ** -0.5
                    parameter.normal_(0.0, width, generator=generator)
        return model.eval()

    @classmethod
    def from_pretrained(
        cls, name: str = "smollm2-135m", device: str | None = None, dtype: torch.dtype = torch.float32
    ) -> Transformer:
        """The weights of whatever `llmlab.checkpoint.load_model` loads, if it is of a kind that is known here."""
        theirs, _ = load_model(name, "cpu", dtype)
        model = cls.from_transformers(theirs)
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @classmethod
    def from_transformers(cls, theirs: Any) -> Transformer:
        """The same weights in our layout; ``theirs`` is a causal language model of transformers."""
        config = ModelConfig.from_huggingface(theirs.config.to_dict(), getattr(theirs, "name_or_path", "") or "model")
        weights = dict(theirs.named_parameters())
        example = weights["model.embed_tokens.weight"]
        model = cls._empty(config, example.device, example.dtype)
        with torch.no_grad():
            for ours, parts in stacked_names(config).items():
                found = [weights[part] for part in parts if part in weights]
                model.get_parameter(ours).copy_(torch.cat(found) if len(found) > 1 else found[0])
        return model.eval()

    @classmethod
    def _empty(cls, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
        """A model whose weights are still to be written; no memory is touched twice for it."""
        with torch.device("meta"):
            model = cls(config)
        model = model.to(dtype).to_empty(device=device)
        if config.tied_embeddings:
            model.head.weight = model.embedding.weight
        model.fill_positions(device)
        return model

    def fill_positions(self, device: torch.device | str) -> None:
        """Write the table of rotary positions, which no checkpoint holds; always in fp32."""
        self.cos_sin = rotary_table(self.config).to(device)

    def kernels(self, device: str) -> Any:
        """What the layers compute with on a kind of device."""
        return kernels_for(device)

    def forward(self, token_ids: Tensor, attention: Attention) -> Tensor:
        """The residual stream [T, D] behind the last block, for token ids [T]."""
        ops = self.kernels(token_ids.device.type)
        stream: Tensor = self.embedding(token_ids)
        for layer in self.layers:
            layer(stream, attention, self.cos_sin, ops)
        return stream

    def logits(self, stream: Tensor) -> Tensor:
        """The head of the normed stream, [N, D] -> [N, V]."""
        ops = self.kernels(stream.device.type)
        logits: Tensor = ops.norm_linear(stream, self.norm, self.config.norm_eps, self.head.weight)
        return logits


def _check_supported(config: ModelConfig) -> None:
    wanted = {"norm": "rms", "gated_mlp": True, "activation": "silu", "norms_per_layer": 2, "position_rows": 0,
              "token_types": 0, "lm_head": True, "head_bias": False, "rotary_size": config.head_size}  # fmt: skip
    odd = [f"{name}={getattr(config, name)!r}" for name, value in wanted.items() if getattr(config, name) != value]
    if odd:
        raise ValueError(f"config: {config.name!r} is no Llama-style decoder: {', '.join(odd)}")


def stacked_names(config: ModelConfig) -> dict[str, list[str]]:
    """Our parameters' names, each with transformers' names of the parts that it stacks."""
    names = {"embedding.weight": ["model.embed_tokens.weight"], "norm": ["model.norm.weight"]}
    if not config.tied_embeddings:
        names["head.weight"] = ["lm_head.weight"]
    for index in range(config.num_layers):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        names[f"{ours}.input_norm"] = [f"{theirs}.input_layernorm.weight"]
        names[f"{ours}.mlp_norm"] = [f"{theirs}.post_attention_layernorm.weight"]
        for part, biased, sources in (
            ("qkv", config.qkv_bias, [f"self_attn.{x}_proj" for x in "qkv"]), ("output", config.output_bias, ["self_attn.o_proj"]),
            ("gate_up", config.mlp_bias, ["mlp.gate_proj", "mlp.up_proj"]), ("down", config.mlp_bias, ["mlp.down_proj"]),
        ):  # fmt: skip
            for kind in ("weight", "bias") if biased else ("weight",):
                names[f"{ours}.{part}.{kind}"] = [f"{theirs}.{source}.{kind}" for source in sources]
        if config.qk_norm:
            names |= {f"{ours}.{x}_norm": [f"{theirs}.self_attn.{x}_norm.weight"] for x in "qk"}
    return names
