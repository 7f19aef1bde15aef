"""Statistics are those of the inputs that each linear layer really gets, and later blocks see what became of earlier ones."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from llmlab.calibration import LayerStatistics, calibration_windows, gather_statistics, visit_blocks
from llmlab.model import Transformer

SMALL = {
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16)),
}


def shaken(kind, seed=0):
    torch.manual_seed(seed)
    model = KINDS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def whole_inputs(model, token_ids):
    """Every linear layer's inputs in one run of the whole model."""
    found, hooks = {}, []
    for name, module in model.model.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, args, name=name: found.update({f"model.{name}": args[0].flatten(0, 1)})
                )
            )
    with torch.no_grad():
        model(token_ids)
    for hook in hooks:
        hook.remove()
    return found


def test_statistics_are_sums_over_all_inputs():
    x = torch.randn(3, 11, 5, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1, 1.0, 0.0])
    statistics = LayerStatistics.of(x[:1].float())
    statistics.add(x[1:].float())
    flat = x.flatten(0, 1)
    assert statistics.tokens == 33
    assert torch.allclose(statistics.hessian.double(), flat.T @ flat / 33, atol=1e-4)
    assert torch.allclose(statistics.mean_abs.double(), flat.abs().mean(0))
    assert torch.allclose(statistics.absmax.double(), flat.abs().amax(0))
    assert torch.allclose(statistics.norm.double(), flat.norm(dim=0))
    assert statistics.outliers().tolist() == [1]
    assert statistics.outliers(float(flat.abs().max())).tolist() == []


def test_wrong_inputs_are_refused_and_leave_the_sums_alone():
    statistics = LayerStatistics.of(torch.ones(2, 3))
    for wrong in (torch.ones(2, 4), torch.tensor([[1.0, float("nan"), 1.0]])):
        with pytest.raises(ValueError, match="x: expected"):
            statistics.add(wrong)
    assert statistics.tokens == 2
    assert torch.equal(statistics.gram, torch.full((3, 3), 2.0))


@pytest.mark.parametrize("kind", KINDS)
def test_block_by_block_sees_what_the_whole_model_sees(kind):
    model, token_ids = shaken(kind), torch.randint(0, 320, (5, 12))
    expected = whole_inputs(model, token_ids)
    found = gather_statistics(model, token_ids, batch_size=2)  # the last batch is a smaller one
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.allclose(found[name].gram, x.T @ x, rtol=1e-4, atol=1e-4), name
        assert torch.allclose(found[name].absmax, x.abs().amax(0), atol=1e-5), name
    with torch.no_grad():
        stream = model.model.norm(visit_blocks(model, token_ids))
        assert torch.allclose(stream, model.model(token_ids).last_hidden_state, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_our_decoder_gives_the_same_statistics(kind):
    theirs, token_ids = shaken(kind), torch.randint(0, 320, (3, 9))
    expected = gather_statistics(theirs, token_ids)
    found = gather_statistics(Transformer.from_transformers(theirs), token_ids, batch_size=2)
    for index in range(3):
        ours, block = f"layers.{index}", f"model.layers.{index}"
        for part, source in (
            ("qkv", "self_attn.q_proj"), ("output", "self_attn.o_proj"), ("gate_up", "mlp.up_proj"), ("down", "mlp.down_proj"),
        ):  # fmt: skip
            a, b = found[f"{ours}.{part}"], expected[f"{block}.{source}"]
            assert a.tokens == b.tokens == 27
            assert torch.allclose(a.gram, b.gram, rtol=1e-3, atol=1e-3), (index, part)
    assert len(found) == 12


@pytest.mark.parametrize("ours", [False, True])
def test_later_blocks_see_what_a_visit_made_of_earlier_ones(ours):
    model = shaken("llama")
    model = Transformer.from_transformers(model) if ours else model
    token_ids, order, seen = torch.randint(0, 320, (2, 10)), [], {}

    def halve_the_first(name, block, statistics):
        order.append(name)
        seen.update({f"{name}.{inner}": value for inner, value in statistics.items()})
        if len(order) == 1:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    module.weight.mul_(0.5)

    before = gather_statistics(model, token_ids)
    visit_blocks(model, token_ids, halve_the_first)
    after = gather_statistics(model, token_ids)  # the weights stay halved
    assert len(order) == len(set(order)) == 3
    for name, statistics in seen.items():
        expected = before if name.startswith(order[0]) else after
        assert torch.allclose(statistics.gram, expected[name].gram, rtol=1e-3, atol=1e-3), name
    last = next(name for name in reversed(seen))
    assert not torch.allclose(after[last].gram, before[last].gram, rtol=1e-2)


def test_hooks_are_gone_behind_the_walk_even_if_a_visit_fails():
    model = shaken("llama")

    def fail(*_):
        raise RuntimeError("a visit fails")

    with pytest.raises(RuntimeError, match="a visit fails"):
        visit_blocks(model, torch.randint(0, 320, (2, 4)), fail)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_windows_do_not_overlap_and_come_from_their_split():
    class Letters:
        def __call__(self, text, verbose=True):
            return {"input_ids": list(range(len(text)))}

    windows = calibration_windows(Letters(), windows=9, length=64)
    assert windows.shape == (9, 64)
    assert len(set(windows.flatten().tolist())) == 9 * 64
    assert torch.equal(windows, calibration_windows(Letters(), windows=9, length=64))
    assert not torch.equal(windows, calibration_windows(Letters(), windows=9, length=64, seed=1))
    with pytest.raises(ValueError, match="windows: split 'calibration' has"):
        calibration_windows(Letters(), windows=9, length=10**5)
    with pytest.raises(ValueError, match="split: expected one of"):
        calibration_windows(Letters(), split="tset")


def test_a_model_without_blocks_and_wrong_tokens_are_refused():
    with pytest.raises(ValueError, match="model: expected a decoder with a list of blocks, got Linear"):
        visit_blocks(nn.Linear(2, 2), torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="token_ids: expected"):
        visit_blocks(shaken("llama"), torch.zeros(4, dtype=torch.long))
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    mixed = Qwen3ForCausalLM(Qwen3Config(**SMALL, use_sliding_window=True, layer_types=kinds))
    with pytest.raises(ValueError, match="model: expected blocks with one kind of attention, got full_attention, sl"):
        visit_blocks(mixed, torch.zeros(1, 4, dtype=torch.long))
