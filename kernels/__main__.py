"""List the commands of this package: python -m kernels

    python -m kernels.aot           build kernels ahead of time, for machines without Triton
    python -m kernels.occupancy     choose default configurations for each architecture, without a GPU

Where Hugging Face's library `kernels` hides this package: python -m vlv kernels.aot, python -m vlv kernels.occupancy.
"""

from __future__ import annotations

import argparse


def main() -> None:
    """Print the list."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    parser.print_help()


if __name__ == "__main__":
    main()
