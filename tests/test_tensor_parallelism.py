"""Layers over ranks against the same layers on one: outputs, gradients, what is moved, and what is refused.

In fp64 over gloo on the CPU; the marked cases in fp32 over NCCL.
"""

import gc
import warnings
from collections import Counter
from functools import partial

import pytest
import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama  # noqa: F401  # ranks are forked from a server that has what is imported here
from on_devices import close, far, named, on_devices, place
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from llmlab.checkpoint import load_model
from llmlab.config import ModelConfig
from llmlab.engine import Engine, SamplingParams
from llmlab.parallel import (
    ColumnParallelLinear,
    Communicator,
    RowParallelLinear,
    VocabParallelEmbedding,
    launch,
    llama_plan,
    parallelize,
    vocab_parallel_cross_entropy,
)
from llmlab.parallel.decoder import ParallelTransformer
from llmlab.parallel.exchange import copy_to_ranks, gather_for_ranks, sum_over_ranks, sum_to_parts
from llmlab.parallel.loading import load_parallel, parts_of
from llmlab.parallel.part import padded_rows
from llmlab.parallel.plan import Block, Column, Row

LAYERS, B, S, D, F_, V = 2, 2, 12, 72, 96, 101  # V: no number of ranks divides it
# ranks: query heads, key/value heads
HEADS = {1: [(6, 3)], 2: [(4, 4), (8, 2), (4, 1)], 3: [(9, 3), (6, 1)], 4: [(8, 4), (4, 2), (8, 1)]}
SHAPES = [(t, *heads) for t, all_heads in HEADS.items() for heads in all_heads]


def llama(H, K, tied=True, bias=False, kind="llama"):
    torch.manual_seed(0)
    shape = {
        "vocab_size": V, "hidden_size": D, "intermediate_size": F_, "num_hidden_layers": LAYERS, "num_attention_heads": H,
        "num_key_value_heads": K, "head_dim": 8, "tie_word_embeddings": tied, "attention_bias": bias,
    }  # fmt: skip
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape, mlp_bias=bias))
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(norm, module)
    return model.double()


def norm(module, x):
    """transformers rounds to fp32 inside its norms, which fp64 would show."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon) * module.weight


def shape_of(model):
    return ModelConfig.from_huggingface(model.config.to_dict(), "a model")


def step(model, ids):
    """Logits, and the model after a step of Adam, with its gradients."""
    exact = next(model.parameters()).dtype == torch.float64
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-8 if exact else 1e-3)  # rounding, amplified
    out = model(ids, labels=ids)
    out.loss.backward()
    optimizer.step()
    return out


def compare(mesh, H, K, sequence, tied, bias, kind):
    """The largest differences to the same model in one piece, and what was moved."""
    ids = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(1)).to(mesh.device_type)
    whole, part = (llama(H, K, tied, bias, kind).to(*place(mesh)) for _ in range(2))
    ranks = Communicator(mesh)
    parallelize(part, ranks, llama_plan(shape_of(part), ranks.size, sequence))
    expected = step(whole, ids)
    moved = []
    part.register_forward_hook(lambda *_: moved.append(len(ranks.log)))
    found = step(part, ids)
    parts = parts_of(part)
    worst = {"logits": far(found.logits, expected.logits), "gradient": 0.0, "weight": 0.0}
    for name, parameter in part.named_parameters():
        theirs = whole.get_parameter(name)
        for what, ours, of_whole in (("gradient", parameter.grad, theirs.grad), ("weight", parameter, theirs)):
            wanted = parts[name].take(of_whole) if name in parts else of_whole
            worst[what] = max(worst[what], far(ours, wanted))
    return worst, ranks.log[: moved[0]], ranks.log[moved[0] :]


def compare_all(mesh, cases):
    return [compare(mesh, *case) for case in cases]


VARIANTS = [(False, True, False, "llama"), (True, True, False, "llama"), (False, False, True, "llama"),
            (True, False, True, "llama"), (False, True, False, "qwen3"), (True, False, False, "qwen3")]  # fmt: skip


@pytest.fixture(scope="module", params=on_devices(SHAPES, lambda shape: shape[0]), ids=named)
def compared(request):
    """The device, the ranks, and for each variant what each rank found. A shape: ranks, query heads, key/value heads."""
    device, (t, H, K) = request.param
    cases = [(H, K, *variant) for variant in VARIANTS]
    by_rank = launch(compare_all, t, cases, device=device)
    return device, t, [[of_rank[i] for of_rank in by_rank] for i in range(len(cases))]


@pytest.mark.parametrize(
    "index",
    range(len(VARIANTS)),
    ids=["plain", "sequence", "untied, biases", "sequence, untied, biases", "qwen3", "qwen3, sequence, untied"],
)
def test_outputs_gradients_and_a_step_of_adam_are_those_of_one_device(compared, index):
    """The step within 1e-10 in fp64, as Adam divides by a gradient's size, which may vanish."""
    device, _, cases = compared
    for worst, _, _ in cases[index]:
        assert worst["logits"] < close(device)
        assert worst["gradient"] < close(device)
        assert worst["weight"] < close(device, 1e-10)


