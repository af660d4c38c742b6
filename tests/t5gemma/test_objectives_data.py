"""PrefixLM, UL2 and packing: nothing lost, nothing twice, and the recipe's rates and spans."""

import itertools

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.pipeline import batches
from common.data.token_store import TokenStore
from common.errors import UserError
from t5gemma.examples import CorpusExamples
from t5gemma.packing import OPEN_ROWS, PackedExamples, pack
from t5gemma.prefix_lm import PrefixLM
from t5gemma.ul2 import T5GEMMA2_MIXTURE, UL2, UL2_MIXTURE, Denoiser, UL2Tokens

BOS, EOS = 2, 1
SPECIAL = UL2Tokens(modes=(7, 8, 9), first_sentinel=19, sentinels=10)
FIRST_TEXT = 20
TEXTS = st.lists(st.lists(st.integers(FIRST_TEXT, 99), max_size=40), min_size=1, max_size=8)
OBJECTIVES = {
    "halves": PrefixLM(BOS),
    "no bos": PrefixLM(None, shortest=0.2, longest=0.2),
    "random split": PrefixLM(BOS, shortest=0.1, longest=0.9),
    "ul2": UL2(BOS, EOS, special=SPECIAL),
    "t5gemma 2": UL2(None, EOS, mixture=T5GEMMA2_MIXTURE, special=SPECIAL),
    "no modes": UL2(BOS, EOS, special=UL2Tokens(None, 19, 3)),
}


def store_of(texts):
    return TokenStore.of([[BOS, *text, EOS] for text in texts], 100)


def rebuilt(objective, example) -> list[int]:
    """The text, with its end where the objective takes it, out of what both sides hold."""
    encoder, targets = example.encoder.tolist(), example.targets.tolist()
    if isinstance(objective, PrefixLM):
        return [token for token in encoder + targets if token != BOS]
    assert targets[-1] == EOS
    ids = objective.special.ids()
    modes, sentinels = ids[: -objective.special.sentinels], ids[-objective.special.sentinels :]
    # What each sentinel stands for, in order; a sentinel may come again.
    spans: list[list[int]] = []
    for token in targets[:-1]:
        if token in sentinels:
            spans.append([])
        else:
            spans[-1].append(token)
    text: list[int] = []
    for number, token in enumerate(t for t in encoder if t != BOS and t not in modes):
        assert number or token not in sentinels, "the text begins with a kept segment"
        text += spans.pop(0) if token in sentinels else [token]
    assert not spans
    return text


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=60, deadline=None)
@given(texts=TEXTS, length=st.integers(3, 24), seed=st.integers(0, 2**40), passes=st.integers(1, 2))
def test_both_sides_rebuild_every_document(name, texts, length, seed, passes):
    objective = OBJECTIVES[name]
    whole = [[*text, EOS] if objective.takes_eos else text for text in texts]
    kept = [text for text in whole if len(text) >= 2]
    options = {"piece_length": length, "seed": seed, "passes": passes}
    if not kept:
        with pytest.raises(UserError, match="no document"):
            CorpusExamples(store_of(texts), objective, **options)
        return
    examples = CorpusExamples(store_of(texts), objective, **options)
    assert examples.left_out == len(whole) - len(kept)
    encoder, targets = examples.sizes()
    stream: list[int] = []
    for index in range(len(examples)):
        example = examples[index]
        assert (len(example.encoder), len(example.targets)) == (encoder[index], targets[index])
        piece = rebuilt(objective, example)
        assert piece == examples.tokens(index).tolist()
        assert 2 <= len(piece) <= length
        stream += piece
    assert stream == list(itertools.chain(*kept)) * passes


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_longest_piece_fits_and_one_more_does_not(name):
    objective = OBJECTIVES[name]
    longest = objective.longest_piece(48, 40)
    draws = np.random.default_rng(0).random(4000)
    for length, fits in ((longest, True), (longest + 1, False)):
        encoder, targets = objective.sizes(np.full(len(draws), length), draws)
        assert bool((encoder <= 48).all() and (targets <= 40).all()) is fits
    with pytest.raises(UserError, match="too short"):
        objective.longest_piece(2, 1)


