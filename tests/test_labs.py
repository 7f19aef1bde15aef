"""Every lab's grader is proved, and the example class earns what it must through plain nbgrader commands."""

import contextlib
import copy
import csv
import importlib
import io
import math
import os
import re
import subprocess
import sys
import time

import nbformat
import pytest
import torch

from llmlab.authoring.answers import read_answers
from llmlab.authoring.example_class import example_class, write_class
from llmlab.authoring.lab import find_labs
from llmlab.authoring.proof import SAMPLE, SAMPLE_SEED, full_proof, prove
from llmlab.authoring.run import run_exercise
from llmlab.config import MODEL_CONFIGS
from llmlab.grading.batch import Local
from llmlab.grading.checks import student_rng
from llmlab.grading.grade import Bundle
from llmlab.grading.withhold import Withheld, names_withheld_by, restored_behind

LABS = find_labs(__import__("pathlib").Path(__file__).parent.parent / "labs")
# What the made-up students earn in each lab, added up by hand from the points of its properties.
SCORES = {
    "batching": {  # of 18 points
        "student-01": 18, "student-02": 0, "student-03": 9, "student-04": 6.75, "student-05": 14.5, "student-06": 14.5,
        "student-07": 18, "student-08": 18, "student-09": 18, "student-10": 16, "student-11": 18,
    },
    "memory": {  # of 19 points
        "student-01": 19, "student-02": 0, "student-03": 11, "student-04": 2.25, "student-05": 16, "student-06": 16,
        "student-07": 19, "student-08": 19, "student-09": 19, "student-10": 17, "student-11": 19,
    },
    "paged_kv_cache": {  # of 19 points
        "student-01": 19, "student-02": 0, "student-03": 9.5, "student-04": 5, "student-05": 15, "student-06": 15,
        "student-07": 19, "student-08": 19, "student-09": 19, "student-10": 17, "student-11": 19,
    },
    "pipeline_parallelism": {  # of 18 points
        "student-01": 18, "student-02": 0, "student-03": 10, "student-04": 7.75, "student-05": 15, "student-06": 15,
        "student-07": 18, "student-08": 18, "student-09": 18, "student-10": 16, "student-11": 18,
    },
    "roofline": {  # of 19.5 points
        "student-01": 19.5, "student-02": 0, "student-03": 10.5, "student-04": 5.25, "student-05": 16, "student-06": 16,
        "student-07": 19.5, "student-08": 19.5, "student-09": 19.5, "student-10": 17.5, "student-11": 19.5,
    },
    "splitfuse": {  # of 17 points
        "student-01": 17, "student-02": 0, "student-03": 6, "student-04": 7, "student-05": 13, "student-06": 13,
        "student-07": 17, "student-08": 17, "student-09": 17, "student-10": 15, "student-11": 17,
    },
    "tensor_parallelism": {  # of 19 points
        "student-01": 19, "student-02": 0, "student-03": 11, "student-04": 5.75, "student-05": 16, "student-06": 16,
        "student-07": 19, "student-08": 19, "student-09": 19, "student-10": 17, "student-11": 19,
    },
}  # fmt: skip


@pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.name)
def test_the_grader_grades(lab, request):
    proof = full_proof(lab) if request.config.getoption("--all-mutants") else prove(lab, SAMPLE, SAMPLE_SEED)
    assert proof.problems == []


@pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.name)
def test_a_lab_has_three_to_six_exercises_and_a_prediction(lab):
    assert 3 <= len(lab.exercises) <= 6
    assert any(e.name.startswith("predicted") for e in lab.exercises)


@pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.name)
def test_the_first_cell_says_device_time_and_difficulty(lab):
    first = lab.cells[0]
    assert first.cell_type == "markdown"
    for word in ("**Device**", "**Time**", "**Difficulty**"):
        assert word in first.source


