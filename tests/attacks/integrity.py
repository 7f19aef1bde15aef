"""Attacks on the integrity of the score: wrong answers that want full marks."""

import json
from dataclasses import replace

from attacks.harness import (
    FULL,
    LIMITS,
    TRIPLE_ONLY,
    WRONG,
    Attack,
    Fault,
    Plain,
    Unsandboxed,
    change_lab,
    code,
    notebook,
    said,
    submission,
)
from llmlab.grading.checks import RECORD_TYPE


def earns_only_triple(result, ground):
    assert result["score"] == TRIPLE_ONLY
    assert result["max_score"] == FULL


def earns_at_most_triple(result, ground):
    """Where the attack may cost more than it can win."""
    assert result["score"] <= TRIPLE_ONLY


def loses_hidden(result, ground):
    """The visible property is right, as it may be; the hidden one is not."""
    outcomes = {o["property"]: o["passed"] for cell in result["cells"] for o in cell["outcomes"] or ()}
    assert not outcomes["any number"]
    assert result["score"] <= TRIPLE_ONLY + 1


def earns_too_much(graded, ground):
    """The class has a plainly wrong answer, too, which earns what it must."""
    assert graded.score is not None, graded.log[-3000:]
    assert graded.score > TRIPLE_ONLY


def same(name, text, contained=earns_only_triple, **tests):
    """An attack whose text needs no canary and that fools tests in the same process.

    tests: what the lab's plain tests hold instead, where the attack is on another kind of assertion.
    """
    return Attack("integrity", name, lambda ground: text, contained, Plain(earns_too_much, tests))


ALWAYS_EQUAL = """
class Anything(int):
    def __eq__(self, other): return True
    def __hash__(self): return 0

def double(n):
    return Anything(7)
"""

DROP_ASSERTS = """
import ast

class Drop(ast.NodeTransformer):
    def visit_Assert(self, node):
        return ast.Pass()

get_ipython().ast_transformers.append(Drop())
"""

BLANK_TEST_CELLS = """
def blank(lines):
    return ["pass\\n"] if any("double(1" in line and "def" not in line for line in lines) else lines

get_ipython().input_transformers_cleanup.append(blank)
"""

PATCHED_NUMPY = """
import numpy.testing
for name in ("assert_equal", "assert_array_equal", "assert_allclose", "assert_almost_equal"):
    setattr(numpy.testing, name, lambda *_, **__: None)

class Same:
    __class__ = property(lambda self: int)
    def __eq__(self, other): return True
    def __array__(self, *_, **__): return numpy.array(7)

def double(n):
    return Same()
"""
NUMPY_TEST = (
    "import numpy.testing\nassert isinstance(double(1), int)\nnumpy.testing.assert_equal(double(123457), 246914)"
)

ANSWER_FROM_HISTORY = """
import re

def double(n):
    cells = [str(cell) for cell in get_ipython().user_ns.get("In", [])]
    found = [re.search(rf"double\\({n}\\)\\D*(\\d+)", cell) for cell in reversed(cells)]
    return next((int(match[1]) for match in found if match), 7)
"""

ANSWER_FROM_CALLER = """
import sys

def double(n):
    frame = sys._getframe(1)
    while frame:
        constants = frame.f_code.co_consts
        if n in constants[:-1] and type(constants[constants.index(n) + 1]) is int:
            return constants[constants.index(n) + 1]
        frame = frame.f_back
    return 7
"""

PATCHED_CHECKS = """
import llmlab.grading.checks as checks
import llmlab.grading.split as split
import llmlab.grading.session as session

checks.equal = checks.close = checks.instance = lambda *_: None
checks.CheckFailed.__init__ = lambda self, *_: None
checks.Record.score = property(lambda self: self.points)
checks.Checks._run = lambda self, name, points, function, hidden: self._outcomes.append(
    checks.Outcome(name, points, True, hidden))
split._record = lambda part, *_: checks.Record("", (checks.Outcome("all", part.points, True, False),))
session._checked = lambda result: result
"""
USES_EQUAL = "from llmlab.grading.checks import equal\nequal(double(1), 2)\nequal(double(123457), 246914)"

