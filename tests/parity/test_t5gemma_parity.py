"""T5Gemma against the transformers library: weights in, logits, gradients, texts, weights out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import t5gemma
from common import generate, models

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("highest_precision")]

VOCAB = 96
SIDES = {
    "small": {"hidden_size": 24, "intermediate_size": 40, "head_dim": 8, "num_hidden_layers": 2},
    "large": {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16, "num_hidden_layers": 4},
    "odd": {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16, "num_hidden_layers": 3},
}
# Encoder, decoder, tied.
PAIRS = {
    "balanced": ("large", "large", True),
    "large encoder": ("large", "small", True),
    "small encoder": ("small", "odd", True),
    "untied": ("small", "small", False),
}


def stack(size: str, window: int) -> dict:
    return {
        "vocab_size": VOCAB,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "query_pre_attn_scalar": 16,
        "sliding_window": window,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 10.0,
        **SIDES[size],
    }


@functools.cache
def reference_model(pair: str, window: int = 64, seed: int = 0, gain: float = 1.0):
    """A small reference model with every parameter randomised."""
    encoder, decoder, tied = PAIRS[pair]
    config = transformers.T5GemmaConfig(
        encoder=stack(encoder, window),
        decoder=stack(decoder, window),
        tie_word_embeddings=tied,
        vocab_size=VOCAB,
        attn_implementation="eager",
    )
    model = transformers.T5GemmaForConditionalGeneration(config).eval().float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                # What layers add is normalised, so that these scales are its strength.
                parameter.copy_(0.3 * noise + (gain - 1.0 if "post" in name else 0.0))
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder and our model of a reference, the library's reading of its windows by default."""

    @functools.cache
    def load(*arguments, encoder_window="transformers"):
        folder = tmp_path_factory.mktemp("reference")
        reference_model(*arguments).save_pretrained(folder)
        return folder, t5gemma.load(folder, encoder_window=encoder_window)

    return load


