"""Decoders from .gguf files: what was exported by the key map is loaded, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf_writer import gguf_bytes, q8_0
from tokenizers import pre_tokenizers

from common import generate, models
from common.checkpoint import InterleavedRotary, export_tensors, open_gguf_file
from common.errors import UserError
from common.models import Decoder, DecoderConfig
from common.models.decoder import GEMMA2_PATTERN, GEMMA3_PATTERN
from common.models.decoder_gguf import config_from_gguf, gguf_rows
from common.nn.rope import RopeScaling
from common.sharding import MeshConfig, make_mesh

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = DecoderConfig(
    vocab_size=264,
    width=64,
    mlp_width=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    num_layers=2,
    max_length=128,
    rope_base=5000.0,
    norm_epsilon=1e-5,
    zero_centred_norm=False,
    activation="silu",
    tied=False,
    scale_embedding=False,
)
GEMMA = dataclasses.replace(
    LLAMA,
    num_layers=3,
    window=8,
    post_norms=True,
    zero_centred_norm=True,
    activation="gelu_tanh",
    tied=True,
    scale_embedding=True,
    bfloat16_scale=False,
)
CONFIGS = {
    "llama": LLAMA,
    "gemma2": dataclasses.replace(
        GEMMA, pattern=GEMMA2_PATTERN, attention_softcap=50.0, logits_softcap=30.0
    ),
    "gemma3": dataclasses.replace(
        GEMMA, pattern=GEMMA3_PATTERN, num_layers=7, qk_norm=True, local_rope_base=10_000.0
    ),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, tied=True),
}


def metadata(architecture: str, **changed) -> dict:
    """What llama.cpp's converter writes of `CONFIGS[architecture]`; None leaves a key out."""
    config = CONFIGS[architecture]
    fields = {
        "block_count": config.num_layers,
        "context_length": config.max_length,
        "embedding_length": config.width,
        "feed_forward_length": config.mlp_width,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_epsilon,
        "rope.freq_base": config.rope_base,
    }
    if config.window is not None:
        fields["attention.sliding_window"] = config.window
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    fields = {f"{architecture}.{key}": value for key, value in fields.items()}
    fields |= {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([3] * 3 + [1] * 256, "<i4"),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": 2,
    }
    named = {key.replace("ARCH", architecture): value for key, value in changed.items()}
    return {key: value for key, value in (fields | named).items() if value is not None}


def randomised(config: DecoderConfig, seed: int = 0) -> Decoder:
    model = Decoder(config, rngs=nnx.Rngs(seed))
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(seed)
    noisy = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), state)
    return nnx.merge(graphdef, noisy)


def tensors_of(model: Decoder, architecture: str) -> dict[str, np.ndarray]:
    params = nnx.to_pure_dict(nnx.state(model))
    rows = gguf_rows(model.config, architecture)
    lazy = export_tensors(params, rows)
    return {name: np.array(tensor.values()) for name, tensor in lazy.items()}


def write(path, architecture, tensors, **changed):
    path.write_bytes(gguf_bytes(metadata(architecture, **changed), tensors))
    return path


@pytest.fixture(scope="module")
def llama():
    return randomised(LLAMA)


@pytest.fixture(scope="module")
def tensors(llama):
    return tensors_of(llama, "llama")


@jax.jit
def logits_of(model, tokens):
    return model(tokens)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_what_was_exported_is_loaded(tmp_path, architecture):
    model = randomised(CONFIGS[architecture])
    stored = tensors_of(model, architecture)
    assert ("output.weight" in stored) is not model.config.tied
    loaded = models.load_decoder(write(tmp_path / "model.gguf", architecture, stored))
    wanted = dataclasses.replace(model.config, pattern=model.config.pattern[: model.num_layers])
    unused = {"bfloat16_scale": loaded.config.bfloat16_scale}
    assert loaded.config == dataclasses.replace(wanted, **unused)
    tokens = np.random.default_rng(1).integers(0, 264, (2, 20))
    np.testing.assert_allclose(
        logits_of(loaded, tokens), logits_of(model, tokens), atol=2e-5, rtol=0
    )
    assert loaded.stop_tokens == (0, 2)


def test_names_and_layout_in_the_file(llama, tensors):
    block = {name.removeprefix("blk.1.") for name in tensors if name.startswith("blk.1.")}
    linear = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert block == {f"{name}.weight" for name in (*linear, "attn_norm", "ffn_norm")}
    kernel = np.asarray(llama.units.blocks[0].attention.k.kernel[...])[1].T  # [K h, D]
    half = LLAMA.head_dim // 2
    for head in range(LLAMA.num_kv_heads):
        for pair in range(half):
            for side in (0, 1):
                row = head * LLAMA.head_dim + 2 * pair + side
                ours = kernel[head * LLAMA.head_dim + side * half + pair]
                np.testing.assert_array_equal(tensors["blk.1.attn_k.weight"][row], ours)
    values = np.asarray(llama.units.blocks[0].attention.v.kernel[...])[1].T
    np.testing.assert_array_equal(tensors["blk.1.attn_v.weight"], values)


