"""The subcommand of Hugging Face's optimum."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from export.manifest import Manifest
from tests.export.conftest import BUNDLED, LIMITS

ROOT = Path(__file__).parents[2]
CLI = [sys.executable, "-c", "from optimum.commands.optimum_cli import main; main()"]


def test_optimum_cli_export_vlv(artifacts):
    """Reaches the same export: all components are there already."""
    command = [*CLI, "export", "vlv", "--ckpt", BUNDLED, "--out", artifacts, *LIMITS, "--components", "context_kv"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "context_kv: up to date" in run.stderr and "context_kv" in run.stdout


def test_optimum_is_not_claimed(tmp_path):
    """The subcommand is packaged; but diffusers asks the metadata whose `optimum` is, and takes the first answer."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    metadata = tmp_path / "vlv.egg-info"
    assert (metadata / "top_level.txt").read_text().split() == ["export", "kernels", "serve", "vlv"]
    assert "optimum/commands/register/vlv.py" in (metadata / "SOURCES.txt").read_text().splitlines()


def test_optimums_input_generators_know_none_of_our_inputs(artifacts):
    """The reason why they are not used; should it lapse, they can be."""
    from optimum.utils import input_generators as theirs

    kinds = [kind for kind in vars(theirs).values() if isinstance(kind, type)]
    kinds = [kind for kind in kinds if issubclass(kind, theirs.DummyInputGenerator)]
    ports = {port.name for artifact in Manifest.open(artifacts).artifacts.values() for port in artifact.inputs}
    known = {name for name in ports for kind in kinds if kind.supports_input(kind, name)}
    assert len(kinds) > 20 and {"pixels", "latents", "ids", "kv_0"} < ports and known == {"timestep"}
    with pytest.raises(KeyError):
        theirs.DTYPE_MAPPER.pt("uint8")


def test_bad_arguments(tmp_path):
    run = subprocess.run(
        [*CLI, "export", "vlv", "--ckpt", "nowhere", "--out", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 2 and "error: --ckpt" in run.stderr
