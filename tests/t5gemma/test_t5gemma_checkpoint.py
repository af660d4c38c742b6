"""Folders in and out: every format, and what is wrong with a bad one, in one line."""

import dataclasses
import json
import shutil

import flax.serialization
import jax
import numpy as np
import pytest
from flax import nnx
from golden_model import CONFIG, DECODER_TOKENS, ENCODER_TOKENS, randomised, shapes

import t5gemma
from common.checkpoint import LazyTensor, open_huggingface, write_safetensors
from common.convert import convert
from common.data.tokenizers import ByteTokenizer, SentencePieceTokenizer
from common.errors import UserError
from common.sharding import MeshConfig, make_mesh
from t5gemma.config import MODELS, smoke_model
from t5gemma.model import T5GemmaConfig

# As many key heads as query heads in the encoder, fewer in the decoder; widths differ.
MIXED = dataclasses.replace(
    CONFIG, encoder=dataclasses.replace(CONFIG.encoder, num_kv_heads=4, window=4096)
)
MIXED = dataclasses.replace(MIXED, decoder=dataclasses.replace(MIXED.decoder, window=4096))


@jax.jit
def call(model):
    return model(ENCODER_TOKENS, DECODER_TOKENS)


@pytest.fixture(scope="module")
def model():
    return randomised(MIXED)


@pytest.fixture(scope="module")
def logits(model):
    return np.asarray(call(model))


@pytest.fixture
def folder(model, tmp_path):
    t5gemma.save(model, tmp_path / "exported", format="huggingface")
    return tmp_path / "exported"


def tensors_in(folder) -> dict[str, np.ndarray]:
    reader = open_huggingface(folder)
    return {name: np.array(reader.read(name)) for name in sorted(reader.keys())}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("s-s", 312_517_632),
        ("b-b", 591_490_560),
        ("l-l", 1_241_761_792),
        ("ml-ml", 2_200_345_344),
        ("xl-xl", 3_766_980_608),
        ("2b-2b", 5_596_853_760),
        ("9b-2b", 12_292_375_296),
        ("9b-9b", 20_333_401_088),
    ],
)
def test_public_sizes(name, count):
    config = MODELS[name]()
    assert config.num_parameters() == count
    abstract = nnx.eval_shape(lambda: t5gemma.T5Gemma(config, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract))) == count


def test_huggingface_there_and_back(folder, logits):
    assert {name: x.shape for name, x in tensors_in(folder).items()} == shapes(MIXED)
    np.testing.assert_array_equal(call(t5gemma.load(folder)), logits)


def test_workspace_there_and_back(model, folder, tmp_path, logits):
    convert("t5gemma", folder, tmp_path / "own", "workspace")
    again = t5gemma.load(tmp_path / "own")
    np.testing.assert_array_equal(call(again), logits)
    assert again.config.encoder_stack.window == model.config.encoder_stack.window
    convert("t5gemma", tmp_path / "own", tmp_path / "back", "huggingface", "bfloat16")
    assert {x.dtype.name for x in tensors_in(tmp_path / "back").values()} == {"bfloat16"}


def test_tokenizer_goes_along(tmp_path):
    model = randomised(smoke_model())
    texts = ["all the words that a small vocabulary needs are here, and a few more"] * 20
    model.tokenizer = SentencePieceTokenizer.train(texts, 300)
    for format in ("workspace", "huggingface"):
        t5gemma.save(model, tmp_path / format, format=format)
        again = t5gemma.load(tmp_path / format)
        assert again.tokenizer.fingerprint() == model.tokenizer.fingerprint()
        assert again.stop_tokens == (1,)
    model.tokenizer = ByteTokenizer()
    with pytest.raises(UserError, match="no tokenizer of plain bytes"):
        t5gemma.save(model, tmp_path / "bytes", format="huggingface")


def test_shards_straight_onto_a_mesh(folder, logits):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices()[:8])
    model = t5gemma.load(folder, mesh=mesh)
    kernel = model.decoder.units.blocks[0].cross.k.kernel[...]
    assert len(kernel.addressable_shards[0].data.ravel()) == kernel.size // 8
    whole = t5gemma.load(folder)
    for here, there in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(whole))):
        np.testing.assert_array_equal(here, there)


def flax_tree(config: T5GemmaConfig, values: dict[str, np.ndarray], turned: bool) -> dict:
    """The published flax layout of Hugging Face tensors (specification, 4.2)."""
    tree = {}
    for side, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        heads, kv_heads, h = stack.num_heads, stack.num_kv_heads, stack.head_dim
        table = values[f"model.{side}.embed_tokens.weight"]
        tree[side] = {
            "embedder": {"input_embedding": np.concatenate([table, np.ones((8, stack.width))])},
            "final_norm": {"scale": values[f"model.{side}.norm.weight"]},
        }
        for i in range(stack.num_layers):
            layer = f"model.{side}.layers.{i}"

            def split(name, count, layer=layer, h=h):
                x = values[f"{layer}.{name}_proj.weight"]
                return x.reshape(count, h, -1).transpose(0, 2, 1)

            def out(name, layer=layer, heads=heads, h=h):
                x = values[f"{layer}.{name}.o_proj.weight"]
                return {"w": x.T.reshape(heads, h, -1)}

            q, k, v = (split(f"self_attn.{n}", c) for n, c in zip("qkv", (heads, *[kv_heads] * 2)))
            if heads == kv_heads:
                attn = {"qkv_einsum": {"w": np.stack([q, k, v])}}
            else:
                attn = {"q_einsum": {"w": q}, "kv_einsum": {"w": np.stack([k, v])}}
            block = {"attn": attn | {"attn_vec_einsum": out("self_attn")}}
            norms = {"self_attn": "attention", "feedforward": "ffw"}
            if side == "decoder":
                norms["cross_attn"] = "cross_attention"
                kv = [split(f"cross_attn.{n}", kv_heads) for n in "kv"]
                block["cross_attn"] = {
                    "q_einsum": {"w": split("cross_attn.q", heads)},
                    "kv_einsum": {"w": np.stack(kv)},
                    "attn_vec_einsum": out("cross_attn"),
                }
            for theirs, ours in norms.items():
                for place in ("pre", "post"):
                    scale = values[f"{layer}.{place}_{theirs}_layernorm.weight"]
                    block[f"{place}_{ours}_norm"] = {"scale": scale}
            pair = [values[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up")]
            gates = np.stack(pair if turned else [x.T for x in pair])
            block["mlp"] = {
                "gating_einsum": gates,
                "linear": values[f"{layer}.mlp.down_proj.weight"].T,
            }
            tree[side][f"layer_{i}"] = block
    return jax.tree.map(lambda x: np.asarray(x, np.float32), {"params": tree})


@pytest.mark.parametrize("turned", [False, True])
def test_flax_tree(folder, tmp_path, logits, turned):
    values = tensors_in(folder)
    file = tmp_path / "t5gemma.msgpack"
    file.write_bytes(flax.serialization.msgpack_serialize(flax_tree(MIXED, values, turned)))
    loaded = t5gemma.load(file)
    # The appendix's vocabulary is not Gemma's, whose unused rows are known: here they stay.
    assert loaded.config.encoder.vocab_size == 48
    np.testing.assert_allclose(call(loaded)[..., :40], logits, atol=1e-6)


def edited(folder, change) -> None:
    data = json.loads((folder / "config.json").read_text())
    change(data)
    (folder / "config.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model_type="gemma2"), "describes a 'gemma2' model, not a t5gemma"),
        (lambda c: c.pop("decoder"), "'decoder' should be an object"),
        (lambda c: c["encoder"].update(hidden_size="32"), "'hidden_size' should be a positive"),
        (lambda c: c["encoder"].update(num_hidden_layers=10**9), "should be a positive|believed"),
        (lambda c: c["decoder"].update(num_hidden_layers=9000), "'layer_types' should name"),
        (lambda c: c["decoder"].update(hidden_activation="relu"), "'relu' is not supported"),
        (lambda c: c["decoder"].update(rope_parameters={"rope_type": "yarn"}), "default rope"),
        (lambda c: c.update(encoder_window="wide"), "'published' or 'transformers', not 'wide'"),
        (lambda c: c["decoder"].update(num_key_value_heads=3), "multiple of"),
        (lambda c: c.update(tie_word_embeddings=False), r"missing tensors \('lm_head.out_proj"),
        (
            lambda c: c["decoder"].update(intermediate_size=41),
            r"layers.0.mlp.gate_proj.weight' is \[40, 24\], not \[41, 24\]",
        ),
        (
            lambda c: c["encoder"].update(num_hidden_layers=1, layer_types=["full_attention"]),
            r"unexpected tensors \('model.encoder.layers.1",
        ),
    ],
)
def test_bad_configurations(folder, change, message):
    edited(folder, change)
    with pytest.raises(UserError, match=message) as error:
        t5gemma.load(folder)
    assert "\n" not in str(error.value)


def test_missing_shard(folder):
    names = tensors_in(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    weight_map["model.encoder.norm.weight"] = "model-00002-of-00002.safetensors"
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"names the shard model-00002-of-00002.safetensors"):
        t5gemma.load(folder)
    index.unlink()
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model.safetensors"):
        t5gemma.load(folder)


def test_head_that_is_not_tied(folder, tmp_path):
    values = tensors_in(folder)
    values["lm_head.out_proj.weight"] = values["model.decoder.embed_tokens.weight"].copy()

    def written(place):
        shutil.copytree(folder, place, ignore=lambda *_: ["model.safetensors"])
        tensors = {n: LazyTensor(x.shape, x.dtype, lambda x=x: x) for n, x in values.items()}
        write_safetensors(place, tensors)
        return place

    t5gemma.load(written(tmp_path / "same"))
    values["lm_head.out_proj.weight"][-1, -1] += 1
    other = written(tmp_path / "other")
    with pytest.raises(UserError, match="set its tie_word_embeddings to false"):
        t5gemma.load(other)
    edited(other, lambda c: c.update(tie_word_embeddings=False))
    assert not t5gemma.load(other).config.decoder.tied


def test_nothing_is_written_over(model, folder):
    with pytest.raises(UserError, match="is not empty"):
        t5gemma.save(model, folder)
    with pytest.raises(UserError, match="no checkpoint at"):
        t5gemma.load(folder / "nowhere")
