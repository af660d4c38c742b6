"""The objectives as Tasks: the loss of packed rows, distillation, what trains."""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.checkpoint.store import load_params
from common.data.pipeline import batches
from common.data.token_store import TokenStore
from common.models.decoder import Decoder, DecoderConfig
from common.sharding import (
    DEFAULT_RULES,
    MeshConfig,
    batch_sharding,
    make_mesh,
    state_shardings,
    use_mesh,
)
from common.train import ModelParts, OptimizerConfig, TrainConfig, Trainer
from t5gemma.config import T5GemmaConfig
from t5gemma.distillation import teacher_layout
from t5gemma.examples import CorpusExamples
from t5gemma.model import T5Gemma
from t5gemma.objective import Distillation, TargetTokens, decoder_hidden
from t5gemma.packing import PackedExamples, pack_row
from t5gemma.prefix_lm import PrefixLM

VOCAB, BOS, EOS = 24, 2, 1
TEACHER = DecoderConfig(
    vocab_size=VOCAB,
    width=16,
    mlp_width=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    num_layers=2,
    logits_softcap=5.0,
)


STACK = dataclasses.replace(TEACHER, width=8, mlp_width=16, head_dim=4, num_layers=1)
CONFIG = T5GemmaConfig(STACK, STACK)


def build(rngs: nnx.Rngs) -> T5Gemma:
    return T5Gemma(CONFIG, rngs=rngs)


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, VOCAB, n).tolist() for n in rng.integers(3, 20, 24)]
    store = TokenStore.of([[BOS, *text, EOS] for text in texts], VOCAB)
    objective = PrefixLM(BOS, shortest=0.3, longest=0.7)
    return CorpusExamples(store, objective, piece_length=objective.longest_piece(16, 16))


@pytest.fixture(scope="module")
def rows(examples):
    return PackedExamples(examples, 16, 16, start_id=BOS)


@pytest.fixture(scope="module")
def batch(rows):
    return {name: jnp.asarray(x) for name, x in rows.batch(np.arange(8)).items()}


@pytest.fixture(scope="module")
def teacher():
    return Decoder(TEACHER, rngs=nnx.Rngs(7))


def built(task: TargetTokens) -> nnx.Module:
    """The task's model as a Trainer starts with it."""
    model = task.build(nnx.Rngs(0))
    if isinstance(task, Distillation):
        given = task.initial_rest({"teacher": dict(enumerate(w[...] for w in model.teacher))})
        for number, weight in given["teacher"].items():
            model.teacher[number][...] = weight
    return model


def value(task, batch):
    model = built(task)
    return jax.device_get(jax.jit(lambda batch: task.loss(model, batch, jax.random.key(0)))(batch))


def value_and_grads(task, batch):
    graphdef, params, rest = nnx.split(built(task), nnx.Param, ...)

    @jax.jit
    def both(params, batch):
        def total(params):
            loss = task.loss(nnx.merge(graphdef, params, rest), batch, jax.random.key(0))
            return loss.total, loss

        (_, loss), grads = jax.value_and_grad(total, has_aux=True)(params)
        return loss, nnx.to_pure_dict(grads)

    return jax.device_get(both(params, batch))


def close(one, other, **tolerance):
    options = {"rtol": 1e-5, "atol": 1e-5} | tolerance
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **options), one, other)


def alone(examples, rows):
    """The examples of the batch, each in a row of its own."""
    numbers = np.concatenate([rows.members(row) for row in range(8)])
    options = {"start_id": BOS, "pad_id": 0}
    single = [pack_row([examples[int(n)]], 16, 16, **options) for n in numbers]
    return {name: jnp.asarray(np.stack([row[name] for row in single])) for name in single[0]}


@pytest.mark.parametrize("loss_chunk", [None, 4])
def test_a_packed_rows_loss_is_the_sum_of_its_examples(examples, rows, batch, loss_chunk):
    task = TargetTokens(build, loss_chunk=loss_chunk)
    packed = value(task, batch)
    single = value(task, alone(examples, rows))
    assert packed.weight == single.weight
    assert packed.total == pytest.approx(single.total, rel=1e-5)


