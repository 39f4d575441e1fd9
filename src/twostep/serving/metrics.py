"""What `/metrics` shows, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from twostep.serving.jobs import Maker, Observer
from twostep.serving.logs import log_error

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)
_PICTURES = (1, 2, 4, 8, 16, 32, 64)


class Metrics(Observer):
    """Counters of one server, in a registry of its own; told by engine and application."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.batches = Histogram(
            "twostep_batch_pictures", "pictures in a batch, by stage", ["stage"],
            buckets=_PICTURES, registry=registry,
        )  # fmt: skip
        self.stages = Histogram(
            "twostep_stage_seconds", "of a batch, by stage; queue: of a picture", ["stage"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.latency = Histogram(
            "twostep_request_seconds", "from request to answer, by answer", ["status"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.pictures = Counter(
            "twostep_pictures", "pictures made, by model", ["model"], registry=registry
        )
        self.previews = Counter(
            "twostep_previews_sent", "previews that went to a client", registry=registry
        )
        self.refusals = Counter(
            "twostep_refusals", "requests refused or given up, by kind", ["kind"], registry=registry
        )
        self.left_early = Counter(
            "twostep_pictures_left", "pictures that left before they were done, by reason",
            ["reason"], registry=registry,
        )  # fmt: skip

    def watch(self, engine: Maker) -> None:
        """Shows the engine's line and state, too."""
        for name, about, read in (
            ("twostep_queue_pictures", "pictures in line", lambda: engine.waiting),
            ("twostep_flight_pictures", "pictures between steps", lambda: engine.in_flight),
            ("twostep_ready", "1 while it takes requests", lambda: engine.state == "ready"),
        ):
            Gauge(name, about, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def batch(self, stage: str, pictures: int, seconds: float) -> None:
        self.batches.labels(stage).observe(pictures)
        self.stages.labels(stage).observe(seconds)

    def waited(self, seconds: float) -> None:
        self.stages.labels("queue").observe(seconds)

    def left(self, reason: str, pictures: int) -> None:
        self.left_early.labels(reason).inc(pictures)

    def finished(self, model: str, pictures: int) -> None:
        self.pictures.labels(model).inc(pictures)

    def failed(self, error: Exception) -> None:
        log_error("the model failed on a batch", error)