@pytest.fixture(scope="module")
def graded(request, tmp_path_factory):
    """The class of every lab, graded by nbgrader in a course of its own: its folder, submissions, export."""
    root = request.config.rootpath
    course = tmp_path_factory.mktemp("course")
    environment = {
        **os.environ,
        "LLMLAB_COURSE_ROOT": str(course),
        "LLMLAB_CHECK_SECONDS": "2",
        "LLMLAB_CELL_SECONDS": "20",
    }

    def nbgrader(*arguments):
        result = subprocess.run(
            ["nbgrader", *arguments], cwd=root / "labs", env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr[-3000:]

    submissions = {}
    for lab in LABS:
        lab.build(course / "build" / "source")
        nbgrader("generate_assignment", lab.name, "--create")
        released = nbformat.read(course / "build" / "release" / lab.name / f"{lab.name}.ipynb", as_version=4)
        submissions[lab.name] = example_class(lab, released)
        write_class(submissions[lab.name], lab, course)
        nbgrader("autograde", lab.name)
        nbgrader("generate_feedback", lab.name)
    nbgrader("export", f"--to={course / 'grades.csv'}")
    with (course / "grades.csv").open(encoding="utf-8") as file:
        return course, submissions, list(csv.DictReader(file))


def test_every_students_drawn_model_can_be_built(root):
    """The prediction's model of a few hundred ids: transformers takes the shape, and its parameters are the formula's."""
    from llmlab.checkpoint import transformers_config

    lab = next(lab for lab in LABS if lab.name == "memory")
    given = next(c.source for c in lab.cells if c.metadata.get("nbgrader", {}).get("grade_id") == "given")
    namespace = {}
    exec(re.sub(r"^withhold\(.*\)$", "", given, flags=re.MULTILINE), namespace)
    for number in range(300):
        config = namespace["draw_decoder"](student_rng(f"student-{number:02d}", "memory"))
        assert config.num_heads * config.head_size != config.hidden_size
        assert transformers_config(config).num_key_value_heads == config.num_kv_heads


def run_reference(lab, student):
    """The names that the lab's own cells leave behind for a student, the tests' left out; ``counted`` is what was measured."""
    names = {"__name__": "__lab__"}
    with restored_behind(), contextlib.redirect_stdout(io.StringIO()):
        for cell in lab.cells:
            if cell.cell_type == "code" and not cell.metadata.get("nbgrader", {}).get("grade"):
                exec(cell.source.replace('"student-00"', repr(student)), names)
                names["measured"] = lambda _, predicted, counted, *unit: names.update(counted=counted)
    return names


def test_every_students_training_step_moves_what_the_hidden_test_says():
    """As the ranks count it for a few; and for many, nothing in it may be forgotten, and no half of it is of the right size."""
    tests = TENSOR.exercises[-1].tests
    for number in range(1, 5):
        names = run_reference(TENSOR, f"student-{number:02d}")
        assert names["counted"] == pytest.approx(names["predicted_bytes"], rel=1e-9)
        assert names["loss"] == pytest.approx(names["alone"], rel=2e-3)  # in bfloat16
    parts = [tests[tests.index(f"def {name}") :].split("\n\n\n")[0] for name in ("ring", "sent_by_ring")]
    exec("\n".join(parts), names)
    assert names["sent_by_ring"](names["my_run"]) == pytest.approx(names["counted"], rel=1e-9)
    for number in range(300):
        run = names["draw_run"](student_rng(f"student-{number:02d}", TENSOR.name))
        right, stream = names["sent_by_ring"](run), names["ring"](run)
        loss = (run["t"] - 1) * 12 * run["B"] * run["S"]
        again = len(run["computed again"]) * run["layers"] * stream
        twins = right - (4 + 8 * run["layers"]) * stream - loss - again
        assert all(part > 0.015 * right for part in (stream, loss, again, twins)), run
        assert right / 2 < 8 * run["layers"] * stream < right < 16 * run["layers"] * stream


def test_every_students_decode_step_waits_for_both_arithmetic_and_memory():
    """Matrices compute and attention reads, for many students: then no floor of the whole step at once is in the band."""
    tests, names = ROOFLINE.exercises[-1].tests, run_reference(ROOFLINE, "student-01")
    exec(tests[tests.index("def step_parts") :].split("\n\n\n")[0], names)
    assert names["counted"] > 0
    for number in range(300):
        step = names["draw_step"](student_rng(f"student-{number:02d}", ROOFLINE.name))
        (read, compute), (read_cache, compute_pairs) = names["step_parts"](*step)
        right = compute + read_cache
        assert compute > 1.2 * read
        assert read_cache > 1.2 * compute_pairs
        wrong = (
            read + read_cache,
            compute + compute_pairs,
            compute,
            compute + read_cache / 2,
            sum((read, right, compute_pairs)),
        )
        assert all(abs(seconds / right - 1) > 0.02 for seconds in wrong), step


@pytest.mark.xdist_group("class")
def test_the_class_earns_what_it_must(graded):
    _, submissions, rows = graded
    earned = {(r["assignment"], r["student_id"]): (r["status"], float(r["score"])) for r in rows}
    expected = {(lab, s.student): (s.status, s.score) for lab, made in submissions.items() for s in made}
    assert earned == expected


@pytest.mark.xdist_group("class")
@pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.name)
def test_the_scores_are_those_worked_out_by_hand(graded, lab):
    rows = {r["student_id"]: float(r["score"]) for r in graded[2] if r["assignment"] == lab.name}
    assert rows == SCORES[lab.name]


