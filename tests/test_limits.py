"""The limits of a submission: the environment sets each of them, and the guide's table has all of them."""

from dataclasses import fields, replace

import pytest

from llmlab.grading.limits import VARIABLES, limits_from_environment, table_rows
from llmlab.grading.sandbox import Limits


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize("field", [field.name for field in fields(Limits)])
def test_each_limit_is_set_by_its_variable(monkeypatch, field):
    assert limits_from_environment() == Limits()
    monkeypatch.setenv(VARIABLES[field], "7")
    assert limits_from_environment() == replace(Limits(), **{field: 7})


@pytest.mark.parametrize("text", ["", "many", "0", "-1", "nan", "inf"])
def test_a_limit_that_is_none_is_named(monkeypatch, text):
    monkeypatch.setenv("LLMLAB_SECONDS", text)
    with pytest.raises(ValueError, match=r"^\$LLMLAB_SECONDS: expected a number above 0, got "):
        limits_from_environment()
    monkeypatch.setenv("LLMLAB_SECONDS", "10")
    monkeypatch.setenv("LLMLAB_PROCESSES", "1.5")
    with pytest.raises(ValueError, match=r"^\$LLMLAB_PROCESSES: expected a whole number above 0, got '1.5'"):
        limits_from_environment()


def test_the_table_has_every_limit_with_its_unit():
    rows = {what: (limit, variable) for what, limit, variable in table_rows(Limits(seconds=90, memory_bytes=3 * 2**29))}
    assert rows["wall time of a submission"] == ("90 s", "LLMLAB_SECONDS")
    assert rows["memory"] == ("1.5 GiB", "LLMLAB_MEMORY_BYTES")
    assert rows["wall time of a property"][1] == "LLMLAB_CHECK_SECONDS"
    assert rows["output of a submission"] == ("4,194,304 characters", "")
    assert {variable for _, variable in rows.values()} == {*VARIABLES.values(), ""}
