# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Lab: does it fit?
#
# | | |
# |---|---|
# | **Device** | any; a laptop's CPU is enough, a GPU is used where there is one |
# | **Time** | about 60 minutes; the whole notebook runs in under a minute |
# | **Difficulty** | easy to moderate: arithmetic, once you know what to count |
# | **Needs** | the chapter *Memory* |
#
# You will write the functions that answer the first question of every deployment: how many bytes, on how many devices.
# You write each answer in one cell, in place of `raise NotImplementedError()`. The cell after it checks your answer
# property by property; when you hand in, hidden checks run the same functions on other inputs.
#
# Sizes are **bytes** everywhere. GB is $10^9$ bytes and GiB is $2^{30}$ bytes; they differ by 7 %, and the last
# exercises depend on it.
#
# First, say who you are. One exercise draws its model from your id, so that everyone predicts another number.

# %%
student_id = "student-00"  # your id, as your instructor knows it

# %% nbgrader={"grade_id": "given", "locked": true}
import math

from llmlab.config import DTYPE_BYTES, MODEL_CONFIGS, ModelConfig
from llmlab.grading.checks import Checks, close, equal, instance, measured, student_rng
from llmlab.grading.withhold import withhold
from llmlab.hardware import DEVICES, GB, DeviceSpec, GiB, find_device, format_bytes
from llmlab.memory import RECIPES, ParameterCounts, Recipe, TrainingMemory

# These functions of the package are the exercises, or answer them, so here they raise. The rest of llmlab works.
withhold(WITHHELD)
withhold(["llmlab.memory.num_parameters", "llmlab.memory.estimate", "llmlab.cli.memory_report"])


def draw_decoder(rng):
    """A small random decoder in the style of Llama: grouped-query attention, a gated MLP, sometimes tied."""
    kv_heads = rng.choice([1, 2, 3, 4])
    heads = kv_heads * rng.choice([2, 3, 4])
    return ModelConfig(
        name="drawn",
        architecture="llama",
        vocab_size=rng.randrange(2_000, 9_000),
        hidden_size=heads * rng.choice([12, 20, 24]),
        intermediate_size=rng.randrange(300, 900),
        num_layers=rng.randrange(2, 6),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=rng.choice([16, 32, 64]),
        max_positions=512,
        tied_embeddings=rng.random() < 0.5,
    )


# %% [markdown]
# ## 1. Count the parameters
#
# A model's shape is in its config, and its size follows from the shape. The letters are the book's notation:
# $V$ vocabulary, $D$ hidden size, $F$ feed-forward size, $L$ layers, $H$ query heads, $H_{kv}$ key/value heads,
# $d$ head size. Look at one:

# %%
MODEL_CONFIGS["llama-3.2-1b"]

# %% [markdown]
# <details><summary>Hint: which matrices does a layer hold?</summary>
#
# Attention has four: queries ($D \times H d$), keys and values ($D \times H_{kv} d$ each), output ($H d \times D$).
# The MLP has two ($D \times F$ and $F \times D$), or three where it is gated.
# </details>
#
# <details><summary>Hint: my total for SmolLM2-135M is 28 million too large</summary>
#
# Its output head and its embedding are one and the same matrix (<code>tied_embeddings</code>). It is stored once.
# </details>


# %% nbgrader={"grade_id": "parameter_counts", "solution": true}
def parameter_counts(config):
    """Count the parameters of each part of a transformer.

    config: a ModelConfig. Returns ParameterCounts(embedding, attention, mlp, norm, head): whole numbers, each summed
    over all layers; its property ``total`` adds them up.

    1. embedding: a row of D for each token of the vocabulary, each learned position (``position_rows``) and each
       token type (``token_types``).
    2. attention: four matrices a layer. ``qkv_bias`` adds a bias to queries, keys and values, ``output_bias`` one to
       the output.
    3. mlp: three matrices a layer where ``gated_mlp`` is true, else two. ``mlp_bias`` adds F + D a layer.
    4. norm: a "rms" norm holds D numbers, a "layer" norm 2·D. There are ``norms_per_layer`` in each layer, one more
       if ``final_norm``, one more if ``embedding_norm``. ``qk_norm`` adds 2·d a layer.
    5. head: only if ``lm_head``: V·D unless ``tied_embeddings``, and V more if ``head_bias``. A ``pooler`` adds D·D + D.
    """
    ### BEGIN SOLUTION llmlab.memory.parameter_counts
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_parameter_counts", "grade": true}
check = Checks("parameter_counts")


