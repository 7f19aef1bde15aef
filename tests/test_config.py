"""Shapes read from config.json, and what a wrong one says."""

import json

import pytest

from llmlab.config import CONFIG_FOLDER, MODEL_CONFIGS, ModelConfig, find_config

LLAMA = json.loads((CONFIG_FOLDER / "llama-7b.json").read_text())


def test_the_presets_have_their_names():
    assert set(MODEL_CONFIGS) == {
        "gpt-j-6b", "phi-2", "llama-7b", "llama-13b", "llama-2-70b", "llama-3-8b", "llama-3.2-1b", "opt-13b",
        "qwen3-0.6b", "bert-base-cased", "smollm2-135m",
    }  # fmt: skip


def test_grouped_query_attention_is_read():
    assert MODEL_CONFIGS["llama-2-70b"].num_kv_heads == 8
    assert MODEL_CONFIGS["llama-2-70b"].group_size == 8
    assert MODEL_CONFIGS["smollm2-135m"].group_size == 3
    assert MODEL_CONFIGS["qwen3-0.6b"].head_size * MODEL_CONFIGS["qwen3-0.6b"].num_heads == 2048


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_a_missing_field_is_named(field):
    config = {k: v for k, v in LLAMA.items() if k != field}
    with pytest.raises(ValueError, match=f"the config of 'broken' lacks the field '{field}'"):
        ModelConfig.from_huggingface(config, "broken")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_hidden_layers": -1}, ValueError, "num_layers of 'm': expected a positive int, got -1"),
        ({"vocab_size": 0}, ValueError, "vocab_size of 'm': expected a positive int, got 0"),
        ({"vocab_size": "many"}, TypeError, "vocab_size of 'm': expected an int, got str 'many'"),
        ({"num_attention_heads": 0}, ValueError, "the config of 'm' has a field of the wrong kind"),
        ({"num_attention_heads": None}, ValueError, "the config of 'm' has a field of the wrong kind"),
        ({"rope_scaling": "linear"}, ValueError, "the config of 'm' has a field of the wrong kind"),
        ({"tie_word_embeddings": "false"}, TypeError, "tied_embeddings of 'm': expected true or false, got 'false'"),
        ({"hidden_size": 4097}, ValueError, "4097 is not a multiple of the 32 heads"),
        ({"num_key_value_heads": 5}, ValueError, "5 does not divide num_heads 32"),
        ({"model_type": "lama"}, ValueError, "did you mean 'llama'"),
    ],
)
def test_an_impossible_shape_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        ModelConfig.from_huggingface({**LLAMA, **change}, "m")


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean .*'llama-2-70b'"):
        find_config("llama-70b")


def test_a_local_folder_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert find_config(str(tmp_path)).hidden_size == 4096


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("[]", "holds no JSON object"), ("{}", "lacks the field 'model_type'")],
)
def test_a_broken_file_is_named(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        find_config(str(tmp_path))


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no config.json at"):
        find_config(str(tmp_path))
