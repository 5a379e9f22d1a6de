"""Distributions of a data set on the detector's grid, as in figure S1 of Friedrich et al. (2023).

    python -m training.statistics DATA_FOLDER FIGURE.png

Prints the share of every kind of specimen and of the draws that were skipped, and draws the distributions of voltage,
semi-angle, scan step, bright-field/collection ratio, thickness and dose (which training draws anew for every sample).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.dataset import KERNELS, load_shards, parameter_names
from training.exit_wave_batches import DOSE_RANGE
from training.simulation import DETECTOR


def distributions(data: Path) -> tuple[dict[str, NDArray], dict[str, float]]:
    """Values by axis label, and the share of every kind of specimen and, as `skipped`, of refused draws."""
    config = json.loads((data / "config.json").read_text())
    numbers = sorted(int(path.stem.split("_")[1]) for path in data.glob("shard_*.npz"))
    shards = load_shards(data, numbers, ("parameters", "kinds"))
    skipped = sum(int(np.load(data / f"shard_{number:05d}.npz")["skipped"]) for number in numbers)
    columns = dict(zip(parameter_names(config), shards["parameters"].T, strict=True))
    values = {
        "voltage [kV]": columns["energy"] / 1e3,
        "semi-angle [mrad]": columns["semiangle"],
        "scan step [A]": columns["scan_step"],
        "thickness [A]": columns["thickness"],
    }
    if "bright_field_radius" in columns:
        values["bright-field / collection angle"] = columns["bright_field_radius"] / (DETECTOR / 2)
        low, high = np.log10(DOSE_RANGE)
        doses = np.random.default_rng(0).uniform(low, high, size=KERNELS * len(columns["energy"]))
        values["log10 of the electrons a pattern"] = doses
    kinds = shards["kinds"].tolist()
    shares = {kind: count / len(kinds) for kind, count in Counter(kinds).most_common()}
    return values, shares | {"skipped": skipped / (skipped + len(kinds))}


def plot(values: dict[str, NDArray], shares: dict[str, float], path: Path) -> None:
    """Write the figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, 4).ravel()
    for axis, (label, value) in zip(axes, values.items(), strict=False):
        axis.hist(value, 30, color="0.4")
        axis.set_xlabel(label)
        axis.set_ylabel("scans" if "electrons" not in label else "samples")
    last = axes[len(values)]
    last.barh(list(shares)[::-1], list(shares.values())[::-1], color="0.4")
    last.set_xlabel("share")
    for axis in axes[len(values) + 1 :]:
        axis.remove()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("figure", type=Path)
    arguments = parser.parse_args()
    values, shares = distributions(arguments.data)
    for kind, share in shares.items():
        print(f"{kind}: {100 * share:.1f} %")
    plot(values, shares, arguments.figure)


if __name__ == "__main__":
    main()