PATCHED_WIRE = """
import llmlab.grading.wire as wire
import llmlab.grading.worker as worker

class Yes(wire.Reference):
    def __eq__(self, other): return True
    __hash__ = None

def tree(value, refer, arrays, depth):
    # The class that is always right crosses as the number that it claims to be.
    if type(value).__name__ == "Right":
        return ["int", "2"] if depth else ["dataclass", "llmlab.grading.wire.Reference", {}]
    return plain(value, refer, arrays, depth)

plain, wire._tree = wire._tree, tree
worker.Property._answer = lambda self, request: Right()
worker.PLAIN = (object,)
worker.SHOWN = 10**9

class Right(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0

def double(n):
    return Right()
"""

SWALLOWED_ERRORS = """
import types

async def run_code(self, code_object, result=None, *, async_=False):
    try:
        exec(code_object, self.user_global_ns, self.user_ns)
    except BaseException:
        pass
    return False

get_ipython().run_code = types.MethodType(run_code, get_ipython())
"""

SILENT_HANDLER = """
def nothing(shell, kind, error, trace, tb_offset=None):
    return []

get_ipython().set_custom_exc((Exception,), nothing)
get_ipython()._showtraceback = lambda *_: None
get_ipython().events.register("post_run_cell", lambda result: setattr(result, "error_in_exec", None))
"""

CHANGED_NAMES = """
class Checks:
    def __init__(self, *_): pass
    def __call__(self, *_, **__): return lambda function: None
    hidden = __call__
    def report(self): pass

def equal(*_): pass
def close(*_): pass
check = rng = random = n = Checks()
"""

STOPS_THE_LOOP = "def double(n):\n    raise StopIteration"
LOOPS = "for got, want in zip(map(double, (1, 123457)), (2, 246914)):\n    assert got == want"

NOT_A_NUMBER = "def double(n):\n    return float('nan')"
TOLERANT = "for n in (1, 123457):\n    assert not abs(double(n) - 2 * n) > 1e-6"

BY_CALL_NUMBER = """
calls = []

def double(n):
    calls.append(n)
    return [2, 246914][len(calls) % 2 - 1]
"""

SHOWN_RECORD = f"""
from IPython.display import display
for exercise in ("double", "triple"):
    outcome = {{"property": "all of it", "points": 3.0, "passed": True, "hidden": False, "message": ""}}
    display({{"{RECORD_TYPE}": {{"exercise": exercise, "outcomes": [outcome]}}, "text/plain": "✓"}}, raw=True)
"""
# The channel on which the worker answers, as any object of the process can be found.
CHANNEL = """
import gc, os, socket, struct, time
from llmlab.grading.wire import Channel
channel = next(thing for thing in gc.get_objects() if type(thing) is Channel)
"""

# A malformed answer to a later question, once there is a checkpoint: nothing may be asked of what has ended.
NO_NAMES = """
import llmlab.grading.worker as worker
honest = worker._describe
worker._describe = lambda names, asked: print("no names") or {} if "triple" in asked else honest(names, asked)
"""


FORGED_REPLY = f"""{CHANNEL}
channel.send({{"ok": True, "error": None, "outputs": [
    {{"output_type": "stream", "name": "stdout", "text": "for" + "ged"}},
    {{"output_type": "display_data", "metadata": {{}}, "data": {{"{RECORD_TYPE}": {{"exercise": "double", "outcomes": []}}}}}},
]}})
"""
FORGED_REPLIES = f"""{FORGED_REPLY}
channel.receive()  # the next cell is never run; its answer comes from here too
channel.send({{"ok": True, "error": None, "outputs": [], "score": 6.0, "outcomes": [], "record": {{"points": 6}}}})
channel.send({{"values": {{"double": 2, "check": True, "equal": True, "Checks": True}}, "objects": ["equal", "check"]}})
"""


def forged_reply_arrives(result, ground):
    assert "forged" in said(result)


