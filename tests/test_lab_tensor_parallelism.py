"""The lab on tensor parallelism: what its students draw, and that the package answers no exercise."""

import pytest
import torch
from lab_runs import LABS, cells_of, graded_in_worker, refuses, run_reference, ways_in

from llmlab.grading.checks import student_rng

LAB = LABS["tensor_parallelism"]
SCORES = {  # of 19 points, for the example class
    "student-01": 19,
    "student-02": 0,
    "student-03": 11,
    "student-04": 5.75,
    "student-11": 19,
}


def test_every_students_training_step_moves_what_the_hidden_test_says():
    """As the ranks count it for a few; and for many, nothing in it may be forgotten, and no half of it is of the right size."""
    tests = LAB.exercises[-1].tests
    for number in range(1, 5):
        names = run_reference(LAB, f"student-{number:02d}")
        assert names["counted"] == pytest.approx(names["predicted_bytes"], rel=1e-9)
        assert names["loss"] == pytest.approx(names["alone"], rel=2e-3)  # in bfloat16
    parts = [tests[tests.index(f"def {name}") :].split("\n\n\n")[0] for name in ("ring", "sent_by_ring")]
    exec("\n".join(parts), names)
    assert names["sent_by_ring"](names["my_run"]) == pytest.approx(names["counted"], rel=1e-9)
    for number in range(300):
        run = names["draw_run"](student_rng(f"student-{number:02d}", LAB.name))
        right, stream = names["sent_by_ring"](run), names["ring"](run)
        loss = (run["t"] - 1) * 12 * run["B"] * run["S"]
        again = len(run["computed again"]) * run["layers"] * stream
        twins = right - (4 + 8 * run["layers"]) * stream - loss - again
        assert all(part > 0.015 * right for part in (stream, loss, again, twins)), run
        assert right / 2 < 8 * run["layers"] * stream < right < 16 * run["layers"] * stream


# This rank's part of a linear layer's weight, by whatever of the package cuts one.
PARTS = """
class Played:
    device_type = "cpu"

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def neighbours(self, size):
        return self


def layer_of(weight):
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(weight)
    return linear


def llama_of(weight, kind, size):
    from transformers import LlamaConfig, LlamaForCausalLM

    wide, narrow = weight.shape if kind == "column" else weight.T.shape
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=size, hidden_size=narrow, intermediate_size=wide, num_hidden_layers=1, num_attention_heads=size,
        num_key_value_heads=size, head_dim=2, tie_word_embeddings=False,
    )).to(weight.dtype)
    layer = getattr(model.model.layers[0].mlp, "up_proj" if kind == "column" else "down_proj")
    layer.weight = torch.nn.Parameter(weight.contiguous())
    return model


def by_its_class(weight, kind, ranks):
    from llmlab.parallel.linear import ColumnParallelLinear, RowParallelLinear

    cut = ColumnParallelLinear if kind == "column" else RowParallelLinear
    return cut.from_linear(layer_of(weight), ranks).weight


def by_a_plan(weight, kind, ranks):
    from llmlab.parallel.plan import Column, Row, parallelize

    model = torch.nn.Sequential(layer_of(weight))
    return parallelize(model, ranks, {"0": Column() if kind == "column" else Row()})[0].weight


def by_whole_units(weight, kind, ranks):
    from llmlab.parallel.part import whole_units

    dim = 0 if kind == "column" else 1
    return whole_units("it", weight.shape[dim], 1, ranks, dim).take(weight)


def by_split(weight, kind, ranks):
    from llmlab.parallel.communicator import split

    return split(weight, ranks.size, 0 if kind == "column" else 1)[ranks.rank]


def by_take_part(weight, kind, ranks):
    from llmlab.parallel.exchange import take_part

    return take_part(weight, ranks, 0 if kind == "column" else 1)


def by_a_gradient(weight, kind, ranks):
    from llmlab.parallel.exchange import gather_parts

    ranks.all_gather = lambda x, dim: weight.clone()
    shape = (weight.shape[0] // ranks.size, weight.shape[1]) if kind == "column" else (weight.shape[0], weight.shape[1] // ranks.size)
    part = torch.zeros(shape, dtype=weight.dtype, requires_grad=True)
    return torch.autograd.grad(gather_parts(part, ranks, 0 if kind == "column" else 1), part, weight)[0]


def by_loading(weight, kind, ranks):
    import tempfile

    from llmlab.parallel.loading import load_parallel

    with tempfile.TemporaryDirectory() as folder:
        llama_of(weight, kind, ranks.size).save_pretrained(folder)
        model, _ = load_parallel(folder, ranks, dtype=weight.dtype)
    return getattr(model.model.layers[0].mlp, "up_proj" if kind == "column" else "down_proj").weight


def by_the_decoder(weight, kind, ranks):
    from llmlab.parallel.decoder import ParallelTransformer

    layer = ParallelTransformer.part_of(llama_of(weight, kind, ranks.size), ranks).layers[0]
    return layer.gate_up.weight.chunk(2)[1] if kind == "column" else layer.down.weight


def by_the_decoders_files(weight, kind, ranks):
    import tempfile

    from llmlab.parallel.decoder import ParallelTransformer

    with tempfile.TemporaryDirectory() as folder:
        llama_of(weight, kind, ranks.size).save_pretrained(folder)
        layer = ParallelTransformer.load(folder, ranks, weight.dtype).layers[0]
    return layer.gate_up.weight.chunk(2)[1] if kind == "column" else layer.down.weight
"""
WAYS = ways_in(PARTS)


def cut_by(*ways):
    """An answer to the exercise shard_linear: the first of these ways that cuts the weight."""
    return (
        PARTS
        + f"""
def shard_linear(weight, bias, kind, rank, size):
    said = []
    for way in ({", ".join(ways)},):
        try:
            part = way(weight, kind, Played(rank, size)).detach()
        except Exception as error:
            said.append(str(error))
        else:
            break
    else:
        raise RuntimeError("; ".join(said))
    if bias is None or kind == "row" and rank:
        return part, None
    return part, bias.chunk(size)[rank] if kind == "column" else bias
"""
    )


@pytest.mark.parametrize("way", WAYS)
def test_no_way_through_the_package_to_a_ranks_part_is_open(way):
    given = {}
    exec(f"import torch\n{cut_by(way)}", given)
    weight = torch.arange(24.0, dtype=torch.float64).view(4, 6)
    for kind, parts in (("column", weight.chunk(2)), ("row", weight.chunk(2, 1))):  # it would be an answer
        assert all(given["shard_linear"](weight, None, kind, r, 2)[0].equal(parts[r]) for r in range(2))
    refuses(LAB, "shard_linear", cut_by(way))


@pytest.mark.sandbox
def test_in_the_worker_the_package_cuts_no_weight():
    # Imported once, in the cell: a property, of which each has a process of its own, has less time.
    answer = f"from transformers import LlamaForCausalLM\n{cut_by(*WAYS)}"
    outcomes = cells_of(graded_in_worker(LAB, {"shard_linear": answer}))["test_shard_linear"]["outcomes"]
    assert [o["property"] for o in outcomes if o["passed"]] == []
    assert any("answers this exercise" in o["message"] for o in outcomes)
