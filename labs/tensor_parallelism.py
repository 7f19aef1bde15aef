# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Lab: share out a layer
#
# | | |
# |---|---|
# | **Device** | any; a laptop's CPU is enough, and the ranks are played one after the other |
# | **Time** | about 90 minutes; the whole notebook runs in under half a minute |
# | **Difficulty** | moderate: short functions of tensors, in which it matters who holds what |
# | **Needs** | the chapter *Tensor parallelism* |
#
# A layer is too large for one device, so each of $t$ ranks holds a part of every matrix. You will write what one rank
# does: which part it keeps, what it computes from that, and what little it must tell the others. At the end you predict
# how many bytes that is in a step of training, and count them.
#
# You write each answer in one cell, in place of `raise NotImplementedError()`. The cell after it checks your answer
# property by property; when you hand in, hidden checks run the same functions on other inputs.
#
# Your functions play **one rank**, number `rank` of `size`, counted from 0. They never talk to the others. What they
# return is that rank's *term* or its few numbers; the checks play all the ranks, do the sum that an all-reduce would do,
# and compare with the whole layer in float64. Where an argument is a whole matrix, take your part of it and leave the
# rest alone: on a real rank it would not be there, and some checks put NaN in its place.
#
# The letters are the book's notation: $B$ batch, $S$ sequence, $D$ hidden size, $F$ feed-forward size, $H$ query heads,
# $H_{kv}$ key/value heads, $d$ head size, $V$ vocabulary, $t$ ranks (`size`).
#
# First, say who you are. One exercise draws its model from your id, so that everyone predicts another number.

# %%
student_id = "student-00"  # your id, as your instructor knows it

# %% nbgrader={"grade_id": "given", "locked": true}
import math

import torch
from torch.nn import functional as F

from llmlab.grading.checks import CheckFailed, Checks, close, measured, student_rng
from llmlab.grading.withhold import withhold

# These names of the package are the exercises, or answer them, so here they raise. The rest of llmlab works.
withhold(
    [
        "llmlab.parallel.linear.ColumnParallelLinear",
        "llmlab.parallel.linear.RowParallelLinear",
        "llmlab.parallel.part.whole_units",
        "llmlab.parallel.part.padded_rows",
        "llmlab.parallel.plan.Column",
        "llmlab.parallel.plan.Row",
        "llmlab.parallel.plan.Vocabulary",
        "llmlab.parallel.plan.llama_plan",
        "llmlab.parallel.plan.parallelize",
        "llmlab.parallel.vocabulary.VocabParallelEmbedding",
        "llmlab.parallel.vocabulary.VocabParallelHead",
        "llmlab.parallel.vocabulary.vocab_parallel_cross_entropy",
        "llmlab.parallel.communicator.Message",
        "llmlab.parallel.communicator.split",
        "llmlab.parallel.exchange.take_part",
        "llmlab.parallel.exchange.gather_parts",
        "llmlab.parallel.loading.load_parallel",
        "llmlab.parallel.decoder.ParallelTransformer",
    ]
)

torch.set_num_threads(1)  # the tensors are small; more threads would only wait for each other


def normal(rng, *shape):
    """Random numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rng.getrandbits(48)), dtype=torch.float64)


class Said(str):
    """Words of our own, which a message shows without quotes."""

    __repr__ = str.__str__


def shown(x):
    """A tensor's numbers as lists, rounded to four decimals."""
    return x.detach().double().mul(1e4).round().div(1e4).tolist()


def shaped(got, shape, dtype=torch.float64):
    """Fail unless ``got`` is a tensor of this shape and dtype."""
    kind = f"a {dtype} tensor of shape {tuple(shape)}"
    if not isinstance(got, torch.Tensor):
        raise CheckFailed(got, kind)
    if got.shape != shape or got.dtype != dtype:
        raise CheckFailed(Said(f"a {got.dtype} tensor of shape {tuple(got.shape)}"), kind)
    return got


def same(got, expected, within=1e-11):
    """Fail unless ``got`` is a tensor like the expected one with the same numbers, but for rounding."""
    shaped(got, expected.shape, expected.dtype)
    off = (got - expected).abs()
    right = off <= within * expected.abs().max()
    if right.all():
        return
    if got.numel() <= 9:
        raise CheckFailed(Said(shown(got)), f"{shown(expected)}")
    place = (~right).nonzero()[0].tolist()
    there = f"of shape {tuple(got.shape)}, {int((~right).sum())} of {got.numel()} numbers differ, by {off.max():.3g} at most"
    raise CheckFailed(Said(f"{got[tuple(place)]:.4g} at {place}"), f"{expected[tuple(place)]:.4g} there; {there}")


def refused(why, function, *arguments):
    """Fail unless the call raises ValueError."""
    try:
        function(*arguments)
    except ValueError:
        return
    except (NotImplementedError, TimeoutError):
        raise
    except Exception as error:  # noqa: BLE001  a student's function may raise anything
        said = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise CheckFailed(Said(said), f"a ValueError: {why}") from None
    raise CheckFailed(Said("an answer"), f"a ValueError: {why}")


def only(whole, dim, start, stop):
    """The slice start:stop of dimension dim in its place, and NaN in place of all the rest."""
    part = torch.full_like(whole, math.nan)
    part.narrow(dim, start, stop - start).copy_(whole.narrow(dim, start, stop - start))
    return part


# %% [markdown]
# ## 1. Cut a linear layer
#
# A linear layer is $Y = X W^\top + b$, and torch keeps $W$ as `[out, in]`: a row for each output. It can be cut two ways.
#
# A **column** layer gives each rank some of the outputs; every rank needs the whole input, and the outputs lie side by
# side: $Y_r = X W_r^\top + b_r$. A **row** layer gives each rank some of the inputs; every rank makes a term of every
# output, and the terms must be added up: $Y = \sum_r (X_r W_r^\top + b_r)$. The names are those of the Megatron paper,
# which writes $XA$ with $A = W^\top$.
#
# <details><summary>Hint: which way do I slice?</summary>
#
# The names speak of $A$, and torch stores its transpose. Ask what a rank should make: some of the outputs (column), so it
# needs those outputs' rows of W; or something from some of the inputs (row), so it needs those inputs' columns of W.
# </details>
#
# <details><summary>Hint: the row layer's outputs are too large by a multiple of the bias</summary>
#
# The terms of all ranks are added up, and so is every bias among them. A t-th of it on each rank would give the right sum
# here, but not for long: in training each rank would move its share by the whole bias's step. (The package adds the
# bias behind the sum instead.)
# </details>


