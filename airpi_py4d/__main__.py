"""Command line: ``python -m airpi_py4d demo``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from airpi_py4d import demo


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run a subcommand.

    Parameters
    ----------
    arguments : list of str, optional
        Those of the command line by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m airpi_py4d", description="Phase reconstruction of 4D-STEM (AIRPI)."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("demo", help="reconstruct the shipped scan, beside DPC and SSB, and write images")
    shown.add_argument("--output", type=Path, default=Path(), help="folder of the results (default: here)")
    shown.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    chosen = parser.parse_args(arguments)
    try:
        demo.run(chosen.output, chosen.device)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"{parser.prog} {chosen.command}: {error}")


if __name__ == "__main__":
    main()