@pytest.mark.xdist_group("class")
def test_the_feedback_shows_outcomes_and_no_hidden_test(graded):
    course, submissions, _ = graded
    for lab in LABS:
        for submission in submissions[lab.name]:
            page = (course / "feedback" / submission.student / lab.name / f"{lab.name}.html").read_text(
                encoding="utf-8"
            )
            for hidden in ("HIDDEN TESTS", "check.hidden", "submission_rng", "randrange(10**6"):
                assert hidden not in page, (submission.student, hidden)
        empty = (course / "feedback" / "student-02" / lab.name / f"{lab.name}.html").read_text(encoding="utf-8")
        assert "✗" in empty


@pytest.mark.xdist_group("class")
def test_the_measurement_is_recorded_beside_the_prediction(graded):
    course, _, _ = graded
    notebook = nbformat.read(course / "autograded" / "student-01" / "memory" / "memory.ipynb", as_version=4)
    recorded = notebook.metadata["llmlab"]["measurements"]
    assert [m["measured"] == pytest.approx(m["predicted"], rel=0.001) for m in recorded] == [True]


LIFTED = [lab for lab in LABS if any(exercise.lifted_from for exercise in lab.exercises)]


@pytest.mark.sandbox
@pytest.mark.parametrize("lab", LIFTED, ids=lambda lab: lab.name)
@pytest.mark.parametrize(
    "how",
    ["{name} = first[{name!r}]", "from {module} import {name}", "__name__ = {module!r}\nfrom {module} import {name}"],
)
def test_the_packages_own_function_earns_nothing_as_an_answer(lab, how):
    """Imported as it is, before the cell that withholds it, or under the name of a module that may call it."""
    notebook, dotted = copy.deepcopy(lab.notebook()), {e.name: e.lifted_from for e in lab.exercises if e.lifted_from}
    instructor = nbformat.writes(notebook)
    for cell in notebook.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id")
        if name in dotted and cell.metadata["nbgrader"]["solution"]:
            module, _, function = dotted[name].rpartition(".")
            answer = how.format(module=module, name=function)
            cell.source = answer if function == name else f"{answer}\n{name} = {function}"
    imports = "\n".join(f"from {d.rpartition('.')[0]} import {d.rpartition('.')[2]}" for d in dotted.values())
    grabbed = f"{imports}\nfirst = dict(globals())"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(grabbed, id="grabbed-first"))
    (result,) = Local(1).run([Bundle(lab.name, "student-01", instructor, nbformat.writes(notebook), "secret")])
    assert result["status"] == "ok"
    outcomes = {cell["grade_id"]: cell["outcomes"] for cell in result["cells"] if cell["outcomes"]}
    for name in dotted:
        assert [o["property"] for o in outcomes[f"test_{name}"] if o["passed"] and o["points"]] == [], name
        assert any("answers this exercise" in o["message"] for o in outcomes[f"test_{name}"]), name


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
WAYS = re.findall(r"^def (by_\w+)", PARTS, flags=re.MULTILINE)
TENSOR = next(lab for lab in LABS if lab.name == "tensor_parallelism")


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
    exercise = next(e for e in TENSOR.exercises if e.name == "shard_linear")
    given = {}
    exec(f"import torch\n{cut_by(way)}", given)
    weight = torch.arange(24.0, dtype=torch.float64).view(4, 6)
    for kind, parts in (("column", weight.chunk(2)), ("row", weight.chunk(2, 1))):  # it would be an answer
        assert all(given["shard_linear"](weight, None, kind, r, 2)[0].equal(parts[r]) for r in range(2))
    record = run_exercise(TENSOR, exercise, cut_by(way), "student-01")
    assert [o.property for o in record.outcomes if o.passed] == []
    assert any("answers this exercise" in o.message for o in record.outcomes)