# %% nbgrader={"grade_id": "shard_linear", "solution": true}
def shard_linear(weight, bias, kind, rank, size):
    """The part of a linear layer that one rank holds, as a pair (weight, bias) for ``F.linear``.

    weight: [out, in]; bias: [out], or None. kind: "column" or "row". Shares are equal and in the order of the ranks.
    Returns tensors: of a column layer [out/t, in] and [out/t]; of a row layer [out, in/t], and the whole bias on rank 0
    and None on the other ranks. Where the layer has no bias it is None everywhere.

    1. Raise ValueError if the ranks do not divide what is shared out: outputs of a column layer, inputs of a row layer.
    2. Take this rank's share of the weight.
    3. Take the bias so that, when the ranks' outputs are put side by side or added up, it is in there once.
    """
    ### BEGIN SOLUTION
    dim = 0 if kind == "column" else 1
    if weight.shape[dim] % size:
        raise ValueError(f"{size} ranks do not divide {weight.shape[dim]}")
    share = weight.shape[dim] // size
    own = slice(rank * share, (rank + 1) * share)
    if kind == "column":
        return weight[own], None if bias is None else bias[own]
    return weight[:, own], bias if rank == 0 else None
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_shard_linear", "grade": true}
check = Checks("shard_linear")


def pair(got):
    """The weight and the bias; fails for anything that is not two things."""
    if type(got) not in (tuple, list) or len(got) != 2:
        raise CheckFailed(got, "a pair (weight, bias)")
    return got


@check("a column layer of 4 outputs on 2 ranks: rank 1 holds the last 2 rows, and their biases", points=0.25)
def _(rng):
    weight, bias = torch.arange(12.0).view(4, 3), torch.tensor([0.1, 0.2, 0.3, 0.4])
    own_weight, own_bias = pair(shard_linear(weight, bias, "column", 1, 2))
    same(own_weight, torch.tensor([[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]]))
    same(own_bias, torch.tensor([0.3, 0.4]))


@check("a row layer of 4 inputs on 2 ranks: rank 0 holds the first 2 columns", points=0.25)
def _(rng):
    own_weight, _ = pair(shard_linear(torch.arange(12.0).view(3, 4), torch.ones(3), "row", 0, 2))
    same(own_weight, torch.tensor([[0.0, 1.0], [4.0, 5.0], [8.0, 9.0]]))


@check("a row layer's bias is in the sum once: all of it on rank 0, None on rank 1", points=0.25)
def _(rng):
    bias = torch.tensor([0.1, 0.2, 0.3])
    first, second = (pair(shard_linear(torch.arange(12.0).view(3, 4), bias, "row", rank, 2))[1] for rank in range(2))
    if first is None:
        raise CheckFailed(Said("None on rank 0"), "the bias there: no rank would add it")
    same(first, bias)
    if second is not None:
        raise CheckFailed(second, "None on rank 1: what it has is added to the bias of rank 0")


@check("a layer without a bias (bias=None): None again", points=0.25)
def _(rng):
    for kind in ("column", "row"):
        own = pair(shard_linear(torch.ones(2, 2), None, kind, 0, 2))[1]
        if own is not None:
            raise CheckFailed(own, f"None, as this {kind} layer has no bias")


@check("3 ranks do not divide 4 outputs: ValueError", points=0.25)
def _(rng):
    refused("3 ranks do not divide 4 outputs", shard_linear, torch.ones(4, 3), torch.ones(4), "column", 0, 3)


### BEGIN HIDDEN TESTS
def layer_sizes(rng):
    """Ranks, and numbers of outputs and inputs that they divide; one rank alone is among them."""
    for t in (1, 2, 3, 4, rng.randrange(5, 8)):
        yield t, t * rng.randrange(2, 5), t * rng.randrange(5, 8)


def whole_layer(x, weight, bias):
    """Output by output, in the plainest way."""
    outputs = [(x * row).sum(-1) for row in weight]
    return torch.stack(outputs, -1) + bias


