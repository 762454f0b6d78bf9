"""What a release consists of, built once: a source archive, and the wheel that is built from it; a venv that has it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "import setuptools.build_meta as b, sys; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"


def run(*command, cwd: Path, **options) -> str:
    """A command's output; its stderr where it fails."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """A copy of the source tree as a clone has it, less what no build reads."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("source") / "tree"
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, names):
        if not name.startswith("assets/") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def sdist(tree, tmp_path_factory) -> Path:
    """The source archive."""
    out = tmp_path_factory.mktemp("dist")
    return out / run(sys.executable, "-c", BUILD, "sdist", out, cwd=tree).splitlines()[-1]


@pytest.fixture(scope="session")
def wheel(sdist, tmp_path_factory) -> Path:
    """The wheel, built from the source archive as pip would."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # Python 3.11.4
    (source,) = folder.iterdir()
    return sdist.parent / run(sys.executable, "-c", BUILD, "wheel", sdist.parent, cwd=source).splitlines()[-1]


@pytest.fixture(scope="session")
def clean_venv(tmp_path_factory) -> Path:
    """A venv without this project; the packages that it depends on are borrowed from the venv that runs the tests."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=ROOT)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(folder / "bin/python", "-c", where, cwd=ROOT).strip())
    borrowed = packages / "borrowed"
    borrowed.mkdir()
    folders = [Path(path) for path in sys.path if Path(path).name == "site-packages"]  # make test-all has two
    for entry in (entry for folder in folders for entry in folder.iterdir()):
        # all but this project's own .pth or finder, which would lead back to the tree
        own = entry.name.startswith(("__editable__", "vlv-", "vlv.", "_vlv")) or entry.suffix == ".pth"
        if not own and not (borrowed / entry.name).exists():
            (borrowed / entry.name).symlink_to(entry)
    (packages / "borrowed.pth").write_text(str(borrowed))
    return folder
