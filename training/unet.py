"""The U-Net of Friedrich et al. (2023) and its complex-valued variant, in backend-neutral Keras 3.

Both take the detector's own grid, and the probe to tell what that grid is:

`patterns` (n, 3, 3, 64, 64) [electrons], `probe` (n, 64, 64, 2), amplitude and phase [rad] of psi_in(k), and
`scan_step` (n, 1) [A] in; `exit_wave` (n, 64, 64, 2) out, amplitude and phase [rad] of psi_out(k).
Waves are centred at pixel 32; |psi_in(k)|^2 sums to 1.
"""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import layers, ops

from training.simulation import DETECTOR

#: Distance of the nine patterns from the central one [scan steps].
DISTANCE = tuple(math.hypot(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1))
#: The network works on |psi|^(1 / 5): the dark field is not lost beside the bright-field disk.
AMPLITUDE_POWER = 5


def _standardised(x: Any) -> Any:
    """Zero mean and unit variance over everything but the batch."""
    mean = ops.mean(x, axis=(1, 2, 3), keepdims=True)
    deviation = ops.sqrt(ops.mean((x - mean) ** 2, axis=(1, 2, 3), keepdims=True))
    return (x - mean) / ops.maximum(deviation, 1e-8)


@keras.saving.register_keras_serializable("airpi")
class WeightedCounts(layers.Layer):
    r"""Counts to features, eq. 10 of Friedrich et al. (2023): counts to the power 0.1, weighted by their position.

    .. math:: x_j = w_j n_j^{0.1}, \quad w_j = 1 \text{ (centre)}, \; 1 / (50 d_j) \text{ (others)}

    d_j [A] is the distance of position j from the central one: the scan step for edges, sqrt(2) times it for corners.
    The nine together are standardised for each sample, so are the probe's amplitude and phase, as in the authors' code
    (github.com/ThFriedrich/airpi).

    In: patterns (n, 3, 3, 64, 64) [electrons], probe (n, 64, 64, 2), scan_step (n, 1) [A]. Out: (n, 64, 64, 11).
    """

    def call(self, patterns: Any, probe: Any, scan_step: Any) -> Any:
        counts = ops.reshape(ops.maximum(patterns, 0.0), (-1, 9, DETECTOR, DETECTOR))
        # the gradient of n^0.1 is never needed: counts are data
        features = ops.power(ops.transpose(counts, (0, 2, 3, 1)), 0.1)
        distance = ops.convert_to_tensor([d or 1.0 for d in DISTANCE], dtype=features.dtype)
        weight = 1 / (50 * scan_step * distance)
        centre = ops.convert_to_tensor([float(d == 0) for d in DISTANCE], dtype=features.dtype)
        weight = centre + (1 - centre) * weight
        features = _standardised(features * weight[:, None, None, :])
        return ops.concatenate([features, _standardised(probe[..., :1]), _standardised(probe[..., 1:])], axis=-1)


@keras.saving.register_keras_serializable("airpi")
class ExitWaveOutput(layers.Layer):
    r"""Amplitude and phase of the exit wave as changes of the probe's, with both penalties.

    .. math:: |\psi(k)| = (|\psi_{in}(k)|^{1/5} + s_a a(k))^5, \quad \phi(k) = \phi_{in}(k) + s_\phi p(k)

    a and p are the network's last convolutions; the trainable scales s start at 1e-4, so that training starts at an
    empty specimen. The power 1/5 is that of the authors' code. Penalties, added to the loss:
    max(sum |psi|^2 - 1, 0), since no electron is created, and the mean of max(|phi| - pi, 0).

    In: change (n, 64, 64, 2), a and p; probe (n, 64, 64, 2). Out: (n, 64, 64, 2).
    """

    def build(self, *_: Any) -> None:
        start = keras.initializers.Constant(1e-4)
        self.amplitude_scale = self.add_weight(shape=(), initializer=start, name="amplitude_scale")
        self.phase_scale = self.add_weight(shape=(), initializer=start, name="phase_scale")

    def call(self, change: Any, probe: Any) -> Any:
        root = ops.power(ops.maximum(probe[..., 0], 0.0), 1 / AMPLITUDE_POWER) + self.amplitude_scale * change[..., 0]
        amplitude = root**AMPLITUDE_POWER
        phase = probe[..., 1] + self.phase_scale * change[..., 1]
        self.add_loss(ops.mean(ops.maximum(ops.sum(amplitude**2, axis=(1, 2)) - 1, 0.0)))
        self.add_loss(ops.mean(ops.maximum(ops.abs(phase) - math.pi, 0.0)))
        return ops.stack([amplitude, phase], axis=-1)


