"""What a connector counts, as vLLM logs it and Prometheus reads it.

A chain is balanced if no engine waits for the one before. How far it is from that, every engine sees for itself: the
share of the step that loads a request's keys and values which it spends waiting for them. 0: the engine before is never
late; near 1: its context is by far the longer one, or the link too slow.
"""

from __future__ import annotations

from typing import Any

from forerun_adapters import vllm as host

__all__ = ["COUNTED", "ChainMetrics", "ChainStats", "Tally"]

COUNTED = {
    "bytes_sent": "Bytes of keys and values sent to the next engine of a chain.",
    "bytes_loaded": "Bytes of keys and values from the engine before that were put into the cache.",
    "layers_loaded": "Layers of requests whose keys and values came from the engine before.",
    "recomputes": "Requests computed without the engine before, which was lost or late.",
    "refused": "Messages and connections that no honest engine of a chain sends.",
}
_WAITS = "Seconds in which a layer waited for the engine before, by that engine's address; lost: for what never came."
_SHARES = "Of the step that loads a request's keys and values, the share that waits for the engine before (imbalance)."
_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


class Tally:
    """Turns totals into what was added since the last call."""

    def __init__(self) -> None:
        self._told: dict[str, float] = {}

    def added(self, totals: dict[str, float]) -> dict[str, float]:
        added = {name: total - self._told.get(name, 0) for name, total in totals.items()}
        self._told = totals
        return {name: value for name, value in added.items() if value}


class ChainStats(host.Stats):  # type: ignore[misc]  # the class is the host's, and differs with its release
    """Since the last report: in `data`, numbers of `COUNTED`, `wait_seconds` by engine, `wait_shares` of requests."""

    @classmethod
    def of(cls, counted: dict[str, float], waits: dict[str, float], shares: list[float]) -> ChainStats:
        return cls(data={**counted, "wait_seconds": waits, "wait_shares": shares})

    def reset(self) -> None:
        self.data: dict[str, Any] = {"wait_seconds": {}, "wait_shares": []}

    def aggregate(self, other: ChainStats) -> ChainStats:
        for name in COUNTED:
            self.data[name] = self.data.get(name, 0) + other.data.get(name, 0)
        mine, theirs = self.data["wait_seconds"], other.data["wait_seconds"]
        self.data["wait_seconds"] = {name: mine.get(name, 0) + theirs.get(name, 0) for name in mine | theirs}
        self.data["wait_shares"] = [*self.data["wait_shares"], *other.data["wait_shares"]]
        return self

    def reduce(self) -> dict[str, int | float]:
        shares = self.data["wait_shares"]
        told = {name: self.data.get(name, 0) for name in COUNTED}
        told["wait_seconds"] = sum(self.data["wait_seconds"].values())
        return told | ({"mean_wait_share": sum(shares) / len(shares)} if shares else {})

    def is_empty(self) -> bool:
        return not any(self.data.values())


class ChainMetrics(host.PromMetrics):  # type: ignore[misc]
    """The same, as `forerun:runahead_…_total` and the histogram `forerun:runahead_wait_share`."""

    def __init__(
        self, config: Any, metric_types: Any, labels: list[str], per_engine_labels: dict[int, list[object]]
    ) -> None:
        super().__init__(config, metric_types, labels, per_engine_labels)
        self._counters = {
            name: self._counter_cls(name=f"forerun:runahead_{name}", documentation=told, labelnames=labels)
            for name, told in COUNTED.items()
        }
        self._waits = self._counter_cls(
            name="forerun:runahead_wait_seconds", documentation=_WAITS, labelnames=[*labels, "before"]
        )
        self._shares = self._histogram_cls(
            name="forerun:runahead_wait_share", documentation=_SHARES, labelnames=labels, buckets=_BUCKETS
        )

    def observe(self, data: dict[str, Any], engine: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine]
        for name, counter in self._counters.items():
            counter.labels(*labels).inc(data.get(name, 0))
        for before, seconds in data["wait_seconds"].items():
            self._waits.labels(*labels, before).inc(seconds)
        for share in data["wait_shares"]:
            self._shares.labels(*labels).observe(share)
