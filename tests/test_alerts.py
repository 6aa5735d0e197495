"""The alert rules and the dashboard: promtool agrees, and they ask for metrics and labels that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import core.metrics as named
from core.settings import ROOT

RULES, DASHBOARD = ROOT / "deploy/prometheus", ROOT / "deploy/grafana/easel.json"
# tests/test_metrics.py shows that a real server exports these, all of them and no others.
LABELS = {m._name: {*m._labelnames} for m in vars(named).values() if getattr(m, "_name", "").startswith("easel_")}


def alerts() -> dict[str, str]:
    rules = yaml.safe_load((RULES / "alerts.yaml").read_text())["groups"][0]["rules"]
    return {rule["alert"]: rule["expr"] for rule in rules}


def panels() -> dict[str, list[str]]:
    shown = json.loads(DASHBOARD.read_text())["panels"]
    return {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in shown if panel["type"] != "row"}


def asked(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Metrics that an expression names, with the labels that it selects by."""
    for name, selected in re.findall(r"(easel_[a-z_]+)(?:\{([^}]*)\})?", expression):
        yield name, set(re.findall(r"(\w+)(?:=~|!~|!=|=)", selected))


@pytest.mark.parametrize("command", [["check", "rules", "--lint-fatal", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]])
def test_promtool_finds_the_rules_right(command: list[str], tmp_path: Path) -> None:
    if not (promtool := shutil.which("promtool")):
        pytest.skip("promtool is not installed: `make system`, or Debian's package prometheus")
    done = subprocess.run([promtool, *command], cwd=RULES, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tested_and_documented() -> None:
    tests = yaml.safe_load((RULES / "alerts_test.yaml").read_text())["tests"]
    assert {t["alertname"] for test in tests for t in test["alert_rule_test"] if t.get("exp_alerts")} == set(alerts())
    text = (ROOT / "docs/operations.md").read_text()
    assert set(re.findall(r"^\| (Easel\w+) \|", text, re.M)) == set(alerts())


@pytest.mark.parametrize("expressions", [list(alerts().values()), *panels().values()], ids=["alerts", *panels()])
def test_what_is_asked_for_is_exported(expressions: list[str]) -> None:
    for expression in expressions:
        found = list(asked(expression))
        assert found
        for name, labels in found:
            metric = re.sub(r"_(total|bucket|count|sum)$", "", name)
            assert labels <= {*LABELS[metric], "instance", "le"}, name
        grouped: set[str] = {label.strip() for group in re.findall(r"(?:by|on) \(([^)]*)\)", expression) for label in group.split(",")}
        known: set[str] = set().union(*(LABELS[re.sub(r"_(total|bucket|count|sum)$", "", name)] for name, _ in found))
        assert grouped <= known | {"instance", "le"}


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {re.sub(r"_(total|bucket|count|sum)$", "", name) for of in panels().values() for expression in of for name, _ in asked(expression)}
    assert shown == set(LABELS)


def test_the_dashboards_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        at: dict[str, Any] = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells
