"""Pictures of what sparse attention reads and what that costs."""

from sparse_attention_hub.plotting.generator import Granularity, PlotGenerator

__all__ = ["Granularity", "PlotGenerator"]
