"""Balance of groups before and after, plots of it, and the page of clusters."""

import numpy as np
import pytest
from PIL import Image

from curation import Hierarchy, Level
from curation.balance import (
    balance_of_labels,
    balance_of_levels,
    divergence_from_uniform,
    largest_share,
)
from curation.page import image_html, sampled_groups, text_html, write_page
from curation.plots import balance_figure, draw_map, sizes_figure


@pytest.fixture
def hierarchy():
    rng = np.random.default_rng(0)
    low = Level.from_assignment(np.zeros((9, 3)), rng.integers(0, 8, 200), rng.random(200))
    return Hierarchy([low, Level.from_assignment(np.zeros((2, 3)), np.arange(9) % 2, np.zeros(9))])


def test_divergence():
    assert divergence_from_uniform(np.array([5, 5, 5])) == pytest.approx(0)
    assert divergence_from_uniform(np.array([7, 0, 0])) == pytest.approx(np.log(3))
    shares = np.array([0.5, 0.25, 0.25])
    expected = np.sum(shares * np.log(shares / (1 / 3)))
    assert divergence_from_uniform(np.array([2, 1, 1])) == pytest.approx(expected)
    assert divergence_from_uniform(np.zeros(3, int)) == 0
    assert largest_share(np.array([2, 1, 1])) == 0.5


def test_balance_of_levels_and_labels(hierarchy):
    selected = np.array([0, 3, 3, 199])
    for number, found in enumerate(balance_of_levels(hierarchy, selected), 1):
        labels = hierarchy.point_labels(number)
        size = hierarchy.num_clusters[number - 1]
        np.testing.assert_array_equal(found.before, np.bincount(labels, minlength=size))
        np.testing.assert_array_equal(found.after, np.bincount(labels[selected], minlength=size))
    found = balance_of_labels(np.array(["b", "a", "b", "c"]), np.array([1, 1, 3]))
    assert found.before.tolist() == [1, 2, 1]
    assert found.after.tolist() == [2, 0, 1]


def test_figures(hierarchy, tmp_path):
    figure = sizes_figure(hierarchy)
    assert [len(line.x) for line in figure.lines] == [8, 2]  # One of nine clusters is empty.
    assert sum(figure.lines[1].y) == 200
    figure = balance_figure("b", "clusters", balance_of_levels(hierarchy, np.arange(50))[0])
    assert sum(figure.lines[0].y) == pytest.approx(1)
    for width in (1, 2, 3):
        points = np.random.default_rng(0).normal(size=(60, width))
        draw_map(tmp_path / "map.png", "a map", [("all", points), ("some", points[:9])], points[:3])
        with Image.open(tmp_path / "map.png") as image:
            assert len(np.unique(np.asarray(image).reshape(-1, 4), axis=0)) > 10


def test_page_shows_selected_items_and_trusts_no_name(hierarchy, tmp_path):
    labels = hierarchy.point_labels(1)
    selected = np.arange(0, 200, 3)
    groups = sampled_groups(labels, selected, groups=4, each=5)
    assert len(groups) == 4
    for group in groups:
        cluster = int(group.name.split()[1])
        assert group.before == np.sum(labels == cluster)
        assert group.after == np.sum(labels[selected] == cluster)
        assert len(group.rows) == min(5, group.after)
        assert set(group.rows) <= set(selected[labels[selected] == cluster].tolist())
    image = np.zeros((300, 200, 3), np.uint8)
    shown = [image_html(image, "<script>'"), text_html("<b>" + "x" * 999, "a & b")]
    write_page(tmp_path / "page.html", "<title>", groups, lambda row: shown[row % 2])
    page = (tmp_path / "page.html").read_text()
    assert "<script>" not in page
    assert "<b>" not in page
    assert "&lt;title&gt;" in page
    assert page.count("<figure>") == sum(len(group.rows) for group in groups)
    assert len(page) < 60_000
