"""Real English text that every Python brings along, in three splits that share no paragraph.

The text is CPython's own reference manual (``pydoc_data.topics``, PSF licence). It differs between Python versions, so
it is kept in the cache under its hash; results name that hash, and a comparison across machines carries the file along
and points ``$LLMLAB_CORPUS`` at it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from llmlab.arguments import checked, one_of
from llmlab.cache import cache_folder, file_sha256, write_atomically

SPLITS = ("train", "calibration", "test")
DOCUMENT_CHARACTERS = 4000
# Which split each document of twenty goes to: 13 train, 3 calibrate, 4 test.
_PATTERN = [
    "train",
    "train",
    "train",
    "test",
    "train",
    "calibration",
    "train",
    "train",
    "test",
    "train",
    "train",
    "calibration",
    "train",
    "test",
    "train",
    "train",
    "calibration",
    "train",
    "test",
    "train",
]


def corpus_file() -> Path:
    """The file that the splits are cut from: ``$LLMLAB_CORPUS``, else this Python's manual in the cache.

    A cached file that is missing or damaged is written anew.
    """
    chosen = os.environ.get("LLMLAB_CORPUS")
    if chosen:
        return Path(chosen)
    text = _manual()
    file = cache_folder() / "text" / f"corpus-{_hash(text)}.txt"
    if not (file.is_file() and file_sha256(file).startswith(_hash(text))):
        write_atomically(file, text)
    return file


def corpus_hash() -> str:
    """The first 16 hex digits of the text's SHA-256, which results name.

    Raises ValueError where ``$LLMLAB_CORPUS`` names no file of text, or a file whose name says another hash.
    """
    return _hash(_read())


@checked(split=one_of(SPLITS))
def corpus(split: str) -> str:
    """The text of one split: "train", "calibration" or "test". No paragraph stands in two of them.

    Raises ValueError where ``$LLMLAB_CORPUS`` names no file of text, or one too short to give every split something.
    """
    documents = _documents()
    needed = 1 + max(_PATTERN.index(name) for name in SPLITS)
    if len(documents) < needed:
        raise _wrong_corpus(
            f"holds {len(documents)} documents of about {DOCUMENT_CHARACTERS:,} characters, and the splits take {needed}"
        )
    return "\n\n".join(d for i, d in enumerate(documents) if _PATTERN[i % len(_PATTERN)] == split)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read() -> str:
    file = corpus_file()
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise _wrong_corpus(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise _wrong_corpus(f"is not text in UTF-8: {error}") from None
    if not text.strip():
        raise _wrong_corpus("is empty")
    if file.stem.startswith("corpus-") and file.stem != f"corpus-{_hash(text)}":
        raise _wrong_corpus("does not hold the text that its name says; carry it over again")
    return text


def _wrong_corpus(trouble: str) -> ValueError:
    return ValueError(f"$LLMLAB_CORPUS: {corpus_file()} {trouble}")


def _manual() -> str:
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name].strip() for name in sorted(topics.topics)) + "\n"


def _documents() -> list[str]:
    """Runs of consecutive paragraphs of about DOCUMENT_CHARACTERS; a paragraph that came before is dropped."""
    documents: list[str] = []
    seen: set[str] = set()
    current: list[str] = []
    for paragraph in _read().split("\n\n"):
        key = " ".join(paragraph.split())
        if not key or key in seen:
            continue
        seen.add(key)
        current.append(paragraph)
        if sum(map(len, current)) >= DOCUMENT_CHARACTERS:
            documents.append("\n\n".join(current))
            current = []
    return documents + (["\n\n".join(current)] if current else [])