def test_halves_are_equal():
    """4096 and 4096 (section 3.2), with bos in the encoder."""
    tokens = np.arange(100, 100 + 8192, dtype=np.int32)
    example = PrefixLM(BOS).random_map(tokens, np.random.default_rng(0))
    assert (len(example.encoder), len(example.targets)) == (4097, 4096)
    np.testing.assert_array_equal(example.encoder[1:], tokens[:4096])
    assert PrefixLM(BOS).longest_piece(4096, 4096) == 8190


def test_random_splits_spread_evenly():
    objective = PrefixLM(None, shortest=0.25, longest=0.75)
    draws = np.random.default_rng(0).random(20_000)
    prefix, _ = objective.sizes(np.full(20_000, 1000), draws)
    assert prefix.min() == 250
    assert prefix.max() == 750
    counts, _ = np.histogram(prefix, 10, (250, 750))
    np.testing.assert_allclose(counts, 2000, atol=5 * np.sqrt(2000))


@pytest.mark.parametrize("mixture", [UL2_MIXTURE, T5GEMMA2_MIXTURE], ids=["ul2", "t5gemma 2"])
def test_rates_and_spans_follow_the_recipe(mixture):
    """Section 6.2, X5: the rate within a token, the mean span within 5 %."""
    objective = UL2(None, EOS, mixture=mixture, special=UL2Tokens())
    length, rng = 1024, np.random.default_rng(0)
    tokens = np.arange(1000, 1000 + length, dtype=np.int32)
    sentinels = objective.special.ids()[3:]
    for draw, denoiser in zip(objective.extremes, mixture, strict=True):
        example = objective.example(tokens, draw, rng)
        assert example.encoder[0] == objective.special.modes["RSX".index(denoiser.mode)]
        marks = np.isin(example.targets, sentinels)
        spans = np.count_nonzero(marks)
        noise = len(example.targets) - spans - 1
        assert abs(noise - length * denoiser.rate) <= 1
        if denoiser.mean_span is None:
            assert spans == 1
            np.testing.assert_array_equal(example.targets[1:-1], tokens[-noise:])
        elif spans > 10:
            assert noise / spans == pytest.approx(denoiser.mean_span, rel=0.05)
        else:
            assert spans == round(noise / denoiser.mean_span)


def test_denoisers_come_as_often_as_they_weigh():
    objective = UL2(None, EOS, mixture=T5GEMMA2_MIXTURE, special=SPECIAL)
    examples = CorpusExamples(
        store_of([[FIRST_TEXT] * 8] * 4000), objective, piece_length=8, seed=3, passes=2
    )
    chosen = objective.denoiser(examples._draws(np.arange(len(examples))))
    expected = np.array([1, 1, 1, 1, 4]) / 8 * len(examples)
    np.testing.assert_allclose(np.bincount(chosen), expected, atol=5 * np.sqrt(8000 * 0.25))
    # A pass draws anew, and so does a seed.
    assert 0.1 < np.mean(chosen[:4000] != chosen[4000:]) < 0.9


def test_segments_are_drawn_evenly():
    """Every place of a span is as likely as any other: 6 tokens in 2 spans, 9 outcomes."""
    objective = UL2(None, EOS, mixture=(Denoiser("X", 0.5, 2.0),), special=UL2Tokens(None, 19, 10))
    tokens = np.arange(100, 108, dtype=np.int32)
    rng = np.random.default_rng(0)
    seen: dict[tuple, int] = {}
    for _ in range(3000):
        outcome = tuple(objective.random_map(tokens, rng).encoder.tolist())
        seen[outcome] = seen.get(outcome, 0) + 1
    assert len(seen) == 9
    np.testing.assert_allclose(list(seen.values()), 3000 / 9, atol=5 * np.sqrt(3000 / 9))


def test_sentinels_start_again_when_they_run_out():
    objective = UL2(None, EOS, mixture=(Denoiser("X", 0.5, 1.0),), special=UL2Tokens(None, 19, 3))
    example = objective.example(np.arange(100, 110, dtype=np.int32), 0.5, np.random.default_rng(0))
    marks = [t for t in example.targets.tolist() if t < 20 and t != EOS]
    assert marks == [19, 18, 17, 19, 18]
    assert [t for t in example.encoder.tolist() if t < 20] == marks


