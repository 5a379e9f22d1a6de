"""What few phonon configurations cost: relative L2 error of patterns and exit waves against 30 independent ones.

    python -m training.phonons CONFIG --specimens 24 --seed 1

Specimens and beams are drawn from the configuration. The last column, 30 against other 30, is what is left of the
reference's own error. Prints rows of a Markdown table.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.config import read_config
from training.structures import random_specimen
from training.supercell import random_detector_illumination, simulate_detector_scan

COUNTS = (1, 2, 4, 8, 16, 30)
REFERENCE = 30


def relative_errors(configurations: NDArray, reference: NDArray) -> NDArray[np.float64]:
    r"""|mean of n - reference| / |reference|, root mean square over all whole groups of n, for n of COUNTS.

    Parameters
    ----------
    configurations : ndarray, shape (n, ...)
        One a phonon configuration.
    reference : ndarray, shape (...)

    Returns
    -------
    ndarray, shape (len(COUNTS),)
    """
    errors = []
    for count in COUNTS:
        groups = configurations[: len(configurations) // count * count].reshape(-1, count, *reference.shape)
        squares = (np.abs(groups.mean(1) - reference) ** 2).reshape(len(groups), -1).sum(1)
        errors.append(np.sqrt(squares.mean() / (np.abs(reference) ** 2).sum()))
    return np.array(errors)


def specimen_errors(config: dict, rng: np.random.Generator) -> dict[str, NDArray[np.float64]]:
    """`relative_errors` of the patterns and exit waves of one random specimen."""
    specimen = None
    while specimen is None:
        illumination = random_detector_illumination(rng, config)
        specimen = random_specimen(rng, illumination.side, config["specimens"])
    still = config["simulation"] | {"phonon_configurations": 1}
    scans = [simulate_detector_scan(specimen, illumination, rng, still) for _ in range(max(COUNTS) + REFERENCE)]
    arrays: dict[str, list[NDArray]] = {
        "patterns": [scan.patterns for scan in scans],
        "exit waves": [scan.exit_wave for scan in scans],
    }
    return {
        name: relative_errors(np.stack(values[:-REFERENCE]), np.mean(values[-REFERENCE:], 0))
        for name, values in arrays.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--specimens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    config, rng = read_config(arguments.config), np.random.default_rng(arguments.seed)
    errors = [specimen_errors(config, rng) for _ in range(arguments.specimens)]
    print(f"| phonon configurations | {' | '.join(map(str, COUNTS))} |")
    print("| --- " * (len(COUNTS) + 1) + "|")
    for name in errors[0]:
        values = np.array([error[name] for error in errors])
        for statistic, row in (("median", np.median(values, 0)), ("largest", values.max(0))):
            print(f"| {name}, {statistic} | {' | '.join(f'{100 * value:.1f} %' for value in row)} |")


if __name__ == "__main__":
    main()