def test_norms_of_gemma_hold_their_one():
    model = randomised(CONFIGS["gemma2"])
    stored = tensors_of(model, "gemma2")
    np.testing.assert_allclose(stored["output_norm.weight"], model.final_norm.scale[...] + 1.0)
    block = model.units.blocks[1]
    for ours, theirs in (
        (block.attention_post_norm, "post_attention_norm"),
        (block.mlp_norm, "ffn_norm"),
        (block.mlp_post_norm, "post_ffw_norm"),
    ):
        np.testing.assert_allclose(stored[f"blk.1.{theirs}.weight"], ours.scale[...][0] + 1.0)


def test_heads_are_read_in_parts_where_they_are_whole():
    transform = InterleavedRotary(4)
    array = np.arange(32 * 3.0).reshape(32, 3)
    whole = transform.forward([array], (32, 3))
    np.testing.assert_array_equal(transform.inverse(whole, 1)[0], array)
    index = (slice(8, 16, 1), slice(1, 3, 1))
    [(_, part)] = transform.reads(index, (32, 3), 1)
    np.testing.assert_array_equal(transform.forward([array[part]], (8, 2)), whole[index])
    assert transform.reads((slice(2, 8, 1), slice(0, 3, 1)), (32, 3), 1) is None
    for shape in ((6, 3), ()):
        with pytest.raises(ValueError):
            transform.source_shapes(shape, 1)


def test_placed_on_a_mesh_as_on_one_device(tmp_path, tensors):
    path = write(tmp_path / "model.gguf", "llama", tensors)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spread, whole = models.load_decoder(path, mesh=mesh), models.load_decoder(path)
    leaves = zip(jax.tree.leaves(nnx.state(spread)), jax.tree.leaves(nnx.state(whole)))
    for found, expected in leaves:
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(nnx.state(spread)))


def test_quantised_weights_and_generation(tmp_path, llama, tensors):
    packed = {
        name: q8_0(value) if value.ndim == 2 and value.shape[-1] % 32 == 0 else value
        for name, value in tensors.items()
    }
    loaded = models.load_decoder(write(tmp_path / "model.gguf", "llama", packed))
    difference = nnx.state(loaded).embed.table[...] - nnx.state(llama).embed.table[...]
    assert 0 < jnp.abs(difference).max() < 0.02
    [out] = generate.generate(loaded, ["Hi é"], max_new_tokens=5, stop=[])
    ids = loaded.tokenizer.encode("Hi é")  # These texts have no beginning.
    [same] = generate.generate(loaded, [ids], max_new_tokens=5, stop=[])
    assert out.tokens == same.tokens
    assert out.text == loaded.tokenizer.decode(out.tokens)


def test_exported_to_the_other_formats(tmp_path, tensors):
    model = models.load_decoder(write(tmp_path / "model.gguf", "llama", tensors))
    tokens = np.random.default_rng(1).integers(0, 264, (1, 9))
    expected = logits_of(model, tokens)
    for form in ("huggingface", "workspace"):
        models.save_decoder(model, tmp_path / form, form)
        again = models.load_decoder(tmp_path / form)
        np.testing.assert_array_equal(logits_of(again, tokens), expected)
        assert again.tokenizer.encode("x é") == model.tokenizer.encode("x é")
        assert again.stop_tokens == model.stop_tokens
        assert again.tokenizer.bos_id == model.tokenizer.bos_id == -1
    assert (tmp_path / "huggingface" / "tokenizer.json").is_file()


def test_a_folder_of_one_file(tmp_path, tensors):
    write(tmp_path / "a.gguf", "llama", tensors)
    assert models.load_decoder(tmp_path).config == LLAMA
    write(tmp_path / "b.gguf", "llama", tensors)
    with pytest.raises(UserError, match=r"has 2 \.gguf files: name one"):
        models.load_decoder(tmp_path)


def test_without_a_tokenizer_the_model_is_still_loaded(tmp_path, tensors, caplog):
    path = write(tmp_path / "model.gguf", "llama", tensors, **{"tokenizer.ggml.pre": "odd"})
    model = models.load_decoder(path)
    assert model.tokenizer is None
    assert model.stop_tokens == (2,)
    assert "without its tokenizer" in caplog.text


