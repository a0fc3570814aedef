"""A matrix as squares: each number stands in the middle of its own."""

import numpy as np
import pytest

from rlrazor.report.drawing import Figure, Points, interactive, paper
from rlrazor.report.heat import heat_map


def test_each_number_is_in_the_middle_of_its_square() -> None:
    values = np.array([[0.1, 1.0, 0.05], [0.5, 0.25, 0.0]])
    panel = heat_map("some method", values, ["base", "1: a"], 0.0, ("task", "after"))
    squares = {
        (x, y) for layer in panel.layers if isinstance(layer, Points) for x, y in zip(layer.x, layer.y, strict=True)
    }
    assert {(x, y) for x, y, _ in panel.texts} == squares
    assert [text for *_, text in panel.texts] == ["10", "100", "5", "50", "25", "0"]
    drawn = paper.draw(Figure("heat", [panel], 1))
    drawn.canvas.draw()
    (axis, *_) = drawn.axes
    for (x, y, text), written in zip(panel.texts, axis.texts, strict=True):
        assert written.get_text() == text
        box, place = written.get_window_extent(), axis.transData.transform((x, y))
        assert ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) == pytest.approx(place, abs=1.5)
    (text,) = [trace for trace in interactive(Figure("heat", [panel], 1)).data if trace.mode == "text"]
    assert text.textposition == "middle center"
