# %% [markdown]
# Answers to the lab `memory`, to try its grader with: the mistakes that the chapter warns of, and other ways to be right.

# %% answer={"exercise": "parameter_counts", "name": "a tied head counted twice", "fails": "SmolLM2-135M ties"}
def parameter_counts(config):
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    q, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    layer = config.num_layers * (2 * D * q + 2 * D * kv)
    return ParameterCounts(V * D, layer, config.num_layers * 3 * D * F, (2 * config.num_layers + 1) * D, V * D)

# %% answer={"exercise": "parameter_counts", "name": "as many key/value heads as query heads", "fails": "attention: key/value heads"}
def parameter_counts(config):
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    attention = config.num_layers * 4 * D * config.num_heads * config.head_size
    head = 0 if config.tied_embeddings else V * D
    return ParameterCounts(V * D, attention, config.num_layers * 3 * D * F, (2 * config.num_layers + 1) * D, head)

# %% answer={"exercise": "parameter_counts", "name": "H·d taken to be D", "fails": "attention: key/value heads"}
def parameter_counts(config):
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    kv = D * config.num_kv_heads // config.num_heads
    attention = config.num_layers * (2 * D * D + 2 * D * kv)
    head = 0 if config.tied_embeddings else V * D
    return ParameterCounts(V * D, attention, config.num_layers * 3 * D * F, (2 * config.num_layers + 1) * D, head)

# %% answer={"exercise": "parameter_counts", "name": "every model taken for a Llama", "fails": "GPT-J"}
def parameter_counts(config):
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    q, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    attention = config.num_layers * (2 * D * q + 2 * D * kv)
    head = 0 if config.tied_embeddings else V * D
    return ParameterCounts(V * D, attention, config.num_layers * 3 * D * F, (2 * config.num_layers + 1) * D, head)

# %% answer={"exercise": "parameter_counts", "name": "the final norm forgotten", "fails": "norms: one or two"}
def parameter_counts(config):
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    q, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    attention = config.num_layers * (2 * D * q + 2 * D * kv)
    head = 0 if config.tied_embeddings else V * D
    return ParameterCounts(V * D, attention, config.num_layers * 3 * D * F, 2 * config.num_layers * D, head)

# %% answer={"exercise": "parameter_counts", "name": "one layer instead of all", "fails": "LLaMA-7B"}
def parameter_counts(config):
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    q, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    return ParameterCounts(V * D, 2 * D * q + 2 * D * kv, 3 * D * F, 3 * D, 0 if config.tied_embeddings else V * D)

# %% answer={"exercise": "parameter_counts", "name": "no biases and no extra embeddings", "fails": "attention: biases"}
def parameter_counts(config):
    D, F, V, L = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_layers
    q, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    matrices = 3 if config.gated_mlp else 2
    one = 2 * D if config.norm == "layer" else D
    head = 0 if config.tied_embeddings else V * D
    norms = config.norms_per_layer * L + 1
    return ParameterCounts(V * D, L * (2 * D * q + 2 * D * kv), L * matrices * D * F, norms * one, head)

# %% answer={"exercise": "parameter_counts", "name": "norms on queries and keys forgotten", "fails": "norms: one or two"}
def parameter_counts(config):
    D, F, V, L = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_layers
    q, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    head = 0 if config.tied_embeddings else V * D
    return ParameterCounts(V * D, L * (2 * D * q + 2 * D * kv), L * 3 * D * F, (2 * L + 1) * D, head)

