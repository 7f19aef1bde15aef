"""Text that is always there: disjoint splits, kept under its hash."""

import hashlib

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


def test_a_changed_file_is_refused():
    corpus_file().write_text("something else")
    with pytest.raises(ValueError, match="does not hold the text that its name says"):
        corpus("train")


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="did you mean 'train'"):
        corpus("training")
