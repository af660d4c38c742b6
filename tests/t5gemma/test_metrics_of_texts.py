"""Exact match, ROUGE and BLEU of texts, against values worked out by hand."""

import math

import pytest

from common.errors import UserError
from t5gemma.metrics import generation_metrics, normalised


def test_the_same_texts_score_all():
    texts = ["The cat sat on the mat today.", "Nothing else happened in the house."]
    scores = generation_metrics(texts, texts)
    assert scores == {name: pytest.approx(100.0) for name in scores}
    assert set(scores) == {
        "exact_match", "normalised_match", "rouge1", "rouge2", "rougeL", "bleu",
    }  # fmt: skip


def test_values_by_hand():
    """ "the cat sat" against "the cat ran far": 2 of 3 and of 4 words, 1 of 2 and of 3 pairs."""
    scores = generation_metrics(["the cat sat"], ["the cat ran far"])
    assert scores["exact_match"] == 0
    assert scores["rouge1"] == pytest.approx(100 * 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert scores["rouge2"] == pytest.approx(100 * 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert scores["rougeL"] == scores["rouge1"]


def test_bleu_is_of_the_corpus():
    """Precisions of 1 to 4 words over both texts together, and the brevity penalty."""
    predictions = ["a b c d e f", "a b c d x"]
    references = ["a b c d e f", "a b c d e f"]
    precisions = [10 / 11, 8 / 9, 6 / 7, 4 / 5]
    brevity = math.exp(1 - 12 / 11)
    expected = 100 * brevity * math.prod(precisions) ** 0.25
    assert generation_metrics(predictions, references)["bleu"] == pytest.approx(expected)


def test_matches():
    scores = generation_metrics(
        ["Paris ", "the Eiffel tower!", "Rome"], ["Paris", "Eiffel Tower", "x"]
    )
    assert scores["exact_match"] == pytest.approx(100 / 3)
    assert scores["normalised_match"] == pytest.approx(200 / 3)
    assert normalised("An  answer, the one.") == "answer one"


def test_stems_count_as_words():
    pair = (["running dogs"], ["run dog"])
    assert generation_metrics(*pair)["rouge1"] == 0
    assert generation_metrics(*pair, stemmer=True)["rouge1"] == pytest.approx(100.0)


def test_nothing_to_score():
    with pytest.raises(UserError, match="no texts"):
        generation_metrics([], [])
    with pytest.raises(ValueError, match="1 predictions for 2"):
        generation_metrics(["a"], ["a", "b"])
