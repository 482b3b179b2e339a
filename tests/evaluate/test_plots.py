from itertools import pairwise
from pathlib import Path

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest

from deepalign.drawing import curve_styles, log_y, new_figure, spread_apart
from deepalign.evaluate import plots
from deepalign.evaluate.plots import plot_attack_success, plot_position_profile
from deepalign.evaluate.statistics import wilson_interval

# The first style is grey, as the axes and antialiased letters are, and could not be found by its colour.
STYLES = curve_styles({name: name for name in ("grey", "aligned", "contrastive", "completed")})


def pixels_of(path: Path, model: str) -> np.ndarray:
    """(row, column) of the pixels that have the curve's colour, its marker and name included."""
    image_HWC = matplotlib.image.imread(path)[..., :3]
    color_C = np.array(matplotlib.colors.to_rgb(STYLES[model].color))
    return np.argwhere(np.abs(image_HWC - color_C).max(axis=-1) < 0.02)


def test_every_curve_is_drawn_and_none_is_moved_far(tmp_path):
    path = tmp_path / "new" / "asr.png"
    counts = {"contrastive": {0: (9, 10), 5: (10, 10)}, "aligned": {0: (0, 10), 5: (9, 10)}, "completed": {0: (0, 10)}}
    plot_attack_success(path, counts, STYLES, title="t")
    assert [file.name for file in path.parent.iterdir()] == ["asr.png"]
    heights = {model: pixels_of(path, model)[:, 0] for model in counts}
    image_height = matplotlib.image.imread(path).shape[0]
    assert heights["contrastive"].max() < 0.3 * image_height  # rates of 0.9 and 1: near the top
    assert heights["completed"].min() > 0.7 * image_height  # a rate of 0: near the bottom
    assert np.ptp(heights["aligned"]) > 0.6 * image_height  # from 0 to 0.9


def test_bands_are_wilson_intervals(figures):
    plot_attack_success("a.png", {"aligned": {0: (0, 10), 5: (9, 10)}}, STYLES, title="t")
    (band,) = figures[0].axes[0].collections
    heights = band.get_paths()[0].vertices[:, 1]
    for bound in (*wilson_interval(0, 10), *wilson_interval(9, 10)):
        assert np.abs(heights - bound).min() < 1e-9


def test_a_depth_without_attacks_is_left_out(tmp_path):
    plot_attack_success(tmp_path / "a.png", {"aligned": {0: (0, 0), 5: (10, 10)}}, STYLES, title="t")
    assert pixels_of(tmp_path / "a.png", "aligned")[:, 0].max() < 0.3 * 840


def test_a_profile_with_gaps_in_its_band_is_drawn(tmp_path):
    profile = {"position": [1, 2, 3], "mean": [5.0, 0.5, 0.05], "standard_error": [0.1, 0.1, None], "n": [3, 2, 1]}
    low = {**profile, "mean": [0.0, 0.01, 0.005]}  # a KL of 0 has no place on a log scale, and must not break it
    plot_position_profile(tmp_path / "kl.png", {"aligned": profile, "completed": low}, STYLES, title="t")
    high, below = (pixels_of(tmp_path / "kl.png", model)[:, 0] for model in ("aligned", "completed"))
    assert high.min() < below.min()
    assert high.max() < below.max()


@pytest.fixture
def figures(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_atomic", lambda figure, path: drawn.append(figure))
    return drawn


@pytest.mark.parametrize(
    ("sizes", "error", "title", "note"),
    [
        ([9, 9], 0.1, "t (n = 9)", ""),
        ([9, 4], 1.0, "t (n = 4 to 9)", "; bands cut at the bottom reach 0 or nearly"),
        ([None, None], 0.1, "t", ""),
    ],
)
def test_a_profile_says_of_how_many_and_which_bands_are_cut(figures, sizes, error, title, note):
    profile = {"position": [1, 2], "mean": [2.0, 1.0], "standard_error": [0.1, error], "n": sizes}
    plot_position_profile("kl.png", {"aligned": profile}, STYLES, title="t")
    (axes,) = figures[0].axes
    assert axes.get_title(loc="left") == title
    assert axes.get_xlabel() == f"position in the answer (1: its first token){note}"


def test_depths_at_equal_distances_are_said_to_be(figures):
    plot_attack_success("a.png", {"aligned": {0: (0, 9), 1: (1, 9), 20: (9, 9)}}, STYLES, title="t")
    (axes,) = figures[0].axes
    assert list(axes.get_xticks()) == [0, 1, 2]
    assert axes.get_xlabel().endswith("not to scale")


@pytest.mark.parametrize(
    "heights",
    [{"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.95, "e": 0.0}, {"a": 0.0, "b": 0.0}, {"a": 0.5, "b": 0.52, "c": 0.55}],
)
def test_names_do_not_overlap_nor_leave_the_frame(heights):
    placed = spread_apart(heights, 0.06)
    values = sorted(placed.values())
    assert all(high - low >= 0.06 - 1e-9 for low, high in pairwise(values))
    assert values[0] >= 0
    assert values[-1] <= 1
    order = sorted(heights, key=lambda name: -heights[name])
    assert sorted(placed, key=lambda name: -placed[name]) == order


def test_names_with_room_stay_where_they_are():
    assert spread_apart({"a": 0.9, "b": 0.1}, 0.06) == pytest.approx({"a": 0.9, "b": 0.1})


def test_styles_differ_in_colour_marker_and_line():
    styles = curve_styles({str(i): str(i) for i in range(8)}).values()
    assert len({style.color for style in styles}) == 8
    assert len({style.marker for style in styles}) == 8
    with pytest.raises(ValueError, match="9 curves"):
        curve_styles({str(i): str(i) for i in range(9)})


@pytest.mark.parametrize(
    ("low", "high", "some", "none"), [(0.6, 2.2, {"0.6", "1", "2"}, ()), (1e-3, 9, {"0.001", "1"}, "2")]
)
def test_a_logarithmic_axis_has_plain_numbers(low, high, some, none):
    figure, axes = new_figure("")
    log_y(axes)
    axes.set_ylim(low, high)
    figure.canvas.draw()
    labels = {label.get_text() for kind in (False, True) for label in axes.yaxis.get_ticklabels(minor=kind)}
    assert some <= labels
    assert not labels & set(none)
    assert not any("$" in label for label in labels)
