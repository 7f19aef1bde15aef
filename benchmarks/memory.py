"""Memory, predicted and measured: training states, the peak of a training step, a KV cache.

On a GPU the allocator's own counters are read; on a CPU every tensor storage is counted. Peers in the same run:
accelerate's estimator, and the rule of four times the weights for Adam.

    python benchmarks/memory.py                 # the device that is here
    python benchmarks/memory.py --device cpu
"""

import argparse
import dataclasses
import gc
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from record import device_name, print_table, write_result

from llmlab.accounting import TensorAccounting, storage_bytes
from llmlab.checkpoint import empty_model, new_model
from llmlab.config import MODEL_CONFIGS
from llmlab.memory import (
    RECIPES,
    activation_bytes,
    estimate,
    kv_cache_bytes,
    num_parameters,
    training_bytes,
    training_peak_bytes,
)

SEED = 0
REPEATS = 3
# model, recipe, batch, sequence, recompute
STEPS = {
    "cuda": [
        ("smollm2-135m", "fp32-adam", 1, 128, None),
        ("smollm2-135m", "bf16-adam", 1, 128, None),
        ("smollm2-135m", "bf16-adam", 8, 1024, None),
        ("smollm2-135m", "bf16-adam", 16, 2048, None),
        ("smollm2-135m", "bf16-adam", 16, 2048, "full"),
        ("llama-3.2-1b", "fp32-adam", 1, 128, None),
        ("llama-3.2-1b", "bf16-adam", 1, 128, None),
        ("llama-3.2-1b", "bf16-adam", 4, 1024, None),
        ("llama-3.2-1b", "bf16-adam", 8, 2048, None),
        ("llama-3.2-1b", "bf16-adam", 8, 2048, "full"),
        ("qwen3-0.6b", "bf16-adam", 8, 1024, None),
        # float32 has no flash kernel for grouped queries: torch keeps the attention weights.
        ("smollm2-135m", "fp32-adam", 8, 1024, None),
    ],
    "cpu": [
        ("smollm2-135m", "fp32-adam", 1, 32, None),
        ("smollm2-135m", "fp32-adam", 2, 256, None),
        ("smollm2-135m", "bf16-adam", 2, 256, None),
        ("smollm2-135m", "fp32-adam", 2, 256, "full"),
    ],
}
CACHES = {"cuda": [("smollm2-135m", 8, 1024), ("llama-3.2-1b", 4, 2048)], "cpu": [("smollm2-135m", 2, 128)]}


ALLOCATORS = {"cuda": ["expandable_segments:True", "expandable_segments:False"], "cpu": ["every storage"]}


def warm_up(device: str) -> None:
    """Make the libraries allocate what they keep for themselves, so that it is not counted as a model's."""
    small = dataclasses.replace(MODEL_CONFIGS["smollm2-135m"], name="warm-up", num_layers=1, vocab_size=512)
    for recipe in ("fp32-adam", "bf16-adam"):
        model = new_model(small, device=device, dtype=RECIPES[recipe].weights)
        tokens = torch.randint(512, (2, 128), device=device)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()


def flash_is_used(name: str, recipe: str, device: str) -> bool:
    """Whether torch has an attention kernel that keeps no attention weights, in the recipe's dtype on this device."""
    grouped = MODEL_CONFIGS[name].group_size > 1
    return device == "cpu" or not (recipe.startswith("fp32") and grouped)


