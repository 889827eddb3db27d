"""Prometheus metrics: vLLM's names, with the prefix `l4jax:`."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from l4jax.engine.engine import Stats

# Upper ends of buckets, in seconds: vLLM's, so that its dashboards keep their shape.
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0)
FIRST_TOKEN += (7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
NEXT_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5)
NEXT_TOKEN += (10.0, 20.0, 40.0, 80.0)
REQUEST = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0)
REQUEST += (240.0, 480.0, 960.0, 1920.0, 7680.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
TOKENS += (200_000, 500_000, 1_000_000)

_GAUGES = {
    "num_requests_running": ("Requests that run.", "running"),
    "num_requests_waiting": ("Requests that wait for capacity.", "waiting"),
    "kv_cache_pages": ("Pages of the cache.", "pages"),
    "kv_cache_pages_used": ("Pages that requests own.", "pages_used"),
}
_COUNTERS = {
    "prompt_tokens": ("Tokens of prompts.", "prompt_tokens"),
    "generation_tokens": ("Tokens of completions.", "generation_tokens"),
    "prefix_cache_queries": ("Tokens looked up in the prefix cache.", "prefix_queries"),
    "prefix_cache_hits": ("Tokens found in the prefix cache.", "prefix_hits"),
    "spec_decode_num_draft_tokens": ("Tokens drafted.", "drafted"),
    "spec_decode_num_accepted_tokens": ("Drafted tokens that were accepted.", "accepted"),
    "num_preemptions": (
        "Requests that released their pages and were computed again.",
        "preemptions",
    ),
}


class Metrics:
    """The server's metrics, in their own registry.

    Args:
        model: the label `model_name`.
    """

    def __init__(self, model: str):
        self._model, self._registry = model, CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.first_token = self._make("time_to_first_token_seconds", FIRST_TOKEN)
        self.next_token = self._make("inter_token_latency_seconds", NEXT_TOKEN)
        self._request = self._make("e2e_request_latency_seconds", REQUEST)
        self._prompt = self._make("request_prompt_tokens", TOKENS)
        self._generated = self._make("request_generation_tokens", TOKENS)
        self._finished = Counter(
            "l4jax:request_success",
            "Ended requests, by reason.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )

    def register_engine(self, read_stats: Callable[[], Stats]) -> None:
        """Report the engine's counts, read at each scrape."""
        self._registry.register(_EngineCollector(self._model, read_stats))

    def observe_inter_token(self, seconds: float, tokens: int) -> None:
        """Observe tokens that each came `seconds` after the one before."""
        for _ in range(tokens):
            self.next_token.observe(seconds)

    def observe_request(self, reason: str, seconds: float, prompt_tokens: int, tokens: int) -> None:
        """Observe the end of a request, `seconds` after its submission."""
        self._finished.labels(self._model, reason).inc()
        self._request.observe(seconds)
        self._prompt.observe(prompt_tokens)
        self._generated.observe(tokens)

    def render(self) -> bytes:
        """Render all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _make(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"l4jax:{name}",
            name.replace("_", " ") + ".",
            ["model_name"],
            buckets=buckets,
            registry=self._registry,
        ).labels(self._model)


class _EngineCollector(Collector):
    def __init__(self, model: str, read_stats: Callable[[], Stats]):
        self._model, self._read_stats = model, read_stats

    def collect(self) -> Iterable[Metric]:
        stats = self._read_stats()
        for name, (text, field) in _GAUGES.items():
            yield self._fill(GaugeMetricFamily, name, text, getattr(stats, field))
        usage = stats.pages_used / stats.pages if stats.pages else 0.0
        yield self._fill(
            GaugeMetricFamily, "kv_cache_usage_perc", "Share of the pages that requests own.", usage
        )
        for name, (text, field) in _COUNTERS.items():
            yield self._fill(CounterMetricFamily, name, text, getattr(stats, field))

    def _fill(
        self,
        family: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        text: str,
        value: float,
    ) -> Metric:
        metric = family(f"l4jax:{name}", text, labels=["model_name"])
        metric.add_metric([self._model], value)
        return metric
