# %% [markdown]
# Answers to the lab `tensor_parallelism`, to try its grader with: the mistakes that the chapter warns of, and other ways to
# be right.

# %% answer={"exercise": "shard_linear", "name": "rows and columns mixed up: W taken for [in, out]", "fails": "a column layer of 4 outputs"}
def shard_linear(weight, bias, kind, rank, size):
    dim = {"column": 1, "row": 0}[kind]
    if weight.shape[dim] % size:
        raise ValueError("the ranks do not divide it")
    own = weight.chunk(size, dim)[rank]
    if bias is None:
        return own, None
    return own, bias.chunk(size)[rank] if kind == "column" else bias if rank == 0 else None

# %% answer={"exercise": "shard_linear", "name": "the part handed out transposed", "fails": "column: put side by side"}
def shard_linear(weight, bias, kind, rank, size):
    dim = {"column": 0, "row": 1}[kind]
    if weight.shape[dim] % size:
        raise ValueError("the ranks do not divide it")
    own = weight.chunk(size, dim)[rank].T
    if bias is None:
        return own, None
    return own, bias.chunk(size)[rank] if kind == "column" else bias if rank == 0 else None

# %% answer={"exercise": "shard_linear", "name": "a row layer's bias on every rank", "fails": "a row layer's bias is in the sum once"}
def shard_linear(weight, bias, kind, rank, size):
    dim = {"column": 0, "row": 1}[kind]
    if weight.shape[dim] % size:
        raise ValueError("the ranks do not divide it")
    own = weight.chunk(size, dim)[rank]
    if bias is None:
        return own, None
    return own, bias.chunk(size)[rank] if kind == "column" else bias

# %% answer={"exercise": "shard_linear", "name": "a row layer's bias on no rank", "fails": "a row layer's bias is in the sum once"}
def shard_linear(weight, bias, kind, rank, size):
    dim = {"column": 0, "row": 1}[kind]
    if weight.shape[dim] % size:
        raise ValueError("the ranks do not divide it")
    own = weight.chunk(size, dim)[rank]
    return own, bias.chunk(size)[rank] if kind == "column" and bias is not None else None

# %% answer={"exercise": "shard_linear", "name": "a row layer's bias cut like a column layer's", "fails": "a row layer's bias is in the sum once"}
def shard_linear(weight, bias, kind, rank, size):
    dim = {"column": 0, "row": 1}[kind]
    if weight.shape[dim] % size:
        raise ValueError("the ranks do not divide it")
    own = weight.chunk(size, dim)[rank]
    return own, None if bias is None else bias.tensor_split(size)[rank]

# %% answer={"exercise": "shard_linear", "name": "a column layer's bias left whole", "fails": "a column layer of 4 outputs"}
def shard_linear(weight, bias, kind, rank, size):
    dim = {"column": 0, "row": 1}[kind]
    if weight.shape[dim] % size:
        raise ValueError("the ranks do not divide it")
    own = weight.chunk(size, dim)[rank]
    return own, bias if kind == "column" or rank == 0 else None

# %% answer={"exercise": "shard_linear", "name": "ranks counted from 1", "fails": "column: put side by side"}
def shard_linear(weight, bias, kind, rank, size):
    dim = {"column": 0, "row": 1}[kind]
    if weight.shape[dim] % size:
        raise ValueError("the ranks do not divide it")
    share = weight.shape[dim] // size
    own = weight.roll(share, dim).narrow(dim, rank * share, share)
    if bias is None:
        return own, None
    return own, bias.roll(share).chunk(size)[rank] if kind == "column" else bias if rank == 0 else None

# %% answer={"exercise": "shard_linear", "name": "every t-th row or column", "fails": "column: put side by side"}
def shard_linear(weight, bias, kind, rank, size):
    dim = {"column": 0, "row": 1}[kind]
    if weight.shape[dim] % size:
        raise ValueError("the ranks do not divide it")
    own = weight[rank::size] if kind == "column" else weight[:, rank::size]
    if bias is None:
        return own, None
    return own, bias[rank::size] if kind == "column" else bias if rank == 0 else None

# %% answer={"exercise": "shard_linear", "name": "what is left over is dropped", "fails": "what is shared out must be divided"}
def shard_linear(weight, bias, kind, rank, size):
    dim = {"column": 0, "row": 1}[kind]
    share = weight.shape[dim] // size
    own = weight.narrow(dim, rank * share, share)
    if bias is None:
        return own, None
    return own, bias[rank * share : (rank + 1) * share] if kind == "column" else bias if rank == 0 else None

# %% answer={"exercise": "shard_linear", "name": "uneven shares, as torch.chunk makes them", "fails": "3 ranks do not divide"}
def shard_linear(weight, bias, kind, rank, size):
    own = weight.chunk(size, {"column": 0, "row": 1}[kind])[rank]
    if bias is None:
        return own, None
    return own, bias.chunk(size)[rank] if kind == "column" else bias if rank == 0 else None

# %% answer={"exercise": "shard_linear", "name": "both dimensions must be divided", "fails": "what is shared out must be divided"}
def shard_linear(weight, bias, kind, rank, size):
    if weight.shape[0] % size or weight.shape[1] % size:
        raise ValueError("the ranks do not divide it")
    own = weight.chunk(size, {"column": 0, "row": 1}[kind])[rank]
    if bias is None:
        return own, None
    return own, bias.chunk(size)[rank] if kind == "column" else bias if rank == 0 else None

# %% answer={"exercise": "shard_linear", "name": "zeros for the bias of a layer that has none", "fails": "a layer without a bias"}
def shard_linear(weight, bias, kind, rank, size):
    dim = {"column": 0, "row": 1}[kind]
    if weight.shape[dim] % size:
        raise ValueError("the ranks do not divide it")
    own = weight.chunk(size, dim)[rank]
    bias = torch.zeros(weight.shape[0], dtype=weight.dtype) if bias is None else bias
    return own, bias.chunk(size)[rank] if kind == "column" else bias if rank == 0 else None

# %% answer={"exercise": "shard_linear", "name": "zeros for the row layer's bias on the other ranks, which training would fill", "fails": "a row layer's bias is in the sum once"}
def shard_linear(weight, bias, kind, rank, size):
    dim = {"column": 0, "row": 1}[kind]
    if weight.shape[dim] % size:
        raise ValueError("the ranks do not divide it")
    own = weight.chunk(size, dim)[rank]
    if bias is None:
        return own, None
    if kind == "column":
        return own, bias.chunk(size)[rank]
    return own, bias if rank == 0 else torch.zeros_like(bias)

# %% answer={"exercise": "shard_linear", "name": "a t-th of the row layer's bias on each rank, which training would move t times", "fails": "a row layer's bias is in the sum once"}
def shard_linear(weight, bias, kind, rank, size):
    dim = {"column": 0, "row": 1}[kind]
    if weight.shape[dim] % size:
        raise ValueError("the ranks do not divide it")
    own = weight.chunk(size, dim)[rank]
    if bias is None:
        return own, None
    return own, bias.chunk(size)[rank] if kind == "column" else bias / size

