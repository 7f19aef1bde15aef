# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Lab: how fast can a step be?
#
# | | |
# |---|---|
# | **Device** | any; a laptop's CPU is enough, a GPU is used where there is one |
# | **Time** | about 50 minutes; the whole notebook runs in under a minute |
# | **Difficulty** | moderate: short functions, each with something that is easily left out |
# | **Needs** | the chapters *Memory* and *The roofline of a step* |
#
# A step of generation moves bytes and does operations. You will count both, and from them work out the least time that
# the step can take, what it waits for, and how large a batch must be before that changes. At the end you predict the
# floor of a step of decoding on a machine that is made up. Then your functions give the floor of the same step on the
# machine in front of you, and that one is measured.
#
# You write each answer in one cell, in place of `raise NotImplementedError()`. The cell after it checks your answer
# property by property; when you hand in, hidden checks run the same functions on other inputs.
#
# Sizes are **bytes**, times are **seconds**, and a multiply-add is **two** operations. The letters are the book's
# notation: $L$ layers, $D$ hidden size, $F$ feed-forward size, $H$ query heads, $H_{kv}$ key/value heads, $d$ head
# size, $V$ vocabulary, $B$ sequences in the batch.
#
# First, say who you are. One exercise draws its model and its machine from your id, so that everyone predicts another
# number.

# %%
student_id = "student-00"  # your id, as your instructor knows it

# %% nbgrader={"grade_id": "given", "locked": true}
import math
from dataclasses import replace
from fractions import Fraction

from llmlab.config import MODEL_CONFIGS, ModelConfig
from llmlab.grading.checks import CheckFailed, Checks, close, equal, measured, student_rng
from llmlab.grading.withhold import withhold
from llmlab.hardware import DEVICES, DeviceSpec, find_device
from llmlab.memory import kv_cache_bytes, parameter_counts

# These names of the package are the exercises, or answer them, so here they raise. The rest of llmlab works.
withhold(
    [
        "llmlab.roofline.prefill_work",
        "llmlab.roofline.weights_read",
        "llmlab.roofline.step_bytes",
        "llmlab.roofline.step_flops",
        "llmlab.roofline._matrix_elements",
        "llmlab.roofline.arithmetic_intensity",
        "llmlab.roofline.step_seconds",
        "llmlab.roofline.crossover_batch",
        "llmlab.roofline.crossover_length",
    ]
)


def draw_decoder(rng):
    """A small random decoder in the style of Llama: grouped-query attention, a gated MLP, sometimes tied."""
    kv_heads = rng.choice([2, 3])
    d = rng.choice([32, 48])
    return ModelConfig(
        name="drawn",
        architecture="llama",
        vocab_size=rng.randrange(2_000, 4_000),
        hidden_size=rng.randrange(40, 60) * 8,
        intermediate_size=rng.randrange(500, 800),
        num_layers=rng.randrange(3, 5),
        num_heads=kv_heads * rng.choice([2, 3]),
        num_kv_heads=kv_heads,
        head_size=d,
        max_positions=512,
        tied_embeddings=rng.random() < 0.5,
        rotary_size=d,
    )


def draw_device(rng):
    """A made-up accelerator that computes in three dtypes."""
    rate = rng.randrange(50, 900) * 10**12
    rates = (("float32", rate / 8), ("bfloat16", float(rate)), ("float8", rate * 2.0))
    return DeviceSpec("drawn", 2**35, rng.randrange(500, 5_000) * 1e9, rates, 0.0)


# %% [markdown]
# ## 1. Attention is quadratic
#
# The tokens of a prompt run through the model together. Attention pairs each of them with every token before it **and
# with itself**: it never looks ahead. Each pair costs, in each layer and each query head, $d$ multiply-adds for the score
# and $d$ more to add up the value.
#
# Some of the tokens before may be in the KV cache already, from an earlier part of the prompt. They are looked at, and
# are not run through the model again.
#
# <details><summary>Hint: how many pairs?</summary>
#
# Let 2 tokens be cached and 3 be new. The first new token sees 2 + 1 keys, the second 2 + 2, the third 2 + 3.
# </details>
#
# <details><summary>Hint: which heads?</summary>
#
# With grouped-query attention several query heads read the same keys. That saves memory. Each query head still computes
# its own scores.
# </details>


# %% nbgrader={"grade_id": "attention_flops", "solution": true}
def attention_flops(config, prompt, cached=0):
    """The operations of causal attention for the new tokens of one sequence, in all layers.

    config: a ModelConfig; prompt: n new tokens; cached: c tokens before them, whose keys and values are there already.
    Returns a whole number (131072.0 is one, too): operations, two for a multiply-add.

    1. Count the pairs of a new token and a key that it sees, its own included.
    2. A pair costs d multiply-adds for its score and d for its value, in each query head of each layer.
    """
    ### BEGIN SOLUTION
    pairs = prompt * cached + prompt * (prompt + 1) // 2
    return 4 * config.num_layers * config.num_heads * config.head_size * pairs
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_attention_flops", "grade": true}
check = Checks("attention_flops")


