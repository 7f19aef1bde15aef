"""The checks of an exercise: points by property, messages, strict comparison, inputs by submission."""

import os
import subprocess
import sys
import time

import pytest

from llmlab.grading.checks import (
    CheckFailed,
    Checks,
    ChecksFailed,
    Record,
    close,
    equal,
    seed_of,
    student_rng,
    submission_rng,
)


class AlwaysEqual:
    def __eq__(self, other):
        return True

    def __hash__(self):
        return 0


class AnInt(int):
    pass


def one(function, hidden=False, name="it holds", points=2):
    check = Checks("exercise")
    (check.hidden if hidden else check)(name, points=points)(function)
    return check.record.outcomes[0]


def test_a_property_earns_its_points_and_others_keep_theirs():
    check = Checks("exercise")
    check("first", points=1)(lambda rng: equal(1, 1))
    check("second", points=0.5)(lambda rng: equal(1, 2))
    check("third", points=2)(lambda rng: equal(3, 3))
    assert (check.record.score, check.record.points) == (3, 3.5)
    with pytest.raises(ChecksFailed, match="1 of 3 properties failed"):
        check.report()


def test_a_visible_failure_shows_both_values():
    assert one(lambda rng: equal(2_500, 10_000)).message == "got 2,500, expected 10,000"


def test_a_hidden_failure_names_the_property_and_nothing_else():
    outcome = one(lambda rng: equal(2_500, 10_000), hidden=True)
    assert outcome.message == "a hidden input gives another value"
    outcome = one(lambda rng: {}["secret"], hidden=True)
    assert outcome.message == "a hidden input raises an error"


@pytest.mark.parametrize("wrong", [AlwaysEqual(), AnInt(4), True, None, "4", [4], float("nan")])
def test_only_a_plain_number_equals_a_number(wrong):
    expected = 1 if wrong is True else 4
    with pytest.raises(CheckFailed):
        equal(wrong, expected)
    with pytest.raises(CheckFailed):
        close(wrong, float(expected))


def test_plain_numbers_compare_by_value():
    equal(4.0, 4)
    equal("a", "a")
    close(100.4, 100, relative=0.01)
    with pytest.raises(CheckFailed):
        close(102.0, 100, relative=0.01)


@pytest.mark.parametrize("error", [SystemExit(0), KeyError("x"), AssertionError("no"), RecursionError()])
def test_an_answer_that_raises_fails_its_property(error):
    def raising(rng):
        raise error

    assert not one(raising).passed


def test_an_endless_answer_fails_in_time(monkeypatch):
    monkeypatch.setenv("LLMLAB_CHECK_SECONDS", "0.2")

    def endless(rng):
        while True:
            pass

    start = time.monotonic()
    outcome = one(endless)
    assert time.monotonic() - start < 2
    assert outcome.message == "TimeoutError: took longer than 0.2 s"


def test_an_answers_warning_is_no_error(capsys):
    import sys
    import warnings

    def noisy(rng):
        print("noise", file=sys.stderr)
        warnings.warn("careful", stacklevel=1)

    with pytest.warns(UserWarning, match="careful"):
        assert one(noisy).passed
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "noise" in captured.out


def test_an_unwritten_answer_is_said_to_be_one():
    def unwritten(rng):
        raise NotImplementedError

    assert one(unwritten).message == "not written yet"


@pytest.mark.parametrize("blank", ["", " ada", "ada ", None, 7])
def test_an_id_is_a_plain_text_without_blanks(blank):
    with pytest.raises(ValueError, match="student_id: expected your id"):
        student_rng(blank, "memory")


def test_inputs_differ_by_submission_and_repeat(monkeypatch):
    def draws(seed):
        monkeypatch.setenv("LLMLAB_SEED", seed)
        return submission_rng("exercise", "it holds").random()

    assert draws(seed_of("memory", "student-01")) == draws(seed_of("memory", "student-01"))
    assert draws(seed_of("memory", "student-01")) != draws(seed_of("memory", "student-02"))


def test_a_students_inputs_are_refused_to_another(monkeypatch):
    monkeypatch.setenv("LLMLAB_STUDENT", "student-01")
    student_rng("student-01", "memory")
    with pytest.raises(ValueError, match="'student-02' and this submission is of 'student-01'"):
        student_rng("student-02", "memory")


