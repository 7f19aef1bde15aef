# %% [markdown]
# Answers to the lab `roofline`, to try its grader with: the mistakes that the chapter warns of, and other ways to be right.

# %% answer={"exercise": "attention_flops", "name": "every token sees the whole prompt", "fails": "a prompt of 3"}
def attention_flops(config, prompt, cached=0):
    return 4 * config.num_layers * config.num_heads * config.head_size * prompt * (cached + prompt)

# %% answer={"exercise": "attention_flops", "name": "a token does not see itself", "fails": "one token of Llama"}
def attention_flops(config, prompt, cached=0):
    pairs = prompt * cached + prompt * (prompt - 1) // 2
    return 4 * config.num_layers * config.num_heads * config.head_size * pairs

# %% answer={"exercise": "attention_flops", "name": "key/value heads compute", "fails": "any shape"}
def attention_flops(config, prompt, cached=0):
    pairs = prompt * cached + prompt * (prompt + 1) // 2
    return 4 * config.num_layers * config.num_kv_heads * config.head_size * pairs

# %% answer={"exercise": "attention_flops", "name": "the cached tokens forgotten", "fails": "behind cached tokens"}
def attention_flops(config, prompt, cached=0):
    return 4 * config.num_layers * config.num_heads * config.head_size * prompt * (prompt + 1) // 2

# %% answer={"exercise": "attention_flops", "name": "the cached tokens run again", "fails": "3 tokens behind 2"}
def attention_flops(config, prompt, cached=0):
    length = cached + prompt
    return 4 * config.num_layers * config.num_heads * config.head_size * length * (length + 1) // 2

# %% answer={"exercise": "attention_flops", "name": "scores without values", "fails": "one token of Llama"}
def attention_flops(config, prompt, cached=0):
    pairs = prompt * cached + prompt * (prompt + 1) // 2
    return 2 * config.num_layers * config.num_heads * config.head_size * pairs

# %% answer={"exercise": "attention_flops", "name": "the hidden size instead of the heads", "fails": "one token of Qwen3"}
def attention_flops(config, prompt, cached=0):
    pairs = prompt * cached + prompt * (prompt + 1) // 2
    return 4 * config.num_layers * config.hidden_size * pairs

# %% answer={"exercise": "attention_flops", "name": "a sum over the new tokens", "right": true}
def attention_flops(config, prompt, cached=0):
    total = 0
    for before in range(cached, cached + prompt):
        seen = before + 1
        scores = 2 * config.head_size * seen
        values = 2 * config.head_size * seen
        total += config.num_heads * (scores + values)
    return config.num_layers * total

# %% answer={"exercise": "attention_flops", "name": "two triangles", "right": true}
def attention_flops(config, prompt, cached=0):
    def triangle(n):
        return n * (n + 1) / 2

    pairs = triangle(cached + prompt) - triangle(cached)
    return pairs * config.num_layers * config.num_heads * config.head_size * 4.0

# %% equivalent={"exercise": "attention_flops", "mutant": "prompt * (prompt + 1) // 2 → prompt * (prompt + 1) / 2", "because": "one of two neighbouring whole numbers is even, so both divide without a remainder, and a float of a whole value is taken"}

# %% answer={"exercise": "step_bytes", "name": "the weights read for each token", "fails": "weights: tied"}
def step_bytes(config, new_tokens, kv_tokens, bytes_per_weight=2, bytes_per_kv_element=2):
    counts = parameter_counts(config)
    weights = counts.total - counts.embedding
    if config.tied_embeddings:
        weights += config.vocab_size * config.hidden_size
    kept = kv_cache_bytes(config, kv_tokens + new_tokens, bytes_per_kv_element)
    return weights * new_tokens * bytes_per_weight + kept

# %% answer={"exercise": "step_bytes", "name": "all parameters", "fails": "GPT-J's embedding"}
def step_bytes(config, new_tokens, kv_tokens, bytes_per_weight=2, bytes_per_kv_element=2):
    kept = kv_cache_bytes(config, kv_tokens + new_tokens, bytes_per_kv_element)
    return parameter_counts(config).total * bytes_per_weight + kept