SHOWN = [
    (lab, exercise)
    for lab in LABS
    if lab.name in ("paged_kv_cache", "tensor_parallelism")
    for exercise in lab.exercises[:-1]
]


@pytest.mark.parametrize(("lab", "exercise"), SHOWN, ids=[exercise.name for _, exercise in SHOWN])
def test_a_student_sees_each_named_wrong_answer_fail(lab, exercise):
    for answer in read_answers(lab).wrong(exercise.name):
        outcomes = run_exercise(lab, exercise, answer.source, "student-01").outcomes
        assert any(o.points and not o.passed and o.message for o in outcomes if not o.hidden), answer.name


@pytest.mark.sandbox
def test_in_the_worker_the_package_cuts_no_weight():
    notebook = copy.deepcopy(TENSOR.notebook())
    instructor = nbformat.writes(notebook)
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("grade_id") == "shard_linear":
            # Imported once, in the cell: a property, of which each has a process of its own, has less time.
            cell.source = f"from transformers import LlamaForCausalLM\n{cut_by(*WAYS)}"
    (result,) = Local(1).run([Bundle(TENSOR.name, "student-01", instructor, nbformat.writes(notebook), "secret")])
    assert result["status"] == "ok"
    outcomes = next(cell["outcomes"] for cell in result["cells"] if cell["grade_id"] == "test_shard_linear")
    assert [o["property"] for o in outcomes if o["passed"]] == []
    assert any("answers this exercise" in o["message"] for o in outcomes)


# How a step is filled, by the first step of whatever of the package fills one.
FILLS = """
def fill_budget(prompts, budget, most=None):
    from llmlab.batching import RooflineCost, policies, simulate
    from llmlab.batching.workload import make_requests
    from llmlab.kv_cache import BlockManager

    requests = make_requests([0.0] * len(prompts), [(n, 1) for n in prompts])
    kv = BlockManager(1000, 16, prefix_caching=False)
    (first, *_) = simulate(requests, policies.{policy}, RooflineCost(1, 1), kv).steps
    return [dict(first.tokens).get(i, 0) for i in range(len(prompts))]
"""
SPLITFUSE = next(lab for lab in LABS if lab.name == "splitfuse")


@pytest.mark.parametrize(
    "policy",
    ["SplitFuse(budget, most)", "PrefillFirst(budget)", "OrcaBatching(64, budget)", "StaticBatching(64, budget)"],
)
def test_no_policy_of_the_package_fills_a_step(policy):
    exercise = next(e for e in SPLITFUSE.exercises if e.name == "fill_budget")
    answer, given = FILLS.format(policy=policy), {}
    exec(answer, given)  # it would be an answer
    assert given["fill_budget"]([600, 100], 512) == [512, 0]
    record = run_exercise(SPLITFUSE, exercise, answer, "student-01")
# What a step moves and computes, by whatever of the package counts it.
COUNTS = {
    "attention_flops": """
def attention_flops(config, prompt, cached=0):
    work = roofline.prefill_work(1, prompt, cached)
    return roofline.step_flops(config, work) - roofline.step_flops(config, work._replace(attended_pairs=0))
""",
    "step_bytes": """
def step_bytes(config, new_tokens, kv_tokens, *widths):
    return roofline.step_bytes(config, roofline.Work(new_tokens, kv_tokens, 0, 0), *widths)
""",
    "arithmetic_intensity": """
def arithmetic_intensity(config, batch, prompt, cached=0):
    return roofline.arithmetic_intensity(config, roofline.prefill_work(batch, prompt, cached))
""",
    "crossover_batch": """
def crossover_batch(weight_bytes, kv_bytes, flops, device, dtype="bfloat16"):
    return math.ceil(roofline.crossover_batch(MODEL_CONFIGS["llama-3.2-1b"], device, dtype))
""",
}
ROOFLINE = next(lab for lab in LABS if lab.name == "roofline")