def test_a_record_survives_the_way_through_json():
    check = Checks("exercise")
    check("first", points=1)(lambda rng: None)
    assert Record.from_json(check.record.to_json()) == check.record


def printed_by(code):
    """What a Python of its own prints: what is withheld stays so in a process."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ)).stdout.strip()


def test_withheld_names_raise_outside_the_package_and_work_inside():
    code = """
from llmlab.config import MODEL_CONFIGS
from llmlab.grading.withhold import Withheld, withhold
import llmlab.memory as m
alias = m.num_parameters
withhold(["llmlab.memory.parameter_counts"])
config = MODEL_CONFIGS["phi-2"]
assert m.num_parameters(config) == 2_779_683_840       # the package's own call goes through
for call in (m.parameter_counts, __import__("llmlab.memory").memory.parameter_counts):
    try:
        call(config)
    except Withheld as error:
        assert "llmlab.memory.parameter_counts answers this exercise" in str(error)
    else:
        raise SystemExit("not withheld")
assert not hasattr(m.parameter_counts, "__wrapped__")
print("held")
"""
    assert printed_by(code) == "held"


def test_a_withheld_class_is_made_inside_the_package_alone():
    """By its name, by a class method or a static one; and its methods are not to be had without an object."""
    code = """
import torch
from llmlab.grading.withhold import Withheld, withhold
from llmlab.parallel import linear, plan
class Alone: rank, size = 0, 1
whole = torch.nn.Linear(2, 2)
withhold(["llmlab.parallel.linear.ColumnParallelLinear"])
assert plan.Column().prepare("it", whole, Alone).weight.equal(whole.weight)  # the package's own call goes through
for of, call in (("", lambda: linear.ColumnParallelLinear(2, 2, mesh=Alone)), (".from_linear", lambda: plan.ColumnParallelLinear.from_linear(whole, Alone))):
    try:
        call()
    except Withheld as error:
        assert str(error).startswith(f"llmlab.parallel.linear.ColumnParallelLinear{of} answers this exercise")
    else:
        raise SystemExit("not withheld")
assert not hasattr(linear.ColumnParallelLinear, "forward")
print("held")
"""
    assert printed_by(code) == "held"


def test_what_a_block_withholds_is_there_again_behind_it_in_modules_too_that_it_imported():
    """And what was withheld before the block stays so, an error or not."""
    code = """
import sys
from llmlab.config import MODEL_CONFIGS
from llmlab.grading import withhold as w
import llmlab.memory as m
withheld_before = m.kv_cache_bytes
w.withhold(["llmlab.memory.kv_cache_bytes"])
whole, guard, before = m.parameter_counts, m.kv_cache_bytes, set(w._GUARDS)
assert guard is not withheld_before
assert not [name for name in sys.modules if name.startswith("llmlab.parallel")]
try:
    with w.restored_behind():
        w.withhold(["llmlab.memory.parameter_counts", "llmlab.memory.kv_cache_bytes", "llmlab.parallel.part.whole_units"])
        from llmlab.parallel import linear, part  # linear takes its name from part, where it is withheld by now
        for call in (m.parameter_counts, linear.whole_units):
            try:
                call()
            except w.Withheld:
                pass
            else:
                raise SystemExit("not withheld")
        raise KeyError
except KeyError:
    pass
assert m.parameter_counts is whole and m.parameter_counts(MODEL_CONFIGS["phi-2"])
assert linear.whole_units is part.whole_units and part.whole_units.__module__ == "llmlab.parallel.part"
assert part.whole_units.__code__.co_name == "whole_units"
assert m.kv_cache_bytes is guard and w._GUARDS == before and not w._OPEN
print("held")
"""
    assert printed_by(code) == "held"


def test_a_process_that_opens_no_block_keeps_no_way_back():
    code = """
from llmlab.grading import withhold as w
w.withhold(["llmlab.memory.parameter_counts"])
import llmlab.memory as m
guard = m.parameter_counts
assert w._OPEN == []
with w.restored_behind():
    w.withhold(["llmlab.memory.parameter_counts"])
assert m.parameter_counts is guard
print("held")
"""
    assert printed_by(code) == "held"