@check(
    "one token of Llama-3.2-1B that sees itself alone: 4 · 16 layers · 32 heads · 64 = 131,072 operations", points=0.25
)
def _(rng):
    equal(attention_flops(MODEL_CONFIGS["llama-3.2-1b"], 1), 131_072)


@check(
    "one token of Qwen3-0.6B: 4 · 28 layers · 16 heads · 128 = 229,376, and 16 · 128 is not its hidden size",
    points=0.25,
)
def _(rng):
    equal(attention_flops(MODEL_CONFIGS["qwen3-0.6b"], 1), 229_376)


@check("a prompt of 3: 1 + 2 + 3 pairs, since no token sees those behind it", points=0.25)
def _(rng):
    equal(attention_flops(MODEL_CONFIGS["llama-3.2-1b"], 3), 6 * 131_072)


@check("3 tokens behind 2 cached ones: 3 + 4 + 5 pairs", points=0.25)
def _(rng):
    equal(attention_flops(MODEL_CONFIGS["llama-3.2-1b"], 3, 2), 12 * 131_072)


### BEGIN HIDDEN TESTS
def pair_by_pair(config, prompt, cached):
    """The slow way: a loop over the new tokens and the keys that each one sees."""
    pairs = sum(1 for query in range(cached, cached + prompt) for key in range(cached + prompt) if key <= query)
    one = 2 * config.head_size + 2 * config.head_size
    return sum(one * config.num_heads for _ in range(config.num_layers)) * pairs


@check.hidden("any shape and any prompt, pair by pair", points=1)
def _(rng):
    for _ in range(3):
        config, prompt = draw_decoder(rng), rng.randrange(2, 80)
        equal(attention_flops(config, prompt), pair_by_pair(config, prompt, 0))


@check.hidden("behind cached tokens, for one new token too: a step of decoding", points=1)
def _(rng):
    for prompt in (1, rng.randrange(2, 60)):
        config, cached = draw_decoder(rng), rng.randrange(1, 90)
        equal(attention_flops(config, prompt, cached), pair_by_pair(config, prompt, cached))


### END HIDDEN TESTS
check.report()

# %% [markdown]
# What it comes to, beside the matrices: a layer of Llama-3.2-1B multiplies each token by matrices of 60.8 million
# elements. At which length does attention become the larger part?

# %%
llama = MODEL_CONFIGS["llama-3.2-1b"]
elements = llama.num_layers * 60_817_408
for length in (1_000, 10_000, 30_000, 100_000):
    matrices = 2 * elements * length
    print(
        f"{length:7,} tokens: attention is {attention_flops(llama, length) / matrices:6.1%} of the matrices' operations"
    )

# %% [markdown]
# ## 2. What a step moves
#
# A step reads every weight once, whatever the number of tokens: they go through the matrices together. It reads the keys
# and values of all tokens that attention looks at, and writes those of the new tokens.
#
# Not every parameter is read. Of the embedding only the rows of the new tokens are looked up, which is next to nothing.
# The output head is read whole. Where head and embedding are **one** matrix (`tied_embeddings`), it is read as the
# head. `parameter_counts` counts that matrix under `embedding`, and its `head` is then 0.
#
# <details><summary>Hint: what may I use?</summary>
#
# <code>parameter_counts(config)</code> has the parts <code>embedding</code>, <code>attention</code>, <code>mlp</code>,
# <code>norm</code>, <code>head</code> and <code>total</code>; <code>kv_cache_bytes(config, num_tokens, width)</code> is
# what you wrote in the lab on memory.
# </details>
#
# <details><summary>Hint: a few bytes are missing</summary>
#
# The keys and values of the new tokens are moved twice: they are written, and attention reads them with the others.
# </details>


# %% nbgrader={"grade_id": "step_bytes", "solution": true}
def step_bytes(config, new_tokens, kv_tokens, bytes_per_weight=2, bytes_per_kv_element=2):
    """The least that a step moves between memory and chip, in bytes.

    config: a ModelConfig of a decoder with an output head. new_tokens: T, over all sequences. kv_tokens: K, over all
    sequences, whose keys and values attention reads; the new tokens are among them. bytes_per_weight,
    bytes_per_kv_element: 2 for 16 bits, 1 for 8, 0.5 for 4.

    1. weights: all parameters but the embedding, each once; a tied head is read all the same.
    2. keys and values: those of K tokens are read, those of T tokens written.
    """
    ### BEGIN SOLUTION
    counts = parameter_counts(config)
    weights = counts.total - counts.embedding
    if config.tied_embeddings:
        weights += config.vocab_size * config.hidden_size
    return weights * bytes_per_weight + kv_cache_bytes(config, kv_tokens + new_tokens, bytes_per_kv_element)
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_step_bytes", "grade": true}
check = Checks("step_bytes")


@check(
    "Llama-3.2-1B, whose head is tied, decodes one sequence of 1,000: its 1,235,814,400 parameters once", points=0.25
)
def _(rng):
    equal(step_bytes(MODEL_CONFIGS["llama-3.2-1b"], 1, 1000), 2 * 1_235_814_400 + 32_768 * 1001)


