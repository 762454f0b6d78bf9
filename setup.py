"""pyproject.toml says it all, but for one line of the metadata.

The package holds a file in `optimum.commands.register`, where optimum-cli looks for subcommands. setuptools would
therefore declare `optimum` a package of ours, and diffusers, which looks a library's version up by that declaration,
would take our version for optimum's ("Multiple distributions found for package optimum. Picked distribution: vlv").
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.egg_info import egg_info


class EggInfo(egg_info):
    """Metadata that claims our own packages alone; the file is installed all the same."""

    def run(self) -> None:
        super().run()
        declared = Path(self.egg_info, "top_level.txt")
        declared.write_text("".join(f"{name}\n" for name in declared.read_text().split() if name != "optimum"))


setup(cmdclass={"egg_info": EggInfo})
