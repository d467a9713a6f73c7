"""Small measurements from inside the code, as JSON lines; nothing when off."""

from sparse_attention_hub.metric_logging.logger import LogEvent, MicroMetricLogger

__all__ = ["LogEvent", "MicroMetricLogger"]
