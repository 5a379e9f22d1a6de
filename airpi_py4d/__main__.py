"""Command line: ``python -m airpi_py4d demo`` and ``python -m airpi_py4d diagnose``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from airpi_py4d import demo, diagnose


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
    shown.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or tensorrt (default: auto)")
    commands.add_parser("diagnose", help="print versions, devices, threads and models of this installation")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "demo":
            demo.run(chosen.output, chosen.device)
        else:
            diagnose()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"{parser.prog} {chosen.command}: {error}")


if __name__ == "__main__":
    main()
