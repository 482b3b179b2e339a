"""Bars: what is drawn, read back from the figure before it is saved."""

import pytest

from deepalign.evaluate import bars
from deepalign.evaluate.bars import Bar, plot_bars


@pytest.fixture
def figures(monkeypatch):
    drawn, save = [], bars.save_atomic
    monkeypatch.setattr(bars, "save_atomic", lambda figure, path: (drawn.append(figure), save(figure, path)))
    return drawn


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_heights_are_rates_and_degenerate_answers_stand_on_top(tmp_path, figures):
    shown = [Bar("Baseline", [(9, 10)], [(0, 10)]), Bar("Ours", [(1, 10)], [(5, 10)])]
    plot_bars(tmp_path / "bars.png", shown, title="title", ylabel="rate")
    axes = figures[0].axes[0]
    heights = [(patch.get_y(), patch.get_height()) for patch in axes.patches]
    assert heights == [pytest.approx(pair) for pair in ((0, 0.9), (0, 0.1), (0.9, 0.0), (0.1, 0.5))]
    assert [text.get_text() for text in axes.texts] == ["9/10", "1/10\n+ 50%"]
    assert legend(figures[0]) == ["harmful", "degenerate", "harmful, 95% interval"]
    assert (tmp_path / "bars.png").stat().st_size > 0


def test_several_seeds_are_dots_around_their_mean(tmp_path, figures):
    plot_bars(tmp_path / "bars.png", [Bar("Safety Augmentation", [(1, 10), (3, 10)])], title="title", ylabel="rate")
    axes = figures[0].axes[0]
    assert axes.patches[0].get_height() == pytest.approx(0.2)
    assert sorted(axes.lines[0].get_ydata()) == [0.1, 0.3]
    assert axes.texts[0].get_text() == "20%"
    assert legend(figures[0]) == ["harmful, mean over seeds", "harmful, one seed"]
    assert axes.get_xticklabels()[0].get_text() == "Safety\nAugmentation"


@pytest.mark.parametrize("counts", [[(1, 10)], [(1, 10), (10, 10), (2, 10)], [(99, 100), (100, 100)]])
def test_a_label_stands_on_its_bar_and_off_the_seeds(tmp_path, figures, counts):
    plot_bars(tmp_path / "bars.png", [Bar(str(place), counts) for place in range(3)], title="title", ylabel="rate")
    (axes,) = figures[0].axes
    for place, text in enumerate(axes.texts):
        box = text.get_window_extent().transformed(axes.transData.inverted())
        assert 0 <= box.y0 - Bar("", counts).rate < 0.04
        assert max(axes.lines[place].get_xdata()) < box.x0
        assert box.x1 < place + 0.5


@pytest.mark.parametrize(
    ("label", "wrapped"),
    [
        ("Safe LoRA", "Safe LoRA"),
        ("Ours, degraded reference", "Ours,\ndegraded\nreference"),
        ("a family\nOurs", "a family\nOurs"),
    ],
)
def test_long_names_get_lines(label, wrapped):
    assert bars._wrapped(label) == wrapped
