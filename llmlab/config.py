"""The shape of a transformer, read from the same ``config.json`` that its checkpoint ships.

Pure Python: formulas, schedulers and the pages of the book read shapes without importing torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmlab.arguments import integer, one_of

CONFIG_FOLDER = Path(__file__).parent / "data" / "configs"

DTYPE_BYTES: dict[str, float] = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float8": 1, "int8": 1, "int4": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one transformer; the letter beside a field is the book's symbol for it."""

    name: str
    architecture: str  # transformers' ``model_type``
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # H_kv
    head_size: int  # d
    max_positions: int
    activation: str = "silu"
    gated_mlp: bool = True  # three matrices (gate, up, down) instead of two
    norm: str = "rms"  # "rms": a scale; "layer": a scale and a bias
    norm_eps: float = 1e-5
    norms_per_layer: int = 2  # one where attention and MLP read the same normalised input
    final_norm: bool = True
    embedding_norm: bool = False
    qk_norm: bool = False  # an RMSNorm over d on queries and keys
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    position_rows: int = 0  # rows of a learned position table; 0 with rotary positions
    token_types: int = 0
    pooler: bool = False
    lm_head: bool = True
    tied_embeddings: bool = False  # the head is the embedding, stored once
    head_bias: bool = False
    dropout: float = 0.0  # on what attention and MLP add to the residual stream
    attention_dropout: float = 0.0
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    rotary_size: int = 0  # how many of the d channels turn; 0: none

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head, H / H_kv."""
        return self.num_heads // self.num_kv_heads

    def without_head(self) -> ModelConfig:
        """The base model: no output projection, as accelerate's estimator loads it."""
        return replace(self, lm_head=False, head_bias=False)

    def __post_init__(self) -> None:
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                      "head_size", "max_positions"):  # fmt: skip
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{field} of {self.name!r}: expected an int, got {type(value).__name__} {value!r}")
            if value <= 0:
                raise ValueError(f"{field} of {self.name!r}: expected a positive int, got {value}")
        for field in ("norms_per_layer", "position_rows", "token_types", "rotary_size"):
            integer(at_least=0)(f"{field} of {self.name!r}", getattr(self, field))
        for field in ("gated_mlp", "final_norm", "embedding_norm", "qk_norm", "qkv_bias", "output_bias", "mlp_bias",
                      "pooler", "lm_head", "tied_embeddings", "head_bias"):  # fmt: skip
            if not isinstance(getattr(self, field), bool):
                raise TypeError(f"{field} of {self.name!r}: expected true or false, got {getattr(self, field)!r}")
        one_of(("rms", "layer"))(f"norm of {self.name!r}", self.norm)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads of {self.name!r}: {self.num_kv_heads} does not divide num_heads {self.num_heads}"
            )

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], name: str) -> ModelConfig:
        """Read the shape from the dictionary of a checkpoint's ``config.json``.

        Raises ValueError for an architecture that is not known here, and for a field that is missing (and names it).
        """
        architecture = config.get("model_type")
        if architecture is None:
            raise ValueError(f"the config of {name!r} lacks the field 'model_type'")
        one_of(_READERS)(f"model_type of {name!r}", architecture)
        try:
            shape = _READERS[architecture](config)
        except KeyError as missing:
            raise ValueError(f"the config of {name!r} lacks the field {missing}") from None
        except (TypeError, AttributeError, ZeroDivisionError) as error:
            raise ValueError(f"the config of {name!r} has a field of the wrong kind: {error}") from None
        return cls(name=name, architecture=architecture, **shape)

    @classmethod
    def from_file(cls, path: str | Path, name: str | None = None) -> ModelConfig:
        """Read a ``config.json``, or the one in a checkpoint's folder.

        Raises ValueError for a file that is missing or holds no JSON object, and where ``from_huggingface`` does.
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"no config.json at {file}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not JSON: {error}") from None
        except RecursionError:
            raise ValueError(f"{file} is nested too deeply to be read") from None
        if not isinstance(config, dict):
            raise ValueError(f"{file} holds no JSON object")
        return cls.from_huggingface(config, name or (path.name if path.is_dir() else path.stem))


def _head_size(hidden_size: int, heads: int) -> int:
    if hidden_size % heads:
        raise ValueError(f"hidden_size {hidden_size} is not a multiple of the {heads} heads, and no head size is given")
    return hidden_size // heads


def _rope(c: Mapping[str, Any]) -> dict[str, Any]:
    """Base and stretching of rotary positions; ``type`` is the older spelling of ``rope_type``."""
    parameters = c.get("rope_parameters") or {}
    rope = {**(c.get("rope_scaling") or parameters)}
    theta = rope.pop("rope_theta", None) or c.get("rope_theta") or parameters.get("rope_theta") or 10000.0
    rope.pop("partial_rotary_factor", None)
    older = rope.pop("type", "default")
    stretched = rope.setdefault("rope_type", older) != "default"
    return {"rope_theta": theta, "rope_scaling": tuple(sorted(rope.items())) if stretched else ()}


def _llama(c: Mapping[str, Any]) -> dict[str, Any]:
    heads = c["num_attention_heads"]
    head_size = c.get("head_dim") or _head_size(c["hidden_size"], heads)
    bias = c.get("attention_bias", False)
    return {
        "vocab_size": c["vocab_size"], "hidden_size": c["hidden_size"], "intermediate_size": c["intermediate_size"],
        "num_layers": c["num_hidden_layers"], "num_heads": heads,
        "num_kv_heads": c.get("num_key_value_heads") or heads, "head_size": head_size,
        "max_positions": c["max_position_embeddings"], "norm_eps": c["rms_norm_eps"],
        "qkv_bias": bias, "output_bias": bias, "mlp_bias": c.get("mlp_bias", False),
        "tied_embeddings": c.get("tie_word_embeddings", False),
        **_rope(c), "rotary_size": head_size,
    }  # fmt: skip


def _qwen2(c: Mapping[str, Any]) -> dict[str, Any]:
    return {**_llama(c), "qkv_bias": True, "output_bias": False}


def _qwen3(c: Mapping[str, Any]) -> dict[str, Any]:
    return {**_llama(c), "qk_norm": True}


def _gptj(c: Mapping[str, Any]) -> dict[str, Any]:
    D, H = c["n_embd"], c["n_head"]
    return {
        "vocab_size": c["vocab_size"], "hidden_size": D, "intermediate_size": c.get("n_inner") or 4 * D,
        "num_layers": c["n_layer"], "num_heads": H, "num_kv_heads": H, "head_size": _head_size(D, H),
        "max_positions": c["n_positions"], "activation": "gelu", "gated_mlp": False,
        "norm": "layer", "norm_eps": c["layer_norm_epsilon"], "norms_per_layer": 1, "mlp_bias": True,
        "tied_embeddings": c.get("tie_word_embeddings", False), "head_bias": True,
        "dropout": c.get("resid_pdrop", 0.0), "attention_dropout": c.get("attn_pdrop", 0.0), "rotary_size": c.get("rotary_dim") or D // H,
    }  # fmt: skip


def _phi(c: Mapping[str, Any]) -> dict[str, Any]:
    D, H = c["hidden_size"], c["num_attention_heads"]
    rope = c.get("rope_parameters") or {}
    factor = c.get("partial_rotary_factor") or rope.get("partial_rotary_factor", 0.5)
    return {
        "vocab_size": c["vocab_size"], "hidden_size": D, "intermediate_size": c["intermediate_size"],
        "num_layers": c["num_hidden_layers"], "num_heads": H, "num_kv_heads": c.get("num_key_value_heads") or H,
        "head_size": _head_size(D, H), "max_positions": c["max_position_embeddings"], "activation": "gelu", "gated_mlp": False,
        "norm": "layer", "norm_eps": c["layer_norm_eps"], "norms_per_layer": 1,
        "qkv_bias": True, "output_bias": True, "mlp_bias": True,
        "tied_embeddings": c.get("tie_word_embeddings", False), "head_bias": True,
        "dropout": c.get("resid_pdrop", 0.0), "attention_dropout": c.get("attention_dropout", 0.0),
        **_rope(c), "rotary_size": int(factor * (D // H)),
    }  # fmt: skip


def _opt(c: Mapping[str, Any]) -> dict[str, Any]:
    D, H = c["hidden_size"], c["num_attention_heads"]
    if c.get("word_embed_proj_dim", D) != D or not c.get("do_layer_norm_before", True):
        raise ValueError("OPT with projected embeddings or norms after the block (350M) is not supported")
    bias = c.get("enable_bias", True)
    return {
        "vocab_size": c["vocab_size"], "hidden_size": D, "intermediate_size": c["ffn_dim"],
        "num_layers": c["num_hidden_layers"], "num_heads": H, "num_kv_heads": H, "head_size": _head_size(D, H),
        "max_positions": c["max_position_embeddings"], "activation": c.get("activation_function", "relu"),
        "gated_mlp": False, "norm": "layer", "qkv_bias": bias, "output_bias": bias, "mlp_bias": bias,
        "position_rows": c["max_position_embeddings"] + 2,  # OPT's positions start at 2
        "tied_embeddings": c.get("tie_word_embeddings", True), "dropout": c.get("dropout", 0.0),
        "attention_dropout": c.get("attention_dropout", 0.0),
    }  # fmt: skip


def _bert(c: Mapping[str, Any]) -> dict[str, Any]:
    D, H = c["hidden_size"], c["num_attention_heads"]
    return {
        "vocab_size": c["vocab_size"], "hidden_size": D, "intermediate_size": c["intermediate_size"],
        "num_layers": c["num_hidden_layers"], "num_heads": H, "num_kv_heads": H, "head_size": _head_size(D, H),
        "max_positions": c["max_position_embeddings"], "activation": c.get("hidden_act", "gelu"), "gated_mlp": False,
        "norm": "layer", "norm_eps": c["layer_norm_eps"], "final_norm": False, "embedding_norm": True,
        "qkv_bias": True, "output_bias": True, "mlp_bias": True, "position_rows": c["max_position_embeddings"],
        "token_types": c["type_vocab_size"], "pooler": True, "lm_head": False,
        "dropout": c.get("hidden_dropout_prob", 0.0),
        "attention_dropout": c.get("attention_probs_dropout_prob", 0.0),
    }  # fmt: skip


_READERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "llama": _llama, "mistral": _llama, "qwen2": _qwen2, "qwen3": _qwen3,
    "gptj": _gptj, "phi": _phi, "opt": _opt, "bert": _bert,
}  # fmt: skip

MODEL_CONFIGS: dict[str, ModelConfig] = {
    file.stem: ModelConfig.from_file(file) for file in sorted(CONFIG_FOLDER.glob("*.json"))
}


def find_config(name: str) -> ModelConfig:
    """The preset of that name, or the config in the local folder of that path.

    Raises ValueError for anything else; the error lists the nearest presets.
    """
    if name in MODEL_CONFIGS:
        return MODEL_CONFIGS[name]
    if Path(name).exists():
        return ModelConfig.from_file(name)
    one_of(MODEL_CONFIGS)("model", name)
    raise AssertionError("unreachable: one_of refuses an unknown name")