def test_rope_scalings(tmp_path, tensors):
    linear = {"ARCH.rope.scaling.type": "linear", "ARCH.rope.scaling.factor": 8.0}
    model = models.load_decoder(write(tmp_path / "a.gguf", "llama", tensors, **linear))
    assert model.config.rope_scaling == RopeScaling("linear", 8.0)
    frequencies = jnp.asarray(LLAMA.rope_base ** (-np.arange(8) * 2.0 / 16))
    for scaling in (RopeScaling("llama3", 8.0), RopeScaling("llama3", 32.0)):
        divisors = np.asarray(frequencies / scaling(frequencies), np.float32)
        stored = tensors | {"rope_freqs.weight": divisors}
        model = models.load_decoder(write(tmp_path / "b.gguf", "llama", stored))
        assert model.config.rope_scaling == scaling
    stored = tensors | {"rope_freqs.weight": np.ones(8, np.float32)}
    model = models.load_decoder(write(tmp_path / "c.gguf", "llama", stored))
    assert model.config.rope_scaling is None


@pytest.mark.parametrize(("architecture", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_scale_by_width(tmp_path, architecture, layers):
    filler = {f"tensor {n}": np.ones(1, np.float32) for n in range(layers)}
    filler["token_embd.weight"] = np.ones((264, 64), np.float32)
    for count, scale in ((layers, (64 / 4) ** -0.5), (layers - 1, None)):
        changed = {"ARCH.block_count": count, "ARCH.attention.key_length": 8}
        changed |= {"ARCH.attention.value_length": 8}
        file = open_gguf_file(write(tmp_path / "model.gguf", architecture, filler, **changed))
        assert config_from_gguf(file).query_scale == scale


HOSTILE = {
    "another architecture": ({"general.architecture": "gpt2"}, {}, "holds a 'gpt2' model"),
    "no architecture": ({"general.architecture": None}, {}, "lacks the metadata general.arch"),
    "no depth": ({"ARCH.block_count": None}, {}, "lacks the metadata llama.block_count"),
    "depth in words": ({"ARCH.block_count": "two"}, {}, "'two', not a count"),
    "endless depth": ({"ARCH.block_count": 2**31}, {}, "states 2147483648 layers, but has only"),
    "no layers": ({"ARCH.block_count": 0}, {}, "model.num_layers must be positive"),
    "no heads": ({"ARCH.attention.head_count": 0}, {}, "model.num_heads must be positive"),
    "heads by layer": ({"ARCH.attention.head_count": np.array([4, 4], "<i4")}, {}, "not a count"),
    "odd heads": ({"ARCH.attention.head_count_kv": 3}, {}, "must be a multiple of"),
    "other values": ({"ARCH.attention.value_length": 8}, {}, "value_length is 8, but the heads"),
    "part of a head": ({"ARCH.rope.dimension_count": 8}, {}, "rope.dimension_count is 8"),
    "yarn": ({"ARCH.rope.scaling.type": "yarn"}, {}, "rope scaling 'yarn' is not supported"),
    "scaling by nothing": ({"ARCH.rope.scaling.factor": 0.0}, {}, "which is not positive"),
    "width in another file": ({"ARCH.embedding_length": 32}, {}, "does not fit the model"),
    "no table": ({}, {"token_embd.weight": None}, "no tensor 'token_embd.weight'"),
    "no norm": ({}, {"output_norm.weight": None}, "1 missing tensors ('output_norm.weight')"),
    "a tensor too many": ({}, {"extra": np.ones(4, np.float32)}, "unexpected tensors ('extra')"),
    "another shape": (
        {},
        {"blk.0.attn_q.weight": np.ones((64, 32), np.float32)},
        "'blk.0.attn_q.weight' is [64, 32], not [64, 64]",
    ),
    "factors of another shape": (
        {},
        {"rope_freqs.weight": np.ones(4, np.float32)},
        "'rope_freqs.weight' is [4], not [8]",
    ),
    "factors of another kind": (
        {},
        {"rope_freqs.weight": np.linspace(1, 3, 8).astype(np.float32)},
        "is not Llama 3's rope scaling",
    ),
    "factors of nothing": ({}, {"rope_freqs.weight": np.zeros(8, np.float32)}, "is not Llama 3's"),
    "tokens beyond the table": (
        {},
        {"token_embd.weight": np.ones((100, 64), np.float32)},
        "'output.weight' is [264, 64], not [100, 64]",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_is_no_decoder_is_one_clear_line(tmp_path, tensors, case):
    changed, replaced, message = HOSTILE[case]
    stored = {k: v for k, v in (tensors | replaced).items() if v is not None}
    path = write(tmp_path / "model.gguf", "llama", stored, **changed)
    with pytest.raises(UserError) as caught:
        models.load_decoder(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"nothing of the kind, but long enough")
    with pytest.raises(UserError, match="it is not a GGUF file"):
        models.load_decoder(tmp_path / "model.bin")
