"""What the service measures, in the text format of Prometheus."""

from collections.abc import Collection, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from visprompt.models.bank import Bank

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one service, in a registry that other libraries do not write to.

    Labels hold names of routes, statuses, and tasks that the service knows: none is chosen by a client.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # a time for each series, which doubles their number and is rarely read
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # resident memory, CPU time, open files
        self.requests = Counter(
            "visprompt_requests", "Requests that were answered.", ("route", "code"), registry=registry
        )
        self.latency = Histogram(
            "visprompt_request_seconds",
            "Time from a request's headers to the end of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.open = Gauge("visprompt_open_requests", "Requests that are not answered yet.", registry=registry)
        self.images = Counter(
            "visprompt_images", "Images by result: ok, bad or failed.", ("task", "result"), registry=registry
        )
        self.decoding = self._histogram(
            "visprompt_decode_seconds", "Decoding and preprocessing of one image."
        )
        self.queueing = self._histogram("visprompt_queue_seconds", "Time of an image in the queue.")
        self.computing = self._histogram("visprompt_compute_seconds", "Time of a batch on the device.")
        self.batch_images = self._histogram("visprompt_batch_images", "Images in a batch.", _COUNTS)
        self.batch_tasks = self._histogram("visprompt_batch_tasks", "Tasks in a batch.", _COUNTS)
        self.admitted = Gauge("visprompt_admitted_images", "Images in the service.", registry=registry)
        self.waiting = Gauge("visprompt_waiting_images", "Images in the queue.", registry=registry)
        self.held = Gauge("visprompt_held_bytes", "Bytes of request bodies in memory.", registry=registry)
        self._tasks = Gauge("visprompt_tasks", "Tasks that can be asked.", registry=registry)
        self._loaded = Gauge(
            "visprompt_tasks_in_memory", "Tasks whose tensors are in memory.", registry=registry
        )
        self._bytes = Gauge("visprompt_tasks_bytes", "Memory of the tasks in memory.", registry=registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self._registry)

    def batch_begins(self, since: Collection[float], tasks: Collection[str], now: float) -> None:
        """Count a batch.

        Args:
            since: When each of its images came into the queue.
            tasks: Names of its tasks.
            now: When it begins, on the same clock.
        """
        self.batch_images.observe(len(since))
        self.batch_tasks.observe(len(tasks))
        for start in since:
            self.queueing.observe(now - start)

    def text(self, bank: Bank) -> bytes:
        """Return all metrics, with the present numbers of a bank."""
        self._tasks.set(len(bank.names))
        self._loaded.set(len(bank.loaded))
        self._bytes.set(bank.nbytes)
        return generate_latest(self._registry)
