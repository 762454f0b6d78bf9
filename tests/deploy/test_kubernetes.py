"""The manifests and the chart: against Kubernetes' schemas and Helm's lint where those are installed, and always for
what a cluster would not say: nothing runs with privileges, and the server takes the options that it is given."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from serve import server, vllm_caption
from serve.engines.base import DEFAULT_IN_FLIGHT
from tests.deploy.conftest import ROOT

KUBERNETES, CHART = ROOT / "deploy/kubernetes", ROOT / "deploy/helm/vlv"
HELM = shutil.which(os.environ.get("HELM", "helm"))
with_helm = pytest.mark.skipif(HELM is None, reason="helm is not installed (HELM=... names one elsewhere)")


def documents(path: Path) -> dict[str, dict]:
    """A file's manifests by their kind."""
    return {entry["kind"]: entry for entry in yaml.safe_load_all(path.read_text()) if entry}


@pytest.fixture(scope="module")
def chart():
    return documents(KUBERNETES / "vlv.yaml")


@pytest.fixture(scope="module")
def pods(chart):
    """By name, the pod templates of all manifests."""
    job = documents(KUBERNETES / "caption-job.yaml")["Job"]
    return {"server": chart["Deployment"]["spec"]["template"]["spec"], "caption": job["spec"]["template"]["spec"]}


@pytest.mark.parametrize("name", ["server", "caption"])
def test_without_privilege(pods, name):
    pod = pods[name]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] >= 10000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not pod.get("hostNetwork") and not pod.get("hostPID")
    (container,) = pod["containers"]
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]} and "privileged" not in security
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {"/tmp", "/dev/shm", "/cache"} <= {*mounted.values()}  # all that is written goes to these
    assert {volume["name"] for volume in pod["volumes"]} == {*mounted}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1 and pod["nodeSelector"]


def test_the_server_takes_its_options_and_the_probes_its_routes(pods):
    from serve.http.app import CaptionApp

    (container,) = pods["server"]["containers"]
    assert container["args"][0] == "serve.server"
    args = server.parser().parse_args(container["args"][1:])
    assert args.host == "0.0.0.0" and args.keys and [args.port] == [p["containerPort"] for p in container["ports"]]
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pods["server"]["terminationGracePeriodSeconds"] > args.drain + sleep
    paths = {container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "readiness", "liveness")}
    assert paths == {"/ready", "/health"}
    assert CaptionApp.ready.__doc__.startswith("GET /ready") and CaptionApp.health.__doc__.startswith("GET /health")
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"  # a server that loads is not killed


def test_the_job_takes_its_options(pods):
    (container,) = pods["caption"]["containers"]
    words = shlex.split(container["args"][0].replace("$((JOB_COMPLETION_INDEX + 1))", "16"))
    assert words[:4] == ["exec", "python3", "-m", "serve.vllm_caption"]
    args = vllm_caption.parser().parse_args(words[4:])
    job = documents(KUBERNETES / "caption-job.yaml")["Job"]["spec"]
    assert args.shard == (16, job["completions"]) and job["completionMode"] == "Indexed"


def test_parts_fit_together(chart):
    deployment, labels = chart["Deployment"], chart["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert chart["Service"]["spec"]["selector"] == labels == deployment["spec"]["selector"]["matchLabels"]
    assert chart["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert chart["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    scaler = chart["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"]  # the autoscaler's business
    args = server.parser().parse_args(deployment["spec"]["template"]["spec"]["containers"][0]["args"][1:])
    active = int(scaler["metrics"][0]["pods"]["target"]["averageValue"])
    # so many are always admitted: a pod does not refuse requests before another is started
    assert active < (args.in_flight or DEFAULT_IN_FLIGHT) + (args.queue or 0)


def test_against_the_schemas():
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for path in KUBERNETES.glob("*.yaml"):
        for entry in yaml.safe_load_all(path.read_text()):
            validate.validate(
                entry, max(validate.api.supported_versions() if hasattr(validate, "api") else ["1.37"]), strict=True
            )


@with_helm
def test_helm_lint_and_manifests_are_current(tmp_path):
    subprocess.run([HELM, "lint", "--strict", CHART], check=True, capture_output=True)
    env = {**os.environ, "HELM": HELM, "OUT": str(tmp_path)}
    subprocess.run([KUBERNETES / "render.sh"], check=True, env=env)
    for name in ("vlv.yaml", "caption-job.yaml"):
        assert (tmp_path / name).read_text() == (KUBERNETES / name).read_text(), "run deploy/kubernetes/render.sh"


@with_helm
def test_images_and_volumes_are_values(tmp_path):
    """Nothing but values has to be changed for another registry and other volumes."""
    values = {
        "image.repository": "registry.example.org/vlv",
        "image.tag": "0.1.0",
        "models.claim": "weights",
        "cache.claim": "compiled",
        "captionJob.imagesClaim": "pictures",
        "captionJob.captionsClaim": "texts",
        "captionJob.name": "nightly",
        "captionJob.pods": "4",
        "captionJob.folder": "2026",
        "checkpoint": "/models/b",
    }
    options = [word for pair in values.items() for word in ("--set", "=".join(pair))]
    env = {**os.environ, "HELM": HELM, "OUT": str(tmp_path)}
    subprocess.run([KUBERNETES / "render.sh", *options], check=True, env=env)
    text = "".join((tmp_path / name).read_text() for name in ("vlv.yaml", "caption-job.yaml"))
    job = documents(tmp_path / "caption-job.yaml")["Job"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert text.count('image: "registry.example.org/vlv:0.1.0"') == 2 and "vlv:vllm" not in text
    claims = sorted(re.findall(r"claimName: (\w+)", text))
    assert claims == ["compiled", "pictures", "texts", "weights", "weights"]
    assert job["metadata"]["name"] == "nightly" and job["spec"]["completions"] == 4
    words = shlex.split(container["args"][0].replace("$((JOB_COMPLETION_INDEX + 1))", "4"))
    args = vllm_caption.parser().parse_args(words[4:])
    assert args.paths == ["/images/2026"] and args.ckpt == "/models/b" and args.shard == (4, 4)


@with_helm
def test_the_charts_choices():
    def render(*settings: str) -> subprocess.CompletedProcess:
        flags = [part for setting in settings for part in ("--set", setting)]
        return subprocess.run([HELM, "template", "vlv", CHART, *flags], capture_output=True, text=True)

    refused = render("auth.secret=")
    assert refused.returncode and "set auth.anybody=true to let everybody in" in refused.stderr
    opened = render("auth.anybody=true", "autoscaling.enabled=false", "models.claim=", "cache.claim=kept")
    found = {entry["kind"]: entry for entry in yaml.safe_load_all(opened.stdout) if entry}
    assert "HorizontalPodAutoscaler" not in found and found["Deployment"]["spec"]["replicas"] == 2
    assert "--no-auth" in found["Deployment"]["spec"]["template"]["spec"]["containers"][0]["args"]