@check("64 sequences of 1,000: the same weights, 64 times the keys and values", points=0.25)
def _(rng):
    equal(step_bytes(MODEL_CONFIGS["llama-3.2-1b"], 64, 64_000), 2 * 1_235_814_400 + 64 * 32_768 * 1001)


@check("GPT-J's embedding is apart from its head: looked up, not read", points=0.25)
def _(rng):
    equal(step_bytes(MODEL_CONFIGS["gpt-j-6b"], 1, 1), 2 * (6_050_882_784 - 50_400 * 4096) + 2 * 458_752)


@check("weights in 4 bits and a cache in 8: each has its own width", points=0.25)
def _(rng):
    equal(step_bytes(MODEL_CONFIGS["llama-3.2-1b"], 1, 1000, 0.5, 1), 1_235_814_400 / 2 + 16_384 * 1001)


### BEGIN HIDDEN TESTS
def matrices_of(config):
    """Elements of the matrices that a token goes through, layer by layer, with the head last."""
    D, F, d = config.hidden_size, config.intermediate_size, config.head_size
    shapes = []
    for _ in range(config.num_layers):
        shapes += [(D, config.num_heads * d), (D, config.num_kv_heads * d), (D, config.num_kv_heads * d)]
        shapes += [(config.num_heads * d, D), (D, F), (F, D)] + ([(D, F)] if config.gated_mlp else [])
    return [rows * columns for rows, columns in shapes], config.vocab_size * D


def moved(config, new_tokens, kv_tokens, width, kv_width):
    """Tensor by tensor; of the norms there are two a layer and one at the end."""
    layers, head = matrices_of(config)
    scales = (2 * config.num_layers + 1) * config.hidden_size
    one = sum(kv_width * config.num_kv_heads * config.head_size for _ in range(config.num_layers) for _ in "kv")
    return (sum(layers) + head + scales) * width + one * kv_tokens + one * new_tokens


@check.hidden("weights: tied and untied, and the same for one new token as for many", points=1)
def _(rng):
    for tied in (True, False):
        config, tokens = replace(draw_decoder(rng), tied_embeddings=tied), rng.randrange(2, 400)
        for new in (1, tokens):
            equal(step_bytes(config, new, tokens), moved(config, new, tokens, 2, 2))


@check.hidden("keys and values: of the key/value heads, read and written", points=1)
def _(rng):
    for _ in range(3):
        config, new = draw_decoder(rng), rng.randrange(1, 300)
        kv = new + rng.randrange(1, 9_000)
        equal(step_bytes(config, new, kv), moved(config, new, kv, 2, 2))


@check.hidden("the widths of weights and of the cache are the caller's", points=1)
def _(rng):
    for width, kv_width in ((4, 4), (0.5, 2), (2, 1)):
        config, new = draw_decoder(rng), rng.randrange(1, 300)
        equal(step_bytes(config, new, 3 * new, width, kv_width), moved(config, new, 3 * new, width, kv_width))


### END HIDDEN TESTS
check.report()

# %% [markdown]
# ## 3. Arithmetic intensity
#
# The arithmetic intensity of a step is its operations divided by the bytes that it moves. Write one function for both
# kinds of step: a *prefill* runs a prompt of $n$ tokens in each of $B$ sequences; *decoding* is the same with $n = 1$ and
# everything before it cached.
#
# Three things compute. Each new token goes through the **matrices** of all layers, two operations for each of their
# elements. **Attention** is your first function, once for each sequence. The output **head** runs for the last token of
# each sequence only, since nobody asks what follows the others.
#
# <details><summary>Hint: which elements?</summary>
#
# Of each layer: D × H·d for the queries, D × H<sub>kv</sub>·d for the keys and again for the values, H·d × D for the
# output, and the MLP's D × F matrices, three where it is gated and two where it is not. The head is D × V. Norms and
# biases are no matrices.
# </details>


# %% nbgrader={"grade_id": "arithmetic_intensity", "solution": true}
def arithmetic_intensity(config, batch, prompt, cached=0):
    """Operations for each byte moved, of one step in 16 bits: weights and cache take 2 bytes an element.

    config: a ModelConfig; batch: B sequences, in each of which ``prompt`` new tokens run behind ``cached`` ones. Each
    sequence wants one next token. Returns operations over bytes, a float.

    1. operations of the matrices: 2 · elements of all layers · new tokens.
    2. operations of attention, in each sequence (``attention_flops``).
    3. operations of the head: 2 · V · D for each sequence.
    4. bytes (``step_bytes``): attention reads the cached tokens and the new ones.
    """
    ### BEGIN SOLUTION
    D, query, kv = config.hidden_size, config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    mlp_matrices = 3 if config.gated_mlp else 2
    elements = config.num_layers * D * (2 * query + 2 * kv + mlp_matrices * config.intermediate_size)
    flops = 2 * elements * batch * prompt + 2 * config.vocab_size * D * batch
    flops += batch * attention_flops(config, prompt, cached)
    return flops / step_bytes(config, batch * prompt, batch * (cached + prompt))
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_arithmetic_intensity", "grade": true}
check = Checks("arithmetic_intensity")


