"""The build step that pyproject.toml cannot state: the wheel keeps `kernels` in a folder of its own.

Hugging Face's library installs a `kernels` too. Of two packages that bring kernels/__init__.py the later one overwrites
the earlier one's, and uninstalling either breaks both. So ours goes to _vlv/kernels, and vlv.pth puts _vlv behind
site-packages on Python's path; kernels/__init__.py and vlv/__init__.py say how the two then share the name.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            library = Path(self.build_lib)
            shutil.rmtree(library / "_vlv", ignore_errors=True)
            shutil.copytree(library / "kernels", library / "_vlv" / "kernels")
            shutil.rmtree(library / "kernels")
            (library / "vlv.pth").write_text("_vlv\n")


setup(cmdclass={"build_py": BuildPy})