def test_defaults_are_gemma_2s_unused_pieces():
    ids = UL2Tokens().ids()
    assert ids[:4] == (7, 8, 9, 105)
    assert sorted(ids) == list(range(7, 106))[:3] + list(range(10, 106))


def test_what_is_drawn_depends_on_seed_and_number_alone():
    texts = [np.random.default_rng(n).integers(FIRST_TEXT, 99, 50).tolist() for n in range(6)]

    def examples(seed):
        return CorpusExamples(store_of(texts), OBJECTIVES["ul2"], piece_length=30, seed=seed)

    first, second = examples(5), examples(5)
    forwards = [first[i] for i in range(len(first))]
    backwards = [second[i] for i in reversed(range(len(second)))][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        np.testing.assert_array_equal(one.encoder, other.encoder)
        np.testing.assert_array_equal(one.targets, other.targets)
    assert any(
        one.encoder.tolist() != other.encoder.tolist() for one, other in zip(forwards, examples(6))
    )


def test_an_objective_is_a_step_of_any_grain_pipeline():
    pieces = [np.arange(100, 120, dtype=np.int32)] * 5
    dataset = grain.MapDataset.source(pieces).seed(0).random_map(OBJECTIVES["ul2"])
    once, again = ([dataset[i] for i in range(5)] for _ in range(2))
    for one, other in zip(once, again, strict=True):
        np.testing.assert_array_equal(one.encoder, other.encoder)
        assert rebuilt(OBJECTIVES["ul2"], one) == pieces[0].tolist()


def unpacked(row):
    """(encoder tokens, targets) of every segment, after checking all that a row promises."""
    found = []
    count = row["encoder_segments"].max()
    assert count == row["decoder_segments"].max()
    np.testing.assert_array_equal(row["weights"], row["decoder_segments"] > 0)
    for segment in range(1, count + 1):
        encoder, decoder = (row[f"{side}_segments"] == segment for side in ("encoder", "decoder"))
        for side, inside in (("encoder", encoder), ("decoder", decoder)):
            positions = row[f"{side}_positions"][inside]
            np.testing.assert_array_equal(positions, np.arange(inside.sum()))
        targets = row["targets"][decoder]
        assert row["decoder_tokens"][decoder].tolist() == [BOS, *targets[:-1]]
        found.append((row["encoder_tokens"][encoder].tolist(), targets.tolist()))
    for name, array in row.items():
        side = "encoder" if name.startswith("encoder") else "decoder"
        padding = row[f"{side}_segments"] == 0
        assert not array[padding].any()
        assert (np.diff(padding.astype(int)) >= 0).all(), "padding is at the end"
        assert array.dtype == (np.float32 if name == "weights" else np.int32)
    return found


@settings(max_examples=80, deadline=None)
@given(texts=TEXTS, seed=st.integers(0, 99), name=st.sampled_from(sorted(OBJECTIVES)))
def test_every_example_is_in_one_row(texts, seed, name):
    objective = OBJECTIVES[name]
    length = objective.longest_piece(24, 20)
    if all(len(text) + objective.takes_eos < 2 for text in texts):
        return
    examples = CorpusExamples(store_of(texts), objective, piece_length=length, seed=seed)
    rows = PackedExamples(examples, 24, 20, start_id=BOS)
    found = [pair for index in range(len(rows)) for pair in unpacked(rows[index])]
    expected = [(e.encoder.tolist(), e.targets.tolist()) for e in examples]
    assert sorted(found) == sorted(expected)
    numbers = np.concatenate([rows.members(index) for index in range(len(rows))])
    assert sorted(numbers) == list(range(len(examples)))


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=OPEN_ROWS)
)
def test_no_row_overflows_and_no_two_rows_would_fit_one(sizes):
    encoder, decoder = np.array(sizes).T
    rows = pack(encoder, decoder, 9, 7)
    used = [np.bincount(rows, side, rows.max() + 1) for side in (encoder, decoder)]
    assert sorted(set(rows.tolist())) == list(range(rows.max() + 1))
    assert used[0].max() <= 9
    assert used[1].max() <= 7
    # An example opens a row only where none of the open ones had room.
    for later in range(rows.max() + 1):
        first = int(np.flatnonzero(rows == later)[0])
        for earlier in set(rows[:first].tolist()):
            before = np.flatnonzero(rows[:first] == earlier)
            assert (
                encoder[before].sum() + encoder[first] > 9
                or decoder[before].sum() + decoder[first] > 7
            )


