"""Dashboard, alerts and autoscaler name metrics and labels that the server's own /metrics has."""

from __future__ import annotations

import base64
import json
import re

import httpx
import pytest
import yaml

from tests.deploy.conftest import ROOT
from tests.serve.serving import Running, Scripted
from vlv.checkpoints.folder import Checkpoint

DEPLOY = ROOT / "deploy"
FOREIGN = {"up"}  # Prometheus' own


def queries() -> dict[str, str]:
    """Every PromQL expression of the dashboard, the alerts and the adapter's rule, by where it stands."""
    board = json.loads((DEPLOY / "grafana/dashboards/vlv.json").read_text())
    found = {f"panel {p['title']} {t['refId']}": t["expr"] for p in board["panels"] for t in p["targets"]}
    for group in yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())["groups"]:
        found |= {f"alert {rule['alert']}": rule["expr"] for rule in group["rules"]}
    return found


@pytest.fixture(scope="module")
def exported(captioning_checkpoint, scene_images):
    """By name, the label sets of every sample that a server shows after one answer of each kind."""
    server = Running(Checkpoint.open(captioning_checkpoint), Scripted)
    try:
        picture = "data:image/png;base64," + base64.b64encode((scene_images / "00.png").read_bytes()).decode()
        httpx.post(server.url + "/v1/captions", json={"images": [picture, "data:,broken"]}, timeout=60)
        content = [{"type": "image_url", "image_url": {"url": picture}}]
        body = {"messages": [{"role": "user", "content": content}], "stream": True}
        httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60)
        server.routes.admission.capacity = 0
        assert httpx.post(server.url + "/v1/captions", json={"images": [picture]}).status_code in (400, 503)
        text = httpx.get(server.url + "/metrics").text
    finally:
        server.stop()
    found: dict[str, list[dict]] = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? ", text, re.M):
        found.setdefault(name, []).append(dict(re.findall(r'(\w+)="([^"]*)"', labels)))
    return found


@pytest.mark.parametrize("where", queries())
def test_queries_name_what_is_exported(where, exported):
    query = queries()[where]
    names = set(re.findall(r"\bvlv_\w+", query))
    assert names and names <= exported.keys(), names - exported.keys()
    labels = {label for name in names for sample in exported[name] for label in sample}
    labels |= {"instance", "job", "le"}  # what Prometheus adds
    matched = set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)\s*\"", query))
    grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")}
    assert matched | grouped <= labels, (matched | grouped) - labels
    assert query.count("(") == query.count(")")


def test_every_metric_is_shown(exported):
    shown = " ".join(queries().values())
    families = {re.sub(r"_(bucket|count|sum|created|total)$", "", name) for name in exported}
    assert not [family for family in families if family not in shown]


def test_the_autoscaler_reads_a_gauge_of_the_server(exported):
    rule = yaml.safe_load((DEPLOY / "prometheus/adapter.yaml").read_text())["rules"]["custom"][0]
    manifests = yaml.safe_load_all((DEPLOY / "kubernetes/vlv.yaml").read_text())
    scaler = next(m for m in manifests if m and m["kind"] == "HorizontalPodAutoscaler")
    metric = scaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert metric == rule["name"]["as"] and rule["seriesQuery"].startswith(metric) and metric in exported


def test_queries_parse():
    parser = pytest.importorskip("promql_parser", reason="pip install promql-parser")
    for where, query in queries().items():
        assert parser.parse(query.replace("$__rate_interval", "1m")), where


def test_the_dashboard_can_be_provisioned():
    board = json.loads((DEPLOY / "grafana/dashboards/vlv.json").read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len({*ids}) and board["uid"] and board["schemaVersion"] >= 39
    boxes = [panel["gridPos"] for panel in board["panels"]]
    places = {(x, y) for b in boxes for x in range(b["x"], b["x"] + b["w"]) for y in range(b["y"], b["y"] + b["h"])}
    assert len(places) == sum(b["w"] * b["h"] for b in boxes) and max(x for x, _ in places) < 24  # none overlap
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    assert source["datasources"][0]["type"] == board["templating"]["list"][0]["query"]


def test_alerts_say_where_to_look():
    for group in yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("warning", "critical") and rule["annotations"]["summary"]
            assert (ROOT / rule["annotations"]["runbook"]).is_file()