@check("Llama-3.2-1B decodes one sequence of 1,000: 2,602,565,632 operations on 2,504,429,568 bytes", points=0.25)
def _(rng):
    close(arithmetic_intensity(MODEL_CONFIGS["llama-3.2-1b"], 1, 1, 999), 2_602_565_632 / 2_504_429_568)


@check("64 such sequences: 64 times the operations, and the weights are read once for all", points=0.25)
def _(rng):
    close(arithmetic_intensity(MODEL_CONFIGS["llama-3.2-1b"], 64, 1, 999), 64 * 2_602_565_632 / 4_570_877_952)


@check("a prompt of 1,000 runs the head once: 2,012,285,337,600 operations on 2,537,164,800 bytes", points=0.25)
def _(rng):
    close(arithmetic_intensity(MODEL_CONFIGS["llama-3.2-1b"], 1, 1000), 2_012_285_337_600 / 2_537_164_800)


@check(
    "Qwen3-0.6B, whose heads are wider than its hidden size, decodes one of 1,000: 1,421,344,768 operations on"
    " 1,306,902,528 bytes",
    points=0.25,
)
def _(rng):
    close(arithmetic_intensity(MODEL_CONFIGS["qwen3-0.6b"], 1, 1, 999), 1_421_344_768 / 1_306_902_528)


@check(
    "phi-2, whose biases are read and multiply nothing, decodes one of 1,000: 5,622,988,800 operations on"
    " 5,625,231,360 bytes",
    points=0.25,
)
def _(rng):
    close(arithmetic_intensity(MODEL_CONFIGS["phi-2"], 1, 1, 999), 5_622_988_800 / 5_625_231_360)


@check(
    "Llama-3.2-1B without the gate, whose MLP then has two matrices a layer, decodes one sequence of 1,000", points=0.25
)
def _(rng):
    without_gate = replace(MODEL_CONFIGS["llama-3.2-1b"], gated_mlp=False)
    gates = 16 * 2048 * 8192
    flops, num_bytes = 2_602_565_632 - 2 * gates, 2_504_429_568 - 2 * gates
    close(arithmetic_intensity(without_gate, 1, 1, 999), flops / num_bytes)


### BEGIN HIDDEN TESTS
def intensity(config, batch, prompt, cached):
    """Token by token: each goes through every matrix, and looks at itself and all before it."""
    D, F, d = config.hidden_size, config.intermediate_size, config.head_size
    shapes = [(config.num_heads * d, D), (config.num_kv_heads * d, D), (config.num_kv_heads * d, D)]
    shapes += [(D, config.num_heads * d), (D, F), (F, D)] + ([(D, F)] if config.gated_mlp else [])
    layer, head = sum(rows * columns for rows, columns in shapes), config.vocab_size * D
    flops = 0
    for position in range(cached, cached + prompt):
        attention = config.num_heads * 2 * (2 * d) * (position + 1)
        flops += sum(2 * layer + attention for _ in range(config.num_layers))
    weights = config.num_layers * (layer + 2 * D) + D + head
    read, written = cached + prompt, prompt
    keys_and_values = 2 * config.num_layers * config.num_kv_heads * d * batch * (read + written)
    return batch * (flops + 2 * head) / (2 * weights + 2 * keys_and_values)


@check.hidden("decoding, alone and in a batch", points=0.75)
def _(rng):
    for batch in (1, rng.randrange(2, 300)):
        config, cached = draw_decoder(rng), rng.randrange(10, 900)
        close(arithmetic_intensity(config, batch, 1, cached), intensity(config, batch, 1, cached))


@check.hidden("prefill, whole and behind cached tokens", points=1)
def _(rng):
    for cached in (0, rng.randrange(50, 500)):
        config, batch, prompt = draw_decoder(rng), rng.randrange(2, 9), rng.randrange(50, 500)
        close(arithmetic_intensity(config, batch, prompt, cached), intensity(config, batch, prompt, cached))


@check.hidden("an MLP that is not gated, in any shape", points=0.25)
def _(rng):
    config, batch, prompt = replace(draw_decoder(rng), gated_mlp=False), rng.randrange(1, 9), rng.randrange(2, 99)
    close(arithmetic_intensity(config, batch, prompt, 7), intensity(config, batch, prompt, 7))


### END HIDDEN TESTS
check.report()

# %% [markdown]
# An H100 can do 295 operations in the time in which it reads a byte. Which of these steps would keep its arithmetic busy?

# %%
for batch, prompt, cached in ((1, 1, 999), (64, 1, 999), (512, 1, 999), (1, 100, 0), (1, 1000, 0), (1, 256, 744)):
    name = f"{batch} x {prompt} new behind {cached} cached"
    print(f"{name:28} {arithmetic_intensity(llama, batch, prompt, cached):7.1f} operations a byte")

