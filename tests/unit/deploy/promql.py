"""Reads PromQL as far as tests need it: which metrics an expression names, and with which label values.

Owns no grammar: strings, groupings and ranges are cut out, and the words that are left are metrics or functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

__all__ = ["Expression", "expressions", "metric_names_in", "selectors_in"]

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"

_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_GROUPED = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
_STRING = re.compile(r'"(?:\\.|[^"\\])*"')
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*("(?:\\.|[^"\\])*")')
_WORD = re.compile(r"(?<![\w.$])[a-zA-Z_:][\w:]*(?!\s*\()(?![\w:])")
_OPERATORS = {"and", "or", "unless", "offset", "bool", "Inf", "NaN"}


@dataclass(frozen=True, slots=True)
class Expression:
    """A PromQL expression and where it stands."""

    origin: str
    text: str


def metric_names_in(expression: str) -> set[str]:
    """Names of the series that an expression reads, such as `pawl_output_tokens_total`."""
    bare = _STRING.sub('""', expression)
    bare = re.sub(r"\{[^}]*\}", " ", bare)
    bare = re.sub(r"\[[^\]]*\]", " ", bare)
    bare = _GROUPING.sub(" ", bare)
    return {word for word in _WORD.findall(bare) if word not in _OPERATORS}


def selectors_in(expression: str) -> list[tuple[str, dict[str, tuple[str, str]]]]:
    """(metric, {label: (operator, value)}) of each selector with braces."""
    found = []
    for name, braces in _SELECTOR.findall(expression):
        if braces:
            matchers = {label: (operator, json.loads(text)) for label, operator, text in _MATCHER.findall(braces)}
            found.append((name, matchers))
    return found


def grouped_labels_in(expression: str) -> set[str]:
    """Labels of the groupings: `by (model)`, `on (worker)`."""
    groups = _GROUPED.findall(_STRING.sub('""', expression))
    return {label.strip() for group in groups for label in group.split(",") if label.strip()}


def expressions(deploy: Path = DEPLOY) -> list[Expression]:
    """Every expression of the rules, the dashboard and the autoscalers."""
    return [*_of_rules(deploy), *_of_dashboard(deploy), *_of_autoscalers(deploy)]


def _of_rules(deploy: Path) -> Iterator[Expression]:
    for group in yaml.safe_load((deploy / "prometheus" / "rules.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield Expression(f"rule {rule.get('alert') or rule['record']}", rule["expr"])


def _of_dashboard(deploy: Path) -> Iterator[Expression]:
    board = json.loads((deploy / "grafana" / "pawl.json").read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield Expression(f"panel {panel['title']!r}", target["expr"])
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            inner = re.fullmatch(r"label_values\((.+), \w+\)", variable["query"]["query"])
            assert inner, f"variable {variable['name']} is no label_values(...)"
            yield Expression(f"variable {variable['name']}", inner[1])


def _of_autoscalers(deploy: Path) -> Iterator[Expression]:
    autoscaler = yaml.safe_load((deploy / "k8s" / "monitoring" / "autoscaler.yaml").read_text())
    for metric in autoscaler["spec"]["metrics"]:
        yield Expression("autoscaler", metric["pods"]["metric"]["name"])
    for rule in yaml.safe_load((deploy / "prometheus" / "adapter.yaml").read_text())["rules"]["custom"]:
        yield Expression("adapter", rule["seriesQuery"])
    scaled = yaml.safe_load((deploy / "prometheus" / "keda.yaml").read_text())
    for trigger in scaled["spec"]["triggers"]:
        yield Expression("keda", trigger["metadata"]["query"])