def kinds(log, num_bytes):
    return Counter(message.kind for message in log if message.num_bytes == num_bytes)


def test_the_collectives_are_those_of_the_formula(compared):
    """Two all-reduces a layer each way of B·S·D elements; one more for the embedding, and backward one for the head."""
    device, t, cases = compared
    width = 4 if device == "cuda" else 8
    for _, forward, backward in cases[0]:
        whole = B * S * D * width
        share = -(-V // t)
        expected = {"all_reduce": 2 * LAYERS + 1} if t > 1 else {}
        assert kinds(forward, whole) == kinds(backward, whole) == expected
        others = [m for m in forward if m.num_bytes != whole]
        assert [(m.kind, m.num_bytes) for m in others] == ([("all_gather", B * S * share * t * width)] if t > 1 else [])
        twins = [m for m in backward if m.num_bytes != whole]
        assert [(m.kind) for m in twins] == []  # those of shared heads are in their own log


def test_sequence_parallelism_moves_the_same_bytes(compared):
    """Each all-reduce becomes an all-gather and a reduce-scatter, of the same bytes together."""
    device, t, cases = compared
    width = 4 if device == "cuda" else 8
    if t == 1:
        assert not any(forward or backward for _, forward, backward in cases[1])
        return
    whole = B * S * D * width
    for (_, forward, backward), (_, plain, _) in zip(cases[1], cases[0], strict=True):
        halves = {"all_gather": 2 * LAYERS + 1, "reduce_scatter": 2 * LAYERS}
        assert kinds(forward, whole) == {**halves, "all_reduce": 1}  # the embedding's sum, of which each takes a part
        assert kinds(backward, whole) == {"reduce_scatter": 2 * LAYERS + 1, "all_gather": 2 * LAYERS + 1}
        norms = [m for m in backward if m.num_bytes == D * width]
        assert len(norms) == 2 * LAYERS + 1  # their gradients are of a part of the sequence

        def layers(log):
            return sum(m.sent_bytes for m in log if m.num_bytes == whole)

        ends = 2 * (t - 1) / t * whole  # the embedding's all-reduce
        assert layers(forward) - ends - (t - 1) / t * whole == pytest.approx(layers(plain) - ends)


def count_by_torch(mesh):
    from torch.distributed.tensor.debug import CommDebugMode

    model = llama(4, 4)
    ranks = Communicator(mesh)
    parallelize(model, ranks)
    ids = torch.arange(B * S).view(B, S)
    with CommDebugMode() as mode:
        model(ids, labels=ids).loss.backward()
    return {str(op): count for op, count in mode.get_comm_counts().items()}, Counter(m.kind for m in ranks.log)


def test_torch_counts_the_same_collectives():
    for by_torch, ours in launch(count_by_torch, 2, device="cpu"):
        assert ours == {"all_reduce": 4 * LAYERS + 2, "all_gather": 1}
        found = Counter()
        for name, count in by_torch.items():
            found["all_reduce" if "allreduce" in name else "all_gather" if "allgather" in name else name] += count
        assert found == ours


def run_layers(mesh):
    """Each layer beside nn's own, both ways, on its own."""
    torch.manual_seed(3)
    device, dtype = where = place(mesh)
    ranks = Communicator(mesh)
    worst = {}

    def check(name, ours, theirs, x, own):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = ours(a), theirs(b)
        weights = torch.linspace(-1, 1, z.numel(), dtype=z.dtype, device=device).view_as(z)
        (y * weights).sum().backward()
        (z * weights).sum().backward()
        worst[name] = max(far(y, z), far(a.grad, b.grad))
        for key, parameter in ours.named_parameters():
            wanted = own.get(key, lambda g: g)(theirs.get_parameter(key).grad)
            worst[name] = max(worst[name], far(parameter.grad, wanted))

    linear = nn.Linear(12, 24).to(*where)
    x = torch.randn(3, 5, 12).to(*where)
    column = ColumnParallelLinear.from_linear(linear, mesh, gather_output=True)
    check("column", column, linear, x, {key: column.parts[key].take for key in ("weight", "bias")})
    linear.zero_grad()
    row = RowParallelLinear.from_linear(linear, mesh)
    width = 12 // ranks.size

    def whole_to_row(x):
        return row(copy_to_ranks(x, ranks)[..., ranks.rank * width : (ranks.rank + 1) * width])

    whole_to_row.named_parameters = row.named_parameters
    check("row", whole_to_row, linear, x, {"weight": row.parts["weight"].take})
    embedding = nn.Embedding(V, 8).to(*where)
    ours = VocabParallelEmbedding.from_embedding(embedding, mesh)
    ids = torch.tensor([[0, V - 1, 50], [7, 7, 99]], device=device)
    y, z = ours(ids), embedding(ids)
    weights = torch.randn(z.shape).to(*where)
    (y * weights).sum().backward()
    (z * weights).sum().backward()
    own = ours.parts["weight"].take(embedding.weight.grad)
    worst["embedding"] = max(far(y, z), far(ours.weight.grad, own))
    logits = (torch.randn(9, V) * 30).to(*where)
    targets = torch.tensor([0, 100, 100, 3, 50, 51, 33, 34, 67], device=device)
    part = padded_rows(V, ranks)
    mine = torch.full((9, part.size), 1e30, dtype=dtype, device=device)  # padding must not count
    mine[:, : part.stop - part.start] = logits[:, part.start : part.stop]
    mine.requires_grad_()
    logits.requires_grad_()
    loss, expected = (
        vocab_parallel_cross_entropy(mine, targets, ranks, V),
        F.cross_entropy(logits, targets, reduction="none"),
    )
    weights = torch.linspace(0, 2, 9, dtype=dtype, device=device)
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    wanted = logits.grad[:, part.start : part.stop]
    given = mine.grad[:, : part.stop - part.start]
    worst["cross-entropy"] = max(far(loss, expected), far(given, wanted))
    assert not mine.grad[:, part.stop - part.start :].any()
    return worst


@pytest.mark.parametrize("where", on_devices([1, 2, 3, 4]), ids=named)
def test_each_layer_is_torchs_own(where):
    device, t = where
    for worst in launch(run_layers, t, device=device):
        assert max(worst.values()) < close(device), worst


def new_layers(mesh):
    torch.manual_seed(5)
    column = ColumnParallelLinear(6, 12, mesh=mesh, dtype=torch.float64)
    row = RowParallelLinear(12, 6, mesh=mesh, dtype=torch.float64)
    embedding = VocabParallelEmbedding(10, 6, mesh=mesh, dtype=torch.float64)
    return row(torch.relu(column(embedding(torch.tensor([1, 9])))))


def test_new_layers_are_parts_of_one_whole():
    torch.manual_seed(5)
    column, row, embedding = nn.Linear(6, 12).double(), nn.Linear(12, 6).double(), nn.Embedding(10, 6).double()
    torch.manual_seed(5)
    column, row = nn.Linear(6, 12, dtype=torch.float64), nn.Linear(12, 6, dtype=torch.float64)
    embedding = nn.Embedding(10, 6, dtype=torch.float64)
    expected = row(torch.relu(column(embedding(torch.tensor([1, 9])))))
    for found in launch(new_layers, 2, device="cpu"):
        assert (found - expected).abs().max() < 1e-12


def mlp_of_torch(mesh):
    """The same MLP by torch's own DTensor, and by ours."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def mlp():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)).double()

    theirs = parallelize_module(mlp(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    ours = parallelize(nn.Sequential(mlp()), mesh, {"0": Block(), "0.0": Column(), "0.2": Row()})
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y, z = ours(x), theirs(x)
        y.square().sum().backward()
        z.square().sum().backward()
    gradients = [(ours[0][0].weight.grad, theirs[0].weight.grad), (ours[0][2].weight.grad, theirs[2].weight.grad),
                 (ours[0][2].bias.grad, theirs[2].bias.grad)]  # fmt: skip
    return [(y - z).abs().max().item()] + [(a - b.to_local()).abs().max().item() for a, b in gradients]


def test_torchs_dtensor_has_the_same_parts():
    for worst in launch(mlp_of_torch, 2, device="cpu"):
        assert max(worst) < 1e-12


def exchange_inputs(mesh):
    """Every exchange, forward and backward, on tensors that are looked at again afterwards."""
    ranks, changed = Communicator(mesh), []
    for exchange in (copy_to_ranks, sum_over_ranks, gather_for_ranks, sum_to_parts):
        x = torch.arange(16.0).view(4, 4).requires_grad_()
        before = x.detach().clone()
        y = exchange(x, ranks)
        gradient = torch.ones_like(y) * (ranks.rank + 1)
        kept = gradient.clone()
        y.backward(gradient)
        changed.append(not (torch.equal(x.detach(), before) and torch.equal(gradient, kept)))
    return changed


def test_collectives_leave_their_input_alone():
    assert launch(exchange_inputs, 2, device="cpu") == [[False] * 4] * 2


def refusals(mesh):
    """What is said where the ranks do not divide; and that nothing is half done."""
    said = []

    def note(call):
        try:
            call()
        except (ValueError, TypeError) as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            said.append("nothing")

    model = llama(9, 3)
    names = [name for name, _ in model.named_modules()]
    note(lambda: parallelize(model, mesh))
    note(
        lambda: parallelize(model, mesh, {"model.layers.*.mlp.up_proj": Column(), "model.layers.*.mlp.no_proj": Row()})
    )
    note(lambda: parallelize(model, mesh, {"model.layers.*.mlp.up_proj": Column(), "model.norm": Row()}))
    note(lambda: parallelize(nn.Linear(2, 2), mesh))
    said.append(
        str(
            names == [name for name, _ in model.named_modules()]
            and all(type(m) is not ColumnParallelLinear for m in model.modules())
        )
    )
    note(lambda: ColumnParallelLinear(4, 7, mesh=mesh))
    note(lambda: RowParallelLinear(12, 4, unit=4, mesh=mesh))
    note(lambda: ColumnParallelLinear(4, 10, unit=4, mesh=mesh))
    ranks = Communicator(mesh)
    note(lambda: sum_to_parts(torch.zeros(3, 5), ranks, 0))
    note(lambda: vocab_parallel_cross_entropy(torch.zeros(1, 6), torch.tensor([11]), ranks, 11))
    note(lambda: vocab_parallel_cross_entropy(torch.zeros(1, 5), torch.tensor([1]), ranks, 11))
    note(lambda: Communicator("ranks"))
    note(lambda: ParallelTransformer.part_of(llama(9, 3), mesh))
    return said


def test_what_the_ranks_do_not_divide_is_refused_with_the_numbers():
    first, second = launch(refusals, 2, device="cpu")
    assert first == second == [
        "ValueError: size: 2 ranks do not divide the 9 query heads of 'LlamaForCausalLM'",
        "ValueError: plan: no module of this LlamaForCausalLM is named 'model.layers.*.mlp.no_proj'",
        "TypeError: plan: 'model.norm' is a LlamaRMSNorm, expected a Linear",
        "ValueError: plan: expected one, as this model has no config to derive it from",
        "True",
        "ValueError: column: 2 ranks do not divide its 7 channels",
        "ValueError: row: 2 ranks do not divide its 3 heads of 4 channels",
        "ValueError: column: units of 4 do not divide its 10 channels",
        "ValueError: 2 ranks do not divide dimension 0 of a tensor of shape (3, 5)",
        "ValueError: targets: expected ids below 11, got 11 to 11",
        "ValueError: logits: expected 6 columns, a share of 11, got 5",
        "TypeError: mesh: expected a DeviceMesh or a process group, got str 'ranks'",
        "ValueError: size: 2 ranks do not divide the 9 query heads of 'LlamaForCausalLM'",
    ]  # fmt: skip


def generate(mesh, folder, prompts, new, graphs):
    model, num_bytes = load_parallel(folder, mesh)
    by_transformers = model.generate(
        torch.tensor([prompts[0]], device=mesh.device_type),
        attention_mask=torch.ones(1, len(prompts[0]), dtype=torch.long, device=mesh.device_type),
        max_new_tokens=new, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    engine = Engine(
        ParallelTransformer.load(folder, mesh), num_blocks=64, max_num_seqs=4, max_length=128, graphs=graphs
    )
    params = [SamplingParams(max_new_tokens=new), SamplingParams(max_new_tokens=new, temperature=1.0, seed=3)]
    by_engine = [[c.token_ids for c in engine.generate(prompts, p)] for p in params]
    del engine
    gc.collect()  # graphs go before the ranks part
    return (
        by_transformers[0, len(prompts[0]) :].tolist(),
        by_engine,
        num_bytes,
        sum(p.numel() for p in model.parameters()),
    )


def check_generation(folder, device, t, prompts, new=10, graphs=False):
    """Tokens of one device, and each rank reads its part of the file."""
    alone = launch(generate, 1, folder, prompts, new, graphs, device=device)[0]
    for tokens, by_engine, num_bytes, size in launch(generate, t, folder, prompts, new, graphs, device=device):
        assert tokens == alone[0]
        assert by_engine == alone[1]
        assert size <= alone[3] / t * 1.02
        assert num_bytes <= alone[2] / t * 1.02
    return alone


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory):
    """A Llama whose greedy tokens vary."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(2)
    shape = {"vocab_size": V, "hidden_size": 128, "intermediate_size": F_, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 4, "tie_word_embeddings": False}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=None, eos_token_id=None)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    model.save_pretrained(folder)
    return str(folder), model


PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], list(range(40, 75)), [100]]


@pytest.mark.parametrize("where", on_devices([2, 4]), ids=named)
def test_generation_over_ranks_is_that_of_one_device(small_checkpoint, where):
    folder, model = small_checkpoint
    alone = check_generation(folder, *where, PROMPTS)
    expected = model.generate(
        torch.tensor(PROMPTS[:1]),
        attention_mask=torch.ones(1, 8, dtype=torch.long),
        max_new_tokens=10,
        do_sample=False,
        pad_token_id=0,
    )
    assert alone[0] == expected[0, 8:].tolist()
    assert alone[1][0][0] == alone[0]
    assert len(set(alone[0])) > 2


@pytest.mark.multi_gpu
def test_cuda_graphs_with_sums_over_ranks_in_them_give_the_same_tokens(small_checkpoint):
    folder, _ = small_checkpoint
    with_graphs = check_generation(folder, "cuda", 2, PROMPTS, graphs=True)
    assert with_graphs[1] == launch(generate, 1, folder, PROMPTS, 10, False, device="cuda")[0][1]


@pytest.mark.parametrize("where", on_devices([3]), ids=named)
def test_the_real_model_over_three_ranks(where):
    """SmolLM2's 9 query heads and 3 key/value heads: 3 and 1 on each."""
    _, tokenizer = load_model("smollm2-135m", "cpu")
    prompts = [tokenizer("The three laws of thermodynamics are")["input_ids"]]
    alone = check_generation("smollm2-135m", *where, prompts, new=4)
    assert alone[3] == 134_515_008


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    from llmlab.parallel.loading import checkpoint_folder, open_weights

    with pytest.raises(
        ValueError, match="name: expected one of smollm2-135m or the folder of a checkpoint, got 'no/such'"
    ):
        checkpoint_folder("no/such")
    with pytest.raises(OSError, match=r"lacks model\.safetensors"), open_weights(tmp_path):
        pass


def test_a_rank_alone_moves_nothing():
    def alone(mesh):
        ranks = Communicator(mesh)
        x = torch.randn(4, 4)
        same = [ranks.all_reduce(x), ranks.all_gather(x), ranks.reduce_scatter(x)]
        return [torch.equal(x, y) and x.data_ptr() != y.data_ptr() for y in same], ranks.log

    assert launch(alone, 1, device="cpu") == [([True] * 3, [])]


def test_dist_is_left_as_it_was():
    assert not dist.is_initialized()