# %% [markdown]
# ## 4. The floor of a step
#
# Bytes take time, $\text{bytes} / \text{bandwidth}$, and so do operations, $\text{operations} / \text{rate}$. A device
# does both at once, so a step takes at least the **longer** of the two.
#
# A step has phases: the matrices, then attention, and so on. If everything may overlap with everything, their bytes and
# operations add up, and the longer sum is the floor. In truth one phase runs after the other. Then each has its own
# floor, and the floors add up.
#
# <details><summary>Hint: can the two differ?</summary>
#
# Where all phases wait for the same thing they are equal. Where one waits for memory and another for arithmetic, taking
# turns is slower: while one is read, nothing computes.
# </details>


# %% nbgrader={"grade_id": "step_floor", "solution": true}
def step_floor(phases, device, dtype="bfloat16", overlap=True):
    """The least time that a step takes, in seconds.

    phases: a list of (bytes, operations), one for each phase. device: a DeviceSpec or the name of one
    (``find_device`` takes either); it has a ``memory_bandwidth`` in bytes a second, and ``flops_of(dtype)`` is its rate
    in operations a second. overlap: whether phases run at the same time; with False, one after the other.
    """
    ### BEGIN SOLUTION
    spec = find_device(device)
    rate = spec.flops_of(dtype)

    def floor(num_bytes, flops):
        return max([num_bytes / spec.memory_bandwidth, flops / rate])

    if overlap:
        return floor(sum(num_bytes for num_bytes, _ in phases), sum(flops for _, flops in phases))
    return sum(floor(num_bytes, flops) for num_bytes, flops in phases)
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_step_floor", "grade": true}
check = Checks("step_floor")
PLAIN = DeviceSpec("plain", 1, 10.0, (("bfloat16", 100.0), ("float8", 200.0)), 0.0)  # 10 B/s, 100 operations a second


@check(
    "one phase of 50 bytes and 200 operations, at 10 bytes and 100 operations a second: it reads for 5 s", points=0.25
)
def _(rng):
    close(step_floor([(50, 200)], PLAIN), 5.0)


@check(
    "one phase of 50 bytes and 800 operations computes for 8 s, and in float8, at 200 a second, reads for 5",
    points=0.25,
)
def _(rng):
    close(step_floor([(50, 800)], PLAIN), 8.0)
    close(step_floor([(50, 800)], PLAIN, "float8"), 5.0)


@check("the two phases of before: 10 s where they overlap, 13 s in turn", points=0.25)
def _(rng):
    close(step_floor([(50, 200), (50, 800)], PLAIN), 10.0)
    close(step_floor([(50, 200), (50, 800)], PLAIN, overlap=False), 13.0)


@check("the same two in turn in float8: both read for longer, 5 s each", points=0.25)
def _(rng):
    close(step_floor([(50, 200), (50, 800)], PLAIN, "float8", overlap=False), 10.0)


@check("a device may be given by its name: an H100 reads 3.35 TB in a second", points=0.25)
def _(rng):
    close(step_floor([(3.35e12, 1)], "h100-80gb"), 1.0)


### BEGIN HIDDEN TESTS
def drawn_phases(rng, device, dtype):
    """Phases of which some read longer and some compute longer, by factors of 2 to 5, and all parts matter."""
    phases = []
    for longer in rng.sample(["read", "compute", "read", "compute"], 4):
        seconds, other = rng.uniform(0.01, 0.05), rng.uniform(2, 5)
        read, compute = (seconds, seconds / other) if longer == "read" else (seconds / other, seconds)
        phases.append((round(read * device.memory_bandwidth), round(compute * device.flops_of(dtype))))
    return phases


def exact(num_bytes, flops, device, dtype):
    """Of two fractions the larger."""
    read = Fraction(num_bytes) / Fraction(device.memory_bandwidth)
    compute = Fraction(flops) / Fraction(device.flops_of(dtype))
    return read if read > compute else compute


@check.hidden("phases that overlap: the longer of the two sums", points=1)
def _(rng):
    for dtype in ("bfloat16", "float32"):
        device = draw_device(rng)
        phases = drawn_phases(rng, device, dtype)
        read, compute = map(sum, zip(*phases, strict=True))
        close(step_floor(phases, device, dtype), float(exact(read, compute, device, dtype)))
        close(step_floor([(read, 0)], device, dtype), float(exact(read, 0, device, dtype)))
        close(step_floor([(0, compute)], device, dtype), float(exact(0, compute, device, dtype)))


@check.hidden("phases in turn: each its own floor", points=1)
def _(rng):
    for dtype in ("bfloat16", "float8"):
        device = draw_device(rng)
        phases = drawn_phases(rng, device, dtype)
        expected = sum(exact(*phase, device, dtype) for phase in phases)
        close(step_floor(phases, device, dtype, overlap=False), float(expected))


@check.hidden("any device may be given by its name", points=0.25)
def _(rng):
    for name in ("h100-80gb", "l4-24gb"):
        phase = drawn_phases(rng, DEVICES[name], "bfloat16")[0]
        close(step_floor([phase], name), float(exact(*phase, DEVICES[name], "bfloat16")))