@pytest.mark.parametrize("name", COUNTS)
def test_no_way_through_the_package_to_what_a_step_counts_is_open(name):
    exercise = next(e for e in ROOFLINE.exercises if e.name == name)
    answer = f"from llmlab import roofline\n{COUNTS[name]}"
    given = {"math": math, "MODEL_CONFIGS": MODEL_CONFIGS}
    exec(answer, given)
    arguments = (16, 0, 2, "h100-80gb") if name == "crossover_batch" else (MODEL_CONFIGS["llama-3.2-1b"], 3, 2)
    assert given[name](*arguments) > 0  # outside the lab it is there
    record = run_exercise(ROOFLINE, exercise, answer, "student-01")
    assert [o.property for o in record.outcomes if o.passed] == []
    assert any("answers this exercise" in o.message for o in record.outcomes)


@pytest.mark.parametrize("exercise", ROOFLINE.exercises[:-1], ids=lambda exercise: exercise.name)
def test_a_student_sees_each_wrong_count_fail(exercise):
    for answer in read_answers(ROOFLINE).wrong(exercise.name):
        outcomes = run_exercise(ROOFLINE, exercise, answer.source, "student-01").outcomes
        assert any(o.points and not o.passed and o.message for o in outcomes if not o.hidden), answer.name


# How long the drawn pipeline takes, by whatever of the package runs a schedule.
RUNS = """
from llmlab.parallel.schedules import Costs, Schedule, bubble_fraction, simulate

mine = Schedule("1f1b", my_p, my_m, 1, one_f_one_b_orders(my_p, my_m))
my_costs = Costs(my_forward, my_backward, 0, my_transfer)  # 0: the backward includes the weights' part


def by_a_run():
    return simulate(mine, my_costs).makespan


def by_its_bubble():
    return my_m * max(f + b for f, b in zip(my_forward, my_backward)) / (1 - bubble_fraction(mine, costs=my_costs))


"""
PIPELINE = next(lab for lab in LABS if lab.name == "pipeline_parallelism")


@pytest.mark.parametrize("way", re.findall(r"^def (by_\w+)", RUNS, flags=re.MULTILINE))
def test_no_way_through_the_package_to_the_makespan_is_open(way):
    exercise = next(e for e in PIPELINE.exercises if e.name == "predicted_makespan")
    answer = f"{RUNS}predicted_makespan = float({way}())"
    drawn = {}
    run_exercise(PIPELINE, exercise, exercise.answer, "student-01", drawn.update)
    given = {name: drawn[name] for name in drawn if name.startswith("my_") or name == "one_f_one_b_orders"}
    exec(answer, given)  # it would be an answer
    assert given["predicted_makespan"] == pytest.approx(drawn["predicted_makespan"], rel=1e-9)
    said = {}
    record = run_exercise(PIPELINE, exercise, answer, "student-01", said.update)
    assert record.score == 0
    assert "answers this exercise" in str(said["answer_error"])


@pytest.mark.sandbox
@pytest.mark.parametrize(
    "how",
    [
        "simulate = first['simulate']",
        "from llmlab.parallel.schedules.simulate import simulate",
        "__name__ = 'llmlab.parallel.schedules.simulate'\nfrom llmlab.parallel.schedules.simulate import simulate",
    ],
)
def test_in_the_worker_the_package_runs_no_schedule(how):
    """Imported before the cell that withholds it, as it is, or under the name of a module that may call it."""
    notebook = copy.deepcopy(PIPELINE.notebook())
    instructor = nbformat.writes(notebook)
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("grade_id") == "predicted_makespan":
            cell.source = f"{RUNS}{how}\npredicted_makespan = float(by_a_run())"
        elif cell.source.startswith("student_id = "):
            cell.source = 'student_id = "student-01"'
    grabbed = "from llmlab.parallel.schedules.simulate import simulate\nfirst = dict(globals())"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(grabbed, id="grabbed-first"))
    (result,) = Local(1).run([Bundle(PIPELINE.name, "student-01", instructor, nbformat.writes(notebook), "secret")])
    assert result["status"] == "ok"
    cells = {cell["grade_id"]: cell for cell in result["cells"]}
    assert "answers this exercise" in cells["predicted_makespan"]["error"]["message"]
    outcomes = cells["test_predicted_makespan"]["outcomes"]
    assert [o["property"] for o in outcomes if o["passed"]] == ["student_id (first code cell) is your own"]
    assert result["score"] == PIPELINE.points - 2


