"""What a connector counts, as vLLM logs it and Prometheus reads it."""

from __future__ import annotations

from typing import Any

from forerun_adapters import vllm as host

__all__ = ["COUNTED", "ChainMetrics", "ChainStats"]

COUNTED = {
    "bytes_sent": "Bytes of keys and values sent to the next engine of a chain.",
    "bytes_loaded": "Bytes of keys and values from the engine before that were put into the cache.",
    "layers_loaded": "Layers of requests whose keys and values came from the engine before.",
    "wait_seconds": "Seconds in which a layer waited for the engine before.",
    "recomputes": "Requests computed without the engine before, which was lost or late.",
    "refused": "Messages and connections that no honest engine of a chain sends.",
}


class ChainStats(host.Stats):  # type: ignore[misc]  # the class is the host's, and differs with its release
    """Counts since the last report: `data` has a number for each of `COUNTED`."""

    def reset(self) -> None:
        self.data: dict[str, float] = dict.fromkeys(COUNTED, 0)

    def aggregate(self, other: ChainStats) -> ChainStats:
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not any(self.data.values())


class ChainMetrics(host.PromMetrics):  # type: ignore[misc]
    """The same, as `forerun:runahead_…_total`."""

    def __init__(
        self, config: Any, metric_types: Any, labels: list[str], per_engine_labels: dict[int, list[object]]
    ) -> None:
        super().__init__(config, metric_types, labels, per_engine_labels)
        self._counters = {
            name: self._counter_cls(name=f"forerun:runahead_{name}", documentation=told, labelnames=labels)
            for name, told in COUNTED.items()
        }

    def observe(self, data: dict[str, Any], engine: int = 0) -> None:
        for name, value in data.items():
            self._counters[name].labels(*self.per_engine_labelvalues[engine]).inc(value)