### END HIDDEN TESTS
check.report()

# %% [markdown]
# ## 5. From which batch does a step compute?
#
# Decoding reads the weights once for the whole batch, so each further sequence makes better use of them. But it also
# brings keys and values of its own. Find the **smallest whole batch** whose operations take at least as long as its
# reading. There may be none.
#
# <details><summary>Hint: set up the inequality</summary>
#
# With W bytes of weights, k bytes of keys and values and f operations of each sequence, reading takes (W + B·k) /
# bandwidth, computing B·f / rate. Bring B to one side.
# </details>
#
# <details><summary>Hint: when is there none?</summary>
#
# When one more sequence adds at least as much reading time as it adds computing time: however many come, computing
# never catches up with the weights.
# </details>


# %% nbgrader={"grade_id": "crossover_batch", "solution": true}
def crossover_batch(weight_bytes, kv_bytes, flops, device, dtype="bfloat16"):
    """The smallest batch for which computing takes at least as long as reading.

    weight_bytes: of the whole model, read once a step; above 0. kv_bytes, flops: bytes and operations that **each**
    sequence adds to a step. device, dtype: as in ``step_floor``. Returns a whole number, 1 at the least, or
    ``math.inf`` where no batch is large enough. Floats are exact enough: apart from the small numbers that you see,
    no check asks for a batch where a millionth of a sequence decides.
    """
    ### BEGIN SOLUTION
    spec = find_device(device)
    margin = flops / spec.flops_of(dtype) - kv_bytes / spec.memory_bandwidth
    if margin <= 0:
        return math.inf
    return math.ceil(weight_bytes / spec.memory_bandwidth / margin)
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_crossover_batch", "grade": true}
check = Checks("crossover_batch")
EIGHT = DeviceSpec("eight", 1, 1.0, (("bfloat16", 8.0), ("float8", 16.0)), 0.0)  # 1 B/s, 8 operations a second


@check(
    "16 bytes of weights, 2 operations a sequence, 8 in the time of a byte: 64 sequences; in float8 it is 128",
    points=0.25,
)
def _(rng):
    equal(crossover_batch(16, 0, 2, EIGHT), 64)
    equal(crossover_batch(16, 0, 2, EIGHT, "float8"), 128)


@check(
    "with 3 operations and 16 bytes of weights it takes 43, as 42 do not do; with 7 it takes 19; with 1 byte and 32"
    " one sequence does",
    points=0.25,
)
def _(rng):
    equal(crossover_batch(16, 0, 3, EIGHT), 43)
    equal(crossover_batch(16, 0, 7, EIGHT), 19)
    equal(crossover_batch(1, 0, 32, EIGHT), 1)


@check(
    "each sequence's keys and values have to be read too: with 1 byte of them and 16 operations, 16 sequences",
    points=0.25,
)
def _(rng):
    equal(crossover_batch(16, 1, 16, EIGHT), 16)


@check("no batch is large enough where a sequence reads for as long as it computes, or longer", points=0.25)
def _(rng):
    equal(crossover_batch(16, 2, 16, EIGHT), math.inf)
    equal(crossover_batch(16, 3, 16, EIGHT), math.inf)


### BEGIN HIDDEN TESTS
def whole(batch):
    """The same, if it is a whole number; 64.0 is one."""
    if type(batch) not in (int, float) or batch != math.floor(batch):
        raise CheckFailed(batch, "a whole number")
    return int(batch)


def computes(batch, weight_bytes, kv_bytes, flops, device, dtype):
    """Whether this batch computes for at least as long as it reads, in whole numbers."""
    read = (weight_bytes + batch * kv_bytes) * Fraction(device.flops_of(dtype))
    return batch * flops * Fraction(device.memory_bandwidth) >= read


def clear_of_ties(draw):
    """Inputs whose crossing lies a millionth of a sequence or more from a whole number, so that floats find it, too."""
    while True:
        weight_bytes, kv_bytes, flops, device, dtype = inputs = draw()
        ridge = Fraction(device.flops_of(dtype)) / Fraction(device.memory_bandwidth)
        crossing = ridge * weight_bytes / (flops - ridge * kv_bytes)
        if abs(crossing - round(crossing)) > 1e-6:
            return inputs


@check.hidden("without keys and values: this batch computes, and one sequence fewer reads", points=1)
def _(rng):
    for dtype in ("bfloat16", "float8", "float32"):

        def draw(dtype=dtype):
            parameters = rng.randrange(10**8, 10**10)
            return 2 * parameters, 0, 2 * parameters + rng.randrange(10**6), draw_device(rng), dtype

        inputs = clear_of_ties(draw)
        batch = whole(crossover_batch(*inputs))
        equal(computes(batch, *inputs), True)
        equal(computes(batch - 1, *inputs), False)