# The drawn load's throughput, by the package's simulator; and the schedule, by the policy that an engine comes with.
BATCHING = next(lab for lab in LABS if lab.name == "batching")
BY_THE_SIMULATOR = """
lengths = [(r["prompt"], r["max_new_tokens"]) for r in my_load]
coming = make_requests([0.0] * len(lengths), lengths)
run = simulate(coming, Plugged(schedule, *my_limits), LinearCost(*my_cost), BlockManager(200, 16))
predicted_throughput = run.throughput
"""
BY_THE_ENGINES_POLICY = """
def schedule(pool, max_batch_size, num_slots):
    from llmlab.batching import Request, State

    policy = Engine(TINY, num_blocks=50, max_num_seqs=max_batch_size, max_length=256, graphs=False).policy
    state = State(BlockManager(num_slots, 1), max_batch_size)
    for r in sorted(pool, key=lambda r: (r["generated"] == 0, r["arrival"])):
        state.add(Request(r["id"], [r["id"]] * (r["prompt"] + r["generated"]), r["max_new_tokens"] - r["generated"]))
    return [r.request_id for r in policy.schedule(state).requests]
"""


def test_the_packages_simulator_predicts_no_throughput():
    exercise = next(e for e in BATCHING.exercises if e.name == "predicted_throughput")
    drawn, said = {}, {}
    run_exercise(BATCHING, exercise, exercise.answer, "student-01", drawn.update)
    given = dict(drawn)
    exec(BY_THE_SIMULATOR, given)  # it would be an answer
    assert given["predicted_throughput"] == pytest.approx(drawn["predicted_throughput"], rel=1e-9)
    answer = f"from llmlab.batching import simulate\n{BY_THE_SIMULATOR}"
    assert run_exercise(BATCHING, exercise, answer, "student-01", said.update).score == 0
    assert "answers this exercise" in str(said["answer_error"])


def test_the_engines_own_policy_reserves_nothing_and_is_no_answer():
    exercise = next(e for e in BATCHING.exercises if e.name == "schedule")
    outcomes = run_exercise(BATCHING, exercise, BY_THE_ENGINES_POLICY, "student-01").outcomes
    assert not next(o for o in outcomes if o.property.startswith("all that a request may come to")).passed
    assert sum(o.points for o in outcomes if o.passed) < exercise.points


@pytest.mark.sandbox
@pytest.mark.parametrize(
    "how",
    [
        "",  # the name that the given cell imports for a check
        "simulate = first['simulate']",
        "from llmlab.batching.simulate import simulate",
        "__name__ = 'llmlab.batching.simulate'\nfrom llmlab.batching.simulate import simulate",
    ],
)
def test_in_the_worker_the_package_simulates_no_requests(how):
    """As the lab's own cell imports it, or before that cell withholds it, or under the name of a module that may call it."""
    notebook = copy.deepcopy(BATCHING.notebook())
    instructor = nbformat.writes(notebook)
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("grade_id") == "predicted_throughput":
            cell.source = f"{how}\n{BY_THE_SIMULATOR}"
        elif cell.source.startswith("student_id = "):
            cell.source = 'student_id = "student-01"'
    grabbed = "from llmlab.batching import simulate\nfirst = dict(globals())"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(grabbed, id="grabbed-first"))
    (result,) = Local(1).run([Bundle(BATCHING.name, "student-01", instructor, nbformat.writes(notebook), "secret")])
    assert result["status"] == "ok"
    cells = {cell["grade_id"]: cell for cell in result["cells"]}
    assert "answers this exercise" in cells["predicted_throughput"]["error"]["message"]
    assert result["score"] == BATCHING.points - 2


