"""Pictures show the data that is given, and nothing else."""

import subprocess
import sys

import pytest
import torch
from matplotlib.image import imread

from sparse_attention_hub import Granularity, PlotGenerator


def test_pictures_differ_with_the_data(tmp_path) -> None:
    plots = PlotGenerator(tmp_path / "deep" / "folder")
    for granularity, name in (("per_token", "keys_read"), ("per_head", "density")):
        pixels = []
        for seed in (0, 1):
            data = torch.rand(6, 30, generator=torch.Generator().manual_seed(seed))
            path = plots.generate_plot(Granularity(granularity), {name: data}, f"seed{seed}")
            assert path == str(tmp_path / "deep" / "folder" / f"{granularity}_seed{seed}.png")
            pixels.append(torch.tensor(imread(path)))
        assert pixels[0].shape != pixels[1].shape or not torch.equal(pixels[0], pixels[1])


def test_lines_and_comparisons(tmp_path) -> None:
    plots = PlotGenerator(tmp_path)
    path = plots.generate_plot(Granularity.PER_LAYER, {"density": [0.1, 0.3, 0.2]}, title="t")
    blank = plots.generate_plot(Granularity.PER_LAYER, {"density": [0.2, 0.2, 0.2]}, "flat")
    assert not torch.equal(torch.tensor(imread(path)), torch.tensor(imread(blank)))
    curves = {
        "quest": {"density": [0.1, 0.05], "error": [0.2, 0.4]},
        "oracle": {"density": [0.05, 0.1], "error": [0.1, 0.05]},
    }
    both = imread(plots.generate_comparison_plot(curves))
    one = imread(plots.generate_comparison_plot({"quest": curves["quest"]}))
    assert both.shape != one.shape or (both != one).any()
    plots.generate_comparison_plot({"quest": [1.0, 2.0]}, Granularity.PER_LAYER)


def test_nothing_is_made_up(tmp_path) -> None:
    plots = PlotGenerator(tmp_path)
    with pytest.raises(ValueError, match="data must hold"):
        plots.generate_plot(Granularity.PER_TOKEN)
    with pytest.raises(ValueError, match="density or attention_matrix"):
        plots.generate_plot(Granularity.PER_HEAD, {"keys_read": [[1]]})
    with pytest.raises(ValueError, match="per_token, per_head, per_layer, got 'per_page'"):
        plots.generate_plot("per_page", {"x": [1]})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one configuration"):
        plots.generate_comparison_plot({})
    with pytest.raises(ValueError, match="equally many"):
        plots.generate_comparison_plot({"a": {"density": [1], "error": []}})
    assert not list(tmp_path.iterdir())


def test_names() -> None:
    assert str(Granularity.PER_HEAD) == "per_head" == Granularity.PER_HEAD
    assert repr(Granularity.PER_HEAD) == "Granularity.PER_HEAD"


def test_matplotlib_is_loaded_by_drawing_alone() -> None:
    code = "import sparse_attention_hub.plotting, sys; print('matplotlib' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.stdout.strip() == "False"