@check.hidden("with keys and values: this batch computes, and one sequence fewer reads", points=1)
def _(rng):
    for share in (0.2, 0.5, 0.9):

        def draw(share=share):
            device, flops = draw_device(rng), 2 * rng.randrange(10**8, 10**10)
            kv_bytes = int(share * flops * device.memory_bandwidth / device.flops_of("bfloat16"))
            return flops, kv_bytes, flops, device, "bfloat16"

        inputs = clear_of_ties(draw)
        batch = whole(crossover_batch(*inputs))
        equal(computes(batch, *inputs), True)
        equal(computes(batch - 1, *inputs), False)


@check.hidden("long contexts have no such batch", points=0.5)
def _(rng):
    device, flops = draw_device(rng), rng.randrange(10**9, 10**11)
    kv_bytes = int(rng.uniform(1.01, 4) * flops * device.memory_bandwidth / device.flops_of("bfloat16"))
    equal(crossover_batch(flops, kv_bytes, flops, device), math.inf)
    equal(crossover_batch(32, 2, 8 * 2, EIGHT), math.inf)


### END HIDDEN TESTS
check.report()

# %% [markdown]
# With your functions, for Llama-3.2-1B on an H100: the batch from which decoding would compute, by the tokens of each
# sequence. (That many sequences of that length need memory too.)

# %%
weights = step_bytes(llama, 0, 0)
for context in (1, 100, 200, 250, 260, 300):
    reads = step_bytes(llama, 1, context) - weights
    head = llama.vocab_size * llama.hidden_size
    operations_of_one = 2 * (elements + head) + attention_flops(llama, 1, context - 1)
    print(
        f"{context:4} tokens each: from a batch of {crossover_batch(weights, reads, operations_of_one, 'h100-80gb'):,}"
    )

# %% [markdown]
# ## 6. Predict, then measure
#
# Here are a small model, a machine and a step of decoding, drawn from your id. All numbers are float32, of 4 bytes. On
# this machine the two phases of a step run **in turn**: the matrices (weights, and their operations with those of the
# head), then attention (keys and values, and its operations).
#
# **Before** you run the measuring cell, commit to a number: what is the floor of this step, in **milliseconds**? Work it
# out on paper or with your functions. The value is exact, and it is graded within 0.1 %: four digits are enough.


# %% nbgrader={"grade_id": "draw", "locked": true}
def draw_step(rng):
    """A small decoder, a machine, a batch, and the tokens that each sequence has, the new one included."""
    config, batch, context = draw_decoder(rng), rng.randrange(112, 145), rng.randrange(48, 81)
    bandwidth = rng.randrange(10, 40)
    rate = round(bandwidth * batch / 2 / rng.uniform(1.4, 2.5))
    machine = DeviceSpec("drawn", 2**33, bandwidth * 1e9, (("float32", rate * 1e9),), 0.0)
    return config, machine, batch, context


my_config, my_machine, my_batch, my_context = draw_step(student_rng(student_id, "roofline"))
print(f"{my_batch} sequences of {my_context} tokens each, the new one included")
print(f"reads {my_machine.memory_bandwidth / 1e9:g} GB/s, computes {my_machine.flops_of('float32') / 1e9:g} GFLOP/s")
my_config

# %% nbgrader={"grade_id": "predicted_ms", "solution": true}
# Set predicted_ms to your prediction: milliseconds, a plain number.
### BEGIN SOLUTION
# On this machine the matrices wait for arithmetic, and attention, with about an operation a byte, for memory.
parts = parameter_counts(my_config)
elements = parts.attention + parts.mlp + my_config.vocab_size * my_config.hidden_size
computing = 2 * elements * my_batch / my_machine.flops_of("float32")
reading = kv_cache_bytes(my_config, my_batch * (my_context + 1), 4) / my_machine.memory_bandwidth
predicted_ms = (computing + reading) * 10**3
### END SOLUTION

# %% nbgrader={"grade_id": "test_predicted_ms", "grade": true}
check = Checks("predicted_ms")


@check("student_id (first code cell) is your own", points=0)
def _(rng):
    student_rng(student_id, "roofline")
    assert student_id != "student-00", "it is still the placeholder student-00"


@check("a prediction is committed, as a plain number; whether it is right shows below, and when it is graded", points=0)
def _(rng):
    assert type(predicted_ms) in (int, float), "expected an int or a float; float(...) makes one of most numbers"


@check(
    "it is of the right size: more than reading takes, since one phase computes for longer, and less than 3 times that",
    points=0.25,
)
def _(rng):
    config, machine, batch, context = draw_step(student_rng(student_id, "roofline"))
    counts = parameter_counts(config)
    weights = counts.total - (0 if config.tied_embeddings else counts.embedding)
    cache = kv_cache_bytes(config, batch * (context + 1), 4)
    reading = 1000 * (4 * weights + cache) / machine.memory_bandwidth
    if not 1.001 * reading < predicted_ms < 3 * reading:
        expected = f"more than {reading:.4g} ms, in which everything is read once, and less than 3 times that"
        raise CheckFailed(predicted_ms, expected)


