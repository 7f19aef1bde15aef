"""The instructor's secret: the key from which hidden inputs are drawn, so that nobody can compute them ahead."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

FILE = ".grading-secret"


def course_secret(course: Path) -> str:
    """The secret of a course, made when it is first asked for; only its owner may read the file.

    Raises PermissionError where the file can be read by others.
    """
    file = course / FILE
    if not file.exists():
        made = file.with_name(f"{FILE}-{os.getpid()}")
        descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as handle:
            handle.write(secrets.token_hex(32) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        try:
            os.link(made, file)  # the first of two graders wins
        except FileExistsError:
            pass
        finally:
            made.unlink()
    if file.stat().st_mode & 0o077:
        raise PermissionError(f"{file} can be read by others; chmod 600 it, and think whether it was")
    return file.read_text(encoding="ascii").strip()


def keyed_seed(secret: str, assignment: str, student: str) -> str:
    """The seed of one submission's hidden inputs: HMAC-SHA256 of assignment and student under the secret (RFC 2104)."""
    return hmac.new(secret.encode(), f"{assignment}\x1f{student}".encode(), hashlib.sha256).hexdigest()
