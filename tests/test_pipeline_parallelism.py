"""Schedules run on ranks: the gradients of one device, the activations of the formula, the bubble of the simulator."""

import json
import statistics

import pytest
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  # ranks are forked from a server that has what is imported here
from on_devices import close, far, named, on_devices, place
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from llmlab.parallel import Pipeline, RankError, launch
from llmlab.parallel.schedules import (
    Costs,
    Schedule,
    ScheduleError,
    activations_in_flight,
    forward_only,
    gpipe,
    interleaved,
    lower_naively,
    one_f_one_b,
    simulate,
    zero_bubble,
)
from llmlab.parallel.sleeper import Sleeper
from llmlab.parallel.stages import llama_stages, sum_tied_gradients
from llmlab.parallel.weight_steps import WeightSteps

B, S, D, V, LAYERS = 2, 6, 32, 61, 8
SCHEDULES = {
    "GPipe": gpipe,
    "1F1B": one_f_one_b,
    "interleaved": lambda p, m: interleaved(p, m, 2),
    "ZB-H1": lambda p, m: zero_bubble(p, m, "H1"),
    "ZB-H2": lambda p, m: zero_bubble(p, m, "H2"),
    "ZB-V": lambda p, m: zero_bubble(p, m, "V"),
}


def llama(tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def cross_entropy(logits, ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def compare(mesh, schedule, tied):
    """The largest difference of a gradient to the model in one piece; the losses; activations; bytes."""
    m = schedule.m
    ids = torch.randint(0, V, (m * B, S), generator=torch.Generator().manual_seed(1)).to(mesh.device_type)
    whole, cut = (llama(tied).to(*place(mesh)) for _ in range(2))
    loss = cross_entropy(whole(ids).logits, ids)
    loss.backward()
    stages = llama_stages(cut, schedule, mesh.get_local_rank())
    pipeline = Pipeline(stages, schedule, mesh, (B, S, D), place(mesh)[1], cross_entropy)
    losses, record = pipeline.step(ids.chunk(m), ids.chunk(m))
    if tied:
        sum_tied_gradients(stages, schedule, mesh)
    names = {id(parameter): name for name, parameter in cut.named_parameters()}
    mine = {names[id(parameter)]: parameter.grad for stage in stages for parameter in stage.parameters()}
    worst = max(far(gradient, whole.get_parameter(name).grad) for name, gradient in mine.items())
    mean = sum(x.item() for x in losses) / m - loss.item() if losses else None
    return (
        worst,
        sorted(mine),
        mean,
        (record.until_backward, record.until_weight),
        record.sent_bytes,
        [r.operation for r in record.ran],
    )


def compare_all(mesh, m, tied):
    return [compare(mesh, make(mesh.size(), m), tied) for make in SCHEDULES.values()]


@pytest.fixture(
    scope="module",
    params=on_devices([(1, 2), (2, 2), (2, 5), (3, 4), (4, 4), (4, 7)], lambda case: case[0]),
    ids=named,
)
def compared(request):
    """Every schedule on so many ranks; the numbers of micro-batches include some that the ranks do not divide."""
    device, (p, m) = request.param
    tied = m % 2 == 0
    by_rank = launch(compare_all, p, m, tied, device=device)
    return device, p, m, tied, {name: [of_rank[i] for of_rank in by_rank] for i, name in enumerate(SCHEDULES)}


@pytest.mark.parametrize("name", SCHEDULES)
def test_gradients_are_those_of_one_device(compared, name):
    device, p, m, tied, found = compared
    assert max(worst for worst, *_ in found[name]) < close(device)
    (mean,) = [mean for _, _, mean, *_ in found[name] if mean is not None]
    assert abs(mean) < close(device)
    names = [name for _, mine, *_ in found[name] for name in mine]
    expected = {name for name, _ in llama(tied).named_parameters()}
    assert set(names) == expected
    twice = {name for name in names if names.count(name) > 1}
    ends_apart = SCHEDULES[name](p, m).rank_of(SCHEDULES[name](p, m).num_stages - 1) != 0
    assert twice == ({"model.embed_tokens.weight"} if tied and ends_apart else set())


@pytest.mark.parametrize("name", SCHEDULES)
def test_activations_order_and_bytes_are_those_of_the_schedule(compared, name):
    device, p, m, _, found = compared
    schedule = SCHEDULES[name](p, m)
    assert [held for *_, held, _, _ in found[name]] == [tuple(held) for held in activations_in_flight(schedule)]
    assert [ran for *_, ran in found[name]] == [list(order) for order in schedule.orders]
    between = sum(schedule.rank_of(s) != schedule.rank_of(s + 1) for s in range(schedule.num_stages - 1))
    assert sum(num_bytes for *_, num_bytes, _ in found[name]) == 2 * m * between * B * S * D * (
        4 if device == "cuda" else 8
    )


def infer(mesh, m):
    model = llama(True).to(*place(mesh))
    schedule = forward_only(mesh.size(), m)
    pipeline = Pipeline(llama_stages(model, schedule, mesh.get_local_rank()), schedule, mesh, (B, S, D), place(mesh)[1])
    ids = torch.randint(0, V, (m * B, S), generator=torch.Generator().manual_seed(1)).to(mesh.device_type)
    with torch.no_grad():
        expected = model(ids).logits
    outputs, _ = pipeline.step(ids.chunk(m))
    return far(torch.cat(outputs), expected) if outputs else None


@pytest.mark.parametrize("where", on_devices([2, 3]), ids=named)
def test_micro_batches_of_inference(where):
    device, p = where
    *others, last = launch(infer, p, 4, device=device)
    assert others == [None] * (p - 1)
    assert last < close(device)


def sleep_through(mesh, schedule, unit):
    chunks = [Sleeper((unit / schedule.v,) * 3) for _ in range(schedule.v)]
    pipeline = Pipeline(chunks, schedule, mesh, (1,), loss=lambda y, _: y.sum())
    if schedule.splits_backward:
        for chunk in chunks:
            chunk.steps = pipeline.weight_steps
    inputs = [torch.ones(1)] * schedule.m
    pipeline.step(inputs, inputs)  # ranks find each other
    torch.distributed.barrier()
    return [(ran.start, ran.end) for ran in pipeline.step(inputs, inputs)[1].ran]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_measured_bubble_is_the_simulated_one(name):
    """Within 2 points of the step, on stages that sleep; a machine that does other work may be late, but not thrice."""
    unit, schedule = 0.15, SCHEDULES[name](4, 4)
    expected = float(simulate(schedule, Costs(unit, unit, unit)).bubble("total"))
    tries = []
    for _ in range(3):
        spans = launch(sleep_through, 4, schedule, unit, device="cpu")
        whole = max(rank[-1][1] for rank in spans) - min(rank[0][0] for rank in spans)
        busy = max(sum(end - start for start, end in rank) for rank in spans)
        tries.append((whole - busy) / whole)
        if abs(tries[-1] - expected) < 0.02:
            return
    raise AssertionError(f"expected a bubble of {expected:.3f}, measured {tries}")


@pytest.fixture(scope="module")
def result(request):
    file = request.config.rootpath / "benchmarks" / "results" / "pipeline_parallelism" / "cpu.json"
    return json.loads(file.read_text(encoding="utf-8"))


def test_the_committed_bubbles_are_within_two_points_in_the_median(result):
    rows = result["bubbles"]
    assert {(row["schedule"], row["m"]) for row in rows} >= {(make(4, 4).name, 4) for make in SCHEDULES.values()}
    off = {(row["schedule"], row["m"]): statistics.median(row["measured"]) - row["simulated"] for row in rows}
    assert {case: points for case, points in off.items() if abs(points) > 0.02} == {}
    assert all(len(row["measured"]) >= 3 for row in rows)


def test_the_committed_run_against_tensor_parallelism_moved_and_held_what_formulas_say(result):
    rows = result["against_tensor"]
    assert {(row["way"], row["what"]) for row in rows} == {
        (way, what) for way in ("alone", "tensor", "pipeline") for what in ("training", "inference")
    }
    for row in rows:
        found, expected = row["measured"], row["predicted"]
        assert {name: found[name] for name in ("messages", "sent_bytes", "held_bytes")} == {
            name: expected[name] for name in ("messages", "sent_bytes", "held_bytes")
        }
        assert found["peak_bytes"] == pytest.approx(
            expected["peak_bytes"], rel=0.1 if row["what"] == "training" else 0.25
        )
        assert len(row["seconds"]) >= 3
    assert not result["commit"].endswith("dirty")


def test_weight_steps_give_the_gradients_later():
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    parted = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    parted.load_state_dict(whole.state_dict())
    steps = WeightSteps()
    steps.defer(parted)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    for _ in range(2):  # gradients add up
        whole(a).square().sum().backward()
        parted(b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)
    assert parted[0].weight.grad is None
    assert parted[0].bias.grad is not None
    left = steps.take()
    assert len(left) == 4
    assert steps.take() == []
    for step in left:
        step()
    for ours, theirs in zip(parted.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


def refusals(mesh):
    said = []

    def note(call):
        try:
            call()
        except ValueError as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            said.append("nothing")

    model, schedule, rank = llama(False), gpipe(2, 2), mesh.get_local_rank()
    stages = llama_stages(model, schedule, rank)
    note(lambda: Pipeline(stages, gpipe(3, 2), mesh, (B, S, D), loss=cross_entropy))
    note(lambda: Pipeline(stages, zero_bubble(2, 4, "V"), mesh, (B, S, D), loss=cross_entropy))
    note(lambda: Pipeline(stages, schedule, mesh, (B, S, D)))
    wrong = Schedule("mine", 2, 1, 1, [[("B", 0), ("F", 0)], [("F", 0), ("B", 0)]])
    note(lambda: Pipeline(stages, wrong, mesh, (B, S, D), loss=cross_entropy))
    note(lambda: Pipeline(stages, schedule, mesh, (B, S, D), loss=cross_entropy).step([torch.zeros(1)], [0]))
    note(lambda: llama_stages(model, interleaved(2, 2, 5), rank))
    note(lambda: llama_stages(model, schedule, rank, [3, 4]))
    model.config._attn_implementation = "eager"
    note(lambda: llama_stages(model, schedule, rank))
    return said


def test_what_cannot_run_is_refused_with_the_numbers():
    first, second = launch(refusals, 2, device="cpu")
    expected = [
        "ValueError: schedule: it is for 3 ranks, and the mesh has 2",
        "ValueError: chunks: expected 2, as the schedule has for a rank, got 1",
        "ValueError: loss: expected one, as the schedule has a backward",
        "ScheduleError: mine: no rank can go on: ",
        "ValueError: inputs: expected 2 micro-batches, got 1",
        "ValueError: schedule: 2 ranks of 5 chunks are 10 stages; the model has 8 layers",
        "ValueError: sizes: expected 2 numbers of at least 1 that make 8 layers, got [3, 4]",
        "ValueError: model: expected causal attention by sdpa, got 'eager'",
    ]
    on_last = "ValueError: targets: expected 2, one for each micro-batch, got 1"
    for found, said in ((first, expected), (second, [*expected[:4], on_last, *expected[5:]])):
        for got, wanted in zip(found, said, strict=True):
            assert got.startswith(wanted)


@pytest.mark.parametrize("where", on_devices([2]), ids=named)
def test_a_rank_that_dies_in_mid_step_ends_the_run(where):
    def die(mesh):
        schedule = one_f_one_b(2, 4)

        class Stage(nn.Module):
            def forward(self, x):
                if mesh.get_local_rank() == 1:
                    raise FloatingPointError("no more")
                return x * 1

        inputs = [torch.ones(1, device=mesh.device_type)] * 4
        Pipeline([Stage()], schedule, mesh, (1,), loss=lambda y, _: y.sum()).step(inputs, inputs)

    device, p = where
    with pytest.raises(RankError, match="rank 1 raised FloatingPointError: no more"):
        launch(die, p, device=device, timeout=60)


def test_naive_programs_would_wait_for_ever():
    """Why the runtime takes its transfers from ``lower``."""
    from llmlab.parallel.schedules import validate

    with pytest.raises(ScheduleError, match="rank 0 waits for rank 1"):
        validate(lower_naively(one_f_one_b(2, 4)))
