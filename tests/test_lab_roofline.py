"""The lab on the roofline: what its students draw, and that the package answers no exercise."""

import math

import pytest
from lab_runs import LABS, refuses, run_reference

from llmlab.config import MODEL_CONFIGS
from llmlab.grading.checks import student_rng

LAB = LABS["roofline"]
SCORES = {  # of 19.5 points, for the example class
    "student-01": 19.5,
    "student-02": 0,
    "student-03": 10.5,
    "student-04": 5.75,
    "student-11": 19.5,
}


def test_every_students_decode_step_waits_for_both_arithmetic_and_memory():
    """Matrices compute and attention reads, for many students: then no floor of the whole step at once is in the band."""
    tests, names = LAB.exercises[-1].tests, run_reference(LAB, "student-01")
    exec(tests[tests.index("def step_parts") :].split("\n\n\n")[0], names)
    assert names["counted"] > 0
    for number in range(300):
        config, machine, batch, context = step = names["draw_step"](student_rng(f"student-{number:02d}", LAB.name))
        (read, compute), (read_cache, compute_pairs) = names["step_parts"](*step)
        right = compute + read_cache
        written = read_cache / (context + 1)
        head = 2 * config.vocab_size * config.hidden_size * batch / machine.flops_of("float32")
        assert compute > 1.2 * read
        assert read_cache > 1.2 * compute_pairs
        wrong = (
            read + read_cache,
            compute + compute_pairs,
            compute,
            compute + read_cache / 2,
            sum((read, right, compute_pairs)),
            right - written,  # the new keys and values counted once
            right - 2 * written,  # or not at all
            right - head,
        )
        assert all(abs(seconds / right - 1) > 0.002 for seconds in wrong), step  # twice the band


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


@pytest.mark.parametrize("name", COUNTS)
def test_no_way_through_the_package_to_what_a_step_counts_is_open(name):
    answer = f"from llmlab import roofline\n{COUNTS[name]}"
    given = {"math": math, "MODEL_CONFIGS": MODEL_CONFIGS}
    exec(answer, given)
    arguments = (16, 0, 2, "h100-80gb") if name == "crossover_batch" else (MODEL_CONFIGS["llama-3.2-1b"], 3, 2)
    assert given[name](*arguments) > 0  # outside the lab it is there
    refuses(LAB, name, answer)
