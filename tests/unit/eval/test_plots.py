import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("matplotlib", reason="needs matplotlib")

import itertools

from megatron_inherit.eval import plots


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=12).map(sorted), st.floats(1, 30))
def test_labels_keep_their_order_and_their_distance(positions, gap):
    placed = plots.spread(positions, gap)
    assert all(b - a >= gap - 1e-6 for a, b in itertools.pairwise(placed))
    assert sum(placed) == pytest.approx(sum(positions), abs=1e-6)


def test_labels_that_have_room_stay_where_they_are():
    assert plots.spread([0.0, 50.0, 100.0], 14) == [0.0, 50.0, 100.0]


def test_a_far_start_leaves_the_picture_and_tokens_become_logarithmic():
    curve = plots.Curve("arm", [0, 1000, 10_000, 100_000], [19.4, 4.0, 3.0, 2.5])
    axes = plots.loss_curves([curve]).axes[0]
    assert axes.get_ylim()[1] < 6
    assert axes.get_xscale() == "symlog"
    short = plots.Curve("arm", [0, 1000, 2000], [4.4, 4.0, 3.0])
    axes = plots.loss_curves([short]).axes[0]
    assert axes.get_ylim()[1] > 4.4
    assert axes.get_xscale() == "linear"


def test_svg_has_the_pages_colours_no_size_of_its_own_and_is_repeatable():
    curve = plots.Curve("<b>arm", [0, 1], [2.0, 1.0], [0.1, None])
    first = plots.to_svg(plots.loss_curves([curve]), description='a "loss" & more')
    assert "var(--series-1)" in first
    assert plots.SERIES[0] not in first
    assert "<b>arm" not in first
    assert "&lt;b&gt;arm" in first
    assert 'aria-label="a &quot;loss&quot; &amp; more"' in first
    assert " width=" not in first[: first.index(">")]
    assert first == plots.to_svg(plots.loss_curves([curve]), description='a "loss" & more')


def test_heatmap_leaves_unknown_cells_blank():
    figure = plots.heatmap([[1.0, float("nan")], [2.0, 3.0]], xlabel="head", ylabel="block", title="", colorbar="rank")
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["1.00", "2.00", "3.00"]
    assert plots.to_png(figure).startswith(b"\x89PNG")
