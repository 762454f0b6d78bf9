"""What every command shares: its help, and how it chooses a device."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlv.common.command import Misuse, Parser, positive
from vlv.common.device import choose_device

ROOT = Path(__file__).parents[2]
COMMANDS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("vlv", "export", "serve")
    for path in sorted((ROOT / package).rglob("*.py"))
    if "\ndef parser() -> " in (text := path.read_text()) and "__main__" in text
]

NO_DEFAULT = (None, False, "", [], argparse.SUPPRESS, "none", "{caption}")  # nothing that a user would ask for


@pytest.mark.parametrize("module", COMMANDS)
def test_the_help_of_every_option_says_what_it_is_and_its_default(module):
    parser = importlib.import_module(module).parser()
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:
            continue
        name = "/".join(action.option_strings) or action.dest
        assert action.help, f"{module} {name} has no help"
        if action.option_strings and action.default not in NO_DEFAULT:
            message = f"{module} {name}: the help does not say that the default is {action.default}"
            assert "default" in action.help, message


def test_values_are_named_by_their_type():
    p = Parser(prog="x")
    p.add_argument("--count", type=positive, required=True)
    p.add_argument("--share", type=float)
    p.add_argument("--out", type=Path)
    p.add_argument("--file", metavar="JSON")
    text = p.format_help()
    assert all(part in text for part in ("--count N", "--share X", "--out PATH", "--file JSON"))


def test_a_device_that_is_not_there_is_refused_in_one_sentence():
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(Misuse, match=r"--device gpu: expected cpu, cuda, or one GPU such as cuda:1"):
        choose_device("gpu")
    with pytest.raises(Misuse, match=rf"--device cuda:99: PyTorch .* finds {torch.cuda.device_count()} GPUs here"):
        choose_device("cuda:99")


def test_a_command_neither_mentions_torchvision_nor_draws_bars_into_a_file():
    code = (
        "from vlv.common.command import Parser, run_command\n"
        "def work(args):\n"
        "    from diffusers import AutoencoderKL\n"
        "    from transformers import AutoModelForCausalLM\n"
        "    AutoModelForCausalLM.from_pretrained('assets/vlv-tiny/llm')\n"
        "run_command(work, Parser().parse_args([]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "torchvision" not in done.stderr and "Loading weights" not in done.stderr