def training_step(
    name: str, recipe: str, batch: int, sequence: int, recompute: str | None, device: str
) -> dict[str, Any]:
    """One row: states and peak of a training step, predicted and measured ``REPEATS`` times."""
    config = MODEL_CONFIGS[name]
    torch.manual_seed(SEED)
    gc.collect()
    if device == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    model = new_model(name, device=device, dtype=RECIPES[recipe].weights)
    if recompute == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(config.vocab_size, (batch, sequence), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()

    step()  # the first step makes the optimizer's states
    measure = _measure_on_gpu if device == "cuda" else _measure_on_cpu
    samples = [measure(step, model, optimizer, before) for _ in range(REPEATS)]
    held = training_bytes(num_parameters(config), recipe)
    states = sorted(s["states"] for s in samples)[REPEATS // 2]
    peak = sorted(s["peak"] for s in samples)[REPEATS // 2]
    flash = flash_is_used(name, recipe, device)
    predicted = training_peak_bytes(config, batch, sequence, recipe, recompute, flash)
    accelerate_says = estimate(config, [RECIPES[recipe].weights])[0].training_bytes
    return {
        "model": name, "recipe": recipe, "flash": flash, "batch": batch, "sequence": sequence, "recompute": recompute,
        "states_predicted": held.total, "states_measured": states, "states_ratio": held.total / states,
        "peak_predicted": predicted, "peak_measured": peak, "peak_ratio": predicted / peak,
        "accelerate_ratio": accelerate_says / peak if accelerate_says else None,
        "activations_predicted": activation_bytes(config, batch, sequence, 4 if recipe == "fp32-adam" else 2, recompute, flash),
        "samples": samples,
    }  # fmt: skip


def _measure_on_gpu(step: Any, model: Any, optimizer: Any, before: int) -> dict[str, int]:
    torch.cuda.synchronize()
    optimizer.zero_grad(set_to_none=True)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    with_workspace = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    held = torch.cuda.memory_allocated()
    # cuBLAS keeps a scratch buffer in the same pool; it belongs to the library, not to the model.
    workspace = with_workspace - held
    return {
        "states": held - before,
        "requested": torch.cuda.memory_stats()["requested_bytes.all.current"],
        "peak": torch.cuda.max_memory_allocated() - before - workspace,
        "workspace": workspace,
        "reserved": torch.cuda.max_memory_reserved(),
    }


def _measure_on_cpu(step: Any, model: Any, optimizer: Any, before: int) -> dict[str, int]:
    optimizer.zero_grad(set_to_none=True)
    states = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    with TensorAccounting() as accounting:
        accounting.count([*model.parameters(), *states])
        step()
    gradients = [p.grad for p in model.parameters()]
    return {"states": storage_bytes([*model.parameters(), *gradients, *states]), "peak": accounting.peak_bytes}


def cache(name: str, batch: int, sequence: int, device: str) -> dict[str, Any]:
    """One row: the bytes of transformers' own KV cache after a prefill, against the formula."""
    torch.manual_seed(SEED)
    model = new_model(name, device=device, dtype="bfloat16").eval()
    tokens = torch.randint(MODEL_CONFIGS[name].vocab_size, (batch, sequence), device=device)
    with torch.no_grad():
        kept = model(input_ids=tokens, use_cache=True).past_key_values
    tensors = [t for layer in kept.layers for t in (layer.keys, layer.values)]
    measured = sum(t.numel() * t.element_size() for t in tensors)
    predicted = kv_cache_bytes(MODEL_CONFIGS[name], batch * sequence)
    return {"model": name, "batch": batch, "sequence": sequence, "predicted": predicted, "measured": measured}


def parameter_counts() -> list[dict[str, Any]]:
    """For each preset: our count, the module's own on the meta device, and accelerate's total."""
    from accelerate.utils import calculate_maximum_sizes

    rows = []
    for name, config in MODEL_CONFIGS.items():
        module = empty_model(name)
        total, _ = calculate_maximum_sizes(module)
        naive = sum(p.numel() for p in module.parameters())
        rows.append({
            "model": name, "formula": num_parameters(config), "module": int(estimate(module, ["float32"])[0].total_bytes) // 4,
            "meta_device_naive": naive, "accelerate_bytes": total, "base_formula": num_parameters(config.without_head()),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    print(f"{device_name(device)}, torch {torch.__version__}\n")
    counts = parameter_counts()
    print_table(counts, list(counts[0]))
    warm_up(device)
    steps = []
    for allocator in ALLOCATORS[device]:
        if device == "cuda":
            torch.cuda.empty_cache()
            torch._C._accelerator_setAllocatorSettings(allocator)
        for arguments in STEPS[device]:
            steps.append({"allocator": allocator} | training_step(*arguments, device))
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    print()
    print_table(steps, ["allocator", "model", "recipe", "batch", "sequence", "recompute", "states_measured", "states_ratio",
                        "peak_measured", "peak_ratio", "accelerate_ratio"])  # fmt: skip
    caches = [cache(*arguments, device) for arguments in CACHES[device]]
    print()
    print_table(caches, list(caches[0]))
    file = write_result("memory", device, [SEED], {"parameters": counts, "training_steps": steps, "kv_caches": caches})
    print(f"\nwrote {file}")


if __name__ == "__main__":
    main()