# %% answer={"exercise": "step_bytes", "name": "a tied head not read", "fails": "Llama-3.2-1B, whose head is tied"}
def step_bytes(config, new_tokens, kv_tokens, bytes_per_weight=2, bytes_per_kv_element=2):
    counts = parameter_counts(config)
    kept = kv_cache_bytes(config, kv_tokens + new_tokens, bytes_per_kv_element)
    return (counts.total - counts.embedding) * bytes_per_weight + kept

# %% answer={"exercise": "step_bytes", "name": "the new keys and values not written", "fails": "keys and values"}
def step_bytes(config, new_tokens, kv_tokens, bytes_per_weight=2, bytes_per_kv_element=2):
    counts = parameter_counts(config)
    head = config.vocab_size * config.hidden_size if config.tied_embeddings else 0
    weights = counts.total - counts.embedding + head
    return weights * bytes_per_weight + kv_cache_bytes(config, kv_tokens, bytes_per_kv_element)

# %% answer={"exercise": "step_bytes", "name": "no cache at all", "fails": "keys and values"}
def step_bytes(config, new_tokens, kv_tokens, bytes_per_weight=2, bytes_per_kv_element=2):
    counts = parameter_counts(config)
    head = config.vocab_size * config.hidden_size if config.tied_embeddings else 0
    return (counts.total - counts.embedding + head) * bytes_per_weight

# %% answer={"exercise": "step_bytes", "name": "one width for both", "fails": "the widths"}
def step_bytes(config, new_tokens, kv_tokens, bytes_per_weight=2, bytes_per_kv_element=2):
    counts = parameter_counts(config)
    head = config.vocab_size * config.hidden_size if config.tied_embeddings else 0
    kept = kv_cache_bytes(config, kv_tokens + new_tokens, bytes_per_weight)
    return (counts.total - counts.embedding + head) * bytes_per_weight + kept

# %% answer={"exercise": "step_bytes", "name": "query heads cached", "fails": "64 sequences"}
def step_bytes(config, new_tokens, kv_tokens, bytes_per_weight=2, bytes_per_kv_element=2):
    counts = parameter_counts(config)
    head = config.vocab_size * config.hidden_size if config.tied_embeddings else 0
    token = 2 * config.num_layers * config.num_heads * config.head_size * bytes_per_kv_element
    return (counts.total - counts.embedding + head) * bytes_per_weight + token * (kv_tokens + new_tokens)

# %% answer={"exercise": "step_bytes", "name": "part by part", "right": true}
def step_bytes(config, new_tokens, kv_tokens, bytes_per_weight=2, bytes_per_kv_element=2):
    counts = parameter_counts(config)
    head = counts.head or config.vocab_size * config.hidden_size
    read = counts.attention + counts.mlp + counts.norm + head
    a_token = kv_cache_bytes(config, 1, bytes_per_kv_element)
    return read * bytes_per_weight + a_token * kv_tokens + a_token * new_tokens

# %% answer={"exercise": "step_bytes", "name": "an untied twin", "right": true}
def step_bytes(config, new_tokens, kv_tokens, bytes_per_weight=2, bytes_per_kv_element=2):
    untied = parameter_counts(replace(config, tied_embeddings=False))
    token = 2 * config.num_layers * config.num_kv_heads * config.head_size
    return (untied.total - untied.embedding) * bytes_per_weight + (new_tokens + kv_tokens) * token * bytes_per_kv_element

# %% answer={"exercise": "arithmetic_intensity", "name": "the head for every token", "fails": "a prompt of 1,000"}
def arithmetic_intensity(config, batch, prompt, cached=0):
    counts = parameter_counts(config)
    matrices = counts.attention + counts.mlp + config.vocab_size * config.hidden_size
    flops = 2 * matrices * batch * prompt + batch * attention_flops(config, prompt, cached)
    return flops / step_bytes(config, batch * prompt, batch * (cached + prompt))