def rows(lengths, width, seed, side="right"):
    """Random tokens of 3 and above, padded with 0, and where they are real."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((len(lengths), width), np.int64)
    for row, length in zip(tokens, lengths):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        row[place] = rng.integers(3, VOCAB, length)
    return tokens, tokens != 0


@jax.jit
def logits_of(model, *tokens):
    return model(*tokens)


@jax.jit
def masked_logits_of(model, encoder_tokens, decoder_tokens, encoder_valid, decoder_valid):
    return model(
        encoder_tokens, decoder_tokens, encoder_valid=encoder_valid, decoder_valid=decoder_valid
    )


def reference_logits(model, tokens, mask, decoder_tokens, decoder_mask):
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            decoder_input_ids=torch.tensor(decoder_tokens),
            decoder_attention_mask=torch.tensor(decoder_mask.astype(np.int64)),
            use_cache=False,
        ).logits.numpy()


@pytest.mark.parametrize("window", [4, 64])
@pytest.mark.parametrize("pair", PAIRS)
def test_logits_equal(saved, pair, window):
    reference = reference_model(pair, window)
    _, model = saved(pair, window)
    tokens, mask = rows([20, 20, 20], 20, 1)
    written, written_mask = rows([11, 11, 11], 11, 2)
    np.testing.assert_allclose(
        logits_of(model, tokens, written),
        reference_logits(reference, tokens, mask, written, written_mask),
        atol=2e-5,
        rtol=0,
    )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("window", [4, 64])
def test_padding(saved, window, side):
    reference = reference_model("large encoder", window)
    _, model = saved("large encoder", window)
    tokens, mask = rows([20, 7, 1, 13], 20, 3, side)
    written, written_mask = rows([4, 11, 7, 1], 11, 4, side)
    ours = masked_logits_of(model, tokens, written, mask, written_mask)
    theirs = reference_logits(reference, tokens, mask, written, written_mask)
    np.testing.assert_allclose(
        np.asarray(ours)[written_mask], theirs[written_mask], atol=2e-5, rtol=0
    )


def test_padding_is_told_by_its_token(saved):
    _, model = saved("large encoder")
    tokens, mask = rows([20, 7, 1, 13], 20, 3)
    written, written_mask = rows([4, 11, 7, 1], 11, 4)
    told = masked_logits_of(model, tokens, written, mask, written_mask)
    np.testing.assert_array_equal(logits_of(model, tokens, written), told)


def test_encoder_states_equal(saved):
    reference = reference_model("balanced", 4)
    _, model = saved("balanced", 4)
    tokens, mask = rows([20, 6], 20, 5)
    with torch.no_grad():
        theirs = reference.model.encoder(
            torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(np.int64))
        ).last_hidden_state.numpy()
    ours = np.asarray(jax.jit(lambda m, t: m.encode(t))(model, tokens))
    np.testing.assert_allclose(ours[mask], theirs[mask], atol=2e-5, rtol=0)


def test_published_window_is_one_narrower(saved):
    """The library with W - 1 keys on each side is what the weights were trained with."""
    folder, _ = saved("balanced", 4)
    model = t5gemma.load(folder)
    narrow = reference_model("balanced", 4)
    tokens, mask = rows([20], 20, 6)
    written, written_mask = rows([9], 9, 7)
    narrow.config.encoder.sliding_window = 3
    try:
        theirs = reference_logits(narrow, tokens, mask, written, written_mask)
    finally:
        narrow.config.encoder.sliding_window = 4
    np.testing.assert_allclose(logits_of(model, tokens, written), theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("pair", ["balanced", "large encoder", "untied"])
def test_gradients_equal(saved, pair):
    reference = reference_model(pair, 4)
    _, model = saved(pair, 4)
    tokens, mask = rows([20, 9], 20, 8)
    written, _ = rows([8, 8], 8, 9)
    targets = np.roll(written, -1, axis=1)
    reference.zero_grad()
    logits = reference(
        input_ids=torch.tensor(tokens),
        attention_mask=torch.tensor(mask.astype(np.int64)),
        decoder_input_ids=torch.tensor(written),
        decoder_attention_mask=torch.ones(written.shape, dtype=torch.int64),
        use_cache=False,
    ).logits
    torch.nn.functional.cross_entropy(
        logits.reshape(-1, VOCAB), torch.tensor(targets).reshape(-1)
    ).backward()
    theirs = {name: p.grad.numpy() for name, p in reference.named_parameters()}

    from common.checkpoint import export_tensors
    from t5gemma.convert import huggingface_rows

    graphdef, state = nnx.split(model)

    def loss(state):
        model = nnx.merge(graphdef, state)
        hidden = model.hidden(jnp.asarray(tokens), jnp.asarray(written))
        return jnp.mean(model.nll(hidden, jnp.asarray(targets), chunk=4))

    grads = nnx.to_pure_dict(jax.jit(jax.grad(loss))(state))
    ours = export_tensors(grads, huggingface_rows(model.config))
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        np.testing.assert_allclose(gradient(), theirs[name], atol=2e-5, rtol=0, err_msg=name)


def reference_text(model, tokens, mask, **options):
    out = model.generate(
        torch.tensor(tokens),
        attention_mask=torch.tensor(mask.astype(np.int64)),
        do_sample=False,
        pad_token_id=0,
        decoder_start_token_id=2,
        **options,
    )
    return out.numpy()[:, 1:]


def until_stop(row, stop):
    """A row of the library's: what comes before padding, the stop token counted."""
    row = row.tolist()
    return row[: row.index(stop) + 1] if stop in row else row


def prompts_of(tokens, mask):
    return [row[real].tolist() for row, real in zip(tokens, mask)]


@pytest.mark.parametrize(("pair", "seed"), [("large encoder", 3), ("untied", 15)])
def test_greedy_generation_is_identical(saved, pair, seed):
    # Strong layers, so that the tied head does not just repeat the input.
    arguments = (pair, 8, seed, 6.0)
    reference = reference_model(*arguments)
    _, model = saved(*arguments)
    tokens, mask = rows([20, 7, 1, 13], 20, 10)
    texts = reference_text(reference, tokens, mask, max_new_tokens=40, eos_token_id=95)
    longest = max(len(set(row.tolist())) for row in texts)
    assert longest > 8, "texts that repeat themselves show nothing"
    ours = generate.generate(model, prompts_of(tokens, mask), max_new_tokens=40, stop=95)
    assert [g.tokens for g in ours] == [until_stop(row, 95) for row in texts]