# %% answer={"exercise": "parameter_counts", "name": "a list of every tensor's shape", "right": true}
def parameter_counts(config):
    D, F, d = config.hidden_size, config.intermediate_size, config.head_size
    shapes = {"embedding": [], "attention": [], "mlp": [], "norm": [], "head": []}
    norm = [(D,), (D,)] if config.norm == "layer" else [(D,)]
    for rows in (config.vocab_size, config.position_rows, config.token_types):
        shapes["embedding"].append((rows, D))
    for _ in range(config.num_layers):
        for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads):
            shapes["attention"].append((heads * d, D))
            if config.qkv_bias:
                shapes["attention"].append((heads * d,))
        shapes["attention"].append((D, config.num_heads * d))
        if config.output_bias:
            shapes["attention"].append((D,))
        shapes["mlp"] += [(F, D), (D, F)] + ([(F, D)] if config.gated_mlp else [])
        if config.mlp_bias:
            shapes["mlp"] += [(F,), (D,)]
        shapes["norm"] += norm * config.norms_per_layer + ([(d,), (d,)] if config.qk_norm else [])
    shapes["norm"] += norm * (int(config.final_norm) + int(config.embedding_norm))
    if config.lm_head and not config.tied_embeddings:
        shapes["head"].append((config.vocab_size, D))
    if config.lm_head and config.head_bias:
        shapes["head"].append((config.vocab_size,))
    if config.pooler:
        shapes["head"] += [(D, D), (D,)]
    return ParameterCounts(**{part: sum(map(math.prod, tensors)) for part, tensors in shapes.items()})

# %% answer={"exercise": "parameter_counts", "name": "factored by what multiplies D", "right": true}
def parameter_counts(config):
    D, F, V, L = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_layers
    rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_size
    attention = D * (rows + config.num_heads * config.head_size) + config.qkv_bias * rows + config.output_bias * D
    mlp = D * F * (2 + config.gated_mlp) + config.mlp_bias * (F + D)
    norms = config.norms_per_layer * L + config.final_norm + config.embedding_norm
    norm = norms * D * (1 + (config.norm == "layer")) + config.qk_norm * 2 * config.head_size * L
    head = config.lm_head * V * ((not config.tied_embeddings) * D + config.head_bias) + config.pooler * D * (D + 1)
    embedding = (V + config.position_rows + config.token_types) * D
    return ParameterCounts(embedding, L * attention, L * mlp, norm, head)

# %% answer={"exercise": "serving_bytes", "name": "bits taken for bytes", "fails": "70 billion"}
def serving_bytes(num_params, bits, overhead=1.2):
    return num_params * bits * overhead

# %% answer={"exercise": "serving_bytes", "name": "the overhead is always 20 %", "fails": "the overhead"}
def serving_bytes(num_params, bits, overhead=1.2):
    return num_params * bits / 8 * 1.2

# %% answer={"exercise": "serving_bytes", "name": "the overhead forgotten", "fails": "70 billion"}
def serving_bytes(num_params, bits, overhead=1.2):
    return num_params * bits / 8

# %% answer={"exercise": "serving_bytes", "name": "whole bytes a weight", "fails": "the size follows the width"}
def serving_bytes(num_params, bits, overhead=1.2):
    return num_params * math.ceil(bits / 8) * overhead

# %% answer={"exercise": "serving_bytes", "name": "the ratio of widths upside down", "fails": "the size follows the width"}
def serving_bytes(num_params, bits, overhead=1.2):
    return num_params * 4 * (32 / bits) * overhead / 4

# %% answer={"exercise": "serving_bytes", "name": "the overhead added instead of multiplied", "fails": "the overhead"}
def serving_bytes(num_params, bits, overhead=1.2):
    return num_params * bits / 8 + 0.2 * num_params * bits / 8

