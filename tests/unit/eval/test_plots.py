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


def looks(figure):
    """Colour and dashes of what was drawn, by label: of the lines, and of the samples beside the labels."""
    axes = figure.axes[0]
    lines = [(line.get_color(), line._dash_pattern) for line in axes.lines if line.get_clip_on()]
    samples = [line for line in axes.lines if not line.get_clip_on()]
    heights = {line.get_transform().transform((0, line.get_ydata()[0]))[1]: line for line in samples}
    labelled = {}
    for text in axes.texts:
        near = min(heights, key=lambda height, own=text: abs(height - height_of(own)), default=None)
        assert near is None or abs(near - height_of(text)) < 1
        labelled[text.get_text()] = None if near is None else (heights[near].get_color(), heights[near]._dash_pattern)
    return lines, labelled


def height_of(text):
    box = text.get_window_extent()
    return (box.y0 + box.y1) / 2


def test_an_arm_without_a_curve_keeps_its_colour():
    full = [plots.Curve(name, [0, 1000], [3.0, 2.0 + place]) for place, name in enumerate("abc")]
    gap = [full[0], plots.Curve("b", (), ()), full[2]]
    lines, labelled = looks(plots.loss_curves(gap))
    assert [color for color, _ in lines] == [plots.SERIES[0], plots.SERIES[2]]
    assert labelled == {"a": None, "c": None}
    colors = {text.get_text(): text.get_color() for text in plots.loss_curves(gap).axes[0].texts}
    assert colors == {"a": plots.SERIES[0], "c": plots.SERIES[2]}


@pytest.mark.parametrize("wide", [True, False])
def test_where_colours_come_again_labels_show_the_dashes(wide):
    curves = [plots.Curve(f"arm {n}", [0, 1000, 50_000], [5.0, 3.0, 2.0 + n / 10]) for n in range(11)]
    figure = plots.loss_curves(curves, reference=("teacher", 1.9), wide=wide)
    figure.draw_without_rendering()
    lines, labelled = looks(figure)
    own = dict(zip((curve.label for curve in curves), lines, strict=False))
    assert {label: labelled[label] for label in own} == own
    assert own["arm 0"][0] == own["arm 8"][0]
    assert own["arm 0"][1] != own["arm 8"][1]
    assert all(line.get_window_extent().x1 <= figure.bbox.x1 for line in figure.axes[0].lines if not line.get_clip_on())


def test_an_arm_that_diverged_is_labelled_where_it_was_last_a_number():
    nan = float("nan")
    curves = [plots.Curve("whole", [0, 1, 2], [3.0, 2.5, 2.0]), plots.Curve("gone", [0, 1, 2], [3.0, 2.8, nan])]
    curves.append(plots.Curve("never", [0, 1, 2], [nan, nan, nan]))
    figure = plots.loss_curves(curves)
    assert {text.get_text(): text.xy[1] for text in figure.axes[0].texts} == {"whole": 2.0, "gone": 2.8}
    assert plots.to_png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("number", [3, 43])
def test_labels_stand_beside_the_axes_and_leave_them_their_height(number, wide):
    curves = [plots.Curve(f"arm {n}", [0, 1000, 50_000], [5.0, 3.0, 2.0 + n / 1000]) for n in range(number)]
    figure = plots.loss_curves(curves, reference=("teacher", 1.9), wide=wide)
    figure.draw_without_rendering()
    axes = figure.axes[0].get_window_extent()
    assert axes.height > 0.75 * figure.bbox.height
    heights = sorted(height_of(text) for text in figure.axes[0].texts)
    assert all(axes.y0 - 1 <= height <= axes.y1 + 1 for height in heights)
    assert all(b - a >= 13.9 * figure.dpi / 72 for a, b in itertools.pairwise(heights))


def test_points_are_joined_where_each_place_has_one():
    groups = {"swept": [(2, 2.0, 0.1), (1, 3.0, None)], "tried twice": [(1, 2.0, None), (2, 2.5, None), (1, 2.0, 0.1)]}
    axes = plots.points(groups, xlabel="blocks", ylabel="loss").axes[0]
    found = {container.get_label(): container[0].get_linestyle() for container in axes.containers}
    assert found == {"swept": "-", "tried twice": "None"}
