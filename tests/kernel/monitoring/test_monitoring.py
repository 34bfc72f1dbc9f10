"""The dashboard, the alert rules and the page of metrics match the service's metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import Histogram
from prometheus_client.parser import text_string_to_metric_families

from kernel.telemetry.metrics import render_page
from tests.pages import load_page

METRICS = load_page("metrics")
DOCS = Path(__file__).parents[3] / "docs"
FROM_THE_LIBRARY = {"process_resident_memory_bytes"}
RULES = [
    rule for group in yaml.safe_load((DOCS / "monitoring/alerts.yaml").read_text())["groups"] for rule in group["rules"]
]
DASHBOARD = json.loads((DOCS / "monitoring/dashboard.json").read_text())


def scraped() -> set[str]:
    names = set(FROM_THE_LIBRARY)
    for metric in METRICS.declared():
        name = METRICS.name_of(metric)
        names.update({f"{name}_bucket", f"{name}_sum", f"{name}_count"} if isinstance(metric, Histogram) else {name})
    return names


def expressions() -> Iterator[Any]:
    for rule in RULES:
        yield pytest.param(rule["expr"], id=rule["alert"])
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield pytest.param(target["expr"], id=f"{panel['title']}-{target['refId']}".replace(" ", "-"))


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_is_promql_and_its_metrics_exist(expression: str) -> None:
    promql_parser.parse(expression)
    named = set(re.findall(r"\b(?:eskernel|process|python)_[a-z_]+\b", expression))
    assert named or expression.startswith("up{")
    assert named <= scraped()


def test_an_invalid_expression_is_noticed() -> None:
    with pytest.raises(ValueError, match=r"unclosed|invalid|unexpected|expected"):
        promql_parser.parse("rate(eskernel_commands_total[5m]")


def test_labels_used_in_expressions_are_those_of_the_metric() -> None:
    labels = {METRICS.name_of(metric): set(metric._labelnames) for metric in METRICS.declared()}
    for parameter in expressions():
        for name, selector in re.findall(r"(eskernel_[a-z_]+)\{([^}]*)\}", parameter.values[0]):
            used = set(re.findall(r"([a-z]+)[=!]", selector))
            assert used <= labels[name.removesuffix("_bucket")] | {"app"}, (name, used)


def test_no_label_is_one_that_prometheus_gives_to_targets() -> None:
    """Prometheus would rename ours, and the rules would be about its own."""
    for metric in METRICS.declared():
        assert not {"job", "instance", "app", "worker"} & set(metric._labelnames), metric


def test_an_instance_that_is_down_raises_an_alert() -> None:
    (rule,) = [rule for rule in RULES if rule["expr"].startswith("up{")]
    assert rule["expr"].endswith("== 0")
    assert rule["labels"]["severity"] == "critical"


def test_each_panel_shows_the_chosen_app() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            metrics = re.findall(r"\b(?:eskernel|process)_[a-z_]+", target["expr"])
            assert target["expr"].count('app=~"$app"') == len(metrics)


def test_rules_keep_the_app() -> None:
    """What is summed up over several apps says of none what is wrong."""
    for rule in RULES:
        for by in re.findall(r"\b(?:sum|min|max)\b(.{0,8})", rule["expr"]):
            assert by.startswith(" by (app"), rule["expr"]


def test_each_sample_of_a_page_has_the_apps_name() -> None:
    families = list(text_string_to_metric_families(render_page('a "b"').decode()))
    samples = [sample for family in families for sample in family.samples]
    assert len(samples) > 100
    assert {sample.labels["app"] for sample in samples} == {'a "b"'}


def test_each_rule_says_what_is_wrong_and_what_to_do() -> None:
    for rule in RULES:
        assert rule["annotations"]["summary"] and rule["annotations"]["action"]
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_the_dashboard_is_the_one_that_is_described() -> None:
    assert load_page("monitoring/dashboard").dashboard() == DASHBOARD


def test_the_page_of_metrics_is_up_to_date() -> None:
    assert (DOCS / "metrics.md").read_text() == METRICS.render(), "make docs"


def test_there_are_thirty_metrics_and_each_says_what_it_is() -> None:
    found = list(METRICS.declared())
    assert len(found) >= 30
    assert all(len(metric._documentation) > 10 for metric in found)
    assert not {"id", "aggregate_id", "command_id", "subject"} & {
        label for metric in found for label in metric._labelnames
    }
