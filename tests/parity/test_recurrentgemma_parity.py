"""RecurrentGemma against the transformers library: weights in, logits, greedy text, weights out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import recurrentgemma
from common import generate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("highest_precision")]

WINDOW = 8  # ours: eight earlier keys and the query's own


def reference_model(seed: int, window: int = WINDOW, gain: float = 1.0):
    """A small reference model with every parameter randomised; its window counts the own key."""
    config = transformers.RecurrentGemmaConfig(
        vocab_size=96,
        hidden_size=32,
        lru_width=32,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=4,
        head_dim=8,
        attention_window_size=window + 1,
    )
    model = transformers.RecurrentGemmaForCausalLM(config).eval().float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("recurrent_param"):
                parameter.copy_(noise - 3.0)
            elif parameter.ndim == 1 or "bias" in name:
                parameter.copy_(0.3 * noise)
            else:
                scale = 1.0 / gain if "embed" in name else gain
                parameter.copy_(scale * noise * parameter.shape[-1] ** -0.5)
    return model


def save_as_released(model, folder) -> None:
    """Saves with the window as the released checkpoints state it: the own key not counted."""
    model.config.attention_window_size -= 1
    model.save_pretrained(folder)
    model.config.attention_window_size += 1


@jax.jit
def logits_of(model, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def reference_logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens), use_cache=False).logits.numpy()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("length", [5, 8, 9, 10, 40])
def test_logits_equal(tmp_path, seed, length):
    reference = reference_model(seed)
    save_as_released(reference, tmp_path)
    model = recurrentgemma.load(tmp_path)
    tokens = np.random.default_rng(seed).integers(0, 96, (2, length))
    np.testing.assert_allclose(
        logits_of(model, tokens), reference_logits(reference, tokens), atol=2e-5, rtol=0
    )


def test_window_of_the_transformers_library(tmp_path):
    reference = reference_model(2)
    reference.save_pretrained(tmp_path)
    model = recurrentgemma.load(tmp_path, window_counts_self=True)
    tokens = np.random.default_rng(2).integers(0, 96, (1, 40))
    np.testing.assert_allclose(
        logits_of(model, tokens), reference_logits(reference, tokens), atol=2e-5, rtol=0
    )


def test_greedy_generation_is_identical(tmp_path):
    # Strong layers, so that the tied head does not just repeat the input.
    reference = reference_model(3, gain=2.0)
    save_as_released(reference, tmp_path)
    model = recurrentgemma.load(tmp_path)
    prompt = np.random.default_rng(3).integers(2, 96, (1, 11))
    text = reference.generate(
        torch.tensor(prompt), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    ).numpy()
    assert len(set(text[0, 11:].tolist())) > 8, "a text that repeats itself shows nothing"
    [ours] = generate.generate(model, prompt.tolist(), max_new_tokens=64, stop=[])
    assert ours.tokens == text[0, 11:].tolist()


def test_sharded_folder_loads_alike(tmp_path):
    reference = reference_model(4)
    save_as_released(reference, tmp_path / "one")
    reference.config.attention_window_size -= 1
    reference.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (recurrentgemma.load(tmp_path / name) for name in ("one", "many"))
    tokens = jnp.arange(12)[None]
    np.testing.assert_array_equal(logits_of(one, tokens), logits_of(many, tokens))


def test_export_loads_in_the_reference(tmp_path):
    reference = reference_model(5)
    save_as_released(reference, tmp_path / "in")
    model = recurrentgemma.load(tmp_path / "in")
    recurrentgemma.save(model, tmp_path / "out", format="huggingface")
    again = transformers.RecurrentGemmaForCausalLM.from_pretrained(tmp_path / "out").float()
    assert again.config.attention_window_size == WINDOW
    theirs, back = reference.state_dict(), again.state_dict()
    assert theirs.keys() == back.keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, back[name]), name


def test_gradients_equal(tmp_path):
    reference = reference_model(6)
    save_as_released(reference, tmp_path)
    model = recurrentgemma.load(tmp_path)
    # Token 0 is the reference's padding, whose embedding gets no gradient there.
    tokens = np.random.default_rng(6).integers(1, 96, (2, 20))
    theirs = reference(torch.tensor(tokens), use_cache=False).logits
    torch.nn.functional.cross_entropy(
        theirs[:, :-1].reshape(-1, 96), torch.tensor(tokens[:, 1:]).reshape(-1)
    ).backward()

    graphdef, state = nnx.split(model)

    def loss(state):
        logits = nnx.merge(graphdef, state)(jnp.asarray(tokens))[:, :-1]
        chosen = jnp.take_along_axis(logits, jnp.asarray(tokens)[:, 1:, None], -1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, -1) - chosen)

    grads = nnx.to_pure_dict(jax.jit(jax.grad(loss))(state))
    expected = reference.model.embed_tokens.weight.grad.numpy()
    np.testing.assert_allclose(grads["embed"]["table"], expected, atol=2e-5)
    expected = reference.model.layers[0].temporal_block.rg_lru.recurrent_param.grad.numpy()
    got = grads["units"]["blocks"][0]["mixer"]["rg_lru"]["a_param"][0]
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_torch_release_loads(tmp_path):
    """The original torch release: dotted names, dense layers transposed, in a zipped pickle."""
    from common.checkpoint import export_tensors
    from recurrentgemma.convert import release_rows

    reference = reference_model(7)
    save_as_released(reference, tmp_path / "hf")
    model = recurrentgemma.load(tmp_path / "hf")
    rows = release_rows(model.config, separator=".", torch=True)
    tensors = export_tensors(nnx.to_pure_dict(nnx.state(model)), rows)
    state = {name: torch.tensor(values()) for name, values in tensors.items()}
    torch.save(state, tmp_path / "2b.pt")
    again = recurrentgemma.load(tmp_path / "2b.pt")
    tokens = np.arange(8)[None]
    np.testing.assert_array_equal(logits_of(model, tokens), logits_of(again, tokens))