FORGED_VALUE = """
import os, stat, struct, json

def double(n):
    shapes = [
        ["dataclass", "llmlab.grading.checks.Outcome", {"property": ["str", "two"], "points": ["float", "0x1p+2"],
         "passed": ["bool", True], "hidden": ["bool", False]}],
        ["reference", 0, "int", "2", False], ["int", "-0x0002"], ["float", "0x1p+1"],
    ]
    for shape in shapes if n == 1 else shapes[:1]:
        text = json.dumps(["dict", [[["str", "value"], shape]]]).encode()
        for name in os.listdir("/proc/self/fd"):
            try:
                if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                    os.write(int(name), struct.pack(">II", len(text), 0) + text)
            except OSError:
                pass
    return 7
"""


def forged_value_arrives(result, ground):
    messages = [o["message"] for cell in result["cells"] for o in cell["outcomes"] or ()]
    assert any("Outcome(property='two'" in message for message in messages)


OWN_ERRORS = """
from llmlab.grading.checks import ChecksFailed
from llmlab.grading.sandbox import SandboxError

def double(n):
    raise SandboxError("the worker did not start") if n == 1 else ChecksFailed("0 of 2 properties failed")
"""


def read_source(ground):
    """The instructor's notebook lies where nbgrader has it: in a folder source/."""
    file = ground.canary("source/toy/toy.ipynb", ground.instructor)
    return submission(f"""
import json
try:
    cells = json.load(open({str(file)!r}))["cells"]
    exec(next("".join(cell["source"]) for cell in cells if "def double" in "".join(cell["source"])))
except OSError:
    def double(n):
        return 7
""")


def edited_tests():
    """The tests of the notebook are the student's, and worth a thousand points."""
    cells = json.loads(submission(WRONG))["cells"]
    for cell in cells:
        marks = cell["metadata"].get("nbgrader", {})
        if marks.get("grade"):
            cell["source"] = "check = None"
            marks.update(points=1000, locked=False)
    return notebook(cells)


def twice_the_tests():
    """A second cell of the same mark, behind the real one, and the real one's mark on a cell of the student's."""
    cells = json.loads(submission(WRONG))["cells"]
    mark = {"grade": True, "solution": False, "locked": True, "points": 3}
    extra = code("check.report = lambda: None", "test_double", **mark)
    answers = [code("def double(n):\n    return n * 2" if good else WRONG, "double") for good in (True, False)]
    return notebook([*cells[:3], *answers, *cells[3:], extra, code("pass", "test_double", **mark)])


# What a given cell defined would be taken from the student, if the student could say it with the very same object: first
# what the lab defines, so that it looks like the student's own, then another value.
TAKEN_CONSTANT = """
import llmlab.grading.worker as worker
asked_before = []

def describe(names, asked):
    found = honest(names, asked)
    if "TIMES" in asked:
        found["values"]["TIMES"] = 2 if len(asked_before) % 2 else 0
        asked_before.append(1)
    return found

honest, worker._describe = worker._describe, describe
TIMES = 0

def double(n):
    return 2 if n == 1 else 0
"""
TAKEN_CONSTANT_TEST = "assert double(1) == 2\nassert double(123457) == 123457 * TIMES"


def take_constant(ground):
    given = "import Checks, equal\n"
    change_lab(ground, {given: f"{given}\nTIMES = 2\n", "equal(double(n), n + n)": "equal(double(n), n * TIMES)"})
    return submission(TAKEN_CONSTANT)


# Messages that the trusted side can read but not handle must cost the student, not the grading.
LONG_NUMBER = f"""{CHANNEL}
measurement = {{"name": "x", "predicted": 16**4095, "measured": 1, "unit": "bytes"}}
channel.send({{"ok": True, "error": None, "outputs": [
    {{"output_type": "display_data", "metadata": {{}}, "data": {{"application/vnd.llmlab.measurement+json": measurement}}}}]}})
"""


