"""A plan says, for names of modules, what each rank does with them; applied to any model, it leaves that rank's part.

plan = {"model.layers.*.mlp": Block(), "model.layers.*.mlp.up_proj": Column(), "model.layers.*.mlp.down_proj": Row()}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from llmlab.config import ModelConfig
from llmlab.parallel.communicator import Ranks
from llmlab.parallel.exchange import copy_to_ranks, gather_for_ranks, take_part
from llmlab.parallel.linear import ColumnParallelLinear, RowParallelLinear, ranks_of
from llmlab.parallel.vocabulary import VocabParallelEmbedding, VocabParallelHead


class Style(Protocol):
    """What becomes of one module."""

    def prepare(self, name: str, module: nn.Module, ranks: Ranks) -> nn.Module:
        """The module for its place; raises ValueError or TypeError, and changes nothing, where it cannot be."""

    def hook(self, module: nn.Module, ranks: Ranks) -> None:
        """What is added to the module when all of the plan could be prepared."""


@dataclass(frozen=True)
class Column:
    """A linear layer by its outputs; ``unit`` channels stay together, fewer units than ranks may be replicated.

    copy_input: where no Block around it copies its input for the ranks.
    """

    unit: int = 1
    replicate: bool = False
    copy_input: bool = False
    gather_output: bool = False

    def prepare(self, name: str, module: nn.Module, ranks: Ranks) -> nn.Module:
        linear = _of(nn.Linear, name, module)
        return ColumnParallelLinear.from_linear(
            linear, ranks, self.unit, self.replicate, self.copy_input, self.gather_output, name
        )

    def hook(self, module: nn.Module, ranks: Ranks) -> None: ...


@dataclass(frozen=True)
class Row:
    """A linear layer by its inputs; ``scatter_sequence`` leaves each rank its part of the sequence."""

    unit: int = 1
    scatter_sequence: bool = False

    def prepare(self, name: str, module: nn.Module, ranks: Ranks) -> nn.Module:
        linear = _of(nn.Linear, name, module)
        return RowParallelLinear.from_linear(linear, ranks, self.unit, self.scatter_sequence, name)

    def hook(self, module: nn.Module, ranks: Ranks) -> None: ...


@dataclass(frozen=True)
class Vocabulary:
    """An embedding or a head by the vocabulary, padded where the ranks do not divide it."""

    gather_output: bool = True
    copy_input: bool = True

    def prepare(self, name: str, module: nn.Module, ranks: Ranks) -> nn.Module:
        if isinstance(module, nn.Embedding):
            return VocabParallelEmbedding.from_embedding(module, ranks)
        head = _of(nn.Linear, name, module)
        return VocabParallelHead(head, ranks, self.gather_output, self.copy_input)

    def hook(self, module: nn.Module, ranks: Ranks) -> None: ...


@dataclass(frozen=True)
class Block:
    """A module whose column layers share one input: it is copied for the ranks (or gathered along the sequence) once.

    attributes: what the module must know of its part, such as how many query heads share a key/value head.
    """

    gather_sequence: bool = False
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def prepare(self, name: str, module: nn.Module, ranks: Ranks) -> nn.Module:
        missing = [attribute for attribute in self.attributes if not hasattr(module, attribute)]
        if missing:
            raise ValueError(f"{name}: a {type(module).__name__} has no {', '.join(missing)}")
        return module

    def hook(self, module: nn.Module, ranks: Ranks) -> None:
        for attribute, value in self.attributes.items():
            setattr(module, attribute, value)
        _change_input(module, partial(gather_for_ranks if self.gather_sequence else copy_to_ranks, ranks=ranks))


@dataclass(frozen=True)
class OnPart:
    """A whole module that sees a part of the sequence or of the heads, as norms do: its weights' gradients are summed.

    enter: the sequence is still whole: take the part. leave: gather the sequence's parts.
    """

    enter: bool = False
    leave: bool = False

    def prepare(self, name: str, module: nn.Module, ranks: Ranks) -> nn.Module:
        return module

    def hook(self, module: nn.Module, ranks: Ranks) -> None:
        if self.enter:
            _change_input(module, partial(take_part, ranks=ranks, dim=-2))
            return
        for parameter in module.parameters():
            parameter.register_hook(ranks.all_reduce)
        if self.leave:
            module.register_forward_hook(lambda _, inputs, output: gather_for_ranks(output, ranks))


def llama_plan(config: ModelConfig, size: int, sequence_parallel: bool = False) -> dict[str, Style]:
    """The plan for transformers' Llama, Mistral, Qwen2 and Qwen3 models over ``size`` ranks.

    Query heads and key/value heads are shared out; with fewer key/value heads than ranks, each is held by several.
    sequence_parallel: between the blocks each rank keeps its part of the sequence, S/t tokens.
    Raises ValueError for ranks that do not divide the heads.
    """
    d, sequence = config.head_size, sequence_parallel
    if config.num_heads % size:
        raise ValueError(f"size: {size} ranks do not divide the {config.num_heads} query heads of {config.name!r}")
    queries, keys = config.num_heads // size, max(1, config.num_kv_heads // size)
    layer = "model.layers.*"
    plan: dict[str, Style] = {
        "model.embed_tokens": Vocabulary(),
        f"{layer}.self_attn": Block(sequence, {"num_key_value_groups": queries // keys}),
        f"{layer}.self_attn.q_proj": Column(d),
        f"{layer}.self_attn.k_proj": Column(d, replicate=True),
        f"{layer}.self_attn.v_proj": Column(d, replicate=True),
        f"{layer}.self_attn.o_proj": Row(d, sequence),
        f"{layer}.mlp": Block(sequence),
        f"{layer}.mlp.gate_proj": Column(),
        f"{layer}.mlp.up_proj": Column(),
        f"{layer}.mlp.down_proj": Row(1, sequence),
        "lm_head": Vocabulary(copy_input=not sequence),
    }
    if config.qk_norm:
        plan |= {f"{layer}.self_attn.q_norm": OnPart(), f"{layer}.self_attn.k_norm": OnPart()}
    if sequence:
        plan |= {
            "model.layers.0": OnPart(enter=True),
            f"{layer}.input_layernorm": OnPart(),
            f"{layer}.post_attention_layernorm": OnPart(),
            "model.norm": OnPart(leave=True),
        }
    return plan


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | Ranks,
    plan: Mapping[str, Style] | None = None,
    fill: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Leave of ``model`` this rank's part, in place; what the plan does not name stays whole on every rank.

    plan: a style for each pattern of modules' names (``*`` stands for any text); ``llama_plan`` of the model's config
    where none is given. fill: what writes the weights of a model without memory. Weights that were tied stay tied.
    Returns the model.
    Raises ValueError for a pattern that matches nothing and for ranks that do not divide a layer, TypeError for a
    module of another kind; the model is then as it was.
    """
    ranks = ranks_of(mesh)
    if plan is None:
        config = getattr(model, "config", None)
        if config is None:
            raise ValueError("plan: expected one, as this model has no config to derive it from")
        plan = llama_plan(ModelConfig.from_huggingface(config.to_dict(), type(model).__name__), ranks.size)
    modules = dict(model.named_modules())
    prepared: dict[str, nn.Module] = {}
    hooks: list[tuple[Style, str]] = []
    for pattern, style in plan.items():
        names = [name for name in modules if name and fnmatchcase(name, pattern) and _same_depth(name, pattern)]
        if not names:
            raise ValueError(f"plan: no module of this {type(model).__name__} is named {pattern!r}")
        for name in names:
            new = style.prepare(name, modules[name], ranks)
            if new is not modules[name]:
                prepared[name] = new
            hooks.append((style, name))
    _tie(modules, prepared)
    for name, module in prepared.items():
        model.set_submodule(name, module)
    if fill is not None:
        fill(model)
    for style, name in hooks:
        style.hook(prepared[name] if name in prepared else modules[name], ranks)
    return model


def _tie(modules: Mapping[str, nn.Module], prepared: Mapping[str, nn.Module]) -> None:
    """Modules that shared a parameter share its part."""
    parts: dict[tuple[int, Any], nn.Parameter] = {}
    for name, module in prepared.items():
        for key, parameter in list(module.named_parameters(recurse=False)):
            was = modules[name].get_parameter(key)
            part = getattr(module, "parts", {}).get(key)
            setattr(module, key, parts.setdefault((id(was), part), parameter))


def _of(kind: type[nn.Linear], name: str, module: nn.Module) -> nn.Linear:
    if not isinstance(module, kind):
        raise TypeError(f"plan: {name!r} is a {type(module).__name__}, expected a {kind.__name__}")
    return module


def _same_depth(name: str, pattern: str) -> bool:
    return name.count(".") == pattern.count(".")


def _change_input(module: nn.Module, change: Any) -> None:
    """Apply ``change`` to the hidden states, first argument or named so."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args and isinstance(args[0], Tensor):
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    module.register_forward_pre_hook(hook, with_kwargs=True)