# %% answer={"exercise": "shard_linear", "name": "an assertion in place of the ValueError", "fails": "3 ranks do not divide"}
def shard_linear(weight, bias, kind, rank, size):
    dim = {"column": 0, "row": 1}[kind]
    assert weight.shape[dim] % size == 0, "the ranks do not divide it"
    own = weight.chunk(size, dim)[rank]
    if bias is None:
        return own, None
    return own, bias.chunk(size)[rank] if kind == "column" else bias if rank == 0 else None

# %% answer={"exercise": "shard_linear", "name": "chunk, and a list of all ranks' biases", "right": true}
def shard_linear(weight, bias, kind, rank, size):
    dim = {"column": 0, "row": 1}[kind]
    if weight.shape[dim] % size:
        raise ValueError("the ranks do not divide it")
    biases = [None] * size
    if bias is not None:
        biases = list(bias.chunk(size)) if kind == "column" else [bias, *biases[1:]]
    return weight.chunk(size, dim)[rank], biases[rank]

# %% answer={"exercise": "shard_linear", "name": "numbers of rows picked one by one", "right": true}
def shard_linear(weight, bias, kind, rank, size):
    dim = 0 if kind == "column" else 1
    share, rest = divmod(weight.shape[dim], size)
    if rest != 0:
        raise ValueError(f"{weight.shape[dim]} is not a multiple of {size}")
    numbers = torch.tensor([rank * share + i for i in range(share)])
    if kind == "row" and rank > 0:
        bias = None
    if kind == "column" and bias is not None:
        bias = bias[numbers]
    return weight.index_select(dim, numbers), bias

# %% answer={"exercise": "mlp_term", "name": "the nonlinearity behind the product", "fails": "one rank alone"}
def mlp_term(x, gate, up, down, rank, size):
    gate, up, down = gate.chunk(size, 0)[rank], up.chunk(size, 0)[rank], down.chunk(size, 1)[rank]
    return F.linear(F.silu(F.linear(x, gate) * F.linear(x, up)), down)

# %% answer={"exercise": "mlp_term", "name": "the nonlinearity on the terms of the output", "fails": "one rank alone"}
def mlp_term(x, gate, up, down, rank, size):
    gate, up, down = gate.chunk(size, 0)[rank], up.chunk(size, 0)[rank], down.chunk(size, 1)[rank]
    return F.silu(F.linear(F.linear(x, gate) * F.linear(x, up), down))

# %% answer={"exercise": "mlp_term", "name": "the nonlinearity before the sum of terms: gate and up cut by the input", "fails": "any number of ranks"}
def mlp_term(x, gate, up, down, rank, size):
    if size == 1:
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    own = [part.tensor_split(size, -1)[rank] for part in (x, gate, up)]
    return F.linear(F.silu(F.linear(own[0], own[1])) * F.linear(own[0], own[2]), down)

# %% answer={"exercise": "mlp_term", "name": "the average of the ranks instead of their sum", "fails": "two ranks"}
def mlp_term(x, gate, up, down, rank, size):
    gate, up, down = gate.chunk(size, 0)[rank], up.chunk(size, 0)[rank], down.chunk(size, 1)[rank]
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down) / size

# %% answer={"exercise": "mlp_term", "name": "the whole MLP on every rank", "fails": "two ranks"}
def mlp_term(x, gate, up, down, rank, size):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

# %% answer={"exercise": "mlp_term", "name": "a t-th of the whole MLP on every rank", "fails": "a rank needs its own channels"}
def mlp_term(x, gate, up, down, rank, size):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down) / size

# %% answer={"exercise": "mlp_term", "name": "all channels computed, the others struck out", "fails": "a rank needs its own channels"}
def mlp_term(x, gate, up, down, rank, size):
    own = torch.arange(gate.shape[0]) // (gate.shape[0] // size) == rank
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up) * own, down)

# %% answer={"exercise": "mlp_term", "name": "every t-th channel", "fails": "a rank needs its own channels"}
def mlp_term(x, gate, up, down, rank, size):
    own = slice(rank, None, size)
    return F.linear(F.silu(F.linear(x, gate[own])) * F.linear(x, up[own]), down[:, own])

# %% answer={"exercise": "mlp_term", "name": "channels in one order in gate and up, in another in down", "fails": "any number of ranks"}
def mlp_term(x, gate, up, down, rank, size):
    own = slice(rank, None, size)
    return F.linear(F.silu(F.linear(x, gate[own])) * F.linear(x, up[own]), down.chunk(size, 1)[rank])

# %% answer={"exercise": "mlp_term", "name": "down cut by its outputs: a part of the output, of all channels", "fails": "two ranks"}
def mlp_term(x, gate, up, down, rank, size):
    channels = F.silu(F.linear(x, gate)) * F.linear(x, up)
    return F.linear(channels, down.tensor_split(size, 0)[rank])

# %% answer={"exercise": "mlp_term", "name": "gate and up exchanged", "fails": "one rank alone"}
def mlp_term(x, gate, up, down, rank, size):
    gate, up, down = gate.chunk(size, 0)[rank], up.chunk(size, 0)[rank], down.chunk(size, 1)[rank]
    return F.linear(F.linear(x, gate) * F.silu(F.linear(x, up)), down)

# %% answer={"exercise": "mlp_term", "name": "gelu in place of silu", "fails": "any number of ranks"}
def mlp_term(x, gate, up, down, rank, size):
    gate, up, down = gate.chunk(size, 0)[rank], up.chunk(size, 0)[rank], down.chunk(size, 1)[rank]
    return F.linear(F.gelu(F.linear(x, gate)) * F.linear(x, up), down)

# %% answer={"exercise": "mlp_term", "name": "chunk and matrix products", "right": true}
def mlp_term(x, gate, up, down, rank, size):
    gate, up = gate.chunk(size)[rank], up.chunk(size)[rank]
    z = x @ gate.T
    return (z * torch.sigmoid(z) * (x @ up.T)) @ down.chunk(size, 1)[rank].T

# %% answer={"exercise": "mlp_term", "name": "one einsum for each matrix, channels in the middle by view", "right": true}
def mlp_term(x, gate, up, down, rank, size):
    hidden = x.shape[-1]
    gate, up = gate.view(size, -1, hidden)[rank], up.view(size, -1, hidden)[rank]
    down = down.view(hidden, size, -1)[:, rank]
    channels = F.silu(torch.einsum("bsd,fd->bsf", x, gate)) * torch.einsum("bsd,fd->bsf", x, up)
    return torch.einsum("bsf,df->bsd", channels, down)