### BEGIN HIDDEN TESTS
def step_parts(config, machine, batch, context):
    """Seconds to read and to compute: matrices, then attention."""
    D, F, d = config.hidden_size, config.intermediate_size, config.head_size
    H, H_kv = config.num_heads, config.num_kv_heads
    matrices = config.num_layers * D * (2 * H * d + 2 * H_kv * d + 3 * F) + config.vocab_size * D
    norms = (2 * config.num_layers + 1) * D
    cached = 2 * config.num_layers * H_kv * d * batch * (context + 1)
    bandwidth, rate = machine.memory_bandwidth, machine.flops_of("float32")
    pairs = 4 * config.num_layers * H * d * batch * context
    return (
        ((matrices + norms) * 4 / bandwidth, 2 * matrices * batch / rate),
        (cached * 4 / bandwidth, pairs / rate),
    )


@check.hidden("the prediction for your step is right within 0.1 %", points=1.75)
def _(rng):
    phases = step_parts(*draw_step(student_rng(student_id, "roofline")))
    close(predicted_ms, 1000 * sum(max(phase) for phase in phases), relative=0.001)


### END HIDDEN TESTS
check.report()

# %% [markdown]
# Now measure. What you predicted was the made-up machine's floor, and nobody can run that machine. So the cell measures
# how fast **this** one reads and computes, lets your functions predict the floor from these two figures, and runs a step
# of that shape here: every matrix once for the whole batch, and attention over every sequence's keys and values, with
# random numbers in all of them. It is worth no points; what is recorded is this machine's floor beside its step.

# %%
import time

import torch
from torch.nn import functional as F

where = "cuda" if torch.cuda.is_available() else "cpu"


def seconds_of(call, times=7):
    """The fastest of a few runs: whatever else the machine does meanwhile only adds to the others."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        if where == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken)


def random(*shape):
    return torch.randn(*shape, device=where) / shape[-1] ** 0.5


def matrices():
    """The new tokens go through the matrices of all layers, and through the head."""
    x = stream
    for qkv, output, gate, up, down in layers:
        mixed = F.linear(x, qkv)[:, : output.shape[1]]
        x = x + F.linear(mixed, output)
        x = x + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    return F.linear(x, head)


def attention():
    """Each sequence's new token looks at its keys and adds up its values; queries that share a key/value head go together."""
    return [(queries @ keys.transpose(-1, -2)).softmax(-1) @ values for queries, keys, values in caches]


D, d, width = my_config.hidden_size, my_config.head_size, my_config.intermediate_size
H, H_kv, every_layer = my_config.num_heads, my_config.num_kv_heads, range(my_config.num_layers)
stream, head = random(my_batch, D), random(my_config.vocab_size, D)
layers = [
    (random((H + 2 * H_kv) * d, D), random(D, H * d), random(width, D), random(width, D), random(D, width))
    for _ in every_layer
]
caches = [
    (random(my_batch, H_kv, H // H_kv, d), random(my_batch, H_kv, my_context, d), random(my_batch, H_kv, my_context, d))
    for _ in every_layer
]
numbers = torch.ones(2**25, device=where)
rates = []  # of two products: a large square, and a product of the step's own shape
for many, rows in ((1024, random(1024, 1024)), (my_batch, random(width, D))):
    x = random(many, rows.shape[1])
    rates.append(2 * many * rows.numel() / seconds_of(lambda x=x, rows=rows: F.linear(x, rows)))
here = DeviceSpec("here", 1, 2**27 / seconds_of(numbers.sum), (("float32", max(rates)),), 0.0)

weight_bytes = step_bytes(my_config, 0, 0, 4, 4)
cache_bytes = step_bytes(my_config, my_batch, my_batch * my_context, 4, 4) - weight_bytes
of_matrices = 2 * my_batch * (sum(w.numel() for layer in layers for w in layer) + head.numel())
of_attention = my_batch * attention_flops(my_config, 1, my_context - 1)
print(f"the made-up machine: floor {1000 * predicted_ms:,.0f} µs, as you predict")
print(
    f"this machine ({where}) reads {here.memory_bandwidth / 1e9:.1f} GB/s, computes {here.flops_of('float32') / 1e9:.0f} GFLOP/s"
)
floors, steps = [], []
for name, call, phase in (
    ("matrices", matrices, (weight_bytes, of_matrices)),
    ("attention", attention, (cache_bytes, of_attention)),
):
    floors.append(step_floor([phase], here, "float32"))
    steps.append(seconds_of(call))
    times = f"floor {1e6 * floors[-1]:9,.0f} µs, measured {1e6 * steps[-1]:9,.0f} µs"
    print(f"{name:10} {times}, measured / floor {steps[-1] / floors[-1]:.2f}")
measured(f"a decode step on {where}", 1e6 * sum(floors), 1e6 * sum(steps), "µs")

# %% [markdown]
# ## Explain
#
# Two sentences for yourself; they are not graded. Which of the two phases is farther from its floor on this machine, and
# what could take the time there? The keys and values of a layer are small here: what stays in a cache from one run to the
# next need not come from memory again, so attention may even be faster than its "floor".