# %% answer={"exercise": "arithmetic_intensity", "name": "two operations for every parameter", "fails": "Llama-3.2-1B decodes"}
def arithmetic_intensity(config, batch, prompt, cached=0):
    flops = 2 * parameter_counts(config).total * batch * prompt + batch * attention_flops(config, prompt, cached)
    return flops / step_bytes(config, batch * prompt, batch * (cached + prompt))

# %% answer={"exercise": "arithmetic_intensity", "name": "a multiply-add taken for one operation", "fails": "decoding, alone"}
def arithmetic_intensity(config, batch, prompt, cached=0):
    counts = parameter_counts(config)
    flops = (counts.attention + counts.mlp) * batch * prompt + config.vocab_size * config.hidden_size * batch
    flops += batch * attention_flops(config, prompt, cached) // 2
    return flops / step_bytes(config, batch * prompt, batch * (cached + prompt))

# %% answer={"exercise": "arithmetic_intensity", "name": "attention left out", "fails": "prefill, whole"}
def arithmetic_intensity(config, batch, prompt, cached=0):
    counts = parameter_counts(config)
    flops = 2 * (counts.attention + counts.mlp) * batch * prompt + 2 * config.vocab_size * config.hidden_size * batch
    return flops / step_bytes(config, batch * prompt, batch * (cached + prompt))

# %% answer={"exercise": "arithmetic_intensity", "name": "the cache of one sequence", "fails": "64 such sequences"}
def arithmetic_intensity(config, batch, prompt, cached=0):
    counts = parameter_counts(config)
    flops = 2 * (counts.attention + counts.mlp) * batch * prompt + 2 * config.vocab_size * config.hidden_size * batch
    flops += batch * attention_flops(config, prompt, cached)
    return flops / step_bytes(config, prompt, cached + prompt)

# %% answer={"exercise": "arithmetic_intensity", "name": "the cached tokens are not read", "fails": "decoding, alone"}
def arithmetic_intensity(config, batch, prompt, cached=0):
    counts = parameter_counts(config)
    flops = 2 * (counts.attention + counts.mlp) * batch * prompt + 2 * config.vocab_size * config.hidden_size * batch
    flops += batch * attention_flops(config, prompt, cached)
    return flops / step_bytes(config, batch * prompt, batch * prompt)