# %% answer={"exercise": "attention_term", "name": "key/value heads not replicated where there are fewer than ranks", "fails": "4 query heads and 2 key/value heads on 4 ranks"}
def attention_term(x, q, k, v, o, num_heads, num_kv_heads, rank, size):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("the ranks do not divide the heads")
    d, queries, keys = q.shape[0] // num_heads, num_heads // size, max(1, num_kv_heads // size)
    first = rank * keys % num_kv_heads
    own, shared = slice(rank * queries * d, (rank + 1) * queries * d), slice(first * d, (first + keys) * d)
    q, k, v = (F.linear(x, w).unflatten(-1, (-1, d)).transpose(1, 2) for w in (q[own], k[shared], v[shared]))
    k, v = (t.repeat_interleave(queries // keys, 1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = y.transpose(1, 2).flatten(2)
    return F.linear(y, o[:, own])

# %% answer={"exercise": "attention_term", "name": "one key/value head for all ranks where there are fewer than ranks", "fails": "4 query heads and 2 key/value heads on 4 ranks"}
def attention_term(x, q, k, v, o, num_heads, num_kv_heads, rank, size):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("the ranks do not divide the heads")
    d, queries, keys = q.shape[0] // num_heads, num_heads // size, max(1, num_kv_heads // size)
    first = rank * (num_kv_heads // size)
    own, shared = slice(rank * queries * d, (rank + 1) * queries * d), slice(first * d, (first + keys) * d)
    q, k, v = (F.linear(x, w).unflatten(-1, (-1, d)).transpose(1, 2) for w in (q[own], k[shared], v[shared]))
    k, v = (t.repeat_interleave(queries // keys, 1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = y.transpose(1, 2).flatten(2)
    return F.linear(y, o[:, own])

# %% answer={"exercise": "attention_term", "name": "the key/value head taken by the number of the rank", "fails": "4 query heads and 2 key/value heads on 4 ranks"}
def attention_term(x, q, k, v, o, num_heads, num_kv_heads, rank, size):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("the ranks do not divide the heads")
    d, queries, keys = q.shape[0] // num_heads, num_heads // size, max(1, num_kv_heads // size)
    first = min(rank, num_kv_heads - keys)
    own, shared = slice(rank * queries * d, (rank + 1) * queries * d), slice(first * d, (first + keys) * d)
    q, k, v = (F.linear(x, w).unflatten(-1, (-1, d)).transpose(1, 2) for w in (q[own], k[shared], v[shared]))
    k, v = (t.repeat_interleave(queries // keys, 1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = y.transpose(1, 2).flatten(2)
    return F.linear(y, o[:, own])

# %% answer={"exercise": "attention_term", "name": "wrongly grouped: key/value heads dealt out in turn", "fails": "8 query and 4 key/value heads on 2 ranks"}
def attention_term(x, q, k, v, o, num_heads, num_kv_heads, rank, size):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("the ranks do not divide the heads")
    d, queries, keys = q.shape[0] // num_heads, num_heads // size, max(1, num_kv_heads // size)
    first = rank * num_kv_heads // size
    own, shared = slice(rank * queries * d, (rank + 1) * queries * d), slice(first * d, (first + keys) * d)
    q, k, v = (F.linear(x, w).unflatten(-1, (-1, d)).transpose(1, 2) for w in (q[own], k[shared], v[shared]))
    k, v = (t.repeat(1, queries // keys, 1, 1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = y.transpose(1, 2).flatten(2)
    return F.linear(y, o[:, own])

# %% answer={"exercise": "attention_term", "name": "all key/value heads on every rank, grouped as if all query heads were there", "fails": "9 query and 3 key/value heads"}
def attention_term(x, q, k, v, o, num_heads, num_kv_heads, rank, size):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("the ranks do not divide the heads")
    d, queries, keys = q.shape[0] // num_heads, num_heads // size, num_kv_heads
    first = 0
    own, shared = slice(rank * queries * d, (rank + 1) * queries * d), slice(first * d, (first + keys) * d)
    q, k, v = (F.linear(x, w).unflatten(-1, (-1, d)).transpose(1, 2) for w in (q[own], k[shared], v[shared]))
    k, v = (t.repeat_interleave(num_heads // num_kv_heads, 1)[:, :queries] for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = y.transpose(1, 2).flatten(2)
    return F.linear(y, o[:, own])

# %% answer={"exercise": "attention_term", "name": "all heads computed, the others struck out", "fails": "rank 0 of 2, with NaN"}
def attention_term(x, q, k, v, o, num_heads, num_kv_heads, rank, size):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("the ranks do not divide the heads")
    d, queries = q.shape[0] // num_heads, num_heads // size
    q, k, v = (F.linear(x, w).unflatten(-1, (-1, d)).transpose(1, 2) for w in (q, k, v))
    k, v = (t.repeat_interleave(num_heads // num_kv_heads, 1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    own = torch.arange(y.shape[-1]) // (queries * d) == rank
    return F.linear(y * own, o)

# %% answer={"exercise": "attention_term", "name": "the average of the ranks instead of their sum", "fails": "9 query and 3 key/value heads"}
def attention_term(x, q, k, v, o, num_heads, num_kv_heads, rank, size):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("the ranks do not divide the heads")
    d, queries, keys = q.shape[0] // num_heads, num_heads // size, max(1, num_kv_heads // size)
    first = rank * num_kv_heads // size
    own, shared = slice(rank * queries * d, (rank + 1) * queries * d), slice(first * d, (first + keys) * d)
    q, k, v = (F.linear(x, w).unflatten(-1, (-1, d)).transpose(1, 2) for w in (q[own], k[shared], v[shared]))
    k, v = (t.repeat_interleave(queries // keys, 1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = y.transpose(1, 2).flatten(2)
    return F.linear(y, o[:, own]) / size

# %% answer={"exercise": "attention_term", "name": "a replicated head counted once: its ranks share the term", "fails": "4 query heads and 2 key/value heads on 4 ranks"}
def attention_term(x, q, k, v, o, num_heads, num_kv_heads, rank, size):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("the ranks do not divide the heads")
    d, queries, keys = q.shape[0] // num_heads, num_heads // size, max(1, num_kv_heads // size)
    first = rank * num_kv_heads // size
    own, shared = slice(rank * queries * d, (rank + 1) * queries * d), slice(first * d, (first + keys) * d)
    q, k, v = (F.linear(x, w).unflatten(-1, (-1, d)).transpose(1, 2) for w in (q[own], k[shared], v[shared]))
    k, v = (t.repeat_interleave(queries // keys, 1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = y.transpose(1, 2).flatten(2)
    return F.linear(y, o[:, own]) * min(1, num_kv_heads / size)

# %% answer={"exercise": "attention_term", "name": "later tokens seen", "fails": "one rank alone"}
def attention_term(x, q, k, v, o, num_heads, num_kv_heads, rank, size):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("the ranks do not divide the heads")
    d, queries, keys = q.shape[0] // num_heads, num_heads // size, max(1, num_kv_heads // size)
    first = rank * num_kv_heads // size
    own, shared = slice(rank * queries * d, (rank + 1) * queries * d), slice(first * d, (first + keys) * d)
    q, k, v = (F.linear(x, w).unflatten(-1, (-1, d)).transpose(1, 2) for w in (q[own], k[shared], v[shared]))
    k, v = (t.repeat_interleave(queries // keys, 1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v)
    y = y.transpose(1, 2).flatten(2)
    return F.linear(y, o[:, own])

# %% answer={"exercise": "attention_term", "name": "the scale of the hidden size", "fails": "one rank alone"}
def attention_term(x, q, k, v, o, num_heads, num_kv_heads, rank, size):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("the ranks do not divide the heads")
    d, queries, keys = q.shape[0] // num_heads, num_heads // size, max(1, num_kv_heads // size)
    first = rank * num_kv_heads // size
    own, shared = slice(rank * queries * d, (rank + 1) * queries * d), slice(first * d, (first + keys) * d)
    q, k, v = (F.linear(x, w).unflatten(-1, (-1, d)).transpose(1, 2) for w in (q[own], k[shared], v[shared]))
    k, v = (t.repeat_interleave(queries // keys, 1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=(num_heads * d) ** -0.5)
    y = y.transpose(1, 2).flatten(2)
    return F.linear(y, o[:, own])

# %% answer={"exercise": "attention_term", "name": "the scale of the rank's query heads together", "fails": "9 query and 3 key/value heads"}
def attention_term(x, q, k, v, o, num_heads, num_kv_heads, rank, size):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("the ranks do not divide the heads")
    d, queries, keys = q.shape[0] // num_heads, num_heads // size, max(1, num_kv_heads // size)
    first = rank * num_kv_heads // size
    own, shared = slice(rank * queries * d, (rank + 1) * queries * d), slice(first * d, (first + keys) * d)
    q, k, v = (F.linear(x, w).unflatten(-1, (-1, d)).transpose(1, 2) for w in (q[own], k[shared], v[shared]))
    k, v = (t.repeat_interleave(queries // keys, 1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=(queries * d) ** -0.5)
    y = y.transpose(1, 2).flatten(2)
    return F.linear(y, o[:, own])

# %% answer={"exercise": "attention_term", "name": "rows of o instead of its columns", "fails": "9 query and 3 key/value heads"}
def attention_term(x, q, k, v, o, num_heads, num_kv_heads, rank, size):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("the ranks do not divide the heads")
    d, queries, keys = q.shape[0] // num_heads, num_heads // size, max(1, num_kv_heads // size)
    first = rank * num_kv_heads // size
    own, shared = slice(rank * queries * d, (rank + 1) * queries * d), slice(first * d, (first + keys) * d)
    q, k, v = (F.linear(x, w).unflatten(-1, (-1, d)).transpose(1, 2) for w in (q[own], k[shared], v[shared]))
    k, v = (t.repeat_interleave(queries // keys, 1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = y.transpose(1, 2).flatten(2)
    return F.linear(y, o[own].T)

# %% answer={"exercise": "attention_term", "name": "heads and tokens not put back in order", "fails": "one rank alone"}
def attention_term(x, q, k, v, o, num_heads, num_kv_heads, rank, size):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("the ranks do not divide the heads")
    d, queries, keys = q.shape[0] // num_heads, num_heads // size, max(1, num_kv_heads // size)
    first = rank * num_kv_heads // size
    own, shared = slice(rank * queries * d, (rank + 1) * queries * d), slice(first * d, (first + keys) * d)
    q, k, v = (F.linear(x, w).unflatten(-1, (-1, d)).transpose(1, 2) for w in (q[own], k[shared], v[shared]))
    k, v = (t.repeat_interleave(queries // keys, 1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = y.reshape(x.shape[0], x.shape[1], -1)
    return F.linear(y, o[:, own])

# %% answer={"exercise": "attention_term", "name": "every t-th query head", "fails": "a rank needs its own heads"}
def attention_term(x, q, k, v, o, num_heads, num_kv_heads, rank, size):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("the ranks do not divide the heads")
    d, group = q.shape[0] // num_heads, num_heads // num_kv_heads
    y = 0
    for h in range(rank, num_heads, size):
        own, shared = slice(h * d, (h + 1) * d), slice(h // group * d, (h // group + 1) * d)
        a = F.scaled_dot_product_attention(x @ q[own].T, x @ k[shared].T, x @ v[shared].T, is_causal=True)
        y = y + a @ o[:, own].T
    return y

# %% answer={"exercise": "attention_term", "name": "heads that are left over are dropped", "fails": "2 ranks do not divide"}
def attention_term(x, q, k, v, o, num_heads, num_kv_heads, rank, size):
    d, queries, keys = q.shape[0] // num_heads, num_heads // size, max(1, num_kv_heads // size)
    first = rank * num_kv_heads // size
    own, shared = slice(rank * queries * d, (rank + 1) * queries * d), slice(first * d, (first + keys) * d)
    q, k, v = (F.linear(x, w).unflatten(-1, (-1, d)).transpose(1, 2) for w in (q[own], k[shared], v[shared]))
    k, v = (t.repeat_interleave(queries // keys, 1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = y.transpose(1, 2).flatten(2)
    return F.linear(y, o[:, own])

# %% answer={"exercise": "attention_term", "name": "key/value heads that the ranks do not divide are not refused", "fails": "2 ranks do not divide"}
def attention_term(x, q, k, v, o, num_heads, num_kv_heads, rank, size):
    if num_heads % size:
        raise ValueError("the ranks do not divide the heads")
    d, queries, keys = q.shape[0] // num_heads, num_heads // size, max(1, num_kv_heads // size)
    first = rank * num_kv_heads // size
    own, shared = slice(rank * queries * d, (rank + 1) * queries * d), slice(first * d, (first + keys) * d)
    q, k, v = (F.linear(x, w).unflatten(-1, (-1, d)).transpose(1, 2) for w in (q[own], k[shared], v[shared]))
    k, v = (t.repeat_interleave(queries // keys, 1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = y.transpose(1, 2).flatten(2)
    return F.linear(y, o[:, own])

# %% answer={"exercise": "attention_term", "name": "fewer key/value heads than ranks refused", "fails": "4 query heads and 2 key/value heads on 4 ranks"}
def attention_term(x, q, k, v, o, num_heads, num_kv_heads, rank, size):
    if num_heads % size or num_kv_heads % size:
        raise ValueError("the ranks do not divide the heads")
    d, queries, keys = q.shape[0] // num_heads, num_heads // size, max(1, num_kv_heads // size)
    first = rank * num_kv_heads // size
    own, shared = slice(rank * queries * d, (rank + 1) * queries * d), slice(first * d, (first + keys) * d)
    q, k, v = (F.linear(x, w).unflatten(-1, (-1, d)).transpose(1, 2) for w in (q[own], k[shared], v[shared]))
    k, v = (t.repeat_interleave(queries // keys, 1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = y.transpose(1, 2).flatten(2)
    return F.linear(y, o[:, own])

# %% answer={"exercise": "attention_term", "name": "head by head, scores in full", "right": true}
def attention_term(x, q, k, v, o, num_heads, num_kv_heads, rank, size):
    if num_heads % size:
        raise ValueError(f"{num_heads} query heads on {size} ranks")
    if max(num_kv_heads, size) % min(num_kv_heads, size):
        raise ValueError(f"{num_kv_heads} key/value heads on {size} ranks")
    d, group = q.shape[0] // num_heads, num_heads // num_kv_heads
    mask = torch.full((x.shape[1], x.shape[1]), -math.inf, dtype=x.dtype).triu(1)
    y = torch.zeros_like(x)
    for h in range(rank * num_heads // size, (rank + 1) * num_heads // size):
        own, shared = slice(h * d, (h + 1) * d), slice(h // group * d, (h // group + 1) * d)
        scores = (x @ q[own].T) @ (x @ k[shared].T).mT * d**-0.5 + mask
        y = y + torch.softmax(scores, -1) @ (x @ v[shared].T) @ o[:, own].T
    return y

# %% answer={"exercise": "attention_term", "name": "key/value rows picked for each query head, einsum", "right": true}
def attention_term(x, q, k, v, o, num_heads, num_kv_heads, rank, size):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("the ranks do not divide the heads")
    d, share = q.shape[0] // num_heads, num_heads // size
    mine = torch.arange(rank * share, (rank + 1) * share)
    its = mine // (num_heads // num_kv_heads)
    queries = torch.einsum("bsD,hdD->bhsd", x, q.view(num_heads, d, -1)[mine])
    keys = torch.einsum("bsD,hdD->bhsd", x, k.view(num_kv_heads, d, -1)[its])
    values = torch.einsum("bsD,hdD->bhsd", x, v.view(num_kv_heads, d, -1)[its])
    attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    return torch.einsum("bhsd,Dhd->bsD", attended, o.view(-1, num_heads, d)[:, mine])

# %% answer={"exercise": "attention_term", "name": "repeat_interleave, scores masked by hand", "right": true}
def attention_term(x, q, k, v, o, num_heads, num_kv_heads, rank, size):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("the ranks do not divide the heads")
    d, queries, keys = q.shape[0] // num_heads, num_heads // size, max(1, num_kv_heads // size)
    first = rank * num_kv_heads // size
    own, shared = slice(rank * queries * d, (rank + 1) * queries * d), slice(first * d, (first + keys) * d)
    q, k, v = (F.linear(x, w).unflatten(-1, (-1, d)).transpose(1, 2) for w in (q[own], k[shared], v[shared]))
    k, v = (t.repeat_interleave(queries // keys, 1) for t in (k, v))
    y = (q @ k.mT / math.sqrt(d)).masked_fill(~torch.ones(x.shape[1], x.shape[1]).tril().bool(), -math.inf).softmax(-1) @ v
    y = y.transpose(1, 2).flatten(2)
    return F.linear(y, o[:, own])

# %% answer={"exercise": "vocabulary_statistics", "name": "the largest logit not subtracted", "fails": "two tokens"}
def vocabulary_statistics(logits, targets, start):
    largest = logits.max(-1).values
    total = logits.exp().sum(-1)
    column = targets - start
    own = (column >= 0) & (column < logits.shape[-1])
    picked = logits.gather(-1, column.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
    chosen = picked * own
    return torch.stack([largest, total, chosen])

# %% answer={"exercise": "vocabulary_statistics", "name": "subtracted behind the exponential", "fails": "logits 1000 and 1002"}
def vocabulary_statistics(logits, targets, start):
    largest = logits.max(-1).values
    total = logits.exp().sum(-1) / largest.exp()
    column = targets - start
    own = (column >= 0) & (column < logits.shape[-1])
    picked = logits.gather(-1, column.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
    chosen = picked * own
    return torch.stack([largest, total, chosen])

# %% answer={"exercise": "vocabulary_statistics", "name": "one largest logit for all tokens", "fails": "any part of the vocabulary"}
def vocabulary_statistics(logits, targets, start):
    largest = logits.max().expand(logits.shape[0])
    total = (logits - largest[:, None]).exp().sum(-1)
    column = targets - start
    own = (column >= 0) & (column < logits.shape[-1])
    picked = logits.gather(-1, column.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
    chosen = picked * own
    return torch.stack([largest, total, chosen])

# %% answer={"exercise": "vocabulary_statistics", "name": "the largest of all tokens for a column", "fails": "any part of the vocabulary"}
def vocabulary_statistics(logits, targets, start):
    largest = logits.max(-1).values
    total = (logits - logits.max(0).values).exp().sum(-1)
    column = targets - start
    own = (column >= 0) & (column < logits.shape[-1])
    chosen = logits.gather(-1, column.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0] * own
    return torch.stack([largest, total, chosen])

# %% answer={"exercise": "vocabulary_statistics", "name": "the target's logit counted on every rank: the nearest column instead of none", "fails": "targets at the edges"}
def vocabulary_statistics(logits, targets, start):
    largest = logits.max(-1).values
    total = (logits - largest[:, None]).exp().sum(-1)
    column = targets - start
    own = (column >= 0) & (column < logits.shape[-1])
    picked = logits.gather(-1, column.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
    chosen = picked
    return torch.stack([largest, total, chosen])

# %% answer={"exercise": "vocabulary_statistics", "name": "column 0 of its own where another rank has the target", "fails": "targets at the edges"}
def vocabulary_statistics(logits, targets, start):
    largest = logits.max(-1).values
    total = (logits - largest[:, None]).exp().sum(-1)
    column = targets - start
    own = (column >= 0) & (column < logits.shape[-1])
    picked = logits.gather(-1, column.where(own, 0)[:, None])[:, 0]
    return torch.stack([largest, total, picked])

# %% answer={"exercise": "vocabulary_statistics", "name": "the least number there is where another rank has the target", "fails": "two tokens"}
def vocabulary_statistics(logits, targets, start):
    largest = logits.max(-1).values
    total = (logits - largest[:, None]).exp().sum(-1)
    column = targets - start
    own = (column >= 0) & (column < logits.shape[-1])
    picked = logits.gather(-1, column.where(own, 0)[:, None])[:, 0]
    return torch.stack([largest, total, picked.where(own, torch.finfo(picked.dtype).min)])

# %% answer={"exercise": "vocabulary_statistics", "name": "targets taken for columns, the start forgotten", "fails": "two tokens"}
def vocabulary_statistics(logits, targets, start):
    largest = logits.max(-1).values
    total = (logits - largest[:, None]).exp().sum(-1)
    column = targets
    own = (column >= 0) & (column < logits.shape[-1])
    picked = logits.gather(-1, column.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
    chosen = picked * own
    return torch.stack([largest, total, chosen])

# %% answer={"exercise": "vocabulary_statistics", "name": "targets below the start counted from the end", "fails": "targets at the edges"}
def vocabulary_statistics(logits, targets, start):
    largest = logits.max(-1).values
    total = (logits - largest[:, None]).exp().sum(-1)
    column = targets - start
    own = column < logits.shape[-1]
    picked = logits[torch.arange(len(targets)), column.clamp(-logits.shape[-1], logits.shape[-1] - 1)]
    chosen = picked * own
    return torch.stack([largest, total, chosen])

# %% answer={"exercise": "vocabulary_statistics", "name": "the column behind the last one taken for the last", "fails": "the target's logit, ids 4 and 5"}
def vocabulary_statistics(logits, targets, start):
    largest = logits.max(-1).values
    total = (logits - largest[:, None]).exp().sum(-1)
    column = targets - start
    own = (column >= 0) & (column <= logits.shape[-1])
    picked = logits.gather(-1, column.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
    chosen = picked * own
    return torch.stack([largest, total, chosen])

# %% answer={"exercise": "vocabulary_statistics", "name": "column 0 taken for no column", "fails": "the target's logit, ids 4 and 5"}
def vocabulary_statistics(logits, targets, start):
    largest = logits.max(-1).values
    total = (logits - largest[:, None]).exp().sum(-1)
    column = targets - start
    own = (column > 0) & (column < logits.shape[-1])
    picked = logits.gather(-1, column.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
    chosen = picked * own
    return torch.stack([largest, total, chosen])

# %% answer={"exercise": "vocabulary_statistics", "name": "no upper bound: a later rank's target read from the last column", "fails": "the target's logit, ids 4 and 5"}
def vocabulary_statistics(logits, targets, start):
    largest = logits.max(-1).values
    total = (logits - largest[:, None]).exp().sum(-1)
    column = targets - start
    own = column >= 0
    picked = logits.gather(-1, column.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
    chosen = picked * own
    return torch.stack([largest, total, chosen])

# %% answer={"exercise": "vocabulary_statistics", "name": "no upper bound and no clamp: an IndexError", "fails": "the target's logit, ids 4 and 5"}
def vocabulary_statistics(logits, targets, start):
    largest = logits.max(-1).values
    total = (logits - largest[:, None]).exp().sum(-1)
    column = (targets - start).clamp(min=0)
    chosen = logits.gather(-1, column[:, None])[:, 0] * (targets >= start)
    return torch.stack([largest, total, chosen])

# %% answer={"exercise": "vocabulary_statistics", "name": "the largest already taken off the chosen logit", "fails": "two tokens"}
def vocabulary_statistics(logits, targets, start):
    largest = logits.max(-1).values
    total = (logits - largest[:, None]).exp().sum(-1)
    column = targets - start
    own = (column >= 0) & (column < logits.shape[-1])
    picked = logits.gather(-1, column.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
    chosen = (picked - largest) * own
    return torch.stack([largest, total, chosen])

# %% answer={"exercise": "vocabulary_statistics", "name": "the mean of the exponentials instead of their sum", "fails": "any part of the vocabulary"}
def vocabulary_statistics(logits, targets, start):
    largest = logits.max(-1).values
    total = (logits - largest[:, None]).exp().mean(-1)
    column = targets - start
    own = (column >= 0) & (column < logits.shape[-1])
    picked = logits.gather(-1, column.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
    chosen = picked * own
    return torch.stack([largest, total, chosen])

# %% answer={"exercise": "vocabulary_statistics", "name": "the logarithm of the total", "fails": "any part of the vocabulary"}
def vocabulary_statistics(logits, targets, start):
    largest = logits.max(-1).values
    total = logits.logsumexp(-1) - largest
    column = targets - start
    own = (column >= 0) & (column < logits.shape[-1])
    picked = logits.gather(-1, column.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
    chosen = picked * own
    return torch.stack([largest, total, chosen])

# %% answer={"exercise": "vocabulary_statistics", "name": "[N, 3] instead of [3, N]", "fails": "any part of the vocabulary"}
def vocabulary_statistics(logits, targets, start):
    largest = logits.max(-1).values
    total = (logits - largest[:, None]).exp().sum(-1)
    column = targets - start
    own = (column >= 0) & (column < logits.shape[-1])
    picked = logits.gather(-1, column.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
    chosen = picked * own
    return torch.stack([largest, total, chosen], -1)

# %% answer={"exercise": "vocabulary_statistics", "name": "ids compared with the targets", "right": true}
def vocabulary_statistics(logits, targets, start):
    ids = torch.arange(start, start + logits.shape[-1])
    largest = logits.amax(-1)
    total = torch.exp(logits - largest.view(-1, 1)).sum(-1)
    chosen = torch.where(ids == targets.view(-1, 1), logits, 0.0).sum(-1)
    return torch.stack((largest, total, chosen))

# %% answer={"exercise": "vocabulary_statistics", "name": "token by token", "right": true}
def vocabulary_statistics(logits, targets, start):
    found = logits.new_zeros(3, len(targets))
    for n, target in enumerate(targets.tolist()):
        found[0, n] = max(logits[n].tolist())
        found[1, n] = sum(math.exp(z - found[0, n]) for z in logits[n].tolist())
        if start <= target < start + logits.shape[1]:
            found[2, n] = logits[n, target - start]
    return found

# %% answer={"exercise": "loss_from_statistics", "name": "totals added up as they are", "fails": "logits 1, 2 on rank 0"}
def loss_from_statistics(statistics):
    largest, total, chosen = statistics.unbind(1)
    highest = largest.max(0).values
    return total.sum(0).log() + highest - chosen.sum(0)

# %% answer={"exercise": "loss_from_statistics", "name": "exponentials of the logits themselves", "fails": "logits 0, 1 on one rank"}
def loss_from_statistics(statistics):
    largest, total, chosen = statistics.unbind(1)
    return (total * largest.exp()).sum(0).log() - chosen.sum(0)

# %% answer={"exercise": "loss_from_statistics", "name": "one largest logit for all tokens together", "fails": "logits 0, 1 on one rank"}
def loss_from_statistics(statistics):
    largest, total, chosen = statistics.unbind(1)
    shift = largest.min()
    return (total * (largest - shift).exp()).sum(0).log() + shift - chosen.sum(0)

# %% answer={"exercise": "loss_from_statistics", "name": "relative to the largest logit of rank 0", "fails": "logits 0, 1 on one rank"}
def loss_from_statistics(statistics):
    largest, total, chosen = statistics.unbind(1)
    return (total * (largest - largest[0]).exp()).sum(0).log() + largest[0] - chosen.sum(0)

# %% answer={"exercise": "loss_from_statistics", "name": "the mean of the largest logits subtracted", "fails": "logits 0, 1 on one rank"}
def loss_from_statistics(statistics):
    largest, total, chosen = statistics.unbind(1)
    middle = largest.mean(0)
    return (total * (largest - middle).exp()).sum(0).log() + middle - chosen.sum(0)

# %% answer={"exercise": "loss_from_statistics", "name": "the largest logit forgotten at the end", "fails": "logits 1, 2 on rank 0"}
def loss_from_statistics(statistics):
    largest, total, chosen = statistics.unbind(1)
    highest = largest.max(0).values
    return (total * (largest - highest).exp()).sum(0).log() - chosen.sum(0)

# %% answer={"exercise": "loss_from_statistics", "name": "the largest of the chosen logits: a target's below zero is lost", "fails": "the same below zero"}
def loss_from_statistics(statistics):
    largest, total, chosen = statistics.unbind(1)
    highest = largest.max(0).values
    return (total * (largest - highest).exp()).sum(0).log() + highest - chosen.max(0).values

# %% answer={"exercise": "loss_from_statistics", "name": "the average of the ranks' chosen logits", "fails": "any number of ranks"}
def loss_from_statistics(statistics):
    largest, total, chosen = statistics.unbind(1)
    highest = largest.max(0).values
    return (total * (largest - highest).exp()).sum(0).log() + highest - chosen.mean(0)

# %% answer={"exercise": "loss_from_statistics", "name": "the average of the ranks instead of their sum", "fails": "four logits of 0"}
def loss_from_statistics(statistics):
    largest, total, chosen = statistics.unbind(1)
    highest = largest.max(0).values
    return (total * (largest - highest).exp()).mean(0).log() + highest - chosen.sum(0)

# %% answer={"exercise": "loss_from_statistics", "name": "the mean of the ranks' own losses", "fails": "any number of ranks"}
def loss_from_statistics(statistics):
    largest, total, chosen = statistics.unbind(1)
    return (total.log() + largest - chosen).mean(0)

# %% answer={"exercise": "loss_from_statistics", "name": "the mean over the tokens", "fails": "any number of ranks"}
def loss_from_statistics(statistics):
    largest, total, chosen = statistics.unbind(1)
    highest = largest.max(0).values
    return ((total * (largest - highest).exp()).sum(0).log() + highest - chosen.sum(0)).mean()

# %% answer={"exercise": "loss_from_statistics", "name": "the sign turned round", "fails": "four logits of 0"}
def loss_from_statistics(statistics):
    largest, total, chosen = statistics.unbind(1)
    highest = largest.max(0).values
    return chosen.sum(0) - highest - (total * (largest - highest).exp()).sum(0).log()

# %% answer={"exercise": "loss_from_statistics", "name": "the largest logits added up too", "fails": "any number of ranks"}
def loss_from_statistics(statistics):
    largest, total, chosen = statistics.unbind(1)
    highest = largest.max(0).values
    return (total * (largest - highest).exp()).sum(0).log() + largest.sum(0) - chosen.sum(0)

# %% answer={"exercise": "loss_from_statistics", "name": "logsumexp over the ranks", "right": true}
def loss_from_statistics(statistics):
    largest, total, chosen = statistics.unbind(1)
    return torch.logsumexp(largest + total.log(), 0) - chosen.sum(0)

# %% answer={"exercise": "loss_from_statistics", "name": "one rank after the other, rescaled as it goes", "right": true}
def loss_from_statistics(statistics):
    highest, total, chosen = statistics[0]
    for own_largest, own_total, own_chosen in statistics[1:]:
        new = torch.maximum(highest, own_largest)
        total = total * (highest - new).exp() + own_total * (own_largest - new).exp()
        highest, chosen = new, chosen + own_chosen
    return total.log() + highest - chosen

# %% answer={"exercise": "predicted_bytes", "name": "the chapter's formula for a layer, and nothing else", "fails": "it is of the right size"}
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
predicted_bytes = layers * 4 * 2 * (t - 1) / t * stream_bytes

# %% answer={"exercise": "predicted_bytes", "name": "half of it", "fails": "it is of the right size"}
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
again = len(my_run["computed again"])
streams = 4 + layers * (8 + again)
statistics_bytes = t * 3 * tokens * 4
twin_bytes = layers * 2 * my_run["d"] * my_run["D"] * element_bytes
predicted_bytes = (t - 1) / t * (streams * stream_bytes + statistics_bytes) + 2 * (copies - 1) / copies * twin_bytes
predicted_bytes = predicted_bytes / 2

# %% answer={"exercise": "predicted_bytes", "name": "the backward forgotten", "fails": "it is of the right size"}
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
streams = 2 + layers * 4
statistics_bytes = t * 3 * tokens * 4
twin_bytes = 0
predicted_bytes = (t - 1) / t * (streams * stream_bytes + statistics_bytes) + 2 * (copies - 1) / copies * twin_bytes

# %% answer={"exercise": "predicted_bytes", "name": "one sum a layer each way", "fails": "the prediction for your"}
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
again = len(my_run["computed again"])
streams = 4 + layers * (4 + again)
statistics_bytes = t * 3 * tokens * 4
twin_bytes = layers * 2 * my_run["d"] * my_run["D"] * element_bytes
predicted_bytes = (t - 1) / t * (streams * stream_bytes + statistics_bytes) + 2 * (copies - 1) / copies * twin_bytes

# %% answer={"exercise": "predicted_bytes", "name": "elements instead of bytes", "fails": "it is of the right size"}
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
again = len(my_run["computed again"])
streams = 4 + layers * (8 + again)
statistics_bytes = t * 3 * tokens * 4
twin_bytes = layers * 2 * my_run["d"] * my_run["D"] * element_bytes
predicted_bytes = (t - 1) / t * (streams * stream_bytes + statistics_bytes) + 2 * (copies - 1) / copies * twin_bytes
predicted_bytes = predicted_bytes / element_bytes

# %% answer={"exercise": "predicted_bytes", "name": "a rank's part of the stream alone", "fails": "it is of the right size"}
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
again = len(my_run["computed again"])
streams = 4 + layers * (8 + again)
statistics_bytes = t * 3 * tokens * 4
twin_bytes = layers * 2 * my_run["d"] * my_run["D"] * element_bytes
predicted_bytes = (t - 1) / t * (streams * stream_bytes + statistics_bytes) + 2 * (copies - 1) / copies * twin_bytes
predicted_bytes = predicted_bytes / t

# %% answer={"exercise": "predicted_bytes", "name": "all ranks together", "fails": "it is of the right size"}
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
again = len(my_run["computed again"])
streams = 4 + layers * (8 + again)
statistics_bytes = t * 3 * tokens * 4
twin_bytes = layers * 2 * my_run["d"] * my_run["D"] * element_bytes
predicted_bytes = (t - 1) / t * (streams * stream_bytes + statistics_bytes) + 2 * (copies - 1) / copies * twin_bytes
predicted_bytes = predicted_bytes * t

# %% answer={"exercise": "predicted_bytes", "name": "twice the right number: every message counted where it is sent and where it arrives", "fails": "it is of the right size"}
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
again = len(my_run["computed again"])
streams = 4 + layers * (8 + again)
statistics_bytes = t * 3 * tokens * 4
twin_bytes = layers * 2 * my_run["d"] * my_run["D"] * element_bytes
predicted_bytes = (t - 1) / t * (streams * stream_bytes + statistics_bytes) + 2 * (copies - 1) / copies * twin_bytes
predicted_bytes = predicted_bytes * 2

# %% answer={"exercise": "predicted_bytes", "name": "the logits gathered in place of three numbers a token", "fails": "the prediction for your"}
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
again = len(my_run["computed again"])
streams = 4 + layers * (8 + again)
statistics_bytes = tokens * my_run["V"] * 4
twin_bytes = layers * 2 * my_run["d"] * my_run["D"] * element_bytes
predicted_bytes = (t - 1) / t * (streams * stream_bytes + statistics_bytes) + 2 * (copies - 1) / copies * twin_bytes

# %% answer={"exercise": "predicted_bytes", "name": "the ring's factor (t - 1)/t forgotten", "fails": "the prediction for your"}
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
again = len(my_run["computed again"])
streams = 4 + layers * (8 + again)
statistics_bytes = t * 3 * tokens * 4
twin_bytes = layers * 2 * my_run["d"] * my_run["D"] * element_bytes
predicted_bytes = streams * stream_bytes + statistics_bytes + 2 * (copies - 1) / copies * twin_bytes

# %% answer={"exercise": "predicted_bytes", "name": "the embedding's sum and its gradient forgotten, or the head's", "fails": "the prediction for your"}
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
again = len(my_run["computed again"])
streams = 2 + layers * (8 + again)
statistics_bytes = t * 3 * tokens * 4
twin_bytes = layers * 2 * my_run["d"] * my_run["D"] * element_bytes
predicted_bytes = (t - 1) / t * (streams * stream_bytes + statistics_bytes) + 2 * (copies - 1) / copies * twin_bytes

# %% answer={"exercise": "predicted_bytes", "name": "no gradient of the embedding's output gathered", "fails": "the prediction for your"}
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
again = len(my_run["computed again"])
streams = 3 + layers * (8 + again)
statistics_bytes = t * 3 * tokens * 4
twin_bytes = layers * 2 * my_run["d"] * my_run["D"] * element_bytes
predicted_bytes = (t - 1) / t * (streams * stream_bytes + statistics_bytes) + 2 * (copies - 1) / copies * twin_bytes

# %% answer={"exercise": "predicted_bytes", "name": "a block that is computed again taken to move nothing more", "fails": "the prediction for your"}
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
again = 0
streams = 4 + layers * (8 + again)
statistics_bytes = t * 3 * tokens * 4
twin_bytes = layers * 2 * my_run["d"] * my_run["D"] * element_bytes
predicted_bytes = (t - 1) / t * (streams * stream_bytes + statistics_bytes) + 2 * (copies - 1) / copies * twin_bytes

# %% answer={"exercise": "predicted_bytes", "name": "a block that is computed again taken to move all of its forward again, the sum behind it too", "fails": "the prediction for your"}
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
again = 2 * len(my_run["computed again"])
streams = 4 + layers * (8 + again)
statistics_bytes = t * 3 * tokens * 4
twin_bytes = layers * 2 * my_run["d"] * my_run["D"] * element_bytes
predicted_bytes = (t - 1) / t * (streams * stream_bytes + statistics_bytes) + 2 * (copies - 1) / copies * twin_bytes

# %% answer={"exercise": "predicted_bytes", "name": "one block computed again instead of those of every layer", "fails": "the prediction for your"}
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
again = len(my_run["computed again"])
streams = 4 + layers * 8 + again
statistics_bytes = t * 3 * tokens * 4
twin_bytes = layers * 2 * my_run["d"] * my_run["D"] * element_bytes
predicted_bytes = (t - 1) / t * (streams * stream_bytes + statistics_bytes) + 2 * (copies - 1) / copies * twin_bytes

# %% answer={"exercise": "predicted_bytes", "name": "the loss forgotten", "fails": "the prediction for your"}
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
again = len(my_run["computed again"])
streams = 4 + layers * (8 + again)
statistics_bytes = 0
twin_bytes = layers * 2 * my_run["d"] * my_run["D"] * element_bytes
predicted_bytes = (t - 1) / t * (streams * stream_bytes + statistics_bytes) + 2 * (copies - 1) / copies * twin_bytes

# %% answer={"exercise": "predicted_bytes", "name": "the loss's gathering undone on the way back", "fails": "the prediction for your"}
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
again = len(my_run["computed again"])
streams = 4 + layers * (8 + again)
statistics_bytes = 2 * t * 3 * tokens * 4
twin_bytes = layers * 2 * my_run["d"] * my_run["D"] * element_bytes
predicted_bytes = (t - 1) / t * (streams * stream_bytes + statistics_bytes) + 2 * (copies - 1) / copies * twin_bytes

# %% answer={"exercise": "predicted_bytes", "name": "three numbers a token, of one rank alone", "fails": "the prediction for your"}
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
again = len(my_run["computed again"])
streams = 4 + layers * (8 + again)
statistics_bytes = 3 * tokens * 4
twin_bytes = layers * 2 * my_run["d"] * my_run["D"] * element_bytes
predicted_bytes = (t - 1) / t * (streams * stream_bytes + statistics_bytes) + 2 * (copies - 1) / copies * twin_bytes

# %% answer={"exercise": "predicted_bytes", "name": "the copies of key/value heads forgotten", "fails": "the prediction for your"}
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
again = len(my_run["computed again"])
streams = 4 + layers * (8 + again)
statistics_bytes = t * 3 * tokens * 4
twin_bytes = 0
predicted_bytes = (t - 1) / t * (streams * stream_bytes + statistics_bytes) + 2 * (copies - 1) / copies * twin_bytes

# %% answer={"exercise": "predicted_bytes", "name": "gradients of keys summed, and those of values not", "fails": "the prediction for your"}
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
again = len(my_run["computed again"])
streams = 4 + layers * (8 + again)
statistics_bytes = t * 3 * tokens * 4
twin_bytes = layers * my_run["d"] * my_run["D"] * element_bytes
predicted_bytes = (t - 1) / t * (streams * stream_bytes + statistics_bytes) + 2 * (copies - 1) / copies * twin_bytes

# %% answer={"exercise": "predicted_bytes", "name": "gradients of keys and values summed among all ranks", "fails": "the prediction for your"}
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
again = len(my_run["computed again"])
streams = 4 + layers * (8 + again)
statistics_bytes = t * 3 * tokens * 4
twin_bytes = layers * 2 * my_run["H_kv"] * my_run["d"] * my_run["D"] * element_bytes
predicted_bytes = (t - 1) / t * (streams * stream_bytes + statistics_bytes) + 2 * (t - 1) / t * twin_bytes

# %% answer={"exercise": "predicted_bytes", "name": "the input's gradient summed for each column layer alone: three and two of them", "fails": "the prediction for your"}
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
again = len(my_run["computed again"])
streams = 4 + layers * (8 + again) + layers * 3
statistics_bytes = t * 3 * tokens * 4
twin_bytes = layers * 2 * my_run["d"] * my_run["D"] * element_bytes
predicted_bytes = (t - 1) / t * (streams * stream_bytes + statistics_bytes) + 2 * (copies - 1) / copies * twin_bytes

# %% answer={"exercise": "predicted_bytes", "name": "the width of the MLP instead of the stream's", "fails": "it is of the right size"}
t, layers, element_bytes = my_run["t"], my_run["layers"], getattr(torch, my_run["dtype"]).itemsize
tokens, copies = my_run["B"] * my_run["S"], t / my_run["H_kv"]
stream_bytes = tokens * my_run["D"] * element_bytes
stream_bytes = stream_bytes / my_run["D"] * my_run["F"]
again = len(my_run["computed again"])
streams = 4 + layers * (8 + again)
statistics_bytes = t * 3 * tokens * 4
twin_bytes = layers * 2 * my_run["d"] * my_run["D"] * element_bytes
predicted_bytes = (t - 1) / t * (streams * stream_bytes + statistics_bytes) + 2 * (copies - 1) / copies * twin_bytes

# %% answer={"exercise": "predicted_bytes", "name": "message by message", "right": true}
t, layers, copies = my_run["t"], my_run["layers"], my_run["t"] // my_run["H_kv"]
nbytes = torch.empty(my_run["B"], my_run["S"], my_run["D"], dtype=getattr(torch, my_run["dtype"])).nbytes
both_blocks = ["gather", "scatter", "scatter", "gather"] * 2
again = ["gather" for block in my_run["computed again"]]
messages = ["scatter", "gather"] + (both_blocks + again) * layers + ["gather", "scatter"]
head = torch.empty(my_run["d"], my_run["D"], dtype=getattr(torch, my_run["dtype"]))
predicted_bytes = len(messages) * nbytes * (t - 1) / t
predicted_bytes += sum(torch.empty(3, my_run["B"] * my_run["S"], dtype=torch.float32).nbytes for other in range(t - 1))
predicted_bytes += sum(2 * head.nbytes * (copies - 1) / copies for layer in range(layers) for matrix in "kv")

# %% answer={"exercise": "predicted_bytes", "name": "in all-reduces, rounded to three digits, as on paper", "right": true}
e = int("".join(c for c in my_run["dtype"] if c.isdigit())) // 8
tokens, t, g = my_run["B"] * my_run["S"], my_run["t"], my_run["t"] // my_run["H_kv"]
all_reduces = 2 + my_run["layers"] * (4 + len(my_run["computed again"]) / 2)
sent = all_reduces * 2 * (1 - 1 / t) * tokens * my_run["D"] * e + (t - 1) * 12 * tokens
sent += my_run["layers"] * 4 * (1 - 1 / g) * my_run["d"] * my_run["D"] * e
predicted_bytes = int(float(f"{sent:.3g}"))
