"""Figures of a study's own script: points and curves, as ``minherit report --analysis`` takes them."""

import pytest

from megatron_inherit.eval.analysis_charts import drawings_of
from megatron_inherit.eval.plots import to_svg

pytest.importorskip("matplotlib")

COMMON = {"name": "depths", "title": "By depth", "note": "Two seeds."}
POINTS = COMMON | {
    "kind": "points",
    "xlabel": "layers",
    "ylabel": "loss",
    "groups": {"one arm": [[4, 1.9, 0.01], [8, 1.8, 0.02]], "another": [[4, 2.0, 0.0], [8, 2.3, 0.1]]},
    "reference": ["the teacher", 1.7],
}
CURVES = COMMON | {
    "kind": "curves",
    "reference": ["scratch at its end", 1.9],
    "curves": [
        {"label": "one arm", "x": [0, 768, 1536], "y": [1.9, 1.8, 1.7], "error": [0.1, 0.0, 0.0]},
        {"label": "another", "x": [0, 768, 1536], "y": [2.9, 2.8, 2.7], "error": [0.1, 0.0, 0.0]},
    ],
}


@pytest.mark.parametrize(
    ("figure", "words"), [(POINTS, ("layers", "the teacher")), (CURVES, ("tokens seen", "scratch at its end"))]
)
@pytest.mark.parametrize("wide", [True, False])
def test_every_group_is_drawn_and_named(figure, words, wide):
    (drawing,) = drawings_of(figure)
    assert (drawing.title, drawing.note) == ("By depth", "Two seeds.")
    svg = to_svg(drawing.draw(wide=wide), description="x")
    for word in ("one arm", "another", *words):
        assert word in svg
    assert all(f"var(--series-{number})" in svg for number in (1, 2))
