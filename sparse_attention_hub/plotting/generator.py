"""`PlotGenerator`: densities, keys that were read, and errors, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DPI = 150


class Granularity(StrEnum):
    """What one point of a picture stands for."""

    PER_TOKEN = "per_token"
    PER_HEAD = "per_head"
    PER_LAYER = "per_layer"

    def __repr__(self) -> str:
        """The name."""
        return f"Granularity.{self.name}"


class PlotGenerator:
    """Draws data that it is given, and only that.

    Attributes:
        storage_path: The folder of the pictures.
    """

    def __init__(self, storage_path: str | Path = "./plots") -> None:
        """Makes the folder.

        Args:
            storage_path: Of the pictures.
        """
        self.set_storage_path(storage_path)

    def set_storage_path(self, path: str | Path) -> None:
        """Draws to another folder from now on, and makes it."""
        self.storage_path = Path(path)
        self.storage_path.mkdir(parents=True, exist_ok=True)

    def generate_plot(
        self,
        granularity: Granularity,
        data: Mapping[str, Any] | None = None,
        plot_type: str = "default",
        title: str = "",
    ) -> str:
        """Draws one picture.

        Args:
            granularity: PER_TOKEN: `data["keys_read"]` `(heads or queries, keys)`, the weight of
                each key (0 = not read), a picture of which keys a step read. PER_HEAD:
                `data["attention_matrix"]` or `data["density"]`, `(layers, heads)`, a heat map.
                PER_LAYER: `data` names any number of series `(layers,)`.
            data: See above.
            plot_type: Part of the file's name, so that pictures can lie side by side.
            title: Above the picture.

        Returns:
            The path of the PNG file, `<granularity>_<plot_type>.png`.

        Raises:
            ValueError: The granularity is unknown, or the data for it is missing.
        """
        try:
            granularity = Granularity(granularity)
        except ValueError:
            allowed = ", ".join(member.value for member in Granularity)
            raise ValueError(f"granularity must be one of {allowed}, got {granularity!r}") from None
        if not data:
            raise ValueError(f"data must hold what is drawn {granularity.value}, got {data!r}")
        if granularity is Granularity.PER_LAYER:
            return self._lines(data, f"{granularity}_{plot_type}", title, "layer")
        names = {
            Granularity.PER_TOKEN: ("keys_read",),
            Granularity.PER_HEAD: ("density", "attention_matrix"),
        }[granularity]
        matrix = next((data[name] for name in names if name in data), None)
        if matrix is None:
            raise ValueError(f"data must have {' or '.join(names)}, got {sorted(data)}")
        labels = ("key", "head") if granularity is Granularity.PER_TOKEN else ("head", "layer")
        return self._heat_map(matrix, f"{granularity}_{plot_type}", title, labels)

    def generate_comparison_plot(
        self,
        data_dict: Mapping[str, Any],
        granularity: Granularity = Granularity.PER_LAYER,
        title: str = "",
    ) -> str:
        """Draws several configurations into one picture.

        Args:
            data_dict: By configuration: a series `(layers,)`, drawn over the layers; or
                `{"density": [...], "error": [...]}`, drawn as error against density.
            granularity: Part of the file's name.
            title: Above the picture.

        Returns:
            The path of the PNG file, `comparison_<granularity>.png`.

        Raises:
            ValueError: There is nothing to draw, or a configuration has other data.
        """
        if not data_dict:
            raise ValueError("data_dict must have at least one configuration, got none")
        name = f"comparison_{Granularity(granularity)}"
        if not all(isinstance(value, Mapping) for value in data_dict.values()):
            return self._lines(data_dict, name, title, "layer")
        axes = _new_axes()
        for label, series in data_dict.items():
            if set(series) != {"density", "error"} or len({*map(len, series.values())}) != 1:
                raise ValueError(
                    f"{label!r} must have density and error, equally many, got {dict(series)!r}"
                )
            points = sorted(zip(series["density"], series["error"], strict=True))
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
        axes.set(xlabel="density", ylabel="relative output error", title=title, yscale="log")
        axes.legend()
        return self._saved(axes, name)

    def _lines(self, data: Mapping[str, Sequence[float]], name: str, title: str, label: str) -> str:
        axes = _new_axes()
        for series, values in data.items():
            axes.plot(range(len(values)), [float(value) for value in values], label=series)
        axes.set(xlabel=label, title=title)
        axes.legend()
        return self._saved(axes, name)

    def _heat_map(self, matrix: Any, name: str, title: str, labels: tuple[str, str]) -> str:
        if hasattr(matrix, "tolist"):  # tensors and arrays
            matrix = matrix.tolist()
        axes = _new_axes()
        image = axes.imshow(matrix, aspect="auto", interpolation="nearest", cmap="viridis")
        axes.figure.colorbar(image)
        axes.set(xlabel=labels[0], ylabel=labels[1], title=title)
        return self._saved(axes, name)

    def _saved(self, axes: Axes, name: str) -> str:
        path = self.storage_path / f"{name}.png"
        axes.figure.savefig(path, dpi=_DPI, bbox_inches="tight")  # type: ignore[union-attr]
        return str(path)


def _new_axes() -> Axes:
    """Of a figure of its own, without the global state of pyplot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # Imported here: only who draws needs it.
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(9, 5), layout="constrained").add_subplot()