def test_rows_are_full():
    """A decoder as long as the mixture's mean share wants is mostly text, not padding."""
    rng = np.random.default_rng(0)
    texts = [[FIRST_TEXT] * n for n in rng.integers(20, 900, 3000)]
    objective = UL2(BOS, EOS, special=SPECIAL)
    examples = CorpusExamples(store_of(texts), objective, piece_length=512)
    encoder, targets = examples.sizes()
    decoder_length = int(2048 * targets.sum() / encoder.sum())
    rows = PackedExamples(examples, 2048, decoder_length, start_id=BOS)
    assert min(rows.efficiency) > 0.9
    halves = CorpusExamples(store_of(texts), PrefixLM(None), piece_length=512)
    assert min(PackedExamples(halves, 1024, 1024, start_id=BOS).efficiency) > 0.95


def ul2_rows(passes=2):
    texts = [np.random.default_rng(n).integers(FIRST_TEXT, 99, 90).tolist() for n in range(20)]
    objective = OBJECTIVES["ul2"]
    length = objective.longest_piece(48, 32)
    examples = CorpusExamples(store_of(texts), objective, piece_length=length, passes=passes)
    return PackedExamples(examples, 48, 32, start_id=BOS)


def test_resuming_anywhere_gives_the_identical_stream():
    rows = ul2_rows()

    def stream():
        return batches(rows, global_batch=4, seed=1, process_index=0, process_count=1)

    reader = stream()
    whole, states = [], []
    for _ in range(12):
        states.append(reader.get_state())
        whole.append(next(reader))
    reader.close()
    for start in (1, 5, 11):
        again = stream()
        again.set_state(states[start])
        for expected in whole[start:]:
            batch = next(again)
            for name in expected:
                np.testing.assert_array_equal(batch[name], expected[name])
        again.close()


def test_processes_share_each_batch():
    rows = ul2_rows()

    def first(process_index, process_count):
        reader = batches(
            rows, global_batch=6, seed=1, process_index=process_index, process_count=process_count
        )
        batch = next(reader)
        reader.close()
        return batch

    whole, parts = first(0, 1), [first(index, 3) for index in range(3)]
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PrefixLM(BOS, shortest=0.6, longest=0.4), "0.6 to 0.4"),
        (lambda: Denoiser("Q", 0.1, 3.0), "R, S, X"),
        (lambda: Denoiser("R", 1.0, 3.0), "between 0 and 1"),
        (lambda: Denoiser("R", 0.1, 0.5), "mean_span"),
        (lambda: Denoiser("R", 0.1, 3.0, weight=0.0), "weight"),
        (lambda: UL2(BOS, EOS, mixture=()), "at least one denoiser"),
        (lambda: UL2Tokens(sentinels=0), "at least one sentinel"),
        (lambda: UL2Tokens(modes=(7, 8, 105)), "different ids"),
        (lambda: UL2Tokens(first_sentinel=5), "different ids"),
        (lambda: ul2_rows(passes=0), "passes"),
        (
            lambda: CorpusExamples(store_of([[30, 31]]), PrefixLM(BOS), piece_length=2),
            "too short",
        ),
        (
            lambda: PackedExamples(
                CorpusExamples(store_of([[30] * 20]), PrefixLM(BOS), piece_length=20),
                8,
                8,
                start_id=BOS,
            ),
            "11 tokens for the encoder and 9 for the decoder",
        ),
    ],
)
def test_bad_arguments(make, says):
    with pytest.raises(UserError, match=says):
        make()
