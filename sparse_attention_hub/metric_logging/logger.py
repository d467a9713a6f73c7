"""`MicroMetricLogger`: named measurements, queued and appended to `micro_metrics.jsonl`."""

from __future__ import annotations

import atexit
import json
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

logger = logging.getLogger(__name__)

FILE_NAME = "micro_metrics.jsonl"
_MOST_QUEUED = 100_000
"""Events that wait for a file that cannot be written; after them the oldest are lost."""


@dataclass(frozen=True)
class LogEvent:
    """One measurement.

    Attributes:
        timestamp: When.
        metric: Its registered name.
        value: What JSON can hold.
        metadata: Such as the layer.
        location: `module.function` that measured.
    """

    timestamp: datetime
    metric: str
    value: Any
    metadata: dict[str, Any]
    location: str

    def to_json(self) -> str:
        """One line of the file; numbers that JSON has not (NaN, infinities) are null.

        Raises:
            TypeError: The value or the metadata is not what JSON can hold.
        """
        fields = {**vars(self), "timestamp": self.timestamp.isoformat()}
        try:
            return json.dumps(fields, allow_nan=False)
        except ValueError:
            return json.dumps(json.loads(json.dumps(fields), parse_constant=lambda name: None))


class MicroMetricLogger:
    """One per process; safe to use from several threads.

    Only the first construction counts. Without a path, or with a metric that is not enabled, `log`
    does nothing; ask `is_metric_enabled` before measuring anything that costs.
    """

    _instance: ClassVar[MicroMetricLogger | None] = None
    _initialized: ClassVar[bool] = False
    _registered_metrics: ClassVar[dict[str, type]] = {}
    _class_lock: ClassVar[threading.RLock] = threading.RLock()

    def __new__(cls, *args: Any, **kwargs: Any) -> MicroMetricLogger:
        """The process's logger."""
        with cls._class_lock:
            if cls._instance is None:
                cls._instance = super().__new__(cls)
                cls._initialized = False
            return cls._instance

    def __init__(
        self,
        log_path: str | None = None,
        flush_every: int = 1000,
        flush_interval: float = 60.0,
        enabled_metrics: str | Iterable[str] | None = None,
        max_records: int | None = None,
        sampling_factor: float = 1.0,
    ) -> None:
        """Sets up the logger the first time.

        Args:
            log_path: A folder; None = nothing is logged until `configure_logging`.
            flush_every: Events that are queued at most.
            flush_interval: Seconds after which the next event writes the queue.
            enabled_metrics: See `enable_metrics`.
            max_records: Events in all, >= 0; None = no limit.
            sampling_factor: The share of events that is kept; below 0 is 0, above 1 is 1.

        Raises:
            ValueError: `max_records` is negative.
        """
        with self._class_lock:
            if type(self)._initialized:
                if log_path is not None and log_path != self.log_path:
                    logger.warning(
                        "the metric logger writes to %s already; use configure_logging to move it",
                        self.log_path,
                    )
                return
            self._lock = threading.RLock()
            self._queue: list[str] = []
            self._enabled: set[str] = set()
            self._last_flush = time.monotonic()
            self.flush_every = flush_every
            self.flush_interval = flush_interval
            self.log_path: str | None = None
            self._limit(max_records, sampling_factor)
            type(self)._initialized = True
            if log_path is not None:
                self.configure_logging(log_path, enabled_metrics, max_records, sampling_factor)
            else:
                self.enable_metrics(enabled_metrics)
            atexit.register(self.flush)

    @classmethod
    def register_metric(cls, identifier: str, dtype: type) -> None:
        """Makes a metric known.

        Args:
            identifier: Its name.
            dtype: Of its values.
        """
        with cls._class_lock:
            cls._registered_metrics[identifier] = dtype

    @classmethod
    def get_registered_metrics(cls) -> dict[str, type]:
        """The known metrics, as a copy."""
        return dict(cls._registered_metrics)

    def enable_metrics(self, metrics: str | Iterable[str] | None) -> None:
        """Says which metrics are logged from now on.

        Args:
            metrics: "all" = those known now, names, or None = none. Unknown names are left out
                with a warning.
        """
        known = self.get_registered_metrics()
        wanted = set(known) if metrics == "all" else {metrics} if isinstance(metrics, str) else None
        wanted = set(metrics or ()) if wanted is None else wanted
        if wanted - set(known):
            logger.warning("unknown metrics: %s", ", ".join(sorted(wanted - set(known))))
        with self._lock:
            self._enabled = wanted & set(known)

    def configure_logging(
        self,
        log_path: str,
        enabled_metrics: str | Iterable[str] | None = None,
        max_records: int | None = None,
        sampling_factor: float = 1.0,
    ) -> None:
        """Starts a log; what is queued for a former one is written there first, or lost.

        Args: as in the constructor.
        """
        with self._lock:
            self.flush()
            Path(log_path).mkdir(parents=True, exist_ok=True)
            self._limit(max_records, sampling_factor)
            if self._queue:
                logger.warning("%d metrics of %s are lost", len(self._queue), self.log_path)
                self._queue = []
            self.log_path = log_path
        self.enable_metrics(enabled_metrics)

    def _limit(self, max_records: int | None, sampling_factor: float) -> None:
        if max_records is not None and max_records < 0:
            raise ValueError(f"max_records must be >= 0 or None, got {max_records!r}")
        self._max_records = max_records
        self._sampling_factor = min(1.0, max(0.0, sampling_factor))
        self._num_logged = 0

    def log(self, identifier: str, value: Any, metadata: dict[str, Any] | None = None) -> None:
        """Logs a measurement, if its metric is enabled and there is room.

        Args:
            identifier: The metric.
            value: What JSON can hold.
            metadata: Likewise.

        Raises:
            TypeError: The value or the metadata is not what JSON can hold; nothing is logged.
        """
        if not self.is_metric_enabled(identifier) or self.is_max_records_reached():
            return
        if self._sampling_factor < 1.0 and random.random() >= self._sampling_factor:
            return
        frame = sys._getframe(1)
        location = f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_qualname}"
        line = LogEvent(datetime.now(), identifier, value, metadata or {}, location).to_json()
        with self._lock:
            if self.is_max_records_reached():
                return
            self._queue.append(line)
            self._num_logged += 1
            is_due = time.monotonic() - self._last_flush >= self.flush_interval
            if len(self._queue) % self.flush_every == 0 or is_due:
                self.flush()

    def flush(self) -> None:
        """Appends what is queued to the file; if that fails it stays queued, with a warning."""
        with self._lock:
            self._last_flush = time.monotonic()
            if not self._queue or self.log_path is None:
                return
            text = "".join(line + "\n" for line in self._queue)
            try:
                _append(Path(self.log_path) / FILE_NAME, text.encode())
            except OSError as error:  # attention goes on: it is not what was asked for
                logger.warning("%d metrics are not written yet: %s", len(self._queue), error)
                if len(self._queue) > _MOST_QUEUED:
                    logger.warning("%d metrics are lost", len(self._queue) - _MOST_QUEUED)
                    self._queue = self._queue[-_MOST_QUEUED:]
            else:
                self._queue = []

    def is_metric_enabled(self, identifier: str) -> bool:
        """Whether `log` would keep a measurement of this metric, as far as its name goes."""
        return self.log_path is not None and identifier in self._enabled

    def get_enabled_metrics(self) -> set[str]:
        """The enabled metrics, as a copy."""
        return set(self._enabled)

    def is_logging_configured(self) -> bool:
        """Whether there is a place to log to."""
        return self.log_path is not None

    def get_total_records_logged(self) -> int:
        """Events since `configure_logging`, queued ones included."""
        return self._num_logged

    def is_max_records_reached(self) -> bool:
        """Whether nothing more is kept."""
        return self._max_records is not None and self._num_logged >= self._max_records

    def get_records_remaining(self) -> int | None:
        """Events that are still kept; None = no limit."""
        return None if self._max_records is None else max(0, self._max_records - self._num_logged)

    def get_sampling_factor(self) -> float:
        """The share of events that is kept."""
        return self._sampling_factor

    def get_max_records(self) -> int | None:
        """The limit of events; None = none."""
        return self._max_records


def _append(path: Path, content: bytes) -> None:
    """All of it or nothing, so that another try repeats no line.

    Raises:
        OSError: It cannot be written.
    """
    with path.open("ab", buffering=0) as file:
        start, written = file.tell(), 0
        try:
            while written < len(content):
                written += file.write(content[written:])
        except OSError:
            if os.fstat(file.fileno()).st_size == start + written:  # nobody else has written
                file.truncate(start)
            raise