# %% answer={"exercise": "serving_bytes", "name": "32 / Q divided out whole", "fails": "the size follows the width"}
def serving_bytes(num_params, bits, overhead=1.2):
    return num_params * 4 / (32 // bits) * overhead

# %% answer={"exercise": "serving_bytes", "name": "bits over eight", "right": true}
def serving_bytes(num_params, bits, overhead=1.2):
    return overhead * num_params * bits / 8

# %% answer={"exercise": "serving_bytes", "name": "in bits first", "right": true}
def serving_bytes(num_params, bits, overhead=1.2):
    weight_bits = num_params * bits
    return float(weight_bits / 8 + weight_bits / 8 * (overhead - 1))

# %% answer={"exercise": "training_bytes", "name": "gradients forgotten", "fails": "mixed precision: the full"}
def training_bytes(num_params, recipe="fp32-adam", activations=0):
    r = RECIPES[recipe]
    optimizer = num_params * (r.moments * DTYPE_BYTES[r.moment_dtype] + (DTYPE_BYTES[r.master] if r.master else 0))
    return TrainingMemory(int(num_params * DTYPE_BYTES[r.weights]), 0, int(optimizer), activations)

# %% answer={"exercise": "training_bytes", "name": "one moment for Adam", "fails": "moments"}
def training_bytes(num_params, recipe="fp32-adam", activations=0):
    r = RECIPES[recipe]
    optimizer = num_params * (min(r.moments, 1) * 4 + (DTYPE_BYTES[r.master] if r.master else 0))
    size = DTYPE_BYTES
    return TrainingMemory(int(num_params * size[r.weights]), int(num_params * size[r.gradients]), int(optimizer), activations)

# %% answer={"exercise": "training_bytes", "name": "the full-precision copy forgotten", "fails": "mixed precision: the full"}
def training_bytes(num_params, recipe="fp32-adam", activations=0):
    r, size = RECIPES[recipe], DTYPE_BYTES
    optimizer = num_params * r.moments * size[r.moment_dtype]
    if r.moment_block:
        optimizer += r.moments * math.ceil(num_params / r.moment_block) * 4
    return TrainingMemory(int(num_params * size[r.weights]), int(num_params * size[r.gradients]), int(optimizer), activations)

# %% answer={"exercise": "training_bytes", "name": "moments always in float32", "fails": "16-bit Adam"}
def training_bytes(num_params, recipe="fp32-adam", activations=0):
    r, size = RECIPES[recipe], DTYPE_BYTES
    optimizer = num_params * (r.moments * 4 + (size[r.master] if r.master else 0))
    return TrainingMemory(int(num_params * size[r.weights]), int(num_params * size[r.gradients]), int(optimizer), activations)

# %% answer={"exercise": "training_bytes", "name": "scales of 8-bit moments forgotten", "fails": "8-bit moments"}
def training_bytes(num_params, recipe="fp32-adam", activations=0):
    r, size = RECIPES[recipe], DTYPE_BYTES
    optimizer = num_params * (r.moments * size[r.moment_dtype] + (size[r.master] if r.master else 0))
    return TrainingMemory(int(num_params * size[r.weights]), int(num_params * size[r.gradients]), int(optimizer), activations)

# %% answer={"exercise": "training_bytes", "name": "the last block rounded away", "fails": "8-bit moments"}
def training_bytes(num_params, recipe="fp32-adam", activations=0):
    r, size = RECIPES[recipe], DTYPE_BYTES
    optimizer = num_params * (r.moments * size[r.moment_dtype] + (size[r.master] if r.master else 0))
    if r.moment_block:
        optimizer += r.moments * (num_params // r.moment_block) * 4
    return TrainingMemory(int(num_params * size[r.weights]), int(num_params * size[r.gradients]), int(optimizer), activations)

# %% answer={"exercise": "training_bytes", "name": "activations left out", "fails": "activations"}
def training_bytes(num_params, recipe="fp32-adam", activations=0):
    r, size = RECIPES[recipe], DTYPE_BYTES
    optimizer = num_params * (r.moments * size[r.moment_dtype] + (size[r.master] if r.master else 0))
    if r.moment_block:
        optimizer += r.moments * math.ceil(num_params / r.moment_block) * 4
    return TrainingMemory(int(num_params * size[r.weights]), int(num_params * size[r.gradients]), int(optimizer))

# %% answer={"exercise": "training_bytes", "name": "a list of every copy", "right": true}
def training_bytes(num_params, recipe="fp32-adam", activations=0):
    r = RECIPES[recipe]

    def stored(dtype, block=0):
        scales = -(-num_params // block) * 4 if block else 0
        return int(num_params * DTYPE_BYTES[dtype]) + scales

    optimizer = [stored(r.moment_dtype, r.moment_block) for _ in range(r.moments)]
    optimizer += [stored(r.master)] if r.master is not None else []
    return TrainingMemory(stored(r.weights), stored(r.gradients), sum(optimizer), activations)

# %% answer={"exercise": "training_bytes", "name": "a table of bytes a parameter", "right": true}
def training_bytes(num_params, recipe="fp32-adam", activations=0):
    weights, gradients, optimizer, scaled = {
        "fp32-adam": (4, 4, 8, 0), "fp32-sgd": (4, 4, 0, 0), "fp32-momentum": (4, 4, 4, 0), "mixed-adam": (2, 2, 12, 0),
        "bf16-adam": (2, 2, 4, 0), "fp32-adam8bit": (4, 4, 2, 2), "bf16-adam8bit": (2, 2, 2, 2),
    }[recipe]
    blocks = (num_params + 255) // 256
    return TrainingMemory(
        num_params * weights, num_params * gradients, num_params * optimizer + scaled * blocks * 4, activations
    )

# %% answer={"exercise": "kv_cache_bytes", "name": "query heads cached", "fails": "grouped-query attention"}
def kv_cache_bytes(config, num_tokens, bytes_per_element=2):
    return int(2 * config.num_layers * config.num_heads * config.head_size * num_tokens * bytes_per_element)

# %% answer={"exercise": "kv_cache_bytes", "name": "only the keys", "fails": "one sequence of 2,048"}
def kv_cache_bytes(config, num_tokens, bytes_per_element=2):
    return int(config.num_layers * config.num_kv_heads * config.head_size * num_tokens * bytes_per_element)

# %% answer={"exercise": "kv_cache_bytes", "name": "the hidden size instead of the heads", "fails": "any shape"}
def kv_cache_bytes(config, num_tokens, bytes_per_element=2):
    width = config.hidden_size * config.num_kv_heads // config.num_heads
    return int(2 * config.num_layers * width * num_tokens * bytes_per_element)

# %% answer={"exercise": "kv_cache_bytes", "name": "one layer", "fails": "any shape"}
def kv_cache_bytes(config, num_tokens, bytes_per_element=2):
    return int(2 * config.num_kv_heads * config.head_size * num_tokens * bytes_per_element)

# %% answer={"exercise": "kv_cache_bytes", "name": "always 16 bits", "fails": "the width"}
def kv_cache_bytes(config, num_tokens, bytes_per_element=2):
    return 2 * config.num_layers * config.num_kv_heads * config.head_size * num_tokens * 2

# %% answer={"exercise": "kv_cache_bytes", "name": "half bytes rounded away", "fails": "the width"}
def kv_cache_bytes(config, num_tokens, bytes_per_element=2):
    return 2 * config.num_layers * config.num_kv_heads * config.head_size * num_tokens * int(bytes_per_element)

# %% answer={"exercise": "kv_cache_bytes", "name": "summed layer by layer", "right": true}
def kv_cache_bytes(config, num_tokens, bytes_per_element=2):
    total = 0
    for _ in range(config.num_layers):
        for _ in ("keys", "values"):
            total += config.num_kv_heads * config.head_size * num_tokens * bytes_per_element
    return round(total)

# %% answer={"exercise": "kv_cache_bytes", "name": "by way of the query heads", "right": true}
def kv_cache_bytes(config, num_tokens, bytes_per_element=2):
    queries = config.num_heads * config.head_size
    return int(num_tokens * config.num_layers * 2 * queries / config.group_size * bytes_per_element)

# %% answer={"exercise": "gpus_needed", "name": "rounded down", "fails": "168 GB on cards"}
def gpus_needed(num_bytes, device, usable_fraction=1.0):
    return max(1, int(num_bytes // (find_device(device).memory_bytes * usable_fraction)))

# %% answer={"exercise": "gpus_needed", "name": "always one more", "fails": "a device more as soon"}
def gpus_needed(num_bytes, device, usable_fraction=1.0):
    return int(num_bytes // (find_device(device).memory_bytes * usable_fraction)) + 1

# %% answer={"exercise": "gpus_needed", "name": "GiB taken for GB", "fails": "168 GB on cards"}
def gpus_needed(num_bytes, device, usable_fraction=1.0):
    gigabytes = find_device(device).memory_bytes // GiB
    return math.ceil(num_bytes / GB / (gigabytes * usable_fraction))

# %% answer={"exercise": "gpus_needed", "name": "all of the memory used", "fails": "only the usable fraction"}
def gpus_needed(num_bytes, device, usable_fraction=1.0):
    return math.ceil(num_bytes / find_device(device).memory_bytes)

# %% answer={"exercise": "gpus_needed", "name": "the fraction taken of the need", "fails": "only the usable fraction"}
def gpus_needed(num_bytes, device, usable_fraction=1.0):
    return math.ceil(num_bytes * usable_fraction / find_device(device).memory_bytes)

# %% answer={"exercise": "gpus_needed", "name": "rounded to the nearest", "fails": "a device more as soon"}
def gpus_needed(num_bytes, device, usable_fraction=1.0):
    return max(1, round(num_bytes / (find_device(device).memory_bytes * usable_fraction)))

# %% answer={"exercise": "gpus_needed", "name": "one device after another", "right": true}
def gpus_needed(num_bytes, device, usable_fraction=1.0):
    room = find_device(device).memory_bytes * usable_fraction
    count = 1
    while count * room < num_bytes:
        count += 1
    return count

# %% answer={"exercise": "gpus_needed", "name": "floor division of the negative", "right": true}
def gpus_needed(num_bytes, device, usable_fraction=1.0):
    return int(-(-num_bytes // (find_device(device).memory_bytes * usable_fraction)))

# %% answer={"exercise": "predicted_bytes", "name": "weights alone", "fails": "the prediction for your"}
predicted_bytes = parameter_counts(my_config).total * 4

# %% answer={"exercise": "predicted_bytes", "name": "gradients forgotten", "fails": "the prediction for your"}
held = training_bytes(parameter_counts(my_config).total, my_recipe)
predicted_bytes = held.weights + held.optimizer

# %% answer={"exercise": "predicted_bytes", "name": "16-bit numbers", "fails": "the prediction for your"}
predicted_bytes = training_bytes(parameter_counts(my_config).total, my_recipe).total / 2

# %% answer={"exercise": "predicted_bytes", "name": "in GiB", "fails": "the prediction for your"}
predicted_bytes = training_bytes(parameter_counts(my_config).total, my_recipe).total / GiB

# %% answer={"exercise": "predicted_bytes", "name": "the 20 % of serving added", "fails": "the prediction for your"}
predicted_bytes = training_bytes(parameter_counts(my_config).total, my_recipe).total * 1.2

# %% answer={"exercise": "predicted_bytes", "name": "the other tying", "fails": "the prediction for your"}
counts = parameter_counts(my_config)
other = counts.total + (counts.embedding if my_config.tied_embeddings else -counts.head)
predicted_bytes = training_bytes(other, my_recipe).total

# %% answer={"exercise": "predicted_bytes", "name": "4 bytes for each copy", "right": true}
copies = 2 + RECIPES[my_recipe].moments
predicted_bytes = float(copies * 4 * parameter_counts(my_config).total)

# %% answer={"exercise": "predicted_bytes", "name": "rounded to three digits, as on paper", "right": true}
predicted_bytes = float(f"{training_bytes(parameter_counts(my_config).total, my_recipe).total:.3g}")
