"""Text that is always there: disjoint splits, kept under its hash."""

import hashlib
import re

import pytest

from llmlab.text import SPLITS, corpus, corpus_file, corpus_hash


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))
    monkeypatch.delenv("LLMLAB_CORPUS", raising=False)


def paragraphs(split):
    return {" ".join(p.split()) for p in corpus(split).split("\n\n")}


def test_no_paragraph_stands_in_two_splits():
    train, calibration, test = map(paragraphs, SPLITS)
    assert not train & calibration
    assert not train & test
    assert not calibration & test


def test_the_splits_are_large_enough_and_repeatable():
    sizes = {split: len(corpus(split)) for split in SPLITS}
    assert sizes["train"] > 150_000
    assert sizes["test"] > 40_000
    assert sizes["calibration"] > 30_000
    assert sizes == {split: len(corpus(split)) for split in SPLITS}


def test_the_file_is_named_by_its_hash():
    content = corpus_file().read_bytes()
    assert corpus_file().stem == f"corpus-{hashlib.sha256(content).hexdigest()[:16]}" == f"corpus-{corpus_hash()}"


def test_a_carried_file_is_read_instead(tmp_path, monkeypatch):
    carried = tmp_path / "carried.txt"
    carried.write_text("\n\n".join(f"paragraph {i} " + "x" * 3000 for i in range(60)))
    monkeypatch.setenv("LLMLAB_CORPUS", str(carried))
    assert corpus("train").startswith("paragraph 0")
    assert corpus_hash() == hashlib.sha256(carried.read_bytes()).hexdigest()[:16]


@pytest.mark.parametrize("content", [b"something else", b"", b"\xff\xfe"])
def test_a_damaged_cache_is_written_anew(content):
    before = corpus_hash()
    corpus_file().write_bytes(content)
    assert corpus_hash() == before
    assert corpus_file().stem == f"corpus-{before}"
    assert len(corpus("train")) > 150_000


def test_a_carried_file_that_changed_on_the_way_is_refused(tmp_path, monkeypatch):
    carried = tmp_path / corpus_file().name
    carried.write_text("something else")
    monkeypatch.setenv("LLMLAB_CORPUS", str(carried))
    with pytest.raises(ValueError, match="does not hold the text that its name says"):
        corpus("train")


@pytest.mark.parametrize(
    ("content", "trouble"),
    [
        (None, "cannot be read: No such file or directory"),
        ("a folder", "cannot be read: Is a directory"),
        (b"\xff\xfe\x00", "is not text in UTF-8"),
        (b"", "is empty"),
        (b" \n\n\n", "is empty"),
    ],
)
def test_a_wrong_carried_file_is_named_with_its_trouble(tmp_path, monkeypatch, content, trouble):
    carried = tmp_path / "carried.txt"
    if content == "a folder":
        carried.mkdir()
    elif content is not None:
        carried.write_bytes(content)
    monkeypatch.setenv("LLMLAB_CORPUS", str(carried))
    for read in (corpus_hash, lambda: corpus("test")):
        with pytest.raises(ValueError, match=rf"^\$LLMLAB_CORPUS: {re.escape(str(carried))} {trouble}"):
            read()


def test_a_carried_file_too_short_for_three_splits_is_refused(tmp_path, monkeypatch):
    carried = tmp_path / "carried.txt"
    monkeypatch.setenv("LLMLAB_CORPUS", str(carried))
    carried.write_text("\n\n".join(f"paragraph {i} " + "x" * 4000 for i in range(5)))
    with pytest.raises(
        ValueError, match=r"carried\.txt holds 5 documents of about 4,000 characters, and the splits take 6"
    ):
        corpus("train")
    carried.write_text("\n\n".join(f"paragraph {i} " + "x" * 4000 for i in range(6)))
    assert all(corpus(split) for split in SPLITS)


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="did you mean 'train'"):
        corpus("training")