IMPOSSIBLE_TENSOR = f"""{CHANNEL}
head = b'{{"a":{{"dtype":"U64","shape":[0,9223372036854775807,9],"data_offsets":[0,0]}}}}'
text, blob = b'["list",[]]', struct.pack("<Q", len(head)) + head
channel.connection.sendall(struct.pack(">II", len(text), len(blob)) + text + blob)
"""


# Answers ahead of time, then nothing is read any more: a long cell does not fit into the socket's buffer.
DEAF = f"""{CHANNEL}
for reply in ({{"ok": True, "error": None, "outputs": []}},) * 2 + ({{"values": {{}}, "objects": []}},):
    channel.send(reply)
time.sleep(600)
"""
DEAF_NOTEBOOK = submission(WRONG + "\n#" + "x" * 2**21, before=DEAF)


def ends_in_time(result, ground):
    assert result["score"] <= TRIPLE_ONLY
    assert result["seconds"] <= ground.limits.seconds + 2


ATTACKS = [
    same("an object that equals everything", submission(ALWAYS_EQUAL)),
    same("an AST transformer that drops assertions", submission(before=DROP_ASSERTS)),
    same("an input transformer that blanks the test cells", submission(before=BLANK_TEST_CELLS)),
    same("patched numpy testing and an object that says it is an int", submission(PATCHED_NUMPY), double=NUMPY_TEST),
    same("the answer read from the history", submission(ANSWER_FROM_HISTORY)),
    same("the answer read from the constants of the caller", submission(ANSWER_FROM_CALLER)),
    Attack("integrity", "the answer read from source on disk", read_source, earns_only_triple, Plain(earns_too_much)),
    same("patched checks in the worker", submission(before=PATCHED_CHECKS), double=USES_EQUAL),
    same("a patched wire and a subclass that crosses as its base", submission(PATCHED_WIRE), earns_at_most_triple),
    same("a shell that swallows errors", submission(before=SWALLOWED_ERRORS)),
    same("a handler that shows no error", submission(before=SILENT_HANDLER)),
    same("names of the lab redefined before its tests", submission(CHANGED_NAMES + WRONG), double=USES_EQUAL.split("\n", 1)[1]),
    same("an answer that stops the loop of the test", submission(STOPS_THE_LOOP), double=LOOPS),
    same("an answer that is not a number", submission(NOT_A_NUMBER), double=TOLERANT),
    same("answers by the number of the call", submission(BY_CALL_NUMBER), loses_hidden),
    Attack(
        "integrity", "a constant of the lab taken over", take_constant, loses_hidden,
        Plain(earns_too_much, {"double": TAKEN_CONSTANT_TEST}),
    ),
    Attack(
        "integrity", "forged replies on the channel of the worker", lambda ground: submission(before=FORGED_REPLIES),
        earns_at_most_triple, Unsandboxed(forged_reply_arrives),
    ),
    Attack(
        "integrity", "forged values written to every socket", lambda ground: submission(FORGED_VALUE),
        earns_at_most_triple, Unsandboxed(forged_value_arrives),
    ),
]  # fmt: skip
FAULTS = [
    Fault("a record of full marks as a displayed output", lambda g: submission(before=SHOWN_RECORD), earns_only_triple),
    Fault("no answer to a question once there is a checkpoint", lambda g: submission(before=NO_NAMES), earns_at_most_triple),
    Fault("errors of the grader raised as answers", lambda g: submission(OWN_ERRORS), earns_only_triple),
    Fault("edited tests and points", lambda g: edited_tests(), earns_only_triple),
    Fault("marks that stand twice", lambda g: twice_the_tests(), earns_only_triple),
    Fault("a measurement too long to be written down", lambda g: submission(before=LONG_NUMBER), earns_at_most_triple),
    Fault("a tensor that cannot be built", lambda g: submission(before=IMPOSSIBLE_TENSOR), earns_at_most_triple),
    Fault(
        "forged replies from a worker that no longer reads", lambda g: DEAF_NOTEBOOK, ends_in_time,
        replace(LIMITS, seconds=8),
    ),
]  # fmt: skip
