"""The same network with more residual blocks in its image network, which don't change its image until they are trained.

    python -m training.grow NETWORK.keras OUTPUT.keras --blocks 2 4 2

The gain of a new block is 0, so that training goes on where it had stopped (Net2Net of Chen, Goodfellow and Shlens 2016
keeps the function too).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import keras

from training.image_networks import BLOCK, StitchedNetwork
from training.losses import PhaseImageError  # noqa: F401 (registers the loss)


def grown(model: StitchedNetwork, blocks: Sequence[int]) -> StitchedNetwork:
    """The network with `blocks` residual blocks and the weights of `model`.

    Parameters
    ----------
    model : StitchedNetwork
    blocks : sequence of int
        Blocks on the way down, at the bottom and on the way up, as in `image_network`.

    Raises
    ------
    ValueError
        If `model` has more blocks somewhere.
    """
    encoder, image = model.arguments["encoder"], model.arguments["image"]
    if any(new < old for new, old in zip(blocks, image["blocks"], strict=True)):
        raise ValueError(f"blocks is {list(blocks)}, expected at least those of the network, {image['blocks']}.")
    larger = StitchedNetwork(encoder, image | {"blocks": list(blocks)})
    larger.encoder.set_weights(model.encoder.get_weights())
    named = {layer.name: layer for layer in model.image.layers}
    others = iter([layer for layer in model.image.layers if layer.weights and not layer.name.startswith(BLOCK)])
    for layer in larger.image.layers:
        if layer.weights and not layer.name.startswith(BLOCK):
            layer.set_weights(next(others).get_weights())
        elif layer.name in named and layer.name.startswith(BLOCK):
            layer.set_weights(named[layer.name].get_weights())
    return larger


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("network", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--blocks", type=int, nargs=3, required=True, metavar=("DOWN", "BOTTOM", "UP"))
    arguments = parser.parse_args()
    grown(keras.saving.load_model(arguments.network, compile=False), arguments.blocks).save(arguments.output)


if __name__ == "__main__":
    main()
