"""Commands in processes of their own whose imports are done: each is forked from one that has them.

So a command starts at once, and otherwise it is what its program is: a process with its own folder, environment,
output and exit code, which may be killed.
"""

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([
    "pytest", "forked", "nbgrader.apps", "llmlab.cli", "llmlab.grading.command", "llmlab.grading.nbgrader_plugin",
])  # fmt: skip


class Forked:
    """A command that runs; ``program`` is nbgrader or llmlab. It leads a process group of its own.

    memory: the bytes of address space that it may have.
    """

    def __init__(self, program, *arguments, cwd, env, memory=None):
        self._said = Path(tempfile.mkdtemp(prefix="said-"))
        told = (program, [str(a) for a in arguments], str(cwd), dict(env), str(self._said), memory)
        self._process = _CONTEXT.Process(target=_become, args=told)
        self._process.start()

    @property
    def runs(self):
        return self._process.is_alive()

    def kill(self):
        """SIGKILL to the process and its group."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it leads no group yet, or has ended
            self._process.kill()
        self.result()

    def result(self, timeout=None):
        """The end of it, as `subprocess.run` tells it; TimeoutError after so many seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError
        out, err = ((self._said / name).read_text(errors="replace") for name in ("1", "2"))
        code = self._process.exitcode
        self._process.close()
        for name in ("1", "2"):
            (self._said / name).unlink()
        self._said.rmdir()
        return CompletedProcess([], code, out, err)


def run(program, *arguments, cwd, env):
    """Run a command to its end."""
    return Forked(program, *arguments, cwd=cwd, env=env).result()


def _become(program, arguments, cwd, env, said, memory):
    for descriptor in (1, 2):
        file = os.open(Path(said, str(descriptor)), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    sys.argv = [program, *arguments]
    if program == "nbgrader":
        from nbgrader.apps import NbGraderApp

        NbGraderApp.launch_instance()
    else:
        from llmlab.cli import app

        app()