@check.hidden("column: put side by side, the ranks' outputs are the layer's, the bias among them", points=0.75)
def _(rng):
    for t, rows, columns in layer_sizes(rng):
        x, weight, bias = normal(rng, 3, columns + 1), normal(rng, rows, columns + 1), normal(rng, rows)
        parts = [pair(shard_linear(weight, bias, "column", rank, t)) for rank in range(t)]
        for part in parts:
            shaped(part[0], (rows // t, columns + 1))
        same(torch.cat([F.linear(x, *part) for part in parts], -1), whole_layer(x, weight, bias))


@check.hidden("row: added up, the ranks' terms are the layer's outputs, with the bias in them once", points=0.75)
def _(rng):
    for t, rows, columns in layer_sizes(rng):
        x, weight, bias = normal(rng, 3, columns), normal(rng, rows + 1, columns), normal(rng, rows + 1)
        parts = [pair(shard_linear(weight, bias, "row", rank, t)) for rank in range(t)]
        inputs = x.split(columns // t, -1)
        for rank, part in enumerate(parts):
            shaped(part[0], (rows + 1, columns // t))
            if rank and part[1] is not None:
                raise CheckFailed(part[1], "None")
        terms = [F.linear(own, *part) for own, part in zip(inputs, parts, strict=True)]
        same(sum(terms), whole_layer(x, weight, bias))


@check.hidden("no bias anywhere where the layer has none, and the weight's part as ever", points=0.25)
def _(rng):
    for t, rows, columns in layer_sizes(rng):
        weight = normal(rng, rows, columns)
        for kind in ("column", "row"):
            for rank in range(t):
                own, bias = pair(shard_linear(weight, None, kind, rank, t))
                same(own, weight.chunk(t, 0 if kind == "column" else 1)[rank])
                if bias is not None:
                    raise CheckFailed(bias, "None")


@check.hidden(
    "what is shared out must be divided, and only that: outputs of a column, inputs of a row layer", points=0.5
)
def _(rng):
    t = rng.randrange(3, 7)
    divided, other = t * rng.randrange(2, 5), t * rng.randrange(2, 5) + rng.randrange(1, t)
    weight, bias = normal(rng, divided, other), normal(rng, divided)
    same(pair(shard_linear(weight, bias, "column", 1, t))[0], weight[divided // t : 2 * divided // t])
    refused("inputs", shard_linear, weight, bias, "row", 0, t)
    same(pair(shard_linear(weight.T, None, "row", 1, t))[0], weight.T[:, divided // t : 2 * divided // t])
    refused("outputs", shard_linear, weight.T, None, "column", 0, t)


### END HIDDEN TESTS
check.report()

# %% [markdown]
# ## 2. The MLP with one sum
#
# A column layer followed by a row layer needs nothing in between: what the first leaves on a rank is just what the
# second takes there. The gated MLP of a Llama is two column layers and a row layer:
#
# $$\mathrm{MLP}(X) = \big(\mathrm{silu}(X W_g^\top) \odot X W_u^\top\big) W_d^\top$$
#
# So each rank can go all the way to a term of the output, and one all-reduce behind it makes the output whole. The
# checks do just that one sum.
#
# <details><summary>Hint: may the nonlinearity come before the sum?</summary>
#
# silu works number by number, so a rank that has <i>finished</i> numbers of the middle may apply it to those. It may not
# be applied to terms that are still to be added up: silu(a + b) is not silu(a) + silu(b). Which of the two does your
# rank have?
# </details>


# %% nbgrader={"grade_id": "mlp_term", "solution": true}
def mlp_term(x, gate, up, down, rank, size):
    """One rank's term of the gated MLP: the sum over the ranks is (silu(X Wgᵀ) ⊙ X Wuᵀ) Wdᵀ.

    x: [B, S, D], the same on every rank. gate, up: [F, D]; down: [D, F]; whole matrices, F a multiple of size.
    Returns [B, S, D].

    1. This rank has F/t of the F channels in the middle, in the order of the ranks.
    2. Compute those channels, gated.
    3. Go on to their term of the output.
    """
    ### BEGIN SOLUTION
    share = gate.shape[0] // size
    own = slice(rank * share, (rank + 1) * share)
    channels = F.silu(F.linear(x, gate[own])) * F.linear(x, up[own])
    return F.linear(channels, down[:, own])
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_mlp_term", "grade": true}
check = Checks("mlp_term")


def whole_mlp(x, gate, up, down):
    """What one device computes."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


@check("one rank alone: its term is the whole MLP", points=0.25)
def _(rng):
    x, gate, up, down = normal(rng, 1, 1, 2), normal(rng, 3, 2), normal(rng, 3, 2), normal(rng, 2, 3)
    same(mlp_term(x, gate, up, down, 0, 1), whole_mlp(x, gate, up, down))


@check("two ranks: their terms add up to the MLP", points=0.5)
def _(rng):
    x, gate, up, down = normal(rng, 1, 1, 2), normal(rng, 4, 2), normal(rng, 4, 2), normal(rng, 2, 4)
    terms = [mlp_term(x, gate, up, down, rank, 2) for rank in range(2)]
    for term in terms:
        shaped(term, x.shape)
    same(terms[0] + terms[1], whole_mlp(x, gate, up, down))


@check("the first of two ranks, with NaN for the other's channels: its term is finite", points=0.25)
def _(rng):
    x, gate, up, down = normal(rng, 1, 1, 2), normal(rng, 4, 2), normal(rng, 4, 2), normal(rng, 2, 4)
    term = shaped(mlp_term(x, only(gate, 0, 0, 2), only(up, 0, 0, 2), only(down, 1, 0, 2), 0, 2), x.shape)
    if not term.isfinite().all():
        raise CheckFailed(Said("NaN in it"), "finite numbers: rank 0 has channels 0 and 1, and uses no other")


### BEGIN HIDDEN TESTS
def mlp_of_channels(x, gate, up, down, channels):
    """What these channels of the middle add to the output, one channel after the other."""
    total = torch.zeros_like(x)
    for f in channels:
        z = (x * gate[f]).sum(-1, keepdim=True)
        total += z / (1 + (-z).exp()) * (x * up[f]).sum(-1, keepdim=True) * down[:, f]
    return total


def draw_mlp(rng, t):
    """An input and three matrices; t divides F, and not D."""
    wide, hidden = t * rng.randrange(2, 5), t * rng.randrange(1, 3) + 1
    return normal(rng, 2, 3, hidden), normal(rng, wide, hidden), normal(rng, wide, hidden), normal(rng, hidden, wide)


@check.hidden("any number of ranks: one sum of their terms is the MLP", points=1)
def _(rng):
    for t in (2, 3, 4, rng.randrange(5, 9)):
        x, gate, up, down = draw_mlp(rng, t)
        terms = [mlp_term(x, gate, up, down, rank, t) for rank in range(t)]
        for term in terms:
            shaped(term, x.shape)
        same(sum(terms), mlp_of_channels(x, gate, up, down, range(gate.shape[0])))


@check.hidden("a rank needs its own channels and no others, and makes the term of just those", points=1)
def _(rng):
    for t in (2, 3, rng.randrange(4, 7)):
        x, gate, up, down = draw_mlp(rng, t)
        share = gate.shape[0] // t
        for rank in range(t):
            start, stop = rank * share, rank * share + share
            own = only(gate, 0, start, stop), only(up, 0, start, stop), only(down, 1, start, stop)
            same(mlp_term(x, *own, rank, t), mlp_of_channels(x, gate, up, down, range(start, stop)))


### END HIDDEN TESTS
check.report()

# %% [markdown]
# ## 3. Attention heads, with grouped keys and values
#
# Heads do not know each other, so they are shared out whole: queries, keys and values are column layers cut between
# heads, the output projection is a row layer, and again one sum stands behind. With grouped-query attention query head
# $h$ uses key/value head $\lfloor h / (H / H_{kv}) \rfloor$, and a rank must hold the key/value heads that its query heads
# use. Where there are fewer of those than ranks, several ranks hold the same one.
#
# <details><summary>Hint: which key/value head does rank r begin with?</summary>
#
# Its first query head is r·H/t. Put that into the formula above: it is ⌊r·H_kv/t⌋, whether there are more key/value
# heads than ranks or fewer.
# </details>
#
# <details><summary>Hint: how many query heads use each of its key/value heads?</summary>
#
# Count on the rank: its query heads over its key/value heads. Neighbouring query heads share one: heads 0 and 1 the
# first, 2 and 3 the second
# (<code>repeat_interleave</code>, or <code>enable_gqa=True</code> of <code>F.scaled_dot_product_attention</code>).
# </details>
#
# <details><summary>Hint: shapes</summary>
#
# [B, S, heads·d] becomes [B, S, heads, d] and then [B, heads, S, d], which is what
# <code>F.scaled_dot_product_attention</code> takes; and back again behind it.
# </details>


# %% nbgrader={"grade_id": "attention_term", "solution": true}
def attention_term(x, q, k, v, o, num_heads, num_kv_heads, rank, size):
    """One rank's term of causal attention with grouped keys and values; the sum over the ranks is the layer's output.

    x: [B, S, D], the same on every rank. q: [H·d, D]; k, v: [H_kv·d, D]; o: [D, H·d]; whole matrices in torch's layout,
    the d rows (of o: columns) of each head together. H is a multiple of H_kv. No rotary embedding, no bias.
    Returns [B, S, D].

    1. Raise ValueError if the ranks do not divide the H query heads.
    2. Raise ValueError if neither the ranks divide the H_kv key/value heads, nor these the ranks.
    3. Rank r has the query heads r·H/t to (r + 1)·H/t - 1, and just the key/value heads that these use.
    4. softmax(Q Kᵀ / √d) V for each query head; a token sees itself and the tokens before it.
    5. Project with the columns of o that belong to these heads.
    """
    ### BEGIN SOLUTION
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError(f"{size} ranks do not divide {num_heads} query heads and {num_kv_heads} key/value heads")
    d = q.shape[0] // num_heads
    queries, keys = num_heads // size, math.ceil(num_kv_heads / size)
    own = slice(rank * queries * d, (rank + 1) * queries * d)
    first = rank * num_kv_heads // size
    shared = slice(first * d, (first + keys) * d)

    def heads(weight):
        return F.linear(x, weight).unflatten(-1, (-1, d)).permute(0, 2, 1, 3)

    attended = F.scaled_dot_product_attention(
        heads(q[own]), heads(k[shared]), heads(v[shared]), is_causal=True, enable_gqa=True
    )
    return F.linear(attended.permute(0, 2, 1, 3).flatten(2), o[:, own])
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_attention_term", "grade": true}
check = Checks("attention_term")


def by_torch(x, q, k, v, o, num_heads):
    """torch's own attention with these weights, as many key/value heads as query heads, D = H·d."""
    layer = torch.nn.MultiheadAttention(x.shape[-1], num_heads, bias=False, batch_first=True, dtype=x.dtype)
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    with torch.no_grad():
        layer.in_proj_weight.copy_(torch.cat([q, k, v]))
        layer.out_proj.weight.copy_(o)
        return layer(x, x, x, attn_mask=later, need_weights=False)[0]


@check("one rank alone, as many heads of each kind: attention, and no token sees a later one", points=0.25)
def _(rng):
    x, q, k, v, o = normal(rng, 1, 3, 4), *(normal(rng, 4, 4) for _ in range(4))
    same(attention_term(x, q, k, v, o, 2, 2, 0, 1), by_torch(x, q, k, v, o, 2))


def matrices(rng, num_heads, num_kv_heads):
    """An input of 3 tokens and the four matrices, heads of 2 channels, D = H·d."""
    wide, narrow = 2 * num_heads, 2 * num_kv_heads
    return normal(rng, 1, 3, wide), *(normal(rng, rows, wide) for rows in (wide, narrow, narrow, wide))


def sum_is_right(rng, num_heads, num_kv_heads, size):
    """The terms of all ranks add up to torch's attention."""
    x, q, k, v, o = matrices(rng, num_heads, num_kv_heads)
    terms = [attention_term(x, q, k, v, o, num_heads, num_kv_heads, rank, size) for rank in range(size)]
    for term in terms:
        shaped(term, x.shape)
    # each key/value head written down once for every query head that uses it
    copies = num_heads // num_kv_heads
    k, v = (weight.unflatten(0, (-1, 2)).repeat_interleave(copies, 0).flatten(0, 1) for weight in (k, v))
    same(sum(terms), by_torch(x, q, k, v, o, num_heads))


@check("9 query and 3 key/value heads on 3 ranks, as in SmolLM2: the terms add up", points=0.25)
def _(rng):
    sum_is_right(rng, 9, 3, 3)


@check("8 query and 4 key/value heads on 2 ranks, so several of both on each: the terms add up", points=0.25)
def _(rng):
    sum_is_right(rng, 8, 4, 2)


@check("4 query heads and 2 key/value heads on 4 ranks, so two ranks hold the same one: the terms add up", points=0.25)
def _(rng):
    sum_is_right(rng, 4, 2, 4)


@check("rank 0 of 2, with NaN in place of the other's heads: its term is finite", points=0.25)
def _(rng):
    x, q, k, v, o = matrices(rng, 4, 2)
    own = only(q, 0, 0, 4), only(k, 0, 0, 2), only(v, 0, 0, 2), only(o, 1, 0, 4)
    term = shaped(attention_term(x, *own, 4, 2, 0, 2), x.shape)
    if not term.isfinite().all():
        raise CheckFailed(
            Said("NaN in it"), "finite numbers: rank 0 has query heads 0 and 1 and key/value head 0, and uses no other"
        )


@check(
    "2 ranks do not divide 9 query heads, and 6 ranks and 4 key/value heads fit neither way: ValueError", points=0.25
)
def _(rng):
    refused("2 ranks do not divide 9 query heads", attention_term, *matrices(rng, 9, 3), 9, 3, 0, 2)
    why = "6 ranks do not divide 4 key/value heads, nor 4 heads 6 ranks"
    refused(why, attention_term, *matrices(rng, 12, 4), 12, 4, 0, 6)


### BEGIN HIDDEN TESTS
def head_term(x, q, k, v, o):
    """What one query head adds to the output: its four matrices, scores in full, later tokens masked."""
    scores = (x @ q.T) @ (x @ k.T).transpose(1, 2) / math.sqrt(q.shape[0])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1) @ (x @ v.T) @ o.T


def attention_of_heads(x, q, k, v, o, num_heads, num_kv_heads, heads):
    """What these query heads add to the output, one head after the other."""
    d, total = q.shape[0] // num_heads, torch.zeros_like(x)
    for h in heads:
        group = h // (num_heads // num_kv_heads)
        mine, its = slice(h * d, (h + 1) * d), slice(group * d, (group + 1) * d)
        total += head_term(x, q[mine], k[its], v[its], o[:, mine])
    return total


def draw_attention(rng, num_heads, num_kv_heads, tokens=4):
    """An input and the four matrices; D is not H·d."""
    d, hidden = rng.choice([2, 3, 4]), rng.randrange(5, 9)
    wide, narrow = num_heads * d, num_kv_heads * d
    shapes = [(2, tokens, hidden), (wide, hidden), (narrow, hidden), (narrow, hidden), (hidden, wide)]
    return [normal(rng, *shape) for shape in shapes]


def adds_up(rng, num_heads, num_kv_heads, t):
    """The terms of all ranks add up to the layer."""
    whole = draw_attention(rng, num_heads, num_kv_heads)
    terms = [attention_term(*whole, num_heads, num_kv_heads, rank, t) for rank in range(t)]
    for term in terms:
        shaped(term, whole[0].shape)
    same(sum(terms), attention_of_heads(*whole, num_heads, num_kv_heads, range(num_heads)))


@check.hidden("as many key/value heads as ranks, or more: one sum of the terms is the layer", points=1)
def _(rng):
    for t in (2, 3, rng.randrange(4, 6)):
        keys = t * rng.randrange(1, 3)
        adds_up(rng, keys, keys, t)
        adds_up(rng, keys * 2, keys, t)
        adds_up(rng, t * 6, t * 2, t)


@check.hidden("fewer key/value heads than ranks: several ranks hold the same one", points=0.75)
def _(rng):
    for keys in (1, 2, rng.randrange(3, 5)):
        t = keys * rng.randrange(2, 4)
        adds_up(rng, t, keys, t)
        adds_up(rng, t * 2, keys, t)


@check.hidden("a rank needs its own heads and no others, and makes the term of just those", points=0.75)
def _(rng):
    for queries, keys, t in ((8, 4, 2), (12, 2, 4), (6, 1, 3), (6, 3, 6), (6, 6, 3)):
        x, q, k, v, o = draw_attention(rng, queries, keys)
        d, share = q.shape[0] // queries, queries // t
        for rank in range(t):
            mine = range(rank * share, rank * share + share)
            used = [h // (queries // keys) for h in mine]
            start, stop, first, last = mine[0] * d, mine[-1] * d + d, used[0] * d, used[-1] * d + d
            own = only(q, 0, start, stop), only(k, 0, first, last), only(v, 0, first, last), only(o, 1, start, stop)
            term = attention_of_heads(x, q, k, v, o, queries, keys, mine)
            same(attention_term(x, *own, queries, keys, rank, t), term)


@check.hidden("ranks that divide neither kind of heads are refused, and no others", points=0.5)
def _(rng):
    for queries, keys, t in ((12, 4, 6), (12, 6, 4), (9, 3, 2), (rng.choice([8, 16]), 2, 3)):
        whole = draw_attention(rng, queries, keys)
        refused("heads", attention_term, *whole, queries, keys, rng.randrange(t), t)
    for queries, keys, t in ((12, 4, 2), (12, 2, 6), (12, 3, 3)):
        whole = draw_attention(rng, queries, keys)
        shaped(attention_term(*whole, queries, keys, rng.randrange(t), t), whole[0].shape)


### END HIDDEN TESTS
check.report()

# %% [markdown]
# ## 4. What a rank says of its part of the vocabulary
#
# The output head is a column layer of $V$ outputs: each rank has the logits of some token ids, `start` to `start` + $V_r$ - 1.
# The loss of a token is $\log \sum_v e^{z_v} - z_{target}$. To work it out from the logits, someone would have to have all
# $V$ of them. It is enough that each rank says three numbers for each token. You write them here; the next exercise takes
# the $3 t$ numbers that all ranks say of a token, and makes its loss of them.
#
# <details><summary>Hint: why not the sum of exp(z)?</summary>
#
# e<sup>z</sup> overflows: in float32 beyond z = 88, in float64 beyond 709. e<sup>z - largest</sup> is never above 1.
# </details>
#
# <details><summary>Hint: picking the target's logit where it may not be there</summary>
#
# Take <code>targets - start</code>, the column that the target would have. Where that is no column of yours, pick any other
# column (0, say), and put 0 in place of what you picked.
# </details>


# %% nbgrader={"grade_id": "vocabulary_statistics", "solution": true}
def vocabulary_statistics(logits, targets, start):
    """Three numbers of one rank for each token, from which the loss can be worked out.

    logits: [N, V_r], this rank's columns; column 0 is token id ``start``. targets: [N], ids of the whole vocabulary.
    Returns a tensor [3, N] in the dtype of the logits:

    1. largest: the largest of the token's logits on this rank.
    2. total: the sum of exp(logit - largest) over this rank's columns.
    3. chosen: the target's logit where this rank has it; 0 where another rank has it.
    """
    ### BEGIN SOLUTION
    largest = logits.max(1).values
    total = (logits - largest.unsqueeze(1)).exp().sum(1)
    column = targets - start
    own = (column >= 0) & (column < logits.shape[1])
    chosen = logits.gather(1, column.where(own, 0).unsqueeze(1)).squeeze(1).where(own, 0)
    return torch.stack([largest, total, chosen])
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_vocabulary_statistics", "grade": true}
check = Checks("vocabulary_statistics")


@check("two tokens, ids 4 and 5 on this rank, targets 5 and 0", points=0.25)
def _(rng):
    logits = torch.tensor([[1.0, 3.0], [2.0, 2.0]], dtype=torch.float64)
    expected = torch.tensor([[3.0, 2.0], [1 + math.exp(-2), 2.0], [3.0, 0.0]], dtype=torch.float64)
    same(vocabulary_statistics(logits, torch.tensor([5, 0]), 4), expected)


@check(
    "the target's logit, ids 4 and 5 on this rank: 4 and 5 have one, the neighbours 3 and 6 and the far 99 do not",
    points=0.25,
)
def _(rng):
    for target, logit in ((4, 1.0), (5, 3.0), (3, 0.0), (6, 0.0), (99, 0.0)):
        got = vocabulary_statistics(torch.tensor([[1.0, 3.0]], dtype=torch.float64), torch.tensor([target]), 4)
        chosen = shaped(got, (3, 1))[2].item()
        if chosen != logit:
            raise CheckFailed(Said(f"{chosen:g} for target {target}"), f"{logit:g}")


@check("logits 1000 and 1002: nothing overflows", points=0.25)
def _(rng):
    expected = torch.tensor([[1002.0], [1 + math.exp(-2)], [1000.0]], dtype=torch.float64)
    same(vocabulary_statistics(torch.tensor([[1000.0, 1002.0]], dtype=torch.float64), torch.tensor([4]), 4), expected)


### BEGIN HIDDEN TESTS
def in_plain_numbers(logits, targets, start):
    """The same statistics, number by number."""
    columns = []
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        largest = max(row)
        total = math.fsum(math.exp(z - largest) for z in row)
        columns.append([largest, total, dict(enumerate(row, start)).get(target, 0.0)])
    return torch.tensor(columns, dtype=torch.float64).T


@check.hidden("any part of the vocabulary: three numbers a token, the target's logit here or elsewhere", points=1)
def _(rng):
    for width in (1, 2, rng.randrange(5, 9)):
        start, tokens = rng.randrange(3, 9), rng.randrange(8, 14)
        targets = torch.tensor([rng.randrange(3 * (start + width)) if n % 2 else start for n in range(tokens)])
        logits = normal(rng, tokens, width)
        same(vocabulary_statistics(logits, targets, start), in_plain_numbers(logits, targets, start))


@check.hidden(
    "targets at the edges: the first and the last id here, the ids just outside, the ends of the vocabulary",
    points=0.75,
)
def _(rng):
    for start, width in ((rng.randrange(2, 9), 1), (rng.randrange(2, 9), rng.randrange(3, 7)), (0, 4)):
        targets = torch.tensor([start, start + width - 1, max(0, start - 1), start + width, 0, start + 5 * width])
        logits = normal(rng, 6, width) + 10
        same(vocabulary_statistics(logits, targets, start), in_plain_numbers(logits, targets, start))


@check.hidden("logits of thousands, above and below zero: nothing overflows, and no total is 0", points=0.5)
def _(rng):
    start, width = rng.randrange(1, 9), rng.randrange(3, 9)
    targets = torch.tensor([start, start - 1, start + width - 1, start + width])
    for middle in (rng.uniform(1e3, 5e3), -rng.uniform(1e3, 5e3)):
        logits = middle + normal(rng, 4, width)
        same(vocabulary_statistics(logits, targets, start), in_plain_numbers(logits, targets, start))


### END HIDDEN TESTS
check.report()

# %% [markdown]
# ## 5. The loss from all ranks' numbers
#
# Now every rank has said its three numbers of each token, and all ranks have heard them: $3 t$ numbers in place of $V$. Put
# them together. (The package has the ranks agree on the largest logit first, and then sums: three all-reduces of one
# number for each token.)
#
# <details><summary>Hint: the totals cannot be added up as they are</summary>
#
# Each is relative to its own rank's largest logit. With M the largest of all ranks, rank r's part of Σ exp(z - M) is
# total_r · exp(largest_r - M).
# </details>


# %% nbgrader={"grade_id": "loss_from_statistics", "solution": true}
def loss_from_statistics(statistics):
    """The cross-entropy of each token, -log softmax(z)[target], from the statistics of all ranks.

    statistics: [t, 3, N]; what ``vocabulary_statistics`` says on rank 0, rank 1, … Returns [N].

    1. M: the largest logit of any rank.
    2. The sum of exp(z - M) over the whole vocabulary, from the ranks' totals.
    3. The target's logit: just one of the ranks has it, and it may be of any sign.
    4. log Σ exp(z - M) + M - z_target. No exponential may be of a number above 0.
    """
    ### BEGIN SOLUTION
    largest, total, chosen = statistics.unbind(1)
    highest = largest.max(0).values
    return (total * (largest - highest).exp()).sum(0).log() + highest - chosen.sum(0)
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_loss_from_statistics", "grade": true}
check = Checks("loss_from_statistics")


@check("four logits of 0 on two ranks: log 4 = 1.3863 for each target", points=0.25)
def _(rng):
    one_rank = torch.tensor([[0.0, 0.0], [2.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    same(loss_from_statistics(torch.stack([one_rank, one_rank])), torch.tensor([math.log(4)] * 2, dtype=torch.float64))


def of_two_tokens(logits, *statistics):
    """The loss of two tokens with these logits, targets 3 and 0, from what two ranks say of them."""
    expected = F.cross_entropy(torch.tensor([logits] * 2, dtype=torch.float64), torch.tensor([3, 0]), reduction="none")
    same(loss_from_statistics(torch.tensor(statistics, dtype=torch.float64)), expected)


@check("logits 1, 2 on rank 0 and 3, 5 on rank 1, targets 3 and 0", points=0.25)
def _(rng):
    rank_0 = [[2.0, 2.0], [1 + math.exp(-1)] * 2, [0.0, 1.0]]
    rank_1 = [[5.0, 5.0], [1 + math.exp(-2)] * 2, [5.0, 0.0]]
    of_two_tokens([1.0, 2.0, 3.0, 5.0], rank_0, rank_1)


@check("the same below zero: logits -5, -3 on rank 0 and -2, -1 on rank 1, targets 3 and 0", points=0.25)
def _(rng):
    rank_0 = [[-3.0, -3.0], [1 + math.exp(-2)] * 2, [0.0, -5.0]]
    rank_1 = [[-1.0, -1.0], [1 + math.exp(-1)] * 2, [-1.0, 0.0]]
    of_two_tokens([-5.0, -3.0, -2.0, -1.0], rank_0, rank_1)


@check("logits 0, 1 on one rank and 2000, 2001 on the other, either way round: nothing overflows", points=0.25)
def _(rng):
    total = [1 + math.exp(-1)] * 2
    of_two_tokens([0.0, 1.0, 2000.0, 2001.0], [[1.0, 1.0], total, [0.0, 0.0]], [[2001.0, 2001.0], total, [2001.0, 0.0]])
    of_two_tokens([2000.0, 2001.0, 0.0, 1.0], [[2001.0, 2001.0], total, [0.0, 2000.0]], [[1.0, 1.0], total, [1.0, 0.0]])


### BEGIN HIDDEN TESTS
def of_all_ranks(logits, targets, t):
    """The statistics of t ranks with about equal shares of the vocabulary."""
    ids = torch.arange(logits.shape[-1])
    chosen = torch.where(ids == targets.unsqueeze(-1), logits, 0.0)
    ranks = []
    for own in ids.tensor_split(t):
        part = logits[:, own]
        total = (part.logsumexp(-1) - part.amax(-1)).exp()
        ranks.append(torch.stack([part.amax(-1), total, chosen[:, own].sum(-1)]))
    return torch.stack(ranks)


def agrees(logits, targets, t):
    """The loss from t ranks' statistics is torch's from all logits."""
    expected = F.cross_entropy(logits, targets, reduction="none")
    same(loss_from_statistics(of_all_ranks(logits, targets, t)), expected, within=1e-9)


def targets_below(rng, vocabulary, tokens):
    return torch.tensor([rng.randrange(vocabulary) for _ in range(tokens)])


@check.hidden("any number of ranks, one too: the loss is that of the whole vocabulary", points=0.75)
def _(rng):
    for t in (1, 2, 3, rng.randrange(4, 8)):
        vocabulary, tokens = t * rng.randrange(3, 6) + 1, rng.randrange(4, 9)
        agrees(3 * normal(rng, tokens, vocabulary), targets_below(rng, vocabulary, tokens), t)


@check.hidden("all logits below zero: the target's is not lost among the zeros of other ranks", points=0.75)
def _(rng):
    for t in (2, 3, rng.randrange(4, 7)):
        logits = normal(rng, 6, 4 * t)
        agrees(logits - logits.max() - 1, targets_below(rng, 4 * t, 6), t)


@check.hidden("ranks whose logits are thousands apart: nothing overflows, and the largest of all counts", points=0.5)
def _(rng):
    for t in (2, 3, rng.randrange(4, 7)):
        steps = torch.tensor(rng.sample([2000.0 * rank for rank in range(-1, t + 3)], t), dtype=torch.float64)
        for step in (steps, steps.flip(0)):  # so that rank 0 has the largest in one of the two at most
            logits = normal(rng, 6, 4 * t) + step.repeat_interleave(4)
            agrees(logits, targets_below(rng, 4 * t, 6), t)


### END HIDDEN TESTS
check.report()

# %% [markdown]
# How little that is, for a batch of 8 sequences of 4,096 tokens and the 128,256 token ids of Llama 3, in float32 and on 8 ranks:

# %%
tokens = 8 * 4096
print(f"all logits                         {tokens * 128_256 * 4 / 1e6:9,.1f} MB")
print(f"three numbers a token of one rank  {tokens * 3 * 4 / 1e6:9,.1f} MB")
print(f"and of all 8 ranks together        {tokens * 3 * 8 * 4 / 1e6:9,.1f} MB")

# %% [markdown]
# ## 6. Predict the bytes, then count them
#
# The chapter counts what one layer moves. Here is a whole training step of a small model, drawn from your id, over $t$
# ranks. **Before** you run the last cell, commit to a number: how many bytes does **each rank send** in this step? It is
# graded within 1 % of the right value.
#
# The step is arranged so. All of it is in bfloat16, except where it says otherwise.
#
# 1. **Embedding**, cut by the vocabulary: each rank looks up the ids whose rows it has, and puts zeros for the others.
# 2. **The stream** $[B, S, D]$ is cut by the sequence: between the blocks each rank has $S/t$ tokens of it
#    (*sequence parallelism*). There are no norms and no biases.
# 3. **Layers**: `layers` times attention and then an MLP, each by your functions. What a block makes is added to the stream.
# 4. **Computed again**: to save memory, a rank keeps only its own part of the input of the blocks that your draw names. On the
#    way back it computes such a block once more from there, up to its term: the sum behind the block is not needed again.
# 5. **Head**, a matrix of its own, cut by the vocabulary. Its logits are turned into **float32**. Each rank works out its three
#    numbers for each of the $B S$ tokens from them; those are all-gathered, and each rank works out the loss from all of them.
# 6. **The way back**, as far as the gradients of all weights. They are to be the same as on one device, also those of the
#    key/value heads: your draw has fewer of them than ranks.
#
# Every message is one of three, and goes around a ring: of an all-reduce of $n$ bytes among $g$ ranks each of them sends
# $2 (g-1)/g \cdot n$, of an all-gather or a reduce-scatter of $n$ bytes (the whole tensor) $(g-1)/g \cdot n$.
#
# <details><summary>Hint: how do I go about it?</summary>
#
# Go through the step from the ids to the loss, and note each place where a rank has a term of something, or a part where it
# needs the whole. Then go back: what was gathered forward has a gradient to which every rank adds a term, and what was summed
# and cut forward has a gradient of which each rank has a part.
# </details>
#
# <details><summary>Hint: what moves on the way back from the loss to the logits?</summary>
#
# The gradient of a logit is e<sup>z</sup>/Σe<sup>z</sup>, less 1 for the target. What of that does a rank not know by then?
# </details>
#
# <details><summary>Hint: what of the key/value heads?</summary>
#
# Ranks that hold the same key/value head use it for different query heads, so each of them has a term of the gradient of
# its rows of k and v. Those few ranks add theirs up, with an all-reduce among themselves.
# </details>


# %% nbgrader={"grade_id": "draw", "locked": true}
def draw_run(rng):
    """A small model, its batch, and how it is trained."""
    t, keys = rng.choice([(6, 2), (8, 2), (12, 3), (12, 4)])
    return {
        "t": t, "B": rng.choice([2, 3]), "S": t * rng.choice([2, 3]), "dtype": "bfloat16",
        "layers": rng.choice([3, 4]), "D": rng.randrange(15, 24, 2), "F": t * rng.randrange(8, 12), "V": t * rng.randrange(20, 30),
        "H": t * rng.choice([1, 2]), "H_kv": keys, "d": rng.choice([12, 14, 16]),
        "computed again": rng.choice([["attention"], ["MLP"], ["attention", "MLP"]]),
    }  # fmt: skip


my_run = draw_run(student_rng(student_id, "tensor_parallelism"))
my_run

# %% nbgrader={"grade_id": "predicted_bytes", "solution": true}
# Set predicted_bytes to your prediction: bytes that each rank sends, a plain number.
### BEGIN SOLUTION
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
# Gathered or reduced and scattered: behind the embedding, in front of the head, around each block, and all of it backward.
streams = 4 + 8 * layers
# A block that is computed again gathers its input again.
streams = streams + layers * len(my_run["computed again"])
statistics_bytes = t * 3 * tokens * 4
# The rows of k and v that several ranks hold.
twin_bytes = layers * 2 * my_run["d"] * my_run["D"] * element_bytes
predicted_bytes = (t - 1) / t * (streams * stream_bytes + statistics_bytes) + 2 * (copies - 1) / copies * twin_bytes
### END SOLUTION

# %% nbgrader={"grade_id": "test_predicted_bytes", "grade": true}
check = Checks("predicted_bytes")


def ring(run):
    """What a rank sends to gather the stream, or to reduce and scatter it: of t pieces all but one."""
    return (run["t"] - 1) * (run["B"] * run["S"] * run["D"] * 2 / run["t"])


@check("student_id (first code cell) is your own", points=0)
def _(rng):
    student_rng(student_id, "tensor_parallelism")
    assert student_id != "student-00", "it is still the placeholder student-00"


@check("a prediction is committed, as a plain number; whether it is right shows below, and when it is graded", points=0)
def _(rng):
    assert type(predicted_bytes) in (int, float), "expected an int or a float; float(...) makes one of most numbers"


@check(
    "it is of the right size: more than the sums of the layers alone, forward and backward, and less than twice that",
    points=0.25,
)
def _(rng):
    run = draw_run(student_rng(student_id, "tensor_parallelism"))
    layers_alone = run["layers"] * 8 * ring(run)  # two all-reduces each way, or their halves
    if predicted_bytes <= layers_alone:
        raise CheckFailed(
            predicted_bytes,
            "more: as much goes through the layers alone, with two sums forward and two backward in each",
        )
    if predicted_bytes >= 2 * layers_alone:
        raise CheckFailed(
            predicted_bytes,
            "less: what the layers move, with two sums forward and two backward in each, is more than half of it",
        )


### BEGIN HIDDEN TESTS
def sent_by_ring(run):
    """Walk through the step; every message is a number of bytes that one rank sends."""
    stream, sent = ring(run), []
    sent += [stream, stream]  # the embedding's terms are reduced and scattered, and its gradient's parts are gathered
    for _ in range(run["layers"]):
        for block in ("attention", "MLP"):
            sent += [stream, stream]  # gathered in front, reduced and scattered behind
            sent += [stream, stream]  # and the other way round for the gradients
            if block in run["computed again"]:
                sent += [stream]
        twins = run["t"] // run["H_kv"]
        rows = run["d"] * run["D"] * 2
        sent += [2 * (twins - 1) * rows / twins] * 2  # of k and v: once around to add up, once to hand out
    sent += [stream, stream]  # gathered for the head, and its gradient reduced and scattered
    sent += [(run["t"] - 1) * 4] * 3 * run["B"] * run["S"]  # each number of each token goes to all others, in float32
    return sum(sent)


@check.hidden("the prediction for your step is right within 1 %", points=1.75)
def _(rng):
    run = draw_run(student_rng(student_id, "tensor_parallelism"))
    close(predicted_bytes, sent_by_ring(run), relative=0.01)


### END HIDDEN TESTS
check.report()

# %% [markdown]
# Now count. Each rank is a thread that runs **your** functions, but the first, on its part, forward and backward; what stands
# between them is the package's, and keeps a log of what it moves. It is worth no points; a difference is worth a thought.
# The same step on one rank should have the same loss, but for rounding.

# %%
from collections import Counter

from torch.utils.checkpoint import checkpoint

from llmlab.parallel import in_threads
from llmlab.parallel.exchange import gather_for_ranks, sum_to_parts


def run_step(ranks, run, ids, targets):
    """One rank's training step: the loss, and the messages that it sent forward and backward."""
    rank, t, D, dtype = ranks.rank, ranks.size, run["D"], getattr(torch, run["dtype"])
    shared = torch.Generator().manual_seed(0)  # the same on every rank

    def matrix(rows, columns):
        whole = torch.randn(rows, columns, generator=shared) / columns**0.5
        return whole.to(dtype).requires_grad_()

    def with_block(name, x, term, *arguments):
        def on_part(x):
            return term(gather_for_ranks(x, ranks), *arguments, rank, t)

        y = checkpoint(on_part, x, use_reentrant=False) if name in run["computed again"] else on_part(x)
        return x + sum_to_parts(y, ranks)

    share = run["V"] // t
    start = rank * share
    table, head = matrix(run["V"], D), matrix(run["V"], D)
    own = (ids >= start) & (ids < start + share)
    stream = sum_to_parts(table[ids.where(own, start)] * own.unsqueeze(-1), ranks)
    wide, narrow = run["H"] * run["d"], run["H_kv"] * run["d"]
    keys_and_values = []
    for _layer in range(run["layers"]):
        q, k, v, o = matrix(wide, D), matrix(narrow, D), matrix(narrow, D), matrix(D, wide)
        stream = with_block("attention", stream, attention_term, q, k, v, o, run["H"], run["H_kv"])
        middle = matrix(run["F"], D), matrix(run["F"], D), matrix(D, run["F"])
        stream = with_block("MLP", stream, mlp_term, *middle)
        keys_and_values += [k, v]
    logits = F.linear(gather_for_ranks(stream, ranks), head[start : start + share]).flatten(0, 1)

    with torch.no_grad():
        statistics = ranks.all_gather(vocabulary_statistics(logits.float(), targets, start).unsqueeze(0), 0)
        loss = loss_from_statistics(statistics)
        total = loss + statistics[:, 2].sum(0)  # the logarithm of the sum of exp(z)
        is_target = targets.unsqueeze(1) == torch.arange(start, start + share)
        gradient = (logits.float() - total.unsqueeze(1)).exp() - is_target.float()
    forward = len(ranks.log)
    logits.backward(gradient.to(dtype) / len(targets))

    twins = ranks.neighbours(max(1, t // run["H_kv"]))
    for weight in keys_and_values if twins.size > 1 else []:
        first = rank // twins.size * run["d"]
        rows = weight.grad[first : first + run["d"]]
        rows.copy_(twins.all_reduce(rows))
    return loss.mean().item(), ranks.log[:forward], ranks.log[forward:] + twins.log


some = torch.Generator().manual_seed(1)
ids = torch.randint(my_run["V"], (my_run["B"], my_run["S"]), generator=some)
targets = torch.randint(my_run["V"], (my_run["B"] * my_run["S"],), generator=some)
loss, forward, backward = in_threads(run_step, my_run["t"], my_run, ids, targets, timeout=20)[0]
alone = in_threads(run_step, 1, my_run, ids, targets)[0][0]
print(f"loss over {my_run['t']} ranks {loss:.4f}, on one {alone:.4f}")
for when, messages in (("forward", forward), ("backward", backward)):
    for (kind, num_bytes, ranks), times in Counter((m.kind, m.num_bytes, m.size) for m in messages).items():
        print(f"{when:8} {times:3} x {kind} of {num_bytes:,} bytes among {ranks} ranks")
count = sum(message.sent_bytes for message in forward + backward)
measured(f"a step over {my_run['t']} ranks", predicted_bytes, count)

# %% [markdown]
# ## Explain
#
# Two sentences for yourself; they are not graded. With twice as many ranks each of them computes half as much. What becomes
# of the bytes that it sends, and where does that end?