def test_every_students_load_tells_mistakes_from_the_right_throughput():
    """For many ids, each named wrong prediction lies further off than the band, and the engine takes no more than seconds."""
    exercise = BATCHING.exercises[-1]
    names = {}
    run_exercise(BATCHING, exercise, exercise.answer, "student-01", names.update)
    wrong = read_answers(BATCHING).wrong(exercise.name)
    for number in range(100):
        names["my_load"], names["my_limits"], names["my_cost"] = names["draw_load"](
            student_rng(f"student-{number:02d}", BATCHING.name)
        )
        exec(exercise.answer, names)
        right = names["predicted_throughput"]
        assert sum(r["max_new_tokens"] for r in names["my_load"]) / right < 5
        for answer in wrong:
            exec(answer.source, names)
            assert abs(names["predicted_throughput"] / right - 1) > 0.025, (number, answer.name)


# The blocks of a cache, by whatever of the package keeps them; and the attention through a table.
MANAGES = """
def by_the_manager(num_blocks, block_size):
    from llmlab.kv_cache import BlockManager

    return BlockManager(num_blocks, block_size, prefix_caching=False)


def by_the_engines_manager(num_blocks, block_size):
    from llmlab.engine.engine import _manager

    return _manager(num_blocks, block_size, False, 0)


class BlockTables:
    def __init__(self, num_blocks, block_size):
        self.kv, self.size = {way}(num_blocks, block_size), block_size

    def block_table(self, name):
        return list(self.kv.block_table(name))

    def num_free(self):
        return self.kv.num_free_blocks

    def allocate(self, name, num_tokens):
        self.told(self.kv.allocate, name, [0] * num_tokens)

    def append(self, name):
        self.told(self.kv.append, name, 0)
        block, offset = divmod(self.kv.num_tokens(name) - 1, self.size)
        return self.kv.block_table(name)[block] * self.size + offset

    def free(self, name):
        self.kv.free(name)

    def told(self, call, *arguments):
        from llmlab.kv_cache import OutOfBlocks

        try:
            call(*arguments)
        except OutOfBlocks as error:
            raise MemoryError(str(error)) from None
"""
ATTENDS = """
from llmlab.kernels import kernels_for, reference


def by_decodes(q, keys, values, tables, n, out):
    reference.decode_attention(q, keys, values, tables, torch.tensor([0]), n, q.shape[2] ** -0.5, out)


def by_the_kernels_of_a_device(q, keys, values, tables, n, out):
    kernels_for("cpu").decode_attention(q, keys, values, tables, torch.tensor([0]), n, q.shape[2] ** -0.5, out)


def by_a_step(q, keys, values, tables, n, out):
    reference.step_attention(q, keys, values, tables, torch.tensor([0]), n, None, None, q.shape[2] ** -0.5, out)


def by_a_chunk(q, keys, values, tables, n, out):
    chunks, tiles = torch.tensor([[0, 1, 0, int(n) - 1]]), torch.zeros(1, 2, dtype=torch.int32)
    reference.chunk_attention(q, keys, values, tables, chunks, tiles, q.shape[2] ** -0.5, out)


def by_the_cache(q, keys, values, tables, n, out):
    from dataclasses import replace
    from types import SimpleNamespace

    from llmlab.config import MODEL_CONFIGS
    from llmlab.kv_cache.paged import PagedCache, StepBatch

    blocks, kv_heads, size, d = keys.shape
    config = replace(MODEL_CONFIGS["llama-3-8b"], num_layers=1, num_heads=q.shape[1], num_kv_heads=kv_heads, head_size=d)
    cache = PagedCache(config, blocks, size, torch.device("cpu"), keys.dtype)
    cache.keys[0], cache.values[0] = keys, values
    none = torch.tensor([-1])
    attention = cache.attention(StepBatch(none, torch.tensor([0]), torch.tensor([0]), n), tables)
    cos_sin = torch.stack([torch.ones(1, d // 2), torch.zeros(1, d // 2)], 1)
    qkv = torch.cat([q.flatten(1), torch.zeros(1, 2 * kv_heads * d, dtype=q.dtype)], 1)
    layer = SimpleNamespace(index=0, q_norm=None, k_norm=None, eps=0.0)
    out.copy_(attention(layer, qkv, cos_sin).view_as(out))


def paged_attention(q, keys, values, block_table, num_tokens):
    out = torch.empty_like(q)[None]
    {way}(q[None], keys, values, torch.tensor([block_table]), torch.tensor([num_tokens]), out)
    return out[0]
"""
PAGED = next(lab for lab in LABS if lab.name == "paged_kv_cache")


