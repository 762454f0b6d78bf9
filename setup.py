"""The build step that pyproject.toml cannot state: the wheel keeps our packages in a folder of their own.

Hugging Face's library installs a `kernels` too. Of two packages that bring kernels/__init__.py the later one overwrites
the earlier one's, and uninstalling either breaks both. So the wheel holds _vlv/kernels and its neighbours, and vlv.pth
puts _vlv behind site-packages on Python's path; kernels/__init__.py and vlv/__init__.py share the name from there, as
they do in a source tree. optimum's subcommand stays outside: optimum looks for it in its own folder.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOMS = ("kernels", "vlv", "export", "serve")


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            library = Path(self.build_lib)
            for room in ROOMS:
                shutil.rmtree(library / "_vlv" / room, ignore_errors=True)  # of an earlier build
                shutil.copytree(library / room, library / "_vlv" / room)
                shutil.rmtree(library / room)
            (library / "vlv.pth").write_text("_vlv\n")


setup(cmdclass={"build_py": BuildPy})
