"""A server's Prometheus text as numbers."""

from __future__ import annotations


def samples(text: str) -> dict[str, float]:
    """Every sample, summed over its labels. The label "result" isn't summed: it follows the name in braces."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            result = sample.labels.get("result")
            name = f"{sample.name}{{{result}}}" if result else sample.name
            found[name] = found.get(name, 0.0) + sample.value
    return found


def labels(text: str, name: str) -> list[str]:
    """The values of one label, over all samples that have it."""
    from prometheus_client.parser import text_string_to_metric_families

    return [
        sample.labels[name]
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if name in sample.labels
    ]
