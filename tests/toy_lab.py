"""The source of a small lab: exercises that multiply by a number, each with a visible and a hidden property."""

EXERCISE = '''
# %% nbgrader={{"grade_id": "{name}", "solution": true}}
def {name}(n):
    """{meaning}."""
    ### BEGIN SOLUTION
    return n * {factor}
    ### END SOLUTION


# %% nbgrader={{"grade_id": "test_{name}", "grade": true}}
check = Checks("{name}")


@check("{visible}", points=1)
def _(rng):
    equal({name}({given}), {expected})


### BEGIN HIDDEN TESTS
@check.hidden("{hidden}", points=2)
def _(rng):
{body}


### END HIDDEN TESTS
check.report()
'''


def toy_lab(*exercises: str, given: str = "") -> str:
    """A lab of these exercises; ``given`` stands below the imports."""
    start = f"""
# %%
student_id = "student-00"  # your id

# %% nbgrader={{"grade_id": "given", "locked": true}}
import random

from llmlab.grading.checks import Checks, equal
{given}"""
    return start + "".join(exercises)


def doubling(hidden: str, *body: str) -> str:
    """The exercise ``double``: the hidden property's words, and the lines of it."""
    return _exercise("double", "Twice n", 2, ("two", 1), hidden, body)


def tripling(hidden: str, *body: str) -> str:
    """The exercise ``triple``, likewise."""
    return _exercise("triple", "Three times n", 3, ("six", 2), hidden, body)


def _exercise(
    name: str, meaning: str, factor: int, visible: tuple[str, int], hidden: str, body: tuple[str, ...]
) -> str:
    label, given = visible
    return EXERCISE.format(
        name=name, meaning=meaning, factor=factor, visible=label, given=given, expected=factor * given, hidden=hidden,
        body="\n".join(f"    {line}" for line in body),
    )  # fmt: skip
