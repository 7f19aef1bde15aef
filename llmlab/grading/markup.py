"""Making a student's text harmless where others look at it."""

from __future__ import annotations

import base64
import binascii
import html
import re

# What starts a link, an image or a definition whose target is not plain http.
_TARGET = re.compile(r"(\]\s*\(|\]:)\s*<?\s*(?!https?://|#|/)([a-z][a-z0-9+.\-]*|&[^\s]*)\s*:", re.IGNORECASE)
PNG = b"\x89PNG\r\n\x1a\n"


def harmless_markdown(source: str) -> str:
    """Markdown in which HTML is shown as text and links lead to web pages only."""
    return _TARGET.sub(r"\1#\2-", source.replace("&", "&amp;").replace("<", "&lt;"))


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
    """Text for a page, without the control characters that steer terminals."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(text))
    return html.escape("".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in plain))