BEAMS = {
    "plain": {"num_beams": 4},
    "two": {"num_beams": 2},
    "early": {"num_beams": 4, "early_stopping": True},
    "never, long": {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0},
    "short": {"num_beams": 4, "length_penalty": -1.0},
    "sum": {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.0},
}


@pytest.mark.parametrize("case", BEAMS)
def test_beam_search_is_identical(saved, case):
    arguments = ("large encoder", 8, 3, 6.0)
    reference = reference_model(*arguments)
    _, model = saved(*arguments)
    lengths = np.random.default_rng(11).integers(1, 21, 20)
    tokens, mask = rows(lengths, 20, 12)
    stops = [80] if case == "two" else [14, 30, 80, 90]
    texts = reference_text(
        reference, tokens, mask, max_new_tokens=16, eos_token_id=stops, **BEAMS[case]
    )
    ours = generate.generate(
        model, prompts_of(tokens, mask), max_new_tokens=16, stop=stops, **BEAMS[case]
    )
    ended = 0
    for got, row in zip(ours, texts, strict=True):
        row = row.tolist()
        ends = [n for n, token in enumerate(row) if token in stops]
        ended += bool(ends)
        assert got.tokens == (row[: ends[0] + 1] if ends else row)
    assert ended > 3, "nothing ends before the longest text"


@pytest.mark.parametrize("pair", PAIRS)
def test_export_loads_in_the_reference(saved, tmp_path, pair):
    folder, _ = saved(pair, 4)
    model = t5gemma.load(folder)  # The published reading, which the library must be told.
    t5gemma.save(model, tmp_path / "out", format="huggingface")
    again = transformers.T5GemmaForConditionalGeneration.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).float()
    theirs, back = reference_model(pair, 4).state_dict(), again.state_dict()
    assert theirs.keys() == back.keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, back[name]), name
    tokens, mask = rows([20, 8], 20, 13)
    written, written_mask = rows([9, 9], 9, 14)
    ours = logits_of(model, tokens, written)
    np.testing.assert_allclose(
        ours, reference_logits(again, tokens, mask, written, written_mask), atol=2e-5, rtol=0
    )
    np.testing.assert_array_equal(ours, logits_of(t5gemma.load(tmp_path / "out"), tokens, written))


def test_sharded_folder_loads_alike(saved, tmp_path):
    _, model = saved("balanced", 4)
    reference_model("balanced", 4).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    many = t5gemma.load(tmp_path, encoder_window="transformers")
    tokens, _ = rows([12], 12, 15)
    np.testing.assert_array_equal(logits_of(model, tokens, tokens), logits_of(many, tokens, tokens))


def test_adapted_gemma2(tmp_path):
    """A donor of the library: its own logits without cross attention, and an export with it."""
    config = transformers.Gemma2Config(**stack("small", 4), attn_implementation="eager")
    donor = transformers.Gemma2ForCausalLM(config).eval().float()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in donor.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise if parameter.ndim == 1 else noise * 24**-0.5)
    donor.save_pretrained(tmp_path / "donor")
    source = models.load_decoder(tmp_path / "donor")
    tokens, mask = rows([12], 12, 16)
    written, written_mask = rows([9], 9, 17)
    with torch.no_grad():
        alone = donor(torch.tensor(written), use_cache=False).logits.numpy()
    silent = t5gemma.adapt(source, cross="zero")
    np.testing.assert_allclose(logits_of(silent, tokens, written), alone, atol=2e-5, rtol=0)
    model = t5gemma.adapt(source)
    t5gemma.save(model, tmp_path / "adapted", format="huggingface")
    again = transformers.T5GemmaForConditionalGeneration.from_pretrained(
        tmp_path / "adapted", attn_implementation="eager"
    ).float()
    np.testing.assert_allclose(
        logits_of(model, tokens, written),
        reference_logits(again, tokens, mask, written, written_mask),
        atol=2e-5,
        rtol=0,
    )
