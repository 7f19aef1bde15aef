"""Making a student's text harmless where others look at it."""

from __future__ import annotations

import base64
import binascii
import html
import re

PNG = b"\x89PNG\r\n\x1a\n"


def harmless_markdown(source: str) -> str:
    """A student's text as Markdown that shows it as it was typed: every line is one of a code block."""
    return "\n" + "\n".join(f"    {line}" for line in plain_text(source).split("\n"))


def plain_text(text: object) -> str:
    """Text without the characters that steer terminals or turn the direction of reading."""
    bare = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(text).replace("\r\n", "\n"))
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in bare)


def png_address(data: object) -> str | None:
    """A data address of a picture, if it really is a PNG; None otherwise."""
    if type(data) is not str:
        return None
    try:
        picture = base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError):
        return None
    if not picture.startswith(PNG):
        return None
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def shown(text: object) -> str:
    """Text for a page."""
    return html.escape(plain_text(text))
