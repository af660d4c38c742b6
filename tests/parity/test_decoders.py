"""Gemma 2, Gemma 3, Llama and their like against the transformers library, on random weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common import generate, models
from common.models.decoder_huggingface import config_from_huggingface

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("highest_precision")]

VOCABULARY, WINDOW = 96, 6
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
# What sets each case apart; norms are epsilon 1e-5 somewhere, so that it is seen to be read.
CASES = {
    "gemma2": (
        "Gemma2",
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "num_hidden_layers": 5,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 5,
            "rope_parameters": GEMMA3_ROPE,
            "num_hidden_layers": 8,
            "final_logit_softcapping": 3.0,
            "rms_norm_eps": 1e-5,
        },
    ),
    "llama tied": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama untied, llama3 rope": ("Llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 1}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 4, "head_dim": 6}),
    "qwen2 windows": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            "head_dim": 6,
        },
    ),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
}
MODELS = {"Gemma3Text": "Gemma3ForCausalLM"}


def reference_model(case: str, seed: int = 0, gain: float = 1.0):
    """A small reference model with every parameter random."""
    name, more = CASES[case]
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **more})
    torch.manual_seed(seed)
    model = getattr(transformers, MODELS.get(name, f"{name}ForCausalLM"))(config)
    return randomised(model, seed, gain)


def randomised(model, seed: int, gain: float):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                centre = 0.0 if "Gemma" in type(model).__name__ or "bias" in name else 1.0
                parameter.copy_(centre + 0.3 * noise)
            else:
                # A weak embedding, lest a tied head just repeat the input.
                scale = gain**-2 if "embed" in name else gain
                parameter.copy_(scale * noise * parameter.shape[-1] ** -0.5)
    return model.eval().float()


@jax.jit
def logits_of(model, tokens, positions=None, segments=None):
    return model(tokens, positions, segments)


def reference_logits(model, tokens, **options) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens), use_cache=False, **options).logits.numpy()


def near(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=0)


def text(length, seed=0, batch=2):
    return np.random.default_rng(seed).integers(1, VOCABULARY, (batch, length))


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """The reference, ours loaded from its folder, and the folder."""
    reference = reference_model(request.param)
    folder = tmp_path_factory.mktemp("reference")
    reference.save_pretrained(folder)
    return reference, models.load_decoder(folder), folder


def test_logits_equal(pair):
    reference, model, _ = pair
    tokens = text(40)
    expected = reference_logits(reference, tokens)
    near(logits_of(model, tokens), expected)
    if model.config.window is not None:  # The window is shorter than the text, and that shows.
        wide = nnx.merge(*nnx.split(model))
        blocks = [block for part in (wide.units, wide.rest) if part for block in part.blocks]
        for block in blocks:
            if block.attention.before is not None:
                block.attention.before += 8
        assert np.abs(logits_of(wide, tokens) - expected).max() > 1e-3


def test_padding(pair):
    reference, model, _ = pair
    tokens, pads = text(20, seed=1), 7
    mask = np.ones((2, 20), np.int64)
    mask[0, :pads] = 0
    tokens[0, :pads] = 0
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    expected = reference_logits(
        reference,
        tokens,
        attention_mask=torch.tensor(mask),
        position_ids=torch.tensor(positions),
    )
    ours = logits_of(model, tokens, np.where(mask == 1, positions, -1))
    near(ours[0, pads:], expected[0, pads:])
    near(ours[1], expected[1])


def test_greedy_generation_is_identical(pair, request):
    case = request.node.callspec.params["pair"]
    reference = reference_model(case, seed=3, gain=2.0)
    reference.save_pretrained(folder := pair[2] / "strong")
    model = models.load_decoder(folder)
    prompts = [text(n, seed=n, batch=1)[0].tolist() for n in (11, 4)]
    ours = generate.generate(model, prompts, max_new_tokens=32, stop=[])
    for prompt, generation in zip(prompts, ours):
        theirs = reference.generate(
            torch.tensor([prompt]), max_new_tokens=32, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert len(set(theirs)) > 4, "a text that repeats itself shows nothing"
        assert generation.tokens == theirs


def test_gradients_equal(pair):
    reference, model, _ = pair
    tokens = text(20, seed=4)
    reference.zero_grad()
    theirs = reference(torch.tensor(tokens), use_cache=False).logits
    torch.nn.functional.cross_entropy(
        theirs[:, :-1].reshape(-1, VOCABULARY), torch.tensor(tokens[:, 1:]).reshape(-1)
    ).backward()
    graphdef, state = nnx.split(model)

    def loss(state):
        model = nnx.merge(graphdef, state)
        return model.nll(model.hidden(tokens)[:, :-1], jnp.asarray(tokens[:, 1:])).mean()

    grads = nnx.to_pure_dict(jax.jit(jax.grad(loss))(state))
    layer = reference.model.layers[0]
    block = grads["units"]["blocks"][0]
    near(grads["embed"]["table"], reference.model.embed_tokens.weight.grad)
    near(block["attention"]["k"]["kernel"][0], layer.self_attn.k_proj.weight.grad.T)
    near(block["attention_norm"]["scale"][0], layer.input_layernorm.weight.grad)
    near(block["mlp"]["up"][0][:, 0], layer.mlp.gate_proj.weight.grad.T)
    for name in "qk" if model.config.qk_norm else "":
        expected = getattr(layer.self_attn, f"{name}_norm").weight.grad
        near(block["attention"][f"{name}_norm"]["scale"][0], expected)
    if not model.config.tied:
        near(grads["head"]["table"], reference.lm_head.weight.grad)


def test_export_loads_in_the_reference(pair, tmp_path):
    reference, model, _ = pair
    models.save_decoder(model, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype=torch.float32
    )
    assert type(again) is type(reference)
    theirs, back = reference.state_dict(), again.state_dict()
    assert theirs.keys() == back.keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, back[name]), name
    tokens = text(40)
    near(reference_logits(again, tokens), reference_logits(reference, tokens), 1e-6)


def test_shards_and_half_precision_load(pair, tmp_path):
    reference, model, _ = pair
    reference.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    tokens = text(12)
    np.testing.assert_array_equal(
        logits_of(models.load_decoder(tmp_path / "shards"), tokens), logits_of(model, tokens)
    )
    models.save_decoder(model, tmp_path / "half", dtype="bfloat16")
    half = models.load_decoder(tmp_path / "half")
    rounded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "half", attn_implementation="eager", dtype=torch.float32
    )
    near(logits_of(half, tokens), reference_logits(rounded, tokens))


def test_language_model_of_a_multimodal_checkpoint(tmp_path):
    name, more = CASES["gemma3"]
    assert name == "Gemma3Text"
    # The library's multimodal class caps no logits.
    inner = transformers.Gemma3TextConfig(**{**SHAPE, **more, "final_logit_softcapping": None})
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 1, "image_size": 28, "patch_size": 14}
    whole = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=inner,
            vision_config=transformers.SiglipVisionConfig(**vision),
            mm_tokens_per_image=4,
            image_token_index=90,
            boi_token_index=91,
            eoi_token_index=92,
        )
    )
    randomised(whole, 5, 1.0)
    whole.save_pretrained(tmp_path)
    model = models.load_decoder(tmp_path)
    tokens = text(20) % 80 + 1
    with torch.no_grad():
        expected = whole(input_ids=torch.tensor(tokens)).logits.numpy()
    near(logits_of(model, tokens), expected)


def test_older_configurations_read_alike(pair, tmp_path):
    """`rope_theta`, `rope_local_base_freq`, `rope_scaling`, `sliding_window_pattern`."""
    _, model, folder = pair
    data = json.loads((folder / "config.json").read_text())
    rope = data.pop("rope_parameters")
    whole = rope.get("full_attention", rope)
    data["rope_theta"] = whole.pop("rope_theta")
    if whole["rope_type"] != "default":
        data["rope_scaling"] = {("type" if k == "rope_type" else k): v for k, v in whole.items()}
    if "sliding_attention" in rope:
        data["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    data.pop("layer_types", None)
    assert config_from_huggingface(data, "old") == model.config
