"""Mean of the weights of two networks of the same kind, such as those of two stages of one training.

python -m training.average FIRST.keras SECOND.keras OUTPUT.keras
"""

from __future__ import annotations

import argparse
from pathlib import Path

import keras

from training.image_networks import StitchedNetwork  # noqa: F401 (registers the network)
from training.losses import PhaseImageError  # noqa: F401 (registers the loss)


def averaged(first: keras.Model, second: keras.Model) -> keras.Model:
    """The first network with the mean of the weights of both.

    Raises
    ------
    ValueError
        If the weights of both don't have the same shapes.
    """
    shapes = [[weight.shape for weight in model.get_weights()] for model in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError("first and second have weights of different shapes; give two networks of one architecture.")
    first.set_weights([(a + b) / 2 for a, b in zip(first.get_weights(), second.get_weights(), strict=True)])
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("first", "second", "output"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    models = (keras.saving.load_model(path, compile=False) for path in (arguments.first, arguments.second))
    averaged(*models).save(arguments.output)


if __name__ == "__main__":
    main()