def _inputs() -> dict[str, Any]:
    return {
        "patterns": keras.Input((3, 3, DETECTOR, DETECTOR), name="patterns"),
        "probe": keras.Input((DETECTOR, DETECTOR, 2), name="probe"),
        "scan_step": keras.Input((1,), name="scan_step"),
    }


def _block(x: Any, filters: int, strides: int = 1, transposed: bool = False) -> Any:
    """Convolution 3 x 3, batch normalisation, swish."""
    convolution = layers.Conv2DTranspose if transposed else layers.Conv2D
    x = convolution(filters, 3, strides=strides, padding="same", kernel_initializer="he_normal")(x)
    return layers.Activation("swish")(layers.BatchNormalization()(x))


def unet(filters: int, levels: int, blocks: int) -> keras.Model:
    """The paper's network: 32 filters, 3 levels and blocks of 3 give 2.1 million parameters.

    Every level has `blocks` convolutions and a strided one that halves the sides and doubles the filters; the way back
    up mirrors it with transposed convolutions and skip connections.

    Parameters
    ----------
    filters : int
        Of the first level.
    levels, blocks : int

    Examples
    --------
    >>> unet(32, 3, 3).count_params()
    2142884
    """
    inputs = _inputs()
    x = _block(WeightedCounts(dtype="float32")(**inputs), filters)
    skips = []
    for level in range(levels):
        for _ in range(blocks):
            x = _block(x, filters * 2**level)
        skips.append(x)
        x = _block(x, filters * 2 ** (level + 1), strides=2)
    for level in reversed(range(levels)):
        x = _block(x, filters * 2**level, strides=2, transposed=True)
        x = layers.Concatenate()([x, skips[level]])
        for _ in range(blocks):
            x = _block(x, filters * 2**level)
    change = layers.Conv2D(2, 3, padding="same", dtype="float32", name="change")(x)
    wave = ExitWaveOutput(name="exit_wave", dtype="float32")(change, inputs["probe"])
    return keras.Model(inputs, wave, name="unet")


