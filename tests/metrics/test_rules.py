"""The alert rules keep their promises: alert_rules.yml, by promtool."""

from __future__ import annotations

import json
import re
import subprocess
from importlib import resources
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("alert_rules.yml")


def promtool(cases: Path) -> None:
    command = ["promtool", "test", "rules", cases.name]
    done = subprocess.run(command, cwd=cases.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


@pytest.mark.slow
@pytest.mark.prometheus
def test_the_rules_alert_as_they_promise() -> None:
    promtool(CASES)


@pytest.mark.prometheus
def test_the_dashboard_keeps_a_violation_across_a_restart(tmp_path: Path) -> None:
    dashboard = json.loads(resources.files("metrics").joinpath("grafana/flushlab.json").read_text())
    expressions = [
        target["expr"]
        for panel in dashboard["panels"]
        for target in panel["targets"]
        if "flushlab_violations_total" in target["expr"]
    ]
    assert expressions
    values = {"first scrape": "3x9 0x9", "one": "0x2 3x2 0x9", "ended": "0x2 3x2 stale"}
    cases = {
        "tests": [
            {
                "name": name,
                "interval": "15s",
                "input_series": [
                    {"series": 'flushlab_violations_total{instance="a",kind="lost-dirty"}', "values": series}
                ],
                "promql_expr_test": [
                    {
                        "expr": expression.replace("$instance", ".*").replace("$__range", "15m"),
                        "eval_time": "4m",
                        "exp_samples": [{"labels": '{kind="lost-dirty"}', "value": 3}],
                    }
                    for expression in expressions
                ],
            }
            for name, series in values.items()
        ]
    }
    file = tmp_path / "dashboard.yml"
    file.write_text(json.dumps(cases))  # JSON is YAML
    promtool(file)


def test_each_rule_is_seen_to_alert_and_to_be_silent() -> None:
    rules = resources.files("metrics").joinpath("rules/flushlab.yml").read_text()
    alerts = set(re.findall(r"- alert: (\w+)", rules))
    cases = CASES.read_text()
    silent = set(re.findall(r"alertname: (\w+), exp_alerts: \[\]", cases))
    firing = set(re.findall(r"alertname: (\w+)\n +exp_alerts:\n", cases))
    assert alerts == silent == firing
