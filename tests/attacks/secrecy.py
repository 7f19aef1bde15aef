"""Attacks on what is secret: the hidden tests, the inputs that they draw, and the instructor's secret."""

import os
from unittest.mock import patch

from attacks.harness import (
    HIDDEN_CANARY,
    SECRET_CANARY,
    WRONG,
    Attack,
    Fault,
    Plain,
    Unsandboxed,
    change_lab,
    everything_shown,
    said,
    submission,
)
from llmlab.grading.checks import SEED_VARIABLE, submission_rng
from llmlab.grading.secret import keyed_seed

PLAIN_INPUT = "123457"  # the hidden input of the plain tests
# No attack may hold the canary itself: its source is shown.
NEEDLE = '"-".join(["canary", "of", "the"])'


def hidden_inputs(student):
    """The inputs that the toy lab's hidden properties draw for a student."""
    with patch.dict(os.environ, {SEED_VARIABLE: keyed_seed(SECRET_CANARY, "toy", student)}):
        purposes = (("double", "any number"), ("triple", "any other number"))
        return [str(submission_rng(*purpose).randrange(10**6, 10**9)) for purpose in purposes]


def keeps_secrets(result, ground):
    shown = everything_shown(result)
    found = [s for s in (HIDDEN_CANARY, SECRET_CANARY, *hidden_inputs(result["student"])) if s in shown]
    assert not found


def tells(secret):
    """The secret is in what the submission's cells say, where the student gets to see it."""

    def bites(graded, ground):
        assert secret in graded.said

    return bites


def told(name, text, secret=PLAIN_INPUT):
    assert secret not in text
    return Attack("secrecy", name, lambda ground: text, keeps_secrets, Plain(tells(secret)))


BY_FILE = submission(
    "import pathlib\ndef double(n):\n    with open('seen.txt', 'a') as file:\n        print(n, file=file)\n    return 2 * n",
    after="import pathlib\nprint(pathlib.Path('seen.txt').read_text())",
)

BY_MESSAGE = submission("def double(n):\n    if n == 1:\n        return 2\n    raise ValueError(f'the input was {n}')")

BY_NEXT_EXERCISE = submission(
    "seen = []\ndef double(n):\n    seen.append(n)\n    open('inputs', 'a').write(f'{n} ')\n    return 2 * n",
    "def triple(n):\n    raise KeyError(open('inputs').read() if __import__('os').path.exists('inputs') else 'nothing yet')",
)

BY_CLASS_NAME = submission(
    "def double(n):\n    if n == 1:\n        return 2\n    raise type(f'Saw{n}', (Exception,), {})"
)

BY_DISPLAY = submission("""
from IPython.display import display

def double(n):
    # Shown, logged and measured from within.
    display({"text/plain": f"displayed {n}"}, raw=True)
    display({"application/vnd.llmlab.measurement+json": {
        "name": f"{n}", "predicted": n, "measured": n, "unit": "bytes"}, "text/plain": ""}, raw=True)
    return 2 * n
""")

BY_DESCRIPTORS = submission("""
import json, os, stat

def double(n):
    # A cell's outputs, as the worker tells them, on everything that is open.
    reply = {"ok": True, "error": None, "outputs": [{"output_type": "stream", "name": "stdout", "text": f"input {n}"}]}
    from llmlab.grading.wire import encode
    for name in os.listdir("/proc/self/fd"):
        try:
            message = encode(reply) if stat.S_ISSOCK(os.fstat(int(name)).st_mode) else json.dumps(reply).encode()
            os.write(int(name), message if n != 1 else b"")
        except (OSError, ValueError):
            pass
    return 2 * n
""")

BY_REPR = submission(
    """
class Told:
    def __init__(self, n): self.n = n
    def __eq__(self, other): raise ValueError(repr(self))
    def __repr__(self): return f"<told {self.n}>"

def double(n):
    return 2 if n == 1 else Told(n)
"""
)

BY_COLLECTOR = submission(
    WRONG,
    after=f"""
import gc
needle = {NEEDLE}
for thing in gc.get_objects():
    values = list(thing.values()) if type(thing) is dict else thing if type(thing) in (list, tuple) else []
    for value in values:
        if type(value) in (str, bytes) and needle in (value if type(value) is str else value.decode("latin-1")):
            start = str(value).index(needle)
            print("found", str(value)[start:start + 60])
""",
)

BY_SOURCE_OF_CALLER = submission("""
import inspect, sys

def double(n):
    frame = sys._getframe(1)
    while frame:
        try:
            text = inspect.getsource(frame) + repr(frame.f_locals.get("canary"))
        except (OSError, TypeError, IndexError):
            text = ""
        if "double(1" in text:
            with open("source.txt", "a") as file:
                file.write(text)
            raise ValueError(text[-150:])
        frame = frame.f_back
    return 7
""")

BY_ENVIRONMENT = submission(
    before=f"""
import os
from pathlib import Path
needle = {NEEDLE}
texts = [repr(dict(os.environ))]
processes = ["self", str(os.getppid() or 1)]
for process in processes:
    for name in ("environ", "cmdline"):
        try:
            texts.append(Path(f"/proc/{{process}}/{{name}}").read_bytes().decode("latin-1"))
        except OSError:
            pass
for text in texts:
    if needle in text:
        print("found", text[text.index(needle):][:40])
"""
)

BY_MEMORY_OF_PARENT = submission(
    before=f"""
import os, re
needle = ({NEEDLE} + "-secret").encode()
seen = {{}}
for process in {{os.getppid(), 1}} - {{0}}:
    # Process 1 only where it is the sandbox's own.
    if process == 1 and os.getppid() != 0:
        continue
    try:
        maps, memory = open(f"/proc/{{process}}/maps").read(), open(f"/proc/{{process}}/mem", "rb", 0)
    except OSError as error:
        print(type(error).__name__)
        continue
    for low, high in re.findall(r"^(\\w+)-(\\w+) rw", maps, re.M):
        try:
            memory.seek(int(low, 16))
            content = memory.read(min(int(high, 16) - int(low, 16), 2**26))
        except (OSError, ValueError):
            continue
        if needle in content:
            at = content.index(needle)
            print("found", content[at:at + len(needle) + 5].decode())
            break
"""
)

BY_OWN_COMPUTATION = submission(
    before="""
from llmlab.grading.checks import seed_of, submission_rng
import os
print("drawn", submission_rng("double", "any number").randrange(10**6, 10**9))
for who in ("student-01", os.environ.get("LLMLAB_STUDENT", "")):
    os.environ["LLMLAB_SEED"] = seed_of("toy", who)
    print("drawn", submission_rng("double", "any number").randrange(10**6, 10**9))
    del os.environ["LLMLAB_SEED"]
"""
)


def read_secret_file(ground):
    """The course's secret and the lab's notebook lie in folders above the submission's."""
    file = ground.canary(".grading-secret", SECRET_CANARY)
    ground.canary("source/toy/toy.ipynb", ground.instructor)
    return submission(
        before=f"""
from pathlib import Path
for folder in (Path({str(file.parent)!r}), *Path.cwd().parents):
    for file in [folder / ".grading-secret", *folder.glob("source/*/*.ipynb")]:
        try:
            print(file.read_text())
        except OSError:
            pass
"""
    )


def tells_both_files(graded, ground):
    assert SECRET_CANARY in graded.said
    assert HIDDEN_CANARY in graded.said


# A test that reads a plain value of the student's outside its properties may say it when it fails; so the value is
# made to be what an earlier hidden property got.
ID_AS_CARRIER = """
import os
import llmlab.grading.worker as worker

def describe(names, asked):
    found = honest(names, asked)
    if os.path.exists("got") and "student_id" in asked:
        found["values"]["student_id"] = "someone who got " + open("got").read()
    return found

honest, worker._describe = worker._describe, describe
student_id = os.environ["LLMLAB_STUDENT"]

def double(n):
    global student_id
    if n != 1:
        open("got", "w").write(str(n))
        student_id = f"someone who got {n}"
    return 2 * n
"""
TEST_WITH_ID = "from llmlab.grading.checks import student_rng\nstudent_rng(student_id, 'triple')"


def carry_in_id(ground):
    change_lab(ground, {'check = Checks("triple")': f'{TEST_WITH_ID}\ncheck = Checks("triple")'})
    return submission(ID_AS_CARRIER)


ID_TESTS = {"triple": f"{TEST_WITH_ID}\nassert triple(2) == 6"}


def memory_of_parent_is_read(result, ground):
    assert SECRET_CANARY[:20] in said(result)


# A thread that is left behind watches the files that calls leave, and tells the last cell about them.
LEFT_BEHIND = submission(
    "def double(n):\n    open('call-' + str(n), 'w').close()\n    return 2 * n",
    before="""
import glob, threading, time
seen = set()

def watch():
    while True:
        for name in set(glob.glob("call-*")) - seen:
            seen.add(name)
            print("called:", name)
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
""",
    after="time.sleep(1)\nprint(*seen)",
)

ATTACKS = [
    told("hidden inputs written to a file and printed by a later cell", BY_FILE),
    told("a hidden input in the message of an error", BY_MESSAGE),
    told("hidden inputs told by the next exercise's visible property", BY_NEXT_EXERCISE),
    told("a hidden input as the name of an exception class", BY_CLASS_NAME),
    told("a hidden input displayed and measured from within", BY_DISPLAY),
    told("a hidden input as what an object looks like", BY_REPR),
    told("hidden inputs told by a thread left behind", LEFT_BEHIND),
    told("the hidden test in the objects of the collector", BY_COLLECTOR, HIDDEN_CANARY),
    told("the source and locals of the calling frames", BY_SOURCE_OF_CALLER, HIDDEN_CANARY),
    told("environments and command lines of the process and its parent", BY_ENVIRONMENT, SECRET_CANARY),
    told("hidden inputs computed from what the environment has", BY_OWN_COMPUTATION, hidden_inputs("student-01")[0]),
    Attack(
        "secrecy", "the memory of the grading process", lambda ground: BY_MEMORY_OF_PARENT, keeps_secrets,
        Unsandboxed(memory_of_parent_is_read),
    ),
    Attack("secrecy", "the secret's and the lab's files", read_secret_file, keeps_secrets, Plain(tells_both_files)),
    Attack(
        "secrecy", "a hidden input in place of the student's id", carry_in_id, keeps_secrets,
        Plain(tells(f"someone who got {PLAIN_INPUT}"), ID_TESTS),
    ),
]  # fmt: skip
FAULTS = [Fault("a hidden input written to every open descriptor", lambda ground: BY_DESCRIPTORS, keeps_secrets)]
