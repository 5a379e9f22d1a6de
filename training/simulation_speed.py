"""Speed of the simulation on one core, and where its time goes.

    OMP_NUM_THREADS=1 python -m training.simulation_speed CONFIG --scans 64

Makes one shard of that many scans three times: for FFTW's plans and other first times, for the speed, for the profile.
Times are those of the processor, so what else runs on the machine counts little. A scan of 5 x 5 positions of one
specimen has 9 samples: kernels of 3 x 3 patterns with the label of their middle.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
import warnings
from pathlib import Path

from training.config import read_config
from training.dataset import make_shard

STAGES = ("random_specimen", "potential_slices", "multislice", "intensities", "on_detector", "phase_patches")


def speed(config: dict) -> tuple[float, dict[str, float]]:
    """Scans a second, and the share of each of STAGES that the simulation calls."""
    make_shard(config, 0)
    started = time.process_time()
    make_shard(config, 0)
    rate = config["scans_per_shard"] / (time.process_time() - started)
    profile = cProfile.Profile(time.process_time)
    profile.runcall(make_shard, config, 0)
    cumulative = {name: entry[3] for (_, _, name), entry in pstats.Stats(profile).stats.items()}  # type: ignore[attr-defined]
    return rate, {name: cumulative[name] / cumulative["make_shard"] for name in STAGES if name in cumulative}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--scans", type=int, default=64)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rate, shares = speed(read_config(arguments.config) | {"scans_per_shard": arguments.scans})
    print(f"{rate:.2f} scans/s on one core;", ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))


if __name__ == "__main__":
    main()