@check("LLaMA-7B, part by part", points=0.25)
def _(rng):
    counts = parameter_counts(MODEL_CONFIGS["llama-7b"])
    instance(counts, ParameterCounts)
    equal(counts.embedding, 131_072_000)
    equal(counts.attention, 2_147_483_648)
    equal(counts.mlp, 4_328_521_728)
    equal(counts.norm, 266_240)
    equal(counts.head, 131_072_000)


@check("SmolLM2-135M ties its head to its embedding: 134,515,008, not 162,826,560", points=0.25)
def _(rng):
    equal(parameter_counts(MODEL_CONFIGS["smollm2-135m"]).total, 134_515_008)


@check("GPT-J: two-matrix MLP with biases, one LayerNorm a layer, a head with a bias", points=0.25)
def _(rng):
    counts = parameter_counts(MODEL_CONFIGS["gpt-j-6b"])
    equal(counts.mlp, 28 * (4096 * 16384 + 16384 + 16384 * 4096 + 4096))
    equal(counts.norm, 29 * (4096 + 4096))
    equal(counts.head, 50400 * 4096 + 50400)


@check("BERT: learned positions, token types, a norm after the embedding, a pooler and no head", points=0.25)
def _(rng):
    counts = parameter_counts(MODEL_CONFIGS["bert-base-cased"])
    equal(counts.embedding, (28996 + 512 + 2) * 768)
    equal(counts.norm, 25 * (768 + 768))
    equal(counts.head, 768 * 768 + 768)


