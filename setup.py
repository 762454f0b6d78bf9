"""What pyproject.toml cannot state: the wheel keeps our packages in a folder of their own, and does not claim optimum.

Hugging Face's library installs a `kernels` too. Of two packages that bring kernels/__init__.py the later one overwrites
the earlier one's, and uninstalling either breaks both. So the wheel holds _vlv/kernels and its neighbours, and vlv.pth
puts _vlv behind site-packages on Python's path; kernels/__init__.py and vlv/__init__.py share the name from there, as
they do in a source tree. optimum's subcommand stays outside: optimum looks for it in its own folder. But setuptools
would declare that folder a package of ours, and diffusers, which looks up a version by that declaration, would
take our version for optimum's ("Multiple distributions found for package optimum. Picked distribution: vlv").
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

PACKAGES = ("kernels", "vlv", "export", "serve")


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            library = Path(self.build_lib)
            for package in PACKAGES:
                shutil.rmtree(library / "_vlv" / package, ignore_errors=True)  # of an earlier build
                shutil.copytree(library / package, library / "_vlv" / package)
                shutil.rmtree(library / package)
            (library / "vlv.pth").write_text("_vlv\n")


class EggInfo(egg_info):
    def run(self) -> None:
        super().run()
        declared = Path(self.egg_info, "top_level.txt")
        declared.write_text("".join(f"{name}\n" for name in declared.read_text().split() if name in PACKAGES))


setup(cmdclass={"build_py": BuildPy, "egg_info": EggInfo})
