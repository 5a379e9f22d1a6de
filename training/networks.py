"""Networks, in backend-neutral Keras 3. Every one keeps the same contract (see `export.to_onnx`):

`patterns` (n, 3, 3, 64, 64) [electrons] and `geometry` (n, 3) in, `object_patch` (n, 16, 16, 2) out.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import layers, ops

from training.simulation import DETECTOR, OBJECT


@keras.saving.register_keras_serializable("airpi")
class Standardise(layers.Layer):
    """Counts to features: the fraction of the mean pattern's electrons in each pixel, to the powers 1/4 and 1/2.

    In: (n, 3, 3, 64, 64). Out: features (n, 64, 64, 18), about zero mean and unit variance inside the bright-field
    disk, and log10 of the mean electrons a pattern / 7, (n, 1). Counting noise has nearly constant variance at the
    power 1/2; the power 1/4 lifts the dark field.
    """

    def call(self, patterns: Any) -> tuple[Any, Any]:
        counts = ops.reshape(patterns, (-1, 9, DETECTOR, DETECTOR))
        electrons = ops.maximum(ops.sum(counts, axis=(1, 2, 3), keepdims=True) / 9, 1.0)
        root = ops.sqrt(ops.maximum(counts / electrons, 0.0))
        features = ops.concatenate([(ops.sqrt(root) - 0.12) * 5.0, (root - 0.02) * 12.0], axis=1)
        level = ops.log(ops.reshape(electrons, (-1, 1))) / (7 * 2.302585)
        return ops.transpose(features, (0, 2, 3, 1)), ops.minimum(level, 1.0)


@keras.saving.register_keras_serializable("airpi")
class Gain(layers.Layer):
    """A learned gain a channel that starts at 0: residual blocks without normalisation (De and Smith 2020)."""

    def build(self, shape: Any) -> None:
        self.gain = self.add_weight(shape=(shape[-1],), initializer="zeros", name="gain")

    def call(self, x: Any) -> Any:
        return x * self.gain


def modulate(x: Any, condition: Any) -> Any:
    """Scale and shift every channel of x (n, rows, columns, c) by learned functions of the condition (n, d)."""
    channels = x.shape[-1]
    change = layers.Dense(2 * channels, kernel_initializer="zeros")(condition)
    change = layers.Reshape((1, 1, 2 * channels))(change)
    return x * (1 + change[..., :channels]) + change[..., channels:]


def convolution_block(x: Any, condition: Any) -> Any:
    """x + gain * conv(swish(modulated conv(x)))."""
    channels = x.shape[-1]
    y = layers.Conv2D(channels, 3, padding="same", kernel_initializer="he_normal")(x)
    y = layers.Activation("swish")(modulate(y, condition))
    y = layers.Conv2D(channels, 3, padding="same", kernel_initializer="he_normal")(y)
    return x + Gain()(y)


def mixing_block(x: Any, condition: Any) -> Any:
    """Two residual perceptrons, over the places and over the channels (Tolstikhin et al. 2021, without norms).

    The detector grid is absolute (the bright-field disk is always in the middle), so that mixing all places at
    once suits it, and interference couples k to every other k.
    """
    rows, columns, channels = x.shape[1:]
    places = rows * columns
    y = layers.Permute((2, 1))(layers.Reshape((places, channels))(x))
    y = layers.Activation("swish")(layers.Dense(2 * places, kernel_initializer="he_normal")(y))
    y = layers.Permute((2, 1))(layers.Dense(places, kernel_initializer="he_normal")(y))
    x = x + Gain()(layers.Reshape((rows, columns, channels))(y))
    y = layers.Conv2D(2 * channels, 1, kernel_initializer="he_normal")(x)
    y = layers.Activation("swish")(modulate(y, condition))
    return x + Gain()(layers.Conv2D(channels, 1, kernel_initializer="he_normal")(y))


def window_encoder(
    fine_channels: int, coarse_channels: int, fine_blocks: int, coarse_blocks: int, mixing: bool, head: int
) -> keras.Model:
    """Encoder from 64 x 64 to a 16 x 16 window of the object around the probe.

    4 x 4 patches -> convolution blocks at 16 x 16 -> mixing (or convolution) blocks at 8 x 8 -> perceptron -> window.
    """
    patterns = keras.Input((3, 3, DETECTOR, DETECTOR), name="patterns")
    geometry = keras.Input((3,), name="geometry")
    features, level = Standardise()(patterns)
    condition = layers.Dense(48, activation="swish")(layers.Concatenate()([geometry, level]))
    x = layers.Conv2D(fine_channels, 4, strides=4, kernel_initializer="he_normal")(features)
    x = layers.Activation("swish")(modulate(x, condition))
    for _ in range(fine_blocks):
        x = convolution_block(x, condition)
    x = layers.Conv2D(coarse_channels, 3, strides=2, padding="same", kernel_initializer="he_normal")(x)
    x = layers.Activation("swish")(modulate(x, condition))
    for _ in range(coarse_blocks):
        x = mixing_block(x, condition) if mixing else convolution_block(x, condition)
    x = layers.Conv2D(32, 1)(layers.Activation("swish")(x))
    x = layers.Dense(head)(layers.Flatten()(x))
    x = layers.Activation("swish")(modulate(layers.Reshape((1, 1, head))(x), condition))
    x = layers.Dense(OBJECT * OBJECT * 2, kernel_initializer=keras.initializers.RandomNormal(stddev=1e-3))(x)
    change = layers.Reshape((OBJECT, OBJECT, 2))(x)
    return keras.Model([patterns, geometry], VacuumObject(name="object_patch")(change), name="window_encoder")


@keras.saving.register_keras_serializable("airpi")
class VacuumObject(layers.Layer):
    """Real and imaginary part of the object patch: 1 plus the network's output (n, 16, 16, 2)."""

    def call(self, change: Any) -> Any:
        return change + ops.convert_to_tensor([1.0, 0.0], dtype=change.dtype)