### BEGIN HIDDEN TESTS
def tensors(config):
    """Every tensor of a model by part, as shapes: the slow way to count."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    H, K, d = config.num_heads, config.num_kv_heads, config.head_size
    norm = [(D,), (D,)] if config.norm == "layer" else [(D,)]
    for _ in range(config.num_layers):
        yield "attention", [(H * d, D), (K * d, D), (K * d, D), (D, H * d)]
        yield "attention", [(H * d,), (K * d,), (K * d,)] if config.qkv_bias else []
        yield "attention", [(D,)] if config.output_bias else []
        yield "mlp", [(F, D), (F, D), (D, F)] if config.gated_mlp else [(F, D), (D, F)]
        yield "mlp", [(F,), (D,)] if config.mlp_bias else []
        yield "norm", norm * config.norms_per_layer
        yield "norm", [(d,), (d,)] if config.qk_norm else []
    yield "norm", norm if config.final_norm else []
    yield "norm", norm if config.embedding_norm else []
    yield "embedding", [(V, D), (config.position_rows, D), (config.token_types, D)]
    if config.lm_head:
        yield "head", [] if config.tied_embeddings else [(V, D)]
        yield "head", [(V,)] if config.head_bias else []
    yield "head", [(D, D), (D,)] if config.pooler else []


def count(config, part):
    return sum(math.prod(shape) for name, shapes in tensors(config) if name == part for shape in shapes)


def variants(rng, **changes):
    """Four drawn models, each with a draw of what may differ."""
    for i in range(4):
        drawn = {field: rng.choice(choices) if i > 1 else choices[i] for field, choices in changes.items()}
        yield ModelConfig(**{**vars(draw_decoder(rng)), **drawn})


@check.hidden("attention: key/value heads are counted as key/value heads, and H·d need not be D", points=1)
def _(rng):
    for config in variants(rng):
        equal(parameter_counts(config).attention, count(config, "attention"))


@check.hidden("attention: biases of queries, keys, values and of the output", points=0.5)
def _(rng):
    for config in variants(rng, qkv_bias=[True, False], output_bias=[False, True]):
        equal(parameter_counts(config).attention, count(config, "attention"))


@check.hidden("embedding: positions and token types", points=0.5)
def _(rng):
    for config in variants(rng, position_rows=[0, rng.randrange(100, 999)], token_types=[rng.randrange(2, 9), 0]):
        equal(parameter_counts(config).embedding, count(config, "embedding"))


@check.hidden("head: tied, untied, with a bias, none at all, a pooler", points=1)
def _(rng):
    ways = {"tied_embeddings": [True, False], "lm_head": [True, True, False], "head_bias": [True, False]}
    for config in (*variants(rng, **ways), *variants(rng, **ways, pooler=[True, False])):
        equal(parameter_counts(config).head, count(config, "head"))
    for config in variants(rng, lm_head=[False, False], head_bias=[True, False], tied_embeddings=[False, True]):
        equal(parameter_counts(config).head, 0)


@check.hidden("mlp: gated or not, with biases or without", points=0.5)
def _(rng):
    for config in variants(rng, gated_mlp=[True, False], mlp_bias=[False, True]):
        equal(parameter_counts(config).mlp, count(config, "mlp"))


@check.hidden(
    "norms: one or two a layer, with a bias or without, after the embedding, at the end, on queries and keys",
    points=0.5,
)
def _(rng):
    ways = {"norm": ["layer", "rms"], "norms_per_layer": [1, 2], "final_norm": [True, False]}
    for config in (*variants(rng, **ways, embedding_norm=[False, True]), *variants(rng, **ways, qk_norm=[True, False])):
        equal(parameter_counts(config).norm, count(config, "norm"))


### END HIDDEN TESTS
check.report()

# %% [markdown]
# ## 2. The rule of thumb for serving
#
# $$M = \frac{P \cdot 4\,\mathrm{B}}{32 / Q} \cdot 1.2$$
#
# $P$ parameters of 4 bytes each, stored in $Q$ bits instead of 32, and 20 % for everything else.


# %% nbgrader={"grade_id": "serving_bytes", "solution": true}
def serving_bytes(num_params, bits, overhead=1.2):
    """The bytes that serving takes, by the rule of thumb.

    num_params: P; bits: Q, the width of a weight (2 to 32); overhead: the factor for everything that is no weight.
    Returns bytes, a float.
    """
    ### BEGIN SOLUTION llmlab.memory.serving_bytes
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_serving_bytes", "grade": true}
check = Checks("serving_bytes")


@check("70 billion parameters in 16 bits take 168 GB, in 4 bits 42 GB", points=0.5)
def _(rng):
    close(serving_bytes(70e9, 16), 168e9)
    close(serving_bytes(70e9, 4), 42e9)


### BEGIN HIDDEN TESTS
@check.hidden("the size follows the width: 8, 4 and 3 bits", points=1)
def _(rng):
    num_params = rng.randrange(10**8, 10**11)
    close(serving_bytes(num_params, 8), num_params * 1.2)
    close(serving_bytes(num_params, 4), num_params * 0.6)
    close(serving_bytes(num_params, 3), num_params * 0.45)


@check.hidden("the overhead is the caller's", points=0.5)
def _(rng):
    num_params, overhead = rng.randrange(10**8, 10**11), 1 + rng.random()
    close(serving_bytes(num_params, 32, overhead), num_params * 4 * overhead)
    close(serving_bytes(num_params, 16, 1.0), num_params * 2)


### END HIDDEN TESTS
check.report()

# %% [markdown]
# ## 3. What training holds
#
# A recipe says which copies exist and in which dtype. `DTYPE_BYTES` has the size of each dtype.

# %%
for name, recipe in RECIPES.items():
    print(f"{name:15} {recipe}")
print(f"\n{DTYPE_BYTES}")

# %% [markdown]
# <details><summary>Hint: what are the two moments?</summary>
#
# Adam keeps a running mean of the gradient and of its square: two numbers for each parameter
# (<code>moments=2</code>). SGD keeps none, momentum keeps one.
# </details>
#
# <details><summary>Hint: what is a block?</summary>
#
# An 8-bit optimizer stores one byte for each number and one float32 scale for each block of
# <code>moment_block</code> numbers. The last block may be short; it has a scale all the same.
# </details>


# %% nbgrader={"grade_id": "training_bytes", "solution": true}
def training_bytes(num_params, recipe="fp32-adam", activations=0):
    """The bytes that a training recipe holds.

    num_params: P; recipe: a key of RECIPES; activations: bytes, passed through.
    Returns TrainingMemory(weights, gradients, optimizer, activations); whole bytes.

    1. weights and gradients: P numbers each, in the recipe's dtypes.
    2. optimizer: ``moments`` numbers for each parameter, in ``moment_dtype``.
    3. optimizer, where ``moment_block`` is not 0: a float32 scale for each (begun) block of each moment.
    4. optimizer, where ``master`` names a dtype: one more copy of the weights.
    """
    ### BEGIN SOLUTION llmlab.memory.training_bytes
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_training_bytes", "grade": true}
check = Checks("training_bytes")


@check("GPT-J, taken as 6 billion: 24 GB of weights and 96 GB in all with Adam in float32", points=0.5)
def _(rng):
    instance(training_bytes(6_000_000_000), TrainingMemory)
    equal(training_bytes(6_000_000_000).weights, 24 * GB)
    equal(training_bytes(6_000_000_000, "fp32-adam").total, 96 * GB)


@check("a thousand parameters with 8-bit moments: 4 blocks of 256, 2,032 bytes of optimizer states", points=0.25)
def _(rng):
    equal(training_bytes(1000, "bf16-adam8bit").optimizer, 2032)


@check("mixed precision takes 16 bytes a parameter too", points=0.25)
def _(rng):
    equal(training_bytes(1000, "mixed-adam").total, 16_000)


### BEGIN HIDDEN TESTS
@check.hidden("moments: none for SGD, one for momentum, two for Adam", points=0.5)
def _(rng):
    n = rng.randrange(10**6, 10**10)
    equal(training_bytes(n, "fp32-sgd").optimizer, 0)
    equal(training_bytes(n, "fp32-momentum").optimizer, 4 * n)
    equal(training_bytes(n, "fp32-adam").optimizer, 8 * n)


@check.hidden("mixed precision: the full-precision copy belongs to the optimizer, 2 + 2 + 12 bytes", points=0.5)
def _(rng):
    n = rng.randrange(10**6, 10**10)
    held = training_bytes(n, "mixed-adam")
    equal(held.weights, 2 * n)
    equal(held.gradients, 2 * n)
    equal(held.optimizer, 12 * n)


@check.hidden("16-bit Adam without a full-precision copy: 2 + 2 + 4 bytes", points=0.5)
def _(rng):
    n = rng.randrange(10**6, 10**10)
    held = training_bytes(n, "bf16-adam")
    equal(held.optimizer, 4 * n)
    equal(held.total, 8 * n)


@check.hidden("8-bit moments: a byte each, and a float32 scale for each begun block of 256", points=1)
def _(rng):
    for extra in (0, 1, rng.randrange(2, 255)):
        blocks = rng.randrange(10**4, 10**7)
        n = blocks * 256 + extra
        equal(training_bytes(n, "fp32-adam8bit").optimizer, 2 * n + 2 * 4 * (blocks + (extra > 0)))
        equal(training_bytes(n, "bf16-adam8bit").weights, 2 * n)


@check.hidden("activations are passed through and counted in the total", points=0.5)
def _(rng):
    n, activations = rng.randrange(10**6, 10**9), rng.randrange(10**6, 10**9)
    held = training_bytes(n, "fp32-sgd", activations)
    equal(held.activations, activations)
    equal(held.total, 8 * n + activations)


### END HIDDEN TESTS
check.report()

# %% [markdown]
# ## 4. The KV cache
#
# While a model generates, every layer keeps a key and a value for every token so far.
#
# <details><summary>Hint: heads</summary>
#
# With grouped-query attention several query heads share one key/value head. Only keys and values are cached.
# </details>


# %% nbgrader={"grade_id": "kv_cache_bytes", "solution": true}
def kv_cache_bytes(config, num_tokens, bytes_per_element=2):
    """The bytes of a KV cache that holds ``num_tokens`` tokens.

    config: a ModelConfig; bytes_per_element: 2 for 16-bit numbers, 1 for FP8, 0.5 for int4. Returns whole bytes.
    """
    ### BEGIN SOLUTION llmlab.memory.kv_cache_bytes
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_kv_cache_bytes", "grade": true}
check = Checks("kv_cache_bytes")


@check("one sequence of 2,048 tokens of LLaMA-13B takes 1,677,721,600 bytes", points=0.5)
def _(rng):
    equal(kv_cache_bytes(MODEL_CONFIGS["llama-13b"], 2048), 1_677_721_600)


### BEGIN HIDDEN TESTS
@check.hidden("grouped-query attention: Llama-2-70B takes 327,680 bytes a token, not 8 times that", points=1)
def _(rng):
    tokens = rng.randrange(1, 10_000)
    equal(kv_cache_bytes(MODEL_CONFIGS["llama-2-70b"], tokens), 327_680 * tokens)


@check.hidden("any shape: a key and a value in each layer, of H_kv heads of d", points=1)
def _(rng):
    for _ in range(4):
        config, tokens = draw_decoder(rng), rng.randrange(1, 5_000)
        one_layer = 2 * tokens * config.num_kv_heads * config.head_size
        equal(kv_cache_bytes(config, tokens), sum(2 * one_layer for _ in range(config.num_layers)))


@check.hidden("the width of an element is the caller's, half a byte too", points=0.5)
def _(rng):
    tokens = rng.randrange(1, 10_000)
    equal(kv_cache_bytes(MODEL_CONFIGS["smollm2-135m"], tokens, 1), 11_520 * tokens)
    equal(kv_cache_bytes(MODEL_CONFIGS["smollm2-135m"], tokens, 0.5), 5_760 * tokens)
    equal(kv_cache_bytes(MODEL_CONFIGS["smollm2-135m"], 0), 0)


### END HIDDEN TESTS
check.report()

# %% [markdown]
# ## 5. How many GPUs?
#
# A puzzle: the rule of thumb gives Llama-2-70B in 16 bits 168 GB, and people serve it on two A100 cards of "80 GB". Two
# times 80 is 160. How can that be? Write the function; the cell after the checks works the puzzle out with it.


# %% nbgrader={"grade_id": "gpus_needed", "solution": true}
def gpus_needed(num_bytes, device, usable_fraction=1.0):
    """How many devices hold ``num_bytes``, if the bytes can be cut anywhere.

    device: a DeviceSpec or the name of one (``find_device`` takes either); its ``memory_bytes`` is what it holds.
    usable_fraction: the share of each device's memory that may be used. Returns a whole number, 1 at the least.
    """
    ### BEGIN SOLUTION llmlab.memory.gpus_needed
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_gpus_needed", "grade": true}
check = Checks("gpus_needed")


@check("168 GB on cards that hold 80 GB need three; on cards that hold 80 GiB, two", points=0.5)
def _(rng):
    as_advertised = DeviceSpec("80-GB", 80 * GB, 2e12, (), 0.0)
    equal(gpus_needed(168 * GB, as_advertised), 3)
    equal(gpus_needed(168 * GB, "a100-80gb"), 2)


@check("at 90 % use the same 168 GB need three", points=0.5)
def _(rng):
    equal(gpus_needed(168 * GB, "a100-80gb", 0.9), 3)


### BEGIN HIDDEN TESTS
@check.hidden("a device more as soon as the last byte does not fit", points=1)
def _(rng):
    device = DeviceSpec("drawn", rng.randrange(10, 100) * GiB, 1e12, (), 0.0)
    for count in (1, 2, rng.randrange(3, 9)):
        equal(gpus_needed(count * device.memory_bytes, device), count)
        equal(gpus_needed(count * device.memory_bytes + 1, device), count + 1)
    equal(gpus_needed(1, device), 1)


@check.hidden("only the usable fraction counts, on every device", points=1)
def _(rng):
    device = DeviceSpec("drawn", 64 * GiB, 1e12, (), 0.0)
    equal(gpus_needed(64 * GiB, device, 0.5), 2)
    equal(gpus_needed(96 * GiB, device, 0.75), 2)
    equal(gpus_needed(96 * GiB + 1, device, 0.75), 3)


### END HIDDEN TESTS
check.report()

# %% [markdown]
# The puzzle, worked out with your functions. The cards hold 80 GiB = 85.9 GB each; the weights alone take less than
# the rule says; and what is left of the memory decides how many tokens can be in flight:

# %%
llama = MODEL_CONFIGS["llama-2-70b"]
weights = parameter_counts(llama).total * 2
two_cards = 2 * DEVICES["a100-80gb"].memory_bytes * 0.9
print(f"rule of thumb  {format_bytes(serving_bytes(70e9, 16))}")
print(f"exact weights  {format_bytes(weights)}")
print(f"two cards, 90% {format_bytes(two_cards)}")
print(f"cards needed   {gpus_needed(weights, 'a100-80gb', 0.9)} for the weights, 90 % of each used")
print(f"KV cache for   {(two_cards - weights) / kv_cache_bytes(llama, 1):,.0f} tokens in what is left of two")

# %% [markdown]
# ## 6. Predict, then measure
#
# Here is a small model and a training recipe, drawn from your id. **Before** you run the measuring cell, commit to a
# number: how many bytes do weights, gradients and optimizer states take together, once the model has made one
# training step? Work it out on paper or with your functions. It is graded within 1 % of the right value.


# %% nbgrader={"grade_id": "draw", "locked": true}
def draw_run(rng):
    """A small model and a recipe that torch's own optimizers carry out."""
    return draw_decoder(rng), rng.choice(["fp32-adam", "fp32-momentum", "fp32-sgd"])


