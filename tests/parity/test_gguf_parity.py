"""GGUF files against llama.cpp's own Python package: its blocks, its files, its names."""

import jax
import numpy as np
import pytest

from common import models
from common.checkpoint.gguf import open_gguf_file
from common.checkpoint.gguf_types import gguf_type

gguf = pytest.importorskip("gguf")

pytestmark = pytest.mark.parity

BOTH_WAYS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
READ_ONLY = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


@pytest.mark.parametrize("name", BOTH_WAYS + READ_ONLY)
@pytest.mark.filterwarnings("ignore:invalid value")  # Random scales are also infinite.
def test_random_blocks_expand_to_the_same_bits(name):
    theirs = gguf.GGMLQuantizationType[name]
    stored = gguf_type(theirs.value)
    assert (stored.name, stored.block, stored.num_bytes) == (name, *gguf.GGML_QUANT_SIZES[theirs])
    rng = np.random.default_rng(theirs.value)
    data = rng.integers(0, 256, (500, stored.num_bytes), np.uint8)
    expected = gguf.dequantize(data, theirs).reshape(500, stored.block)
    found = stored.dequantise(data.view(stored.layout).reshape(-1))
    np.testing.assert_array_equal(found, expected)
    assert np.isfinite(found).mean() > 0.9


def test_a_file_of_the_package_is_read(tmp_path):
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(6, 64)).astype(np.float32) for name in BOTH_WAYS}
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(3)
    writer.add_rope_freq_base(1e5)
    writer.add_token_list(["a", "ü", ""])
    writer.add_token_scores([0.0, -1.0, 2.5])
    writer.add_add_bos_token(False)
    writer.add_custom_alignment(128)
    quantised = {
        name: gguf.quantize(values, gguf.GGMLQuantizationType[name])
        for name, values in weights.items()
    }
    for name, data in quantised.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[name])
    writer.add_tensor("half", weights["Q8_0"].astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = open_gguf_file(tmp_path / "model.gguf")
    assert reader.string("general.architecture") == "llama"
    assert reader.integer("llama.block_count") == 3
    assert reader.number("llama.rope.freq_base") == 1e5
    assert list(reader.strings("tokenizer.ggml.tokens")) == ["a", "ü", ""]
    assert reader.numbers("tokenizer.ggml.scores").tolist() == [0.0, -1.0, 2.5]
    assert reader.boolean("tokenizer.ggml.add_bos_token") is False
    assert set(reader.keys()) == {*BOTH_WAYS, "half"}
    for name, data in quantised.items():
        expected = gguf.dequantize(data, gguf.GGMLQuantizationType[name])
        np.testing.assert_array_equal(reader.read(name), expected)
        assert reader.type_name(name) == name
    np.testing.assert_array_equal(reader.read("half"), weights["Q8_0"].astype(np.float16))


COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
MODELS = {
    "llama": ("Llama", {"num_hidden_layers": 2, "tie_word_embeddings": False}),
    "gemma2": (
        "Gemma2",
        {"num_hidden_layers": 3, "sliding_window": 6, "query_pre_attn_scalar": 16},
    ),
    "gemma3": (
        "Gemma3Text",
        {"num_hidden_layers": 7, "sliding_window": 6, "query_pre_attn_scalar": 16},
    ),
    "qwen2": ("Qwen2", {"num_hidden_layers": 2}),
    "qwen3": ("Qwen3", {"num_hidden_layers": 2}),
}


@jax.jit
def logits_of(model, tokens):
    return model(tokens)


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to Llama's queries and keys."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def converted(architecture: str, state: dict, config) -> dict[str, np.ndarray]:
    """The tensors of a transformers model, named and changed as llama.cpp's converter does."""
    kind = gguf.MODEL_ARCH[architecture.upper()]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tensors = {}
    for name, value in state.items():
        array = value.numpy().astype(np.float32)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture == "llama" and "q_proj" in name:
            array = interleaved(array, config.num_attention_heads)
        if architecture == "llama" and "k_proj" in name:
            array = interleaved(array, config.num_key_value_heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = array
    return tensors


@pytest.mark.usefixtures("highest_precision")
@pytest.mark.parametrize("architecture", MODELS)
def test_logits_equal_the_model_that_was_converted(tmp_path, architecture):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    family, fields = MODELS[architecture]
    config = getattr(transformers, f"{family}Config")(**COMMON | fields)
    name = family.removesuffix("Text")
    torch.manual_seed(0)
    reference = getattr(transformers, f"{name}ForCausalLM")(config).eval().float()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    for tensor, array in converted(architecture, reference.state_dict(), config).items():
        writer.add_tensor(tensor, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = models.load_decoder(path)
    tokens = np.random.default_rng(0).integers(0, 96, (2, 20))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens), use_cache=False).logits.numpy()
    np.testing.assert_allclose(logits_of(model, tokens), expected, atol=2e-5, rtol=0)
