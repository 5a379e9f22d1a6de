"""Curves of a training run: loss and validation loss, and xc by dose.

python -m training.curves RUN_FOLDER FIGURE.png
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path


def plot(history: Path, path: Path) -> None:
    """Draw the columns of a `history.csv`: losses on the left, correlations on the right."""
    from matplotlib.figure import Figure

    with open(history, newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for name in rows[-1]:
        points = [(int(row["epoch"]) + 1, float(row[name])) for row in rows if row[name]]
        kind = next(
            (n for n, start in enumerate(("loss", "validation loss", "xc at ")) if name.startswith(start)), None
        )
        if kind is not None:
            axes[kind // 2].plot(*zip(*points, strict=True), marker=".", label=name)
    for axis, label in zip(axes, ("loss", "xc of the object's phase"), strict=True):
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.legend()
    axes[0].set_yscale("log")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("figure", type=Path)
    arguments = parser.parse_args()
    plot(arguments.run / "history.csv", arguments.figure)


if __name__ == "__main__":
    main()
