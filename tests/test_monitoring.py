"""Alert rules and dashboard: they parse, use published metrics, fire on faults, and run in a real Prometheus."""

from __future__ import annotations

import json
import re
import shutil
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import subprocess
from helpers import eventually, free_port, message
from test_client import client_of

from geventaudit import NotificationKind
from geventaudit.agent import Agent
from geventaudit.integrations.metrics import COUNTERS, GAUGES

yaml = pytest.importorskip("yaml", reason="needs pyyaml, which the extra [test] brings")
prometheus_client = pytest.importorskip("prometheus_client", reason="needs prometheus-client")

ROOT = Path(__file__).parent.parent
RULES = ROOT / "examples" / "monitoring" / "prometheus-rules.yaml"
DASHBOARD = json.loads((ROOT / "examples" / "monitoring" / "grafana-dashboard.json").read_text())
PAGE = (ROOT / "docs" / "howto" / "operators.md").read_text()
PUBLISHED = {f"geventaudit_{each.name}_total" for each in COUNTERS} | {f"geventaudit_{each.name}" for each in GAUGES}


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    """The expressions of the dashboard, with values for Grafana's variables."""
    values = {"$__rate_interval": "5m", "$__range": "6h", "$job": ".*", "$instance": ".*"}
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    for name, value in values.items():
        found = [each.replace(name, value) for each in found]
    return found


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"geventaudit_\w+", expression))


def test_rules_and_dashboard_use_published_metrics() -> None:
    for rule in rules():
        assert names_in(rule["expr"]) <= PUBLISHED, rule["alert"]
    shown = {name for each in expressions() for name in names_in(each)}
    assert shown == PUBLISHED, "the dashboard shows each metric"


def test_the_page_names_each_alert_metric_and_notification() -> None:
    for rule in rules():
        assert f"`{rule['alert']}`" in PAGE
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
    for name in PUBLISHED:
        assert f"`{name}`" in PAGE, name
    for kind in NotificationKind:
        assert f"| `{kind.name}` |" in PAGE, kind


def test_the_dashboard_is_whole() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["title"]
        assert panel["description"]
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, f"{panel['title']} overlaps"
        assert place["x"] + place["w"] <= 24
        cells |= own
        assert panel["datasource"]["uid"] == "${datasource}"
    assert [each["name"] for each in DASHBOARD["templating"]["list"]] == ["datasource", "job", "instance"]


def promtool(*arguments: str) -> None:
    if not shutil.which("promtool"):
        pytest.skip("needs promtool (Debian's package prometheus)")
    done = subprocess.run(["promtool", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    assert done.returncode == 0, done.stdout.decode()


def test_promtool_accepts_rules_and_expressions(tmp_path: Path) -> None:
    promtool("check", "rules", str(RULES))
    recording = [{"record": f"check:{number}", "expr": each} for number, each in enumerate(expressions())]
    (tmp_path / "dashboard.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recording}]}))
    promtool("check", "rules", str(tmp_path / "dashboard.yaml"))


def test_each_alert_fires_on_its_fault_only(tmp_path: Path) -> None:
    text = (ROOT / "tests" / "data" / "prometheus_rules_test.yaml").read_text()
    for rule in rules():
        assert re.search(rf"alertname: {rule['alert']}\n +exp_alerts", text), f"{rule['alert']} never fires"
    (tmp_path / "test.yaml").write_text(text.replace("[RULES]", f"[{json.dumps(str(RULES))}]"))
    promtool("test", "rules", str(tmp_path / "test.yaml"))


def test_a_real_prometheus_scrapes_a_client(socket_path: str, tmp_path: Path) -> None:
    """The metrics arrive under their names, and each expression of the dashboard has a result."""
    if not shutil.which("prometheus"):
        pytest.skip("needs Debian's package prometheus")
    from geventaudit.integrations.prometheus import AuditCollector

    with Agent(socket_path, lambda _: None), client_of(socket_path) as client:
        client.send(message(1))
        assert client.flush(timeout=30)
        registry = prometheus_client.CollectorRegistry()
        registry.register(AuditCollector(client))
        server, serving = prometheus_client.start_http_server(0, "127.0.0.1", registry)
        scrape = {
            "job_name": "service",
            "scrape_interval": "250ms",
            "scrape_timeout": "250ms",
            "static_configs": [{"targets": [f"127.0.0.1:{server.server_port}"]}],
        }
        config = {"rule_files": [str(RULES)], "scrape_configs": [scrape]}
        (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
        address = f"127.0.0.1:{free_port()}"
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={tmp_path}/prometheus.yaml",
                f"--storage.tsdb.path={tmp_path}/data",
                f"--web.listen-address={address}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        pool = gevent.get_hub().threadpool

        def get(path: str, **query: str) -> Any:
            def fetch() -> Any:
                url = f"http://{address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
                try:
                    with urllib.request.urlopen(url, timeout=30) as response:
                        return json.load(response)["data"]
                except OSError:  # it is about to start
                    return None

            return pool.apply(fetch)

        def results(expression: str) -> list[Any]:
            data = get("query", query=expression)
            return data["result"] if data else []

        try:
            eventually(lambda: results("count_over_time(geventaudit_messages_sent_total[1m]) > 2"), "it scrapes", 60)
            (sent,) = results("geventaudit_messages_sent_total")
            assert sent["value"][1] == "1"
            assert sent["metric"]["job"] == "service"
            for each in expressions():
                assert results(each), each
            loaded = {rule["name"]: rule["health"] for group in get("rules")["groups"] for rule in group["rules"]}
            assert set(loaded) == {rule["alert"] for rule in rules()}
            assert "err" not in loaded.values()
        finally:
            process.terminate()
            process.wait(30)
            server.shutdown()
            server.server_close()
            serving.join(30)
            pool.kill()