def ways_in(source):
    return re.findall(r"^def (by_\w+)", source, flags=re.MULTILINE)


@pytest.mark.parametrize("way", ways_in(MANAGES))
def test_no_way_through_the_package_to_a_block_table_is_open(way):
    given, answer = {}, MANAGES.replace("{way}", way)
    exec(answer, given)
    blocks = given["BlockTables"](8, 4)  # it would be an answer
    blocks.allocate("a", 7)
    slots = [blocks.append("a") for _ in range(2)]
    assert slots == [4 * blocks.block_table("a")[1] + 3, 4 * blocks.block_table("a")[2]]
    refuses(PAGED, "BlockTables", answer)


@pytest.mark.parametrize("way", ways_in(ATTENDS))
def test_no_way_through_the_package_to_attention_over_a_table_is_open(way):
    given, answer = {"torch": torch}, ATTENDS.replace("{way}", way)
    exec(answer, given)
    keys, values = torch.randn(2, 5, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    q, table = torch.ones(4, 6), [3, 1]
    k, v = (c[table].transpose(0, 1).flatten(1, 2)[:, :7].repeat_interleave(2, 0)[None] for c in (keys, values))
    expected = torch.nn.functional.scaled_dot_product_attention(q[None, :, None], k, v)[0, :, 0]
    assert given["paged_attention"](q, keys, values, table, 7).allclose(expected, atol=1e-6)  # it would be an answer
    refuses(PAGED, "paged_attention", answer)


def refuses(lab, name, answer):
    """The answer earns nothing, and the student is told why."""
    exercise = next(e for e in lab.exercises if e.name == name)
    record = run_exercise(lab, exercise, answer, "student-01")
    assert [o.property for o in record.outcomes if o.passed] == []
    assert any("answers this exercise" in o.message for o in record.outcomes)


def withheld_by(lab):
    """What a lab withholds, by its dotted name."""
    given = [c.source for c in lab.notebook().cells if c.metadata.get("nbgrader", {}).get("grade_id") == "given"]
    names = [name for source in given for name in names_withheld_by(source)]
    return {n: getattr(importlib.import_module(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in names}


@pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.name)
def test_what_a_lab_withholds_is_there(lab):
    found = withheld_by(lab)
    assert len(found) > 5
    assert all(map(callable, found.values()))
    assert {e.lifted_from for e in lab.exercises} - {None} <= found.keys()


@pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.name)
def test_to_try_a_grader_in_this_process_withholds_nothing_from_it(lab):
    """Behind the run: what other tests of the process unpickle or call must still be there. In the run it is withheld."""
    before, during = withheld_by(lab), {}
    modules = package_names()
    exercise = lab.exercises[0]
    record = run_exercise(
        lab, exercise, exercise.answer, "student-01", lambda namespace: during.update(withheld_by(lab))
    )
    assert record.score == exercise.points
    assert [name for name in before if during[name] is before[name]] == []
    for name, guard in during.items():
        with pytest.raises(Withheld, match=f"{re.escape(name)} answers this exercise"):
            guard()
    assert withheld_by(lab) == before
    assert {place: value for place, value in package_names().items() if place in modules} == modules


def package_names():
    """What stands under every name of every module of the package that is imported."""
    modules = [(name, module) for name, module in sys.modules.items() if name.partition(".")[0] == "llmlab"]
    return {(name, alias): id(value) for name, module in modules for alias, value in list(vars(module).items())}


@pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.name)
def test_a_whole_lab_runs_in_time_without_a_network(lab, tmp_path):
    """The reference notebook from top to bottom, as the autograder runs it: under 60 s."""
    notebook = lab.build(tmp_path)
    notebook.write_text(
        notebook.read_text(encoding="utf-8").replace('\\"student-00\\"  #', '\\"student-01\\"  #'), encoding="utf-8"
    )
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "nbconvert",
        "--to",
        "notebook",
        "--execute",
        "--output",
        "done",
        str(notebook),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "LLMLAB_STUDENT": "student-01"}
    start = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    assert time.monotonic() - start < 60