# %% answer={"exercise": "arithmetic_intensity", "name": "every MLP taken for a gated one", "fails": "an MLP that is not gated"}
def arithmetic_intensity(config, batch, prompt, cached=0):
    D, width = config.hidden_size, (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_size
    elements = config.num_layers * D * (width + 3 * config.intermediate_size)
    flops = 2 * elements * batch * prompt + 2 * config.vocab_size * D * batch
    flops += batch * attention_flops(config, prompt, cached)
    return flops / step_bytes(config, batch * prompt, batch * (cached + prompt))

# %% answer={"exercise": "arithmetic_intensity", "name": "as many channels in the heads as in the stream", "fails": "Qwen3-0.6B"}
def arithmetic_intensity(config, batch, prompt, cached=0):
    D, kv = config.hidden_size, config.num_kv_heads * config.head_size
    elements = config.num_layers * D * (2 * D + 2 * kv + (3 if config.gated_mlp else 2) * config.intermediate_size)
    flops = 2 * elements * batch * prompt + 2 * config.vocab_size * D * batch
    flops += batch * attention_flops(config, prompt, cached)
    return flops / step_bytes(config, batch * prompt, batch * (cached + prompt))

# %% answer={"exercise": "arithmetic_intensity", "name": "biases taken for matrices", "fails": "phi-2"}
def arithmetic_intensity(config, batch, prompt, cached=0):
    counts = parameter_counts(config)
    flops = 2 * (counts.attention + counts.mlp) * batch * prompt + 2 * config.vocab_size * config.hidden_size * batch
    flops += batch * attention_flops(config, prompt, cached)
    return flops / step_bytes(config, batch * prompt, batch * (cached + prompt))

# %% answer={"exercise": "arithmetic_intensity", "name": "from the counts of parameters", "right": true}
def arithmetic_intensity(config, batch, prompt, cached=0):
    plain = parameter_counts(replace(config, qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm=False))
    a_token = 2 * (plain.attention + plain.mlp)
    a_sequence = a_token * prompt + attention_flops(config, prompt, cached) + 2 * config.vocab_size * config.hidden_size
    return batch * a_sequence / step_bytes(config, batch * prompt, batch * (cached + prompt))

# %% answer={"exercise": "arithmetic_intensity", "name": "layer by layer, from nothing else", "right": true}
def arithmetic_intensity(config, batch, prompt, cached=0):
    D, F, d, V = config.hidden_size, config.intermediate_size, config.head_size, config.vocab_size
    flops, elements = 2 * V * D, V * D + parameter_counts(config).norm
    for _ in range(config.num_layers):
        matrices = [D * config.num_heads * d] * 2 + [D * config.num_kv_heads * d] * 2 + [D * F] * (2 + config.gated_mlp)
        elements += sum(matrices)
        elements += config.qkv_bias * (config.num_heads + 2 * config.num_kv_heads) * d + config.output_bias * D
        elements += config.mlp_bias * (F + D)
        flops += 2 * sum(matrices) * prompt
        flops += sum(4 * config.num_heads * d * (cached + new) for new in range(1, prompt + 1))
    elements += V * (parameter_counts(config).head > V * D)
    kept = 2 * config.num_layers * config.num_kv_heads * d * batch * (cached + 2 * prompt)
    return batch * flops / (2 * (elements + kept))

# %% answer={"exercise": "step_floor", "name": "reading and computing one after the other", "fails": "one phase of 50 bytes and 200"}
def step_floor(phases, device, dtype="bfloat16", overlap=True):
    spec = find_device(device)
    return sum(num_bytes / spec.memory_bandwidth + flops / spec.flops_of(dtype) for num_bytes, flops in phases)

# %% answer={"exercise": "step_floor", "name": "reading alone", "fails": "one phase of 50 bytes and 800"}
def step_floor(phases, device, dtype="bfloat16", overlap=True):
    return sum(num_bytes for num_bytes, _ in phases) / find_device(device).memory_bandwidth

# %% answer={"exercise": "step_floor", "name": "always overlapped", "fails": "phases in turn"}
def step_floor(phases, device, dtype="bfloat16", overlap=True):
    spec = find_device(device)
    num_bytes, flops = map(sum, zip(*phases))
    return max(num_bytes / spec.memory_bandwidth, flops / spec.flops_of(dtype))

# %% answer={"exercise": "step_floor", "name": "always in turn", "fails": "phases that overlap"}
def step_floor(phases, device, dtype="bfloat16", overlap=True):
    spec = find_device(device)
    return sum(max(num_bytes / spec.memory_bandwidth, flops / spec.flops_of(dtype)) for num_bytes, flops in phases)

# %% answer={"exercise": "step_floor", "name": "the longest phase", "fails": "the two phases of before"}
def step_floor(phases, device, dtype="bfloat16", overlap=True):
    spec = find_device(device)
    return max(max(num_bytes / spec.memory_bandwidth, flops / spec.flops_of(dtype)) for num_bytes, flops in phases)

# %% answer={"exercise": "step_floor", "name": "the rate of bfloat16 in any dtype", "fails": "phases in turn"}
def step_floor(phases, device, dtype="bfloat16", overlap=True):
    spec = find_device(device)
    rate = spec.flops_of("bfloat16")
    if overlap:
        phases = [tuple(map(sum, zip(*phases)))]
    return sum(max(num_bytes / spec.memory_bandwidth, flops / rate) for num_bytes, flops in phases)

# %% answer={"exercise": "step_floor", "name": "the rate of bfloat16 in turn", "fails": "the same two in turn"}
def step_floor(phases, device, dtype="bfloat16", overlap=True):
    spec = find_device(device)
    if overlap:
        num_bytes, flops = map(sum, zip(*phases))
        return max(num_bytes / spec.memory_bandwidth, flops / spec.flops_of(dtype))
    rate = spec.flops_of("bfloat16")
    return sum(max(num_bytes / spec.memory_bandwidth, flops / rate) for num_bytes, flops in phases)

# %% answer={"exercise": "step_floor", "name": "the device's name not looked up", "fails": "any device may be"}
def step_floor(phases, device, dtype="bfloat16", overlap=True):
    rate = device.flops_of(dtype)
    if overlap:
        phases = [tuple(map(sum, zip(*phases)))]
    return sum(max(num_bytes / device.memory_bandwidth, flops / rate) for num_bytes, flops in phases)

# %% answer={"exercise": "step_floor", "name": "one list of phases for both", "right": true}
def step_floor(phases, device, dtype="bfloat16", overlap=True):
    spec = find_device(device)
    if overlap:
        phases = [(sum(phase[0] for phase in phases), sum(phase[1] for phase in phases))]
    total = 0.0
    for num_bytes, flops in phases:
        reading, computing = num_bytes / spec.memory_bandwidth, flops / spec.flops_of(dtype)
        total += reading if reading > computing else computing
    return total

# %% answer={"exercise": "step_floor", "name": "by the intensity of each phase", "right": true}
def step_floor(phases, device, dtype="bfloat16", overlap=True):
    spec = find_device(device)
    ridge = spec.flops_of(dtype) / spec.memory_bandwidth

    def seconds(num_bytes, flops):
        return flops / spec.flops_of(dtype) if flops > ridge * num_bytes else num_bytes / spec.memory_bandwidth

    return seconds(*map(sum, zip(*phases))) if overlap else sum(seconds(*phase) for phase in phases)

# %% answer={"exercise": "crossover_batch", "name": "keys and values left out", "fails": "with keys and values"}
def crossover_batch(weight_bytes, kv_bytes, flops, device, dtype="bfloat16"):
    spec = find_device(device)
    return math.ceil(weight_bytes / spec.memory_bandwidth / (flops / spec.flops_of(dtype)))

# %% answer={"exercise": "crossover_batch", "name": "rounded down", "fails": "with 3 operations"}
def crossover_batch(weight_bytes, kv_bytes, flops, device, dtype="bfloat16"):
    spec = find_device(device)
    margin = flops / spec.flops_of(dtype) - kv_bytes / spec.memory_bandwidth
    return math.inf if margin <= 0 else math.floor(weight_bytes / spec.memory_bandwidth / margin)

# %% answer={"exercise": "crossover_batch", "name": "to the nearest", "fails": "with 3 operations"}
def crossover_batch(weight_bytes, kv_bytes, flops, device, dtype="bfloat16"):
    spec = find_device(device)
    margin = flops / spec.flops_of(dtype) - kv_bytes / spec.memory_bandwidth
    return math.inf if margin <= 0 else round(weight_bytes / spec.memory_bandwidth / margin)

# %% answer={"exercise": "crossover_batch", "name": "always one more", "fails": "16 bytes of weights"}
def crossover_batch(weight_bytes, kv_bytes, flops, device, dtype="bfloat16"):
    spec = find_device(device)
    margin = flops / spec.flops_of(dtype) - kv_bytes / spec.memory_bandwidth
    return math.inf if margin <= 0 else math.floor(weight_bytes / spec.memory_bandwidth / margin) + 1

# %% answer={"exercise": "crossover_batch", "name": "a negative batch where there is none", "fails": "no batch is large enough"}
def crossover_batch(weight_bytes, kv_bytes, flops, device, dtype="bfloat16"):
    spec = find_device(device)
    margin = flops / spec.flops_of(dtype) - kv_bytes / spec.memory_bandwidth
    return math.ceil(weight_bytes / spec.memory_bandwidth / margin) if margin else math.inf

# %% answer={"exercise": "crossover_batch", "name": "the device's ratio, whatever the model", "fails": "with keys and values"}
def crossover_batch(weight_bytes, kv_bytes, flops, device, dtype="bfloat16"):
    spec = find_device(device)
    return math.ceil(spec.flops_of(dtype) / spec.memory_bandwidth)

# %% answer={"exercise": "crossover_batch", "name": "the rate of bfloat16 in any dtype", "fails": "without keys and values"}
def crossover_batch(weight_bytes, kv_bytes, flops, device, dtype="bfloat16"):
    spec = find_device(device)
    margin = flops / spec.flops_of("bfloat16") - kv_bytes / spec.memory_bandwidth
    return math.inf if margin <= 0 else math.ceil(weight_bytes / spec.memory_bandwidth / margin)

# %% answer={"exercise": "crossover_batch", "name": "keys and values read once for all", "fails": "each sequence's keys"}
def crossover_batch(weight_bytes, kv_bytes, flops, device, dtype="bfloat16"):
    spec = find_device(device)
    return math.ceil((weight_bytes + kv_bytes) / spec.memory_bandwidth / (flops / spec.flops_of(dtype)))

# %% answer={"exercise": "crossover_batch", "name": "in exact fractions", "right": true}
def crossover_batch(weight_bytes, kv_bytes, flops, device, dtype="bfloat16"):
    spec = find_device(device)
    ridge = Fraction(spec.flops_of(dtype)) / Fraction(spec.memory_bandwidth)
    gained = flops - ridge * kv_bytes
    return -(-ridge * weight_bytes // gained) if gained > 0 else math.inf

# %% answer={"exercise": "crossover_batch", "name": "by halving", "right": true}
def crossover_batch(weight_bytes, kv_bytes, flops, device, dtype="bfloat16"):
    spec = find_device(device)

    def computes(batch):
        return batch * flops / spec.flops_of(dtype) >= (weight_bytes + batch * kv_bytes) / spec.memory_bandwidth

    low, high = 0, 1
    while not computes(high):
        low, high = high, 2 * high
        if high > 2**40:
            return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if computes(middle) else (middle, high)
    return high

# %% answer={"exercise": "predicted_ms", "name": "everything waits for memory", "fails": "the prediction for your"}
predicted_ms = 1000 * step_bytes(my_config, my_batch, my_batch * my_context, 4, 4) / my_machine.memory_bandwidth

# %% answer={"exercise": "predicted_ms", "name": "the phases overlapped", "fails": "the prediction for your"}
weights = step_bytes(my_config, 0, 0, 4, 4)
everything = step_bytes(my_config, my_batch, my_batch * my_context, 4, 4)
counts = parameter_counts(my_config)
operations = 2 * my_batch * (counts.attention + counts.mlp + my_config.vocab_size * my_config.hidden_size)
operations += my_batch * attention_flops(my_config, 1, my_context - 1)
predicted_ms = 1000 * step_floor([(everything, operations)], my_machine, "float32")

# %% answer={"exercise": "predicted_ms", "name": "in seconds", "fails": "the prediction for your"}
weights = step_bytes(my_config, 0, 0, 4, 4)
cache = step_bytes(my_config, my_batch, my_batch * my_context, 4, 4) - weights
counts = parameter_counts(my_config)
operations = 2 * my_batch * (counts.attention + counts.mlp + my_config.vocab_size * my_config.hidden_size)
phases = [(weights, operations), (cache, my_batch * attention_flops(my_config, 1, my_context - 1))]
predicted_ms = step_floor(phases, my_machine, "float32", overlap=False)

# %% answer={"exercise": "predicted_ms", "name": "16-bit numbers", "fails": "the prediction for your"}
weights = step_bytes(my_config, 0, 0)
cache = step_bytes(my_config, my_batch, my_batch * my_context) - weights
counts = parameter_counts(my_config)
operations = 2 * my_batch * (counts.attention + counts.mlp + my_config.vocab_size * my_config.hidden_size)
phases = [(weights, operations), (cache, my_batch * attention_flops(my_config, 1, my_context - 1))]
predicted_ms = 1000 * step_floor(phases, my_machine, "float32", overlap=False)

# %% answer={"exercise": "predicted_ms", "name": "the head forgotten", "fails": "the prediction for your"}
weights = step_bytes(my_config, 0, 0, 4, 4)
cache = step_bytes(my_config, my_batch, my_batch * my_context, 4, 4) - weights
counts = parameter_counts(my_config)
phases = [(weights, 2 * my_batch * (counts.attention + counts.mlp)), (cache, 0)]
predicted_ms = 1000 * step_floor(phases, my_machine, "float32", overlap=False)

# %% answer={"exercise": "predicted_ms", "name": "no keys and values", "fails": "the prediction for your"}
counts = parameter_counts(my_config)
operations = 2 * my_batch * (counts.attention + counts.mlp + my_config.vocab_size * my_config.hidden_size)
phases = [(step_bytes(my_config, 0, 0, 4, 4), operations)]
predicted_ms = 1000 * step_floor(phases, my_machine, "float32", overlap=False)

# %% answer={"exercise": "predicted_ms", "name": "the keys and values of one sequence", "fails": "the prediction for your"}
counts = parameter_counts(my_config)
operations = 2 * my_batch * (counts.attention + counts.mlp + my_config.vocab_size * my_config.hidden_size)
phases = [(step_bytes(my_config, 0, 0, 4, 4), operations), (kv_cache_bytes(my_config, my_context, 4), 0)]
predicted_ms = 1000 * step_floor(phases, my_machine, "float32", overlap=False)

# %% answer={"exercise": "predicted_ms", "name": "the writing left out", "fails": "the prediction for your"}
counts = parameter_counts(my_config)
operations = 2 * my_batch * (counts.attention + counts.mlp + my_config.vocab_size * my_config.hidden_size)
phases = [(step_bytes(my_config, 0, 0, 4, 4), operations), (kv_cache_bytes(my_config, my_batch * my_context, 4), 0)]
predicted_ms = 1000 * step_floor(phases, my_machine, "float32", overlap=False)

# %% answer={"exercise": "predicted_ms", "name": "the new token not counted", "fails": "the prediction for your"}
counts = parameter_counts(my_config)
operations = 2 * my_batch * (counts.attention + counts.mlp + my_config.vocab_size * my_config.hidden_size)
cache = kv_cache_bytes(my_config, my_batch * (my_context - 1), 4)
predicted_ms = 1000 * step_floor([(0, operations), (cache, 0)], my_machine, "float32", overlap=False)

# %% answer={"exercise": "predicted_ms", "name": "on paper", "right": true}
D, query, kv = my_config.hidden_size, my_config.num_heads * my_config.head_size, my_config.num_kv_heads * my_config.head_size
layer = D * (2 * query + 2 * kv + 3 * my_config.intermediate_size)
matrices = my_config.num_layers * layer + my_config.vocab_size * D
computing = 2 * matrices * my_batch / my_machine.flops_of("float32")
reading = 4 * 2 * my_config.num_layers * kv * my_batch * (my_context + 1) / my_machine.memory_bandwidth
predicted_ms = 1000 * (computing + reading)

# %% answer={"exercise": "predicted_ms", "name": "rounded to four digits", "right": true}
cached = kv_cache_bytes(my_config, my_batch * (my_context + 1), 4)
held = parameter_counts(replace(my_config, tied_embeddings=True)).total
seconds = max(4 * held / my_machine.memory_bandwidth, 2 * held * my_batch / my_machine.flops_of("float32"))
predicted_ms = float(f"{1000 * (seconds + cached / my_machine.memory_bandwidth):.4g}")