def test_a_target_depends_on_its_prefix_and_what_was_said_before_it(batch):
    """Section 6.2, X5: on all of the prefix, on no later target, on no other example of the row."""
    model = build(nnx.Rngs(0))
    row = {name: x[:1] for name, x in batch.items()}
    assert row["decoder_segments"].max() > 1, "a row of one example would show less"

    @jax.jit
    def influence(encoder_shift, decoder_shift):
        """Losses [T] of the row where the embeddings of some tokens are moved."""
        encode, decode = model.encoder.embed, model.decoder.embed
        moved = nnx.merge(*nnx.split(model))
        moved.encoder.embed = nnx.data(Moved(encode, encoder_shift))
        moved.decoder.embed = nnx.data(Moved(decode, decoder_shift))
        return moved.nll(decoder_hidden(moved, row), row["targets"])[0]

    zero = jnp.zeros((16, STACK.width))
    by_encoder, by_decoder = jax.jacobian(influence, (0, 1))(zero, zero)
    by_encoder, by_decoder = (np.abs(x).sum(-1) > 1e-12 for x in (by_encoder, by_decoder))
    encoder, decoder = (np.asarray(row[f"{s}_segments"][0]) for s in ("encoder", "decoder"))
    real = decoder[:, None] > 0
    np.testing.assert_array_equal(by_encoder & real, (decoder[:, None] == encoder[None]) & real)
    earlier = np.tril(np.ones((16, 16), bool))
    np.testing.assert_array_equal(
        by_decoder & real, (decoder[:, None] == decoder[None]) & earlier & real
    )


class Moved(nnx.Module):
    """An embedding that adds something to each place."""

    def __init__(self, embed, shift):
        self.embed, self.shift, self.table = embed, nnx.data(shift), embed.table

    def encode(self, tokens):
        return self.embed.encode(tokens) + self.shift

    def decode(self, x):
        return self.embed.decode(x)


def test_the_teacher_reads_prefix_and_target_as_one(examples, rows, batch):
    layout = jax.device_get(teacher_layout(batch))
    for row in range(8):
        expected = []
        for segment, number in enumerate(rows.members(row), 1):
            encoder, targets = examples[int(number)]
            inside = layout.segments[row] == segment
            expected += [*encoder, *targets]
            assert layout.tokens[row][inside].tolist() == [*encoder, *targets]
            # Each place reads the token before the one it predicts.
            wanted = batch["decoder_segments"][row] == segment
            read = layout.tokens[row][layout.predictors[row]][wanted]
            assert read.tolist() == [encoder[-1], *targets[:-1]]
        assert layout.tokens[row][: len(expected)].tolist() == expected


def expected_distillation(examples, rows, teacher, top_k):
    """Section 3.2's sum, an example at a time, in NumPy."""
    batch = alone(examples, rows)
    graphdef, state = nnx.split(teacher)
    read = jax.jit(lambda tokens: nnx.merge(graphdef, state)(tokens))
    model = build(nnx.Rngs(0))
    own = np.asarray(model.logits(decoder_hidden(model, batch)), np.float64)
    own -= np.log(np.exp(own).sum(-1, keepdims=True))
    total = 0.0
    for row, number in enumerate(np.concatenate([rows.members(row) for row in range(8)])):
        encoder, targets = examples[int(number)]
        whole = np.concatenate([encoder, targets])
        # Padding behind the text changes nothing in a causal model.
        logits = np.asarray(read(np.pad(whole, (0, 32 - len(whole)))[None])[0], np.float64)
        logits = logits[len(encoder) - 1 : len(whole) - 1]
        if top_k is not None:
            least = np.sort(logits, axis=-1)[:, -top_k][:, None]
            logits = np.where(logits >= least, logits, -np.inf)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        total -= (p * own[row, : len(targets)]).sum()
    return total


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("loss_chunk", [None, 4])
def test_distillation_is_the_papers_sum(examples, rows, batch, teacher, top_k, loss_chunk):
    task = Distillation(build, teacher, top_k=top_k, loss_chunk=loss_chunk)
    loss = value(task, batch)
    expected = expected_distillation(examples, rows, teacher, top_k)
    assert loss.total == pytest.approx(expected, rel=1e-5)
    assert loss.metrics["distillation"] == loss.total


def test_chunks_and_all_tokens_change_nothing(batch, teacher):
    """Gradients too, of the mixed loss."""
    options = {"ground_truth": 0.25}
    expected = value_and_grads(Distillation(build, teacher, **options), batch)
    for other in ({"loss_chunk": 4}, {"loss_chunk": 8, "top_k": VOCAB}):
        found = value_and_grads(Distillation(build, teacher, **options, **other), batch)
        close(found[0], expected[0])
        close(found[1], expected[1], atol=1e-4)
    loss = expected[0]
    parts = 0.75 * loss.metrics["distillation"] + 0.25 * loss.metrics["nll"]
    assert loss.total == pytest.approx(parts, rel=1e-6)
    plain = value(TargetTokens(build), batch)
    assert loss.metrics["nll"] == pytest.approx(plain.total, rel=1e-5)


