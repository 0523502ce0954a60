"""What the front counts, and the engines' own metrics in one text with it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Summary, generate_latest

__all__ = ["Counts", "labels_of", "merge"]

_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?( .*)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Counts:
    """The front's metrics; each is one of prometheus_client's."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        name = "forerun:front_{}".format
        self.requests = Counter(
            name("requests"), "Completions, by chain or single and why.", ["route", "why"], registry=registry
        )
        self.retries = Counter(name("retries"), "Requests asked again of another engine.", registry=registry)
        self.stages = Counter(
            name("stage_failures"), "Stages of chains that failed, the last left out.", registry=registry
        )
        self.errors = Counter(name("errors"), "Requests that ended with an error of the front's.", registry=registry)
        self.gone = Counter(name("clients_gone"), "Requests that their client gave up.", registry=registry)
        labels = ["route"]
        self.expected = Summary(
            name("expected_ttft_seconds"), "Time to first byte by the table.", labels, registry=registry
        )
        self.seen = Summary(name("ttft_seconds"), "Time to first byte as seen.", labels, registry=registry)
        self.up = Gauge(name("engines_up"), "Engines that answer.", registry=registry)
        self.refined = Gauge(name("table_refinements"), "Times the table of splits was refined.", registry=registry)
        self.restarts = Gauge(name("engine_restarts"), "Times an engine was started again.", registry=registry)

    def text(self) -> str:
        return generate_latest(self._registry).decode()


def labels_of(text: str, name: str) -> dict[str, str]:
    """The labels of the first sample of a metric; none if it is not there."""
    for line in text.splitlines():
        if line.startswith(name) and (sample := _SAMPLE.match(line)) and sample[1] == name:
            return dict(_LABEL.findall(sample[2] or ""))
    return {}


def merge(texts: Mapping[str, str], label: str = "runahead_engine") -> str:
    """Prometheus texts as one: each sample with a label that says whose it is, each metric told of once.

    Args:
        texts: By what the label says.
        label: Its name.
    """
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for whose, text in texts.items():
        family, told = "", set(heads)
        for line in text.splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                if family not in told:
                    heads.setdefault(family, []).append(line)
            elif sample := _SAMPLE.match(line):
                name, labels, value = sample.groups()
                whole = ",".join(part for part in (f'{label}="{whose}"', (labels or "").rstrip(",")) if part)
                samples.setdefault(family or name, []).append(f"{name}{{{whole}}}{value}")
    families = dict.fromkeys([*heads, *samples])
    return "".join(f"{line}\n" for family in families for line in (*heads.get(family, []), *samples.get(family, [])))
