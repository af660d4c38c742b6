"""Decoders read and written: folders, configurations old and new, meshes, everything refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sine_decoders as sine
from flax import nnx

from common import convert, models
from common.checkpoint import open_huggingface
from common.data.tokenizers import SentencePieceTokenizer
from common.errors import UserError
from common.models import Decoder, DecoderConfig
from common.models.decoder import GEMMA2_PATTERN, GEMMA3_PATTERN
from common.models.decoder_huggingface import (
    config_from_huggingface,
    config_to_huggingface,
    shortest_pattern,
)
from common.nn.rope import RopeScaling
from common.sharding import MeshConfig, make_mesh


@pytest.fixture(scope="module", params=sine.FAMILIES)
def folder(request, tmp_path_factory):
    return sine.write(tmp_path_factory.mktemp(request.param), sine.FAMILIES[request.param])


@pytest.fixture
def llama(tmp_path):
    return sine.write(tmp_path / "llama", sine.LLAMA)


def parameters(model):
    return jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))


def assert_same(one, other):
    for a, b in zip(parameters(one), parameters(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_huggingface_there_and_back(folder, tmp_path):
    model = models.load_decoder(folder)
    models.save_decoder(model, tmp_path / "out")
    again = models.load_decoder(tmp_path / "out")
    assert again.config == model.config
    here, there = open_huggingface(folder), open_huggingface(tmp_path / "out")
    assert set(here.keys()) == set(there.keys())
    for name in here.keys():  # noqa: SIM118 (a reader, not a dict)
        np.testing.assert_array_equal(here.read(name), there.read(name))


def test_workspace_there_and_back(folder, tmp_path):
    model = models.load_decoder(folder)
    models.save_decoder(model, tmp_path / "out", "workspace")
    again = models.load_decoder(tmp_path / "out")
    assert again.config == model.config
    assert_same(again, model)


def test_dtypes_and_remat(llama, tmp_path):
    model = models.load_decoder(llama, dtype="bfloat16", remat="full")
    assert {x.dtype for x in parameters(model)} == {jnp.bfloat16.dtype}
    assert (model.config.dtype, model.config.remat) == ("bfloat16", "full")
    model = models.load_decoder(llama, dtype="bfloat16", param_dtype="float32")
    assert {x.dtype for x in parameters(model)} == {np.dtype("float32")}
    models.save_decoder(model, tmp_path / "out", dtype="bfloat16")
    reader = open_huggingface(tmp_path / "out")
    assert {reader.dtype(name).name for name in reader.keys()} == {"bfloat16"}  # noqa: SIM118
    models.save_decoder(model, tmp_path / "own", "workspace", dtype="bfloat16")
    np.testing.assert_array_equal(
        parameters(models.load_decoder(tmp_path / "own"))[0],
        np.asarray(parameters(model)[0], jnp.bfloat16).astype(np.float32),
    )


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_language_model_of_a_multimodal_folder(tmp_path, prefix):
    """As released, and as newer versions of the library save it."""
    weights = sine.tensors(sine.GEMMA3)
    whole = {name.replace("model.", prefix, 1): value for name, value in weights.items()}
    whole["vision_tower.patch.weight"] = np.ones((3, 3), np.float32)
    data = {"model_type": "gemma3", "text_config": sine.GEMMA3, "eos_token_id": [1, 106]}
    model = models.load_decoder(sine.write(tmp_path / "whole", data, whole))
    plain = models.load_decoder(sine.write(tmp_path / "plain", sine.GEMMA3))
    assert (model.config, model.stop_tokens) == (plain.config, (1, 106))
    assert_same(model, plain)


@pytest.mark.parametrize("format", ["huggingface", "workspace"])
def test_parameters_land_on_their_shards(llama, tmp_path, format):
    models.save_decoder(models.load_decoder(llama), tmp_path / "out", format)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices()[:8])
    model = models.load_decoder(tmp_path / "out", mesh=mesh)
    assert_same(model, models.load_decoder(llama))
    for kernel in (model.units.blocks[0].mlp.up, model.embed.table, model.head.table):
        value = kernel[...]
        assert {shard.data.size for shard in value.addressable_shards} == {value.size // 8}


def test_converter_knows_decoders(llama, tmp_path, capsys):
    for source, out, format in ((llama, "w", "workspace"), (tmp_path / "w", "h", "huggingface")):
        flags = f"--package=decoder --from={source} --to={tmp_path / out} --format={format}"
        convert.main(flags.split())
    assert "wrote" in capsys.readouterr().out
    assert_same(models.load_decoder(tmp_path / "h"), models.load_decoder(llama))


def test_tokenizer_and_stop_tokens_go_along(llama, tmp_path):
    documents = [f"the {a} and the {b} stood still" for a in range(40) for b in range(40)]
    tokenizer = SentencePieceTokenizer.train(documents, 300)
    wide = {**sine.LLAMA, "vocab_size": 300, "eos_token_id": [5, 7]}
    folder = sine.write(tmp_path / "wide", wide)
    (folder / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert models.load_decoder(folder).stop_tokens == (5, 7, 9)
    tokenizer.save_huggingface(folder)
    model = models.load_decoder(folder)
    assert model.stop_tokens == (1, 5, 7, 9)
    for format in ("workspace", "huggingface"):
        models.save_decoder(model, tmp_path / format, format)
        again = models.load_decoder(tmp_path / format)
        assert again.tokenizer.fingerprint() == tokenizer.fingerprint()
    assert again.stop_tokens == (1, 5, 7, 9)
    tokenizer.save_huggingface(llama)
    with pytest.raises(UserError, match="tokenizer has 300 tokens but the model 48"):
        models.load_decoder(llama)


def test_run_of_a_decoder(tmp_path):
    """A workdir: its config.json names the model, its newest checkpoint is read."""
    from common import values
    from common.checkpoint import save_params

    config = DecoderConfig(32, 8, 16, 2, 1, 4, 2)
    model = Decoder(config, rngs=nnx.Rngs(3))
    save_params(tmp_path / "checkpoints", nnx.to_pure_dict(nnx.state(model)))
    data = {"model": values.encode(config, DecoderConfig), "seed": 0}
    (tmp_path / "config.json").write_text(json.dumps(data))
    again = models.load_decoder(tmp_path)
    assert again.config == config
    assert_same(again, model)


# Configurations.


def read(**data):
    return config_from_huggingface(data, "config.json")


SIZES = {name: value for name, value in sine.SHAPE.items() if name != "rms_norm_eps"}


def test_gemma2_reads_as_released():
    config = read(model_type="gemma2")
    assert (config.num_layers, config.width, config.vocab_size) == (26, 2304, 256_000)
    assert (config.pattern, config.window) == (GEMMA2_PATTERN, 4096)
    assert (config.attention_softcap, config.logits_softcap) == (50.0, 30.0)
    assert (config.query_scale, config.tied, config.local_rope_base) == (None, True, None)
    wide = read(model_type="gemma2", head_dim=128, query_pre_attn_scalar=144)
    assert wide.query_scale == 1 / 12


def test_gemma3_reads_as_released():
    """The text part of Gemma 3 4B, which leaves out what is as in the library."""
    inner = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = read(model_type="gemma3", text_config=inner)
    assert config.pattern == GEMMA3_PATTERN
    assert (config.window, config.max_length, config.qk_norm) == (1024, 131_072, True)
    assert (config.rope_base, config.local_rope_base) == (1_000_000.0, 10_000.0)
    assert config.rope_scaling == RopeScaling("linear", 8.0)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    newer = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    del inner["rope_scaling"]
    assert read(**inner, rope_parameters=newer) == config


def test_llama_reads_as_released():
    """Llama 3.2 1B in the older way of writing, SmolLM2 without `head_dim`."""
    scaling = {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    config = read(
        model_type="llama", **SIZES, rope_theta=500_000.0, rope_scaling=scaling, mlp_bias=False
    )
    assert config.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert (config.rope_base, config.norm_epsilon, config.tied) == (500_000.0, 1e-6, False)
    assert config.pattern == ("global",)
    plain = {**SIZES, "head_dim": None, "rope_scaling": None}
    assert read(model_type="llama", **plain, tie_word_embeddings=True).head_dim == 6


def test_mistral_window_may_be_absent():
    assert read(model_type="mistral", **SIZES).window == 4096
    assert read(model_type="mistral", **SIZES, sliding_window=None).pattern == ("global",)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"model_type": "bert"}, "describes a 'bert' model; decoders are read of gemma2, gemma3_t"),
        ({"model_type": "gema2"}, "did you mean 'gemma2'"),
        ({}, "describes a None model"),
        ({"model_type": ["llama"]}, r"describes a \['llama'\] model"),
        ({"model_type": "gemma3"}, "no 'text_config'"),
        ({"model_type": "llama"}, "'hidden_size' should be a whole number of 1 to 1"),
        ({"model_type": "gemma2", "head_dim": -1}, "'head_dim' should be a whole number"),
        ({"model_type": "gemma2", "num_hidden_layers": 10**9}, "'num_hidden_layers' should be"),
        ({"model_type": "gemma2", "vocab_size": True}, "'vocab_size' should be"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "each of 26 layers"),
        ({"model_type": "gemma2", "layer_types": ["chunked"] * 26}, "'layer_types' should name"),
        ({"model_type": "gemma2", "attention_bias": True}, "attention_bias of a gemma2 model"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "not supported"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 5.0}, "not supported"),
        ({"model_type": "gemma2", "hidden_activation": "relu"}, "'relu' is not one of gelu_pyt"),
        ({"model_type": "gemma2", "hidden_activation": ["silu"]}, "is not one of gelu_pyt"),
        ({"model_type": "gemma2", "rms_norm_eps": "1e-6"}, "'rms_norm_eps' should be a positive"),
        ({"model_type": "gemma2", "rope_scaling": {"type": "yarn"}}, "rope type 'yarn' is not"),
        ({"model_type": "gemma2", "rope_scaling": 8}, "'rope_scaling' should be an object, not 8"),
        ({"model_type": "gemma2", "rope_scaling": {"type": "linear"}}, "'rope factor' should be"),
        ({"model_type": "gemma2", "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is"),
        ({"model_type": "gemma2", "num_key_value_heads": 3}, "multiple of"),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {"sliding_attention": {"type": "linear", "factor": 2.0}},
            },
            "rope scaling of sliding layers",
        ),
    ],
)
def test_configuration_is_refused(data, message):
    with pytest.raises(UserError, match=message) as caught:
        config_from_huggingface(data, "config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", sine.FAMILIES)
def test_configuration_there_and_back(family):
    config = read(**sine.FAMILIES[family])
    data = config_to_huggingface(config, "float32")
    assert data["model_type"] == sine.FAMILIES[family]["model_type"]
    assert read(**json.loads(json.dumps(data))) == config


def test_a_shape_of_no_family_is_not_exported():
    own = DecoderConfig(32, 8, 16, 2, 1, 4, 2)  # without post norms, but scaled embeddings
    with pytest.raises(UserError, match="no family of the transformers library"):
        config_to_huggingface(own, "float32")
    with pytest.raises(UserError, match="multiple"):
        config_to_huggingface(dataclasses.replace(own, num_heads=3, num_kv_heads=1), "float32")


def test_shortest_pattern():
    assert shortest_pattern(("local", "global") * 3) == GEMMA2_PATTERN
    assert shortest_pattern((*GEMMA3_PATTERN, "local", "local")) == GEMMA3_PATTERN
    assert shortest_pattern(("local",) * 4) == ("local",)
    assert shortest_pattern(("global", "local", "local")) == ("global", "local", "local")


# Folders that do not hold what they say.


def refused(path, message):
    with pytest.raises(UserError, match=message) as caught:
        models.load_decoder(path)
    assert "\n" not in str(caught.value)


def test_tensor_of_another_shape_is_named_with_both_shapes(tmp_path):
    weights = sine.tensors(sine.LLAMA)
    name = "model.layers.1.self_attn.k_proj.weight"
    weights[name] = weights[name][:8]
    refused(
        sine.write(tmp_path, sine.LLAMA, weights),
        rf"1 tensors of another shape or dtype \('{name}' is \[8, 24\], not \[16, 24\]\)",
    )


def test_missing_and_unexpected_tensors_are_named(tmp_path):
    weights = sine.tensors(sine.LLAMA)
    weights["extra"] = weights.pop("model.norm.weight")
    folder = sine.write(tmp_path, sine.LLAMA, weights)
    refused(folder, r"missing tensors \('model.norm.weight'\); 1 unexpected tensors \('extra'\)")


def test_missing_shard_is_named(llama):
    (llama / "model.safetensors").rename(llama / "model-00001-of-00002.safetensors")
    names = dict.fromkeys(sine.tensors(sine.LLAMA), "model-00001-of-00002.safetensors")
    names["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    refused(llama, "names the shard model-00002-of-00002.safetensors, which is not beside it")


def test_more_layers_than_tensors_cost_nothing(llama):
    (llama / "config.json").write_text(json.dumps({**sine.LLAMA, "num_hidden_layers": 10_000}))
    refused(llama, "states 10000 layers, but the checkpoint has only 30 tensors")
    for huge in ({"vocab_size": 10**8}, {"vocab_size": 10**8, "hidden_size": 10**8}):
        (llama / "config.json").write_text(json.dumps({**sine.LLAMA, **huge}))
        refused(llama, r"is \[48, 24\], not \[100000000, ")


def test_folders_that_are_no_decoders(tmp_path, llama):
    refused(tmp_path / "nothing", "no checkpoint at")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "neither config.json nor model.json")
    (llama / "model.safetensors").unlink()
    refused(llama, "has no model.safetensors")
    (llama / "config.json").write_text("[1]")
    refused(llama, "config.json")
    (llama / "config.json").write_text(json.dumps({**sine.GEMMA3, "model_type": "gemma3"}))
    refused(llama, "no 'text_config'")
    head = {"format": "tenfold", "version": 1, "package": "recurrentgemma", "config": {}}
    (tmp_path / "empty" / "model.json").write_text(json.dumps(head))
    (tmp_path / "empty" / "params").mkdir()
    refused(tmp_path / "empty", "describes a model of 'recurrentgemma', not a decoder")


def test_nothing_is_written_over(llama):
    model = models.load_decoder(llama)
    with pytest.raises(UserError, match="is not empty"):
        models.save_decoder(model, llama)
    with pytest.raises(UserError, match="unknown format 'gguf'"):
        models.save_decoder(model, llama.parent / "new", format="gguf")