def shapes_in(jaxpr):
    """Shapes of everything that a program computes, loops' bodies included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from shapes_in(inner)


@pytest.mark.parametrize("top_k", [None, 3])
def test_chunks_keep_the_logits_from_existing_at_once(batch, teacher, top_k):
    """With gradients: nothing computed is as large as the logits `[B, T, V]` of one model."""

    def largest(loss_chunk):
        task = Distillation(build, teacher, top_k=top_k, loss_chunk=loss_chunk)
        graphdef, params, rest = nnx.split(built(task), nnx.Param, ...)

        def total(params):
            model = nnx.merge(graphdef, params, rest)
            return task.loss(model, batch, jax.random.key(0)).total

        jaxpr = jax.make_jaxpr(jax.grad(total))(params)
        sizes = [np.prod(shape) for shape in shapes_in(jaxpr.jaxpr) if VOCAB in shape]
        return max(size for size in sizes)

    whole = 8 * 16 * VOCAB
    assert largest(None) >= whole
    assert largest(4) == whole / 4


def test_a_teacher_may_know_fewer_tokens(batch, teacher):
    larger = CONFIG.with_stacks(vocab_size=VOCAB + 8)
    task = Distillation(lambda rngs: T5Gemma(larger, rngs=rngs), teacher)
    loss, grads = value_and_grads(task, batch)
    assert np.isfinite(loss.total)
    # Tokens that the teacher does not have are pushed down.
    assert np.abs(grads["decoder"]["embed"]["table"][VOCAB:]).max() > 0


def test_evaluation_scores_the_true_tokens(batch, teacher):
    task = Distillation(build, teacher)
    key = jax.random.key(0)
    plain = TargetTokens(build)
    assert float(task.evaluate(built(task), batch, key).total) == pytest.approx(
        float(plain.evaluate(build(nnx.Rngs(0)), batch, key).total)
    )


def test_tables_do_not_decay():
    task = TargetTokens(build)
    state = nnx.state(build(nnx.Rngs(0)))
    kept = {path[-1] for path, v in nnx.to_flat_state(state) if not task.decays(path, v)}
    assert kept == {"table", "scale"}


def test_flops_count_the_teacher_once(batch, teacher):
    counts = {"forward_flops": lambda b, s, t: b * s * t}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(batch))
    assert TargetTokens(build, **counts).flops_per_step(shapes) == 3 * 8 * 16 * 16
    task = Distillation(build, teacher, **counts, teacher_flops=lambda b, l: b * l)
    assert task.flops_per_step(shapes) == 3 * 8 * 16 * 16 + 8 * 32
    assert TargetTokens(build).flops_per_step(shapes) is None


def test_a_run_distils_resumes_and_leaves_the_teacher_alone(rows, teacher, tmp_path):
    before = jax.device_get(nnx.to_pure_dict(nnx.state(teacher)))

    def trained(folder, steps):
        config = TrainConfig(
            steps=steps,
            batch_size=8,
            log_every=1,
            checkpoint_every=3,
            optimizer=OptimizerConfig(learning_rate=3e-2, schedule="constant"),
            mesh=MeshConfig(data=2, fsdp=4),
        )
        task = Distillation(build, teacher, top_k=8, loss_chunk=8)
        reader = batches(rows, global_batch=8, seed=0)
        trainer = Trainer(task, config, folder, reader, seed=0)
        result = trainer.run()
        reader.close()
        return trainer, result

    whole, result = trained(tmp_path / "whole", 6)
    assert result.metrics["loss"] == result.metrics["distillation"]
    assert result.metrics["loss"] < 3.0 < np.log(VOCAB)
    trained(tmp_path / "resumed", 3)
    resumed, again = trained(tmp_path / "resumed", 6)
    assert again.metrics["loss"] == result.metrics["loss"]
    for trainer in (whole, resumed):
        weights = [trainer.state.rest["teacher"][n] for n in range(len(jax.tree.leaves(before)))]
        flat = [v[...] for _, v in nnx.to_flat_state(nnx.state(teacher))]
        for kept, original in zip(weights, flat, strict=True):
            np.testing.assert_array_equal(kept, original)
            assert len(kept.sharding.device_set) == 8
    # The checkpoint's parameters are the student's alone.
    abstract = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(build(nnx.Rngs(0)))))
    params = load_params(tmp_path / "whole" / "checkpoints", abstract)
    close(params, jax.device_get(whole.state.params), atol=0)


@pytest.mark.parametrize("top_k", [8, None])
def test_eight_devices_equal_one(batch, teacher, top_k):
    task = Distillation(build, teacher, top_k=top_k, loss_chunk=8, ground_truth=0.5)
    expected = value_and_grads(task, batch)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    parts = ModelParts(task, 0)
    placed = [
        jax.device_put(nnx.to_pure_dict(state), state_shardings(state, mesh, DEFAULT_RULES))
        for state in nnx.split(built(task), nnx.Param, ...)[1:]
    ]

    def total(params, rest, batch):
        return task.loss(parts.merge(params, rest), batch, jax.random.key(0)).total

    with use_mesh(mesh), jax.default_matmul_precision("highest"):
        rows = jax.device_put(batch, batch_sharding(mesh))
        found, grads = jax.jit(jax.value_and_grad(total))(*placed, rows)
    assert float(found) == pytest.approx(float(expected[0].total), rel=1e-5)
    close(jax.device_get(grads), expected[1], atol=1e-4)
