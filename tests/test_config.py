"""Shapes read from config.json, and what a wrong one says."""

import dataclasses
import json

import pytest

from llmlab.config import CONFIG_FOLDER, MODEL_CONFIGS, ModelConfig, find_config

BERT, LLAMA, PHI = (
    json.loads((CONFIG_FOLDER / f"{name}.json").read_text()) for name in ("bert-base-cased", "llama-7b", "phi-2")
)


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


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (BERT, {"type_vocab_size": -1000}, "token_types of 'm': expected a whole number of at least 0, got -1000"),
        (BERT, {"max_position_embeddings": -512}, "max_positions of 'm': expected a positive int, got -512"),
        (PHI, {"partial_rotary_factor": -0.4}, "rotary_size of 'm': expected a whole number of at least 0, got -32"),
    ],
)
def test_a_negative_count_is_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_huggingface({**config, **change}, "m")


@pytest.mark.parametrize("field", ["norms_per_layer", "position_rows", "token_types", "rotary_size"])
def test_every_optional_count_is_checked(field):
    with pytest.raises(ValueError, match=f"{field} of 'llama-7b': expected a whole number of at least 0, got -1"):
        dataclasses.replace(MODEL_CONFIGS["llama-7b"], **{field: -1})
    with pytest.raises(TypeError, match=f"{field} of 'llama-7b': expected a whole number, got float 1.5"):
        dataclasses.replace(MODEL_CONFIGS["llama-7b"], **{field: 1.5})


@pytest.mark.parametrize("config", [LLAMA, PHI])
@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_stretched_positions_are_carried_in_both_spellings(config, key, place):
    """transformers wrote ``type`` where it writes ``rope_type`` now."""
    shape = ModelConfig.from_huggingface({**config, place: {key: "linear", "factor": 2.0}}, "m")
    assert shape.rope_scaling == (("factor", 2.0), ("rope_type", "linear"))
    plain = ModelConfig.from_huggingface({**config, place: {key: "default"}}, "m")
    assert plain.rope_scaling == ()
    assert plain.rope_theta == shape.rope_theta == 10000.0


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean .*'llama-2-70b'"):
        find_config("llama-70b")


def test_a_local_folder_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert find_config(str(tmp_path)).hidden_size == 4096


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        ("{}", "lacks the field 'model_type'"),
        ("[" * 100_000, r"config\.json is nested too deeply to be read"),
        ('{"a":' * 100_000, r"config\.json is nested too deeply to be read"),
    ],
    ids=["torn", "a list", "empty", "deep lists", "deep objects"],
)
def test_a_broken_file_is_named(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        find_config(str(tmp_path))


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no config.json at"):
        find_config(str(tmp_path))
