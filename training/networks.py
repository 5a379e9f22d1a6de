"""Networks, in backend-neutral Keras 3. Every one keeps the same contract (see `export.to_onnx`):

`patterns` (n, 3, 3, 64, 64) [electrons] and `geometry` (n, 3) in, `object_patch` (n, 16, 16, 2) out.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from training.simulation import BRIGHT_FIELD_RADIUS, DETECTOR, OBJECT


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
class CountEncoding(layers.Layer):
    """`Standardise` and a convolution of 4 x 4 pixels with stride 4 in one, in the fewest operations on whole patterns.

    The powers are homogeneous, so that the division by the mean electrons e comes after the convolution:
    W (s (n / e)^p - c) = s e^-p (W n^p) - W c. In: (n, 3, 3, 64, 64). Out: (n, 16, 16, filters) and the level (n, 1).

    Parameters
    ----------
    filters : int
    """

    def __init__(self, filters: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filters = filters

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"filters": self.filters}

    def build(self, *_: Any) -> None:
        self.kernel = self.add_weight(shape=(4, 4, 18, self.filters), initializer="he_normal", name="kernel")
        self.bias = self.add_weight(shape=(self.filters,), initializer="zeros", name="bias")

    def call(self, patterns: Any) -> tuple[Any, Any]:
        counts = ops.reshape(ops.maximum(patterns, 0.0), (-1, 9, DETECTOR, DETECTOR))
        electrons = ops.maximum(ops.sum(counts, axis=(1, 2, 3)) / 9, 1.0)[:, None, None, None]
        root = ops.sqrt(ops.transpose(counts, (0, 2, 3, 1)))
        quarter_kernel, root_kernel = 5.0 * self.kernel[:, :, :9], 12.0 * self.kernel[:, :, 9:]
        scale = ops.rsqrt(electrons)
        x = ops.conv(root, root_kernel, strides=4) * scale
        x = x + ops.conv(ops.sqrt(root), quarter_kernel, strides=4) * ops.sqrt(scale)
        offset = self.bias - ops.sum(0.12 * quarter_kernel, (0, 1, 2)) - ops.sum(0.02 * root_kernel, (0, 1, 2))
        level = ops.log(electrons[:, :, 0, 0]) / (7 * 2.302585)
        return x + offset, ops.minimum(level, 1.0)


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


@keras.saving.register_keras_serializable("airpi")
class LinearPhase(layers.Layer):
    r"""What a weak specimen's bright field says of its phase, pattern by pattern: the first-order estimate.

    For a weak phase phi the wave psi_j = P_j (1 + i phi) behind probe position j changes the intensity by
    dI_j(k) = -2 Im[conj(Psi_j(k)) F{P_j phi}(k)], Psi_j = F{P_j} = A(k) exp(-i chi(k) - 2 pi i k r_j). The adjoint of
    this linear map, applied to the relative change of the counts n_j over their mean n in the bright-field disk, is

    .. math:: g_j(r) = 2\, \mathrm{Im}\left[P_j^*(r) \sum_k \Psi_j(k)\, e^{2\pi i k r} (n_j(k) / n - 1)\right]

    with P_j scaled so that P_j(r_j) = 1 without aberrations. Summed over all positions of a scan it is the gradient of
    the Poisson likelihood at an empty specimen, where single-slice ptychography starts.

    In: patterns (n, 3, 3, 64, 64), geometry (n, 3). Out: (n, 16, 16, 9), object window around the central position.
    """

    def build(self, *_: Any) -> None:
        reach = np.arange(-BRIGHT_FIELD_RADIUS, BRIGHT_FIELD_RADIUS + 1)
        squared = (reach[:, None] ** 2 + reach[None] ** 2) / BRIGHT_FIELD_RADIUS**2
        self.disk = (squared <= 1).astype("float32")
        self.squared = squared.astype("float32")
        self.reach = (reach / BRIGHT_FIELD_RADIUS).astype("float32")
        angle = 2 * np.pi * np.outer(reach, np.arange(OBJECT) - OBJECT // 2) / DETECTOR
        c, s = np.cos(angle), np.sin(angle)
        # (re, im) of k to (re, im) of r as one real matrix
        self.to_object = np.block([[c, s], [-s, c]]).astype("float32")
        self.inner = slice(DETECTOR // 2 - BRIGHT_FIELD_RADIUS, DETECTOR // 2 + BRIGHT_FIELD_RADIUS + 1)

    def transformed(self, real: Any, imaginary: Any) -> tuple[Any, Any]:
        """sum_k exp(2 pi i k r) f(k), real and imaginary: (m, 25, 25) over the bright-field disk to (m, 16, 16)."""
        for _ in range(2):  # columns, then rows; the axes are swapped twice
            both = ops.matmul(ops.concatenate([real, imaginary], axis=-1), self.to_object)
            both = ops.transpose(both, (0, 2, 1))
            real, imaginary = both[:, :OBJECT], both[:, OBJECT:]
        return real, imaginary

    def call(self, patterns: Any, geometry: Any) -> Any:
        side = len(self.reach)
        counts = ops.reshape(patterns[..., self.inner, self.inner], (-1, 9, side, side))
        area = float(self.disk.sum())
        mean = ops.sum(counts * self.disk, axis=(1, 2, 3), keepdims=True) / (9 * area)
        change = counts / ops.maximum(mean, 1 / area) - 1
        # Psi_j: phase -chi - 2 pi k r_j, with r_j = step (row, column)
        turns = -2 * np.pi * geometry[:, :1] * self.reach
        moved = ops.stack([-turns, ops.zeros_like(turns), turns], axis=1)
        chi = geometry[:, 1, None, None] * self.squared + geometry[:, 2, None, None] * self.squared**2
        angle = moved[:, :, None, :, None] + moved[:, None, :, None, :] - chi[:, None, None]
        angle = ops.reshape(angle, (-1, 9, side, side))
        scale = self.disk / area
        real, imaginary = ops.cos(angle) * scale, ops.sin(angle) * scale
        flat = (-1, side, side)
        wave_real, wave_imaginary = self.transformed(
            ops.reshape(ops.concatenate([real, real * change], axis=1), flat),
            ops.reshape(ops.concatenate([imaginary, imaginary * change], axis=1), flat),
        )
        shape = (-1, 2, 9, OBJECT, OBJECT)
        wave_real, wave_imaginary = ops.reshape(wave_real, shape), ops.reshape(wave_imaginary, shape)
        estimate = wave_real[:, 0] * wave_imaginary[:, 1] - wave_imaginary[:, 0] * wave_real[:, 1]
        return ops.transpose(2 * estimate, (0, 2, 3, 1))


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


def linear_guided(
    fine_channels: int, coarse_channels: int, fine_blocks: int, coarse_blocks: int, head: int, object_channels: int
) -> keras.Model:
    """The window encoder, joined in the object's plane with the first-order estimate of the phase.

    detector: 4 x 4 patches -> blocks at 16 x 16 -> blocks at 8 x 8 -> perceptron -> object window, 8 channels;
    object: first-order estimate (9 channels) and those 8 -> blocks at 16 x 16 -> window.
    """
    patterns = keras.Input((3, 3, DETECTOR, DETECTOR), name="patterns")
    geometry = keras.Input((3,), name="geometry")
    x, level = CountEncoding(fine_channels)(patterns)
    condition = layers.Dense(48, activation="swish")(layers.Concatenate()([geometry, level]))
    x = layers.Activation("swish")(modulate(x, condition))
    for _ in range(fine_blocks):
        x = convolution_block(x, condition)
    x = layers.Conv2D(coarse_channels, 3, strides=2, padding="same", kernel_initializer="he_normal")(x)
    x = layers.Activation("swish")(modulate(x, condition))
    for _ in range(coarse_blocks):
        x = convolution_block(x, condition)
    x = layers.Conv2D(32, 1)(layers.Activation("swish")(x))
    x = layers.Dense(head)(layers.Flatten()(x))
    x = layers.Activation("swish")(modulate(layers.Reshape((1, 1, head))(x), condition))
    seen = layers.Reshape((OBJECT, OBJECT, 8))(layers.Dense(OBJECT * OBJECT * 8)(layers.Flatten()(x)))
    linear = LinearPhase(name="linear_phase")(patterns, geometry)
    x = layers.Concatenate()([seen, linear])
    x = layers.Conv2D(object_channels, 3, padding="same", kernel_initializer="he_normal")(x)
    x = layers.Activation("swish")(modulate(x, condition))
    x = convolution_block(x, condition)
    small = keras.initializers.RandomNormal(stddev=1e-3)
    change = layers.Conv2D(2, 3, padding="same", kernel_initializer=small)(x)
    # the weak specimen's limit: a gain for every pixel of the sum over the positions and of the central one
    gains = layers.Reshape((OBJECT, OBJECT, 2))(
        layers.Dense(OBJECT * OBJECT * 2, kernel_initializer="zeros")(condition)
    )
    sums = layers.Concatenate()(
        [layers.Conv2D(1, 1, use_bias=False, kernel_initializer="ones")(linear), linear[..., 4:5]]
    )
    change = layers.Concatenate()([change[..., :1], change[..., 1:] + ops.sum(gains * sums, axis=-1, keepdims=True)])
    return keras.Model([patterns, geometry], VacuumObject(name="object_patch")(change), name="linear_guided")


@keras.saving.register_keras_serializable("airpi")
class VacuumObject(layers.Layer):
    """Real and imaginary part of the object patch: 1 plus the network's output (n, 16, 16, 2)."""

    def call(self, change: Any) -> Any:
        return change + ops.convert_to_tensor([1.0, 0.0], dtype=change.dtype)


NETWORKS = {network.__name__: network for network in (window_encoder, linear_guided)}
