"""Reports: the page, the plots, and outcomes decided from measurements."""

import json
import struct

import numpy as np
import pytest

from common.launch import (
    Expectation,
    Figure,
    Line,
    Results,
    Table,
    line_from_metrics,
    write_report,
)
from common.launch.report import markdown_table


def results(**measured):
    return Results(
        claim="State stays small.",
        setting="Smaller than the paper: width 64.",
        expectations=[
            Expectation(
                "constant", "state does not grow", lambda m: m["state"][0] == m["state"][-1]
            ),
            Expectation("faster", "at least twice", lambda m: m["ratio"] >= 2),
        ],
        measured=measured,
    )


def test_report_files(tmp_path):
    figure = Figure(
        "bytes",
        "Bytes by context",
        "context (tokens)",
        "bytes",
        [Line("state", [256, 512], [9, 9]), Line("cache", [256, 512], [9, 18], dashed=True)],
        log_x=True,
        log_y=True,
        caption="The cache grows.",
    )
    table = Table(
        "Rates", ("model", "tokens/s"), [("ours", 12345.6), ("a|b", 2.0)], note="One core."
    )
    page = write_report(
        tmp_path / "report",
        "RecurrentGemma",
        text="Intro.",
        tables=[table],
        figures=[figure],
        results=results(state=np.array([8, 8]), ratio=np.float32(1.5)),
    )
    text = page.read_text()
    for part in (
        "# RecurrentGemma",
        "Intro.",
        "![Bytes by context](bytes.png)",
        "The cache grows.",
    ):
        assert part in text
    assert "| ours  |   12,346 |" in text
    assert "a\\|b" in text
    assert "**no**" in text
    header = (tmp_path / "report" / "bytes.png").read_bytes()[:24]
    assert struct.unpack(">II", header[16:]) == (1280, 800)
    assert json.loads((tmp_path / "report" / "results.json").read_text()) == {
        "claim": "State stays small.",
        "setting": "Smaller than the paper: width 64.",
        "expected": ["constant: state does not grow", "faster: at least twice"],
        "measured": {"state": [8, 8], "ratio": 1.5},
        "holds": {"constant": True, "faster": False},
    }


def test_outcomes_follow_the_measurements():
    assert results(state=[1, 1], ratio=3.0).holds == {"constant": True, "faster": True}
    assert results(state=[1, 2], ratio=float("nan")).holds == {"constant": False, "faster": False}
    assert "FAILS  faster: at least twice" in results(state=[1], ratio=1).summary()
    with pytest.raises(KeyError):
        _ = results(state=[1]).holds


def test_numbers_that_are_not_finite_are_null():
    assert results(state=[1], ratio=float("nan")).to_dict()["measured"]["ratio"] is None


def test_curve_from_metrics_takes_the_last_value_of_a_step():
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "eval": 1.0}, {"step": 3, "loss": 2.0}]
    rows += [{"step": 3, "loss": 2.5}, {"step": 4, "loss": None}]
    assert line_from_metrics(rows, "loss", "training") == Line("training", [1, 3], [3.0, 2.5])


def test_mismatched_shapes_are_refused():
    with pytest.raises(ValueError, match="2 x but 1 y"):
        Line("a", [1, 2], [1])
    with pytest.raises(ValueError, match="has not 2 cells"):
        Table("t", ("a", "b"), [(1,)])


def test_markdown_table_aligns_numbers_right():
    assert markdown_table(("name", "n"), [("a", 1), ("b", 1234)]).splitlines() == [
        "| name |     n |",
        "| ---- | ----: |",
        "| a    |     1 |",
        "| b    | 1,234 |",
    ]
