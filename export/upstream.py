"""The published TensorFlow checkpoints of the paper's authors as ONNX files of the engine's contract.

    python -m export.upstream CHECKPOINT_FOLDER OUTPUT.onnx

CHECKPOINT_FOLDER holds `cp-best.ckpt.index` and `cp-best.ckpt.data-00000-of-00001`, as Ckp/Training/V_32_D3_sk_r10 of
github.com/ThFriedrich/airpi does (U-Net, 32 filters, depth 3). Written from the published layer list; the weights
themselves were never at hand, see docs/models.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import tensorflow as tf
from keras import layers, ops

from airpi_py4d import optics
from export.exit_wave import PIXELS, metadata, object_model
from export.to_onnx import TOLERANCE, convert, parity

FILTERS, DEPTH, STACK = 32, 3, 3
CHECKPOINT = "cp-best.ckpt"
_VALUE = "/.attributes/variable_value"

Placed = list[tuple[layers.Layer, str, dict[str, str]]]
_CONVOLUTION = {"kernel": "kernel", "bias": "bias"}
_NORMALISATION = {name: name for name in ("gamma", "beta", "moving_mean", "moving_variance")}


def domain() -> dict[str, tuple[float, float]]:
    """What the authors trained on: table 1 and text of the paper; the ranges of their generator where it says more."""
    corners = [(energy, angle) for energy in (30e3, 300e3) for angle in (5.0, 30.0)]
    spherical = 1e4  # [A], at Scherzer defocus
    phases = [
        (
            float(optics.aberration_phase(k0**2, energy, defocus=optics.scherzer_defocus(energy, spherical))),
            float(optics.aberration_phase(k0**2, energy, spherical_aberration=spherical)),
        )
        for energy, k0 in ((energy, optics.aperture_radius(energy, angle)) for energy, angle in corners)
    ]
    defocus, spherical_phases = zip(*phases, strict=True)
    return {
        "energy": (30e3, 300e3),
        "semiangle": (5.0, 30.0),
        "relative_scan_step": (0.061, 0.55),  # 0.1 to 0.9 of the probe's first zero, 0.61 lambda / alpha
        "coverage": (1 / 0.95, 1 / 0.1),
        "electrons_per_pattern": (3.0, 3e9),
        "defocus_phase": (min(defocus), max(defocus)),
        "spherical_phase": (min(spherical_phases), max(spherical_phases)),
    }


class Features(layers.Layer):
    """Counts and probe to the authors' eleven channels, (n, 64, 64, 11).

    Rows and columns of the patterns are mirrored about the optical axis; channel 3 c + r is the neighbour in scan
    column c and scan row r; counts to the power 0.1, the nine together with zero mean and unit variance for each
    sample, and so are the probe's amplitude and its phase. The weights of eq. 10 are not in the code that runs the
    checkpoints.
    """

    def call(self, patterns: Any, probe: Any) -> Any:
        mirrored = -np.arange(PIXELS) % PIXELS
        counts = ops.take(ops.take(ops.maximum(patterns, 0.0), mirrored, axis=3), mirrored, axis=4)
        counts = ops.reshape(ops.transpose(counts, (0, 3, 4, 2, 1)), (-1, PIXELS, PIXELS, 9))
        return ops.concatenate([_standard(x) for x in (counts**0.1, probe[..., :1], probe[..., 1:])], axis=-1)


def _standard(x: Any) -> Any:
    """Zero mean and unit variance over everything but the batch."""
    x = x - ops.mean(x, axis=(1, 2, 3), keepdims=True)
    return x / ops.maximum(ops.sqrt(ops.mean(x**2, axis=(1, 2, 3), keepdims=True)), 1e-8)


class Scale(layers.Layer):
    """A trained number times its input."""

    def build(self, *_: Any) -> None:
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    def call(self, x: Any) -> Any:
        return x * self.scale


def _block(x: Any, filters: int, path: str, placed: Placed, strides: int = 1, transposed: bool = False) -> Any:
    """Convolution 3 x 3, batch normalisation, swish; notes where in the checkpoint the weights are."""
    kind = layers.Conv2DTranspose if transposed else layers.Conv2D
    convolution, normalisation = kind(filters, 3, strides=strides, padding="same"), layers.BatchNormalization()
    placed += [(convolution, f"{path}/conv2d", _CONVOLUTION)]
    placed += [(normalisation, f"{path}/normalization_layer", _NORMALISATION)]
    return layers.Activation("swish")(normalisation(convolution(x)))


def network(placed: Placed) -> keras.Model:
    """The authors' U-Net: `patterns` and `probe` to the exit wave in real space, see `export.exit_wave.object_model`.

    The last convolutions give the changes of |psi|^0.2 and of the phase against the probe.

    Parameters
    ----------
    placed : list
        Receives every layer that has weights, its path in the checkpoint, and the names of its weights there.

    Examples
    --------
    >>> network([]).count_params()
    2142884
    """
    inputs = {
        "patterns": keras.Input((3, 3, PIXELS, PIXELS), name="patterns"),
        "probe": keras.Input((PIXELS, PIXELS, 2), name="probe"),
    }
    x = _block(Features()(**inputs), FILTERS, "convolution_block", placed)
    skips = []
    for level in range(DEPTH):
        path = f"contraction_block/{level}"
        for number in range(STACK):
            x = _block(x, x.shape[-1], f"{path}/conv_stack/conv_blocks/{number}", placed)
        skips.append(x)
        x = _block(x, 2 * x.shape[-1], f"{path}/contraction", placed, strides=2)
    for level in range(DEPTH):
        path = f"expansion_block/{level}"
        filters = x.shape[-1] // 2
        x = _block(x, filters, f"{path}/expansion", placed, strides=2, transposed=True)
        x = layers.Concatenate()([x, skips[-1 - level]])
        for number in range(STACK):
            x = _block(x, filters, f"{path}/conv_stack/conv_blocks/{number}", placed)
    changes = []
    for path, name in (("amplitude_output", "conv"), ("phase_output", "conv_s")):
        convolution, scale = layers.Conv2D(1, 3, padding="same"), Scale()
        placed += [(convolution, f"{path}/{name}", _CONVOLUTION), (scale, path, {"scale": "scale"})]
        changes.append(scale(convolution(x)))
    root = inputs["probe"][..., :1] ** 0.2 + changes[0]
    phase = inputs["probe"][..., 1:] + changes[1]
    amplitude = root * root * root * root * root
    return keras.Model(inputs, layers.Concatenate()([amplitude, phase]), name="published_unet")


def load(folder: Path) -> keras.Model:
    """The U-Net with the weights of a checkpoint.

    Raises
    ------
    ValueError
        If there is no checkpoint, or its variables aren't those of the layer list; says which.
    """
    try:
        reader = tf.train.load_checkpoint(str(folder / CHECKPOINT))
    except (tf.errors.OpError, ValueError) as error:
        raise ValueError(f"{folder} holds no TensorFlow checkpoint {CHECKPOINT}: {error}") from error
    names = {name.lower(): name for name in reader.get_variable_to_shape_map()}
    placed: Placed = []
    model = network(placed)
    problems = []
    for layer, path, weights in placed:
        for weight in layer.weights:
            name = f"{path}/{weights[weight.name]}"
            if name + _VALUE not in names:
                problems.append(f"{name} is missing")
                continue
            value = reader.get_tensor(names[name + _VALUE])
            if value.shape != tuple(weight.shape):
                problems.append(f"{name} has the shape {value.shape}, expected {tuple(weight.shape)}")
                continue
            weight.assign(value)
    if problems:
        raise ValueError(
            f"the checkpoint in {folder} isn't the published U-Net of {FILTERS} filters and depth {DEPTH}: "
            f"{'; '.join(problems[:5])}{' ...' if len(problems) > 5 else ''}."
        )
    return model


def example_inputs(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random counts and geometries within the domain, to compare Keras and ONNX Runtime with."""
    rng = np.random.default_rng(seed)
    spans = ((0.06, 0.5), (-2.0, 0.0), (0.0, 0.6), (6.0, 20.0), (0.1, 0.5))
    geometry = np.stack([rng.uniform(*span, size=batch) for span in spans], -1)
    k = np.arange(PIXELS) - PIXELS // 2
    disk = k[:, None] ** 2 + k**2 < geometry[:, 3, None, None] ** 2
    mean = np.where(disk, 5.0, 0.05)[:, None, None]
    counts = rng.poisson(np.broadcast_to(mean, (batch, 3, 3, PIXELS, PIXELS)))
    return {"patterns": counts.astype(np.float32), "geometry": geometry.astype(np.float32)}


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, convert and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint")
    parser.add_argument("output", type=Path, help="ONNX file to write")
    chosen = parser.parse_args(arguments)
    try:
        model = object_model(load(chosen.checkpoint), "real")
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    properties = metadata(
        chosen.checkpoint.resolve().name,
        "1",
        domain(),
        normalisation="inside the graph: counts to the power 0.1, standardised",
        label="exit_wave: exit wave over incident wave",
        license="that of the checkpoint",
    )
    graph = convert(model, properties)
    difference = parity(model, graph, example_inputs(8))
    print(f"Keras - ONNX Runtime, random inputs: at most {difference:.2e}")
    if difference > TOLERANCE:
        parser.exit(1, f"difference above {TOLERANCE}: nothing written\n")
    onnx.save(graph, chosen.output)
    print(f"{chosen.output}: {chosen.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