my_config, my_recipe = draw_run(student_rng(student_id, "memory"))
print(my_recipe)
my_config

# %% nbgrader={"grade_id": "predicted_bytes", "solution": true}
# Set predicted_bytes to your prediction: bytes, a plain number.
### BEGIN SOLUTION
predicted_bytes = training_bytes(parameter_counts(my_config).total, my_recipe).total
### END SOLUTION

# %% nbgrader={"grade_id": "test_predicted_bytes", "grade": true}
check = Checks("predicted_bytes")


@check("student_id (first code cell) is your own", points=0)
def _(rng):
    student_rng(student_id, "memory")
    assert student_id != "student-00", "it is still the placeholder student-00"


@check("a prediction is committed, as a plain number; whether it is right shows below, and when it is graded", points=0)
def _(rng):
    assert type(predicted_bytes) in (int, float), "expected an int or a float; float(...) makes one of most numbers"


### BEGIN HIDDEN TESTS
@check.hidden("the prediction for your model and recipe is right within 1 %", points=2)
def _(rng):
    config, recipe = draw_run(student_rng(student_id, "memory"))
    D, heads, kv_heads, d = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_size
    layer = D * heads * d * 2 + D * kv_heads * d * 2 + 3 * D * config.intermediate_size + 2 * D
    embeddings = config.vocab_size * D * (1 if config.tied_embeddings else 2)
    copies = {"fp32-adam": 4, "fp32-momentum": 3, "fp32-sgd": 2}[recipe]
    close(predicted_bytes, copies * 4 * (config.num_layers * layer + embeddings + D), relative=0.01)


### END HIDDEN TESTS
check.report()

# %% [markdown]
# Now measure. The cell builds your model in transformers, makes one training step and adds up the bytes of every
# parameter, gradient and optimizer tensor. It is worth no points; a difference is worth a thought.

# %%
import torch

from llmlab.accounting import storage_bytes
from llmlab.checkpoint import new_model

device = "cuda" if torch.cuda.is_available() else "cpu"
model = new_model(my_config, device=device)
optimizers = {
    "fp32-adam": lambda p: torch.optim.AdamW(p),
    "fp32-momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "fp32-sgd": lambda p: torch.optim.SGD(p, lr=0.01),
}
optimizer = optimizers[my_recipe](model.parameters())
tokens = torch.randint(my_config.vocab_size, (2, 32), device=device)
model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
optimizer.step()

held = list(model.parameters()) + [p.grad for p in model.parameters()]
held += [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
measured(f"one step of {my_recipe} on {device}", predicted_bytes, storage_bytes(held))

# %% [markdown]
# ## Explain
#
# Two sentences for yourself; they are not graded. Your prediction leaves out the activations. For which of batch size,
# sequence length and number of layers do they grow, and for which does nothing that you predicted change?
