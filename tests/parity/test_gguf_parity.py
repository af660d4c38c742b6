"""GGUF files against llama.cpp's own Python package: what it writes, and its weights."""

import numpy as np
import pytest

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