@keras.saving.register_keras_serializable("airpi")
class ComplexConvolution(layers.Layer):
    """Convolution 3 x 3 of complex channels, as one real convolution: (W_r x_r - W_i x_i, W_i x_r + W_r x_i).

    In: (n, rows, columns, 2 c), first all real parts, then all imaginary ones. Out: 2 `filters` channels alike.

    Parameters
    ----------
    filters : int
    strides : int
    transposed : bool
        Whether the strides enlarge.
    """

    def __init__(self, filters: int, strides: int = 1, transposed: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filters, self.strides, self.transposed = filters, strides, transposed

    def get_config(self) -> dict[str, Any]:
        own = {"filters": self.filters, "strides": self.strides, "transposed": self.transposed}
        return super().get_config() | own

    def build(self, shape: Any) -> None:
        channels = shape[-1] // 2
        # E|W|^2 = 2 / fan-in, as for real weights (He), shared by both parts
        start = keras.initializers.RandomNormal(stddev=(9 * channels) ** -0.5)
        pair = (self.filters, channels) if self.transposed else (channels, self.filters)
        self.real = self.add_weight(shape=(3, 3, *pair), initializer=start, name="real")
        start = keras.initializers.RandomNormal(stddev=(9 * channels) ** -0.5)
        self.imaginary = self.add_weight(shape=(3, 3, *pair), initializer=start, name="imaginary")
        self.bias = self.add_weight(shape=(2 * self.filters,), initializer="zeros", name="bias")

    def call(self, x: Any) -> Any:
        real, imaginary = ops.cast(self.real, x.dtype), ops.cast(self.imaginary, x.dtype)
        from_axis, to_axis = (3, 2) if self.transposed else (2, 3)
        to_real = ops.concatenate([real, -imaginary], axis=from_axis)
        to_imaginary = ops.concatenate([imaginary, real], axis=from_axis)
        kernel = ops.concatenate([to_real, to_imaginary], axis=to_axis)
        convolve = ops.conv_transpose if self.transposed else ops.conv
        return convolve(x, kernel, strides=self.strides, padding="same") + ops.cast(self.bias, x.dtype)


@keras.saving.register_keras_serializable("airpi")
class Cardioid(layers.Layer):
    """z (1 + cos arg z) / 2, the complex relative of the rectifier (Virtue, Yu, Lustig 2017). Channels as above."""

    def call(self, x: Any) -> Any:
        real, imaginary = ops.split(x, 2, axis=-1)
        cosine = real * ops.rsqrt(real**2 + imaginary**2 + 1e-6)
        gain = 0.5 * (1 + cosine)
        return ops.concatenate([gain * real, gain * imaginary], axis=-1)


@keras.saving.register_keras_serializable("airpi")
class ComplexExitWaveOutput(layers.Layer):
    """Amplitude and phase of psi_in + s z, z the network's complex output, s a trainable scale that starts at 1e-4.

    The penalty is that of `ExitWaveOutput` on the intensity; the phase is an angle within +-pi by itself.
    In: change (n, 64, 64, 2), real and imaginary part; probe (n, 64, 64, 2). Out: (n, 64, 64, 2).
    """

    def build(self, *_: Any) -> None:
        self.scale = self.add_weight(shape=(), initializer=keras.initializers.Constant(1e-4), name="scale")

    def call(self, change: Any, probe: Any) -> Any:
        real = probe[..., 0] * ops.cos(probe[..., 1]) + self.scale * change[..., 0]
        imaginary = probe[..., 0] * ops.sin(probe[..., 1]) + self.scale * change[..., 1]
        intensity = real**2 + imaginary**2
        self.add_loss(ops.mean(ops.maximum(ops.sum(intensity, axis=(1, 2)) - 1, 0.0)))
        # an angle at the origin has no gradient: at |psi| = 1e-6 nothing depends on it
        return ops.stack([ops.sqrt(intensity + 1e-12), ops.arctan2(imaginary, real + 1e-9)], axis=-1)


def _complex_block(x: Any, filters: int, strides: int = 1, transposed: bool = False) -> Any:
    """Complex convolution 3 x 3, batch normalisation of both parts, cardioid."""
    return Cardioid()(layers.BatchNormalization()(ComplexConvolution(filters, strides, transposed)(x)))


def complex_unet(filters: int, levels: int, blocks: int) -> keras.Model:
    """`unet` of complex channels; the probe enters as one of them, the patterns as real parts.

    22 filters have as many weights as `unet` with 32.

    Parameters
    ----------
    filters, levels, blocks : int
        As for `unet`; a complex filter counts as one and has twice the weights.
    """
    inputs = _inputs()
    features = WeightedCounts(dtype="float32")(**inputs)[..., :9]
    probe = inputs["probe"]
    # |psi_in| is at most about 0.2: of the order of 1 like the standardised counts
    real = layers.Concatenate()([features, 10 * probe[..., :1] * ops.cos(probe[..., 1:])])
    imaginary = layers.Concatenate()([0 * features, 10 * probe[..., :1] * ops.sin(probe[..., 1:])])
    x = _complex_block(layers.Concatenate()([real, imaginary]), filters)
    skips = []
    for level in range(levels):
        for _ in range(blocks):
            x = _complex_block(x, filters * 2**level)
        skips.append(x)
        x = _complex_block(x, filters * 2 ** (level + 1), strides=2)
    for level in reversed(range(levels)):
        x = _complex_block(x, filters * 2**level, strides=2, transposed=True)
        ours, theirs = ops.split(x, 2, axis=-1), ops.split(skips[level], 2, axis=-1)
        x = layers.Concatenate()([ours[0], theirs[0], ours[1], theirs[1]])
        for _ in range(blocks):
            x = _complex_block(x, filters * 2**level)
    change = ComplexConvolution(1, dtype="float32", name="change")(x)
    wave = ComplexExitWaveOutput(name="exit_wave", dtype="float32")(change, inputs["probe"])
    return keras.Model(inputs, wave, name="complex_unet")
