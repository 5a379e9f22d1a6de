"""Networks in two parts, in backend-neutral Keras 3: patterns to feature patches, their stitched image to the phase.

    patterns -> pattern encoder -> feature patches -> stitched feature image -> image network -> phase and its error

The encoder sees a pattern alone, so that it runs once for every position, however many patches overlap. Stitching is
linear. The image network sees what all patterns around a pixel say of it. What the engine does with the parts is
written in `airpi_py4d.feature_stitching`; here the stitching of a small square scan is three matrix products.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from numpy.typing import NDArray

from airpi_py4d.stitching import interpolation_matrix
from training.networks import CountEncoding, Gain, LinearPhase, modulate
from training.simulation import BRIGHT_FIELD_RADIUS, DETECTOR, OBJECT

#: Pixel of the patches, and their side, in units of 1 / k0.
PATCH_PIXEL = BRIGHT_FIELD_RADIUS / DETECTOR
PATCH_SIDE = OBJECT * PATCH_PIXEL
#: Features that aren't learned: `CentreOfMass` and `FirstOrder`.
PHYSICAL_FEATURES = 4
#: Channels of the image network's input behind the features: level of the counts, coverage.
EXTRA_CHANNELS = 2
_GRADIENT_SCALE = 12.0
_NOISE_OF_ONE_ELECTRON = 14.0
#: Linear filters of the first-order features, and pixels that they reach to each side.
FILTERS = 8
FILTER_REACH = 6
_SCALE_REACH = 8
#: Start of the names of the residual blocks' layers.
BLOCK = "block_"
#: Of the integrated centres of mass: pixels of the kernel to each side, variance of one electron in 1 / k0^2; standard
#: deviation of the spot that holds a centre of mass [1 / k0].
INTEGRATION_REACH = 12
_NOISE_OF_INTEGRATION = 4.0
_SPOT = 0.15


@keras.saving.register_keras_serializable("airpi")
class FirstOrder(LinearPhase):
    r"""What the bright field of one pattern says of a weak specimen, to first order.

    For a weak phase phi (and log-amplitude a) the wave psi = P (1 + i phi + a) behind a probe changes the intensity by
    dI(k) = 2 Re[conj(Psi(k)) F{P (i phi + a)}(k)], Psi = F{P} = A(k) exp(-i chi(k)). The adjoint of this linear map,
    applied to the relative change of the counts n over their mean in the bright-field disk, is

    .. math:: g(r) = 2 P^*(r) \sum_k \Psi(k)\, e^{2\pi i k r} (n(k) / \bar{n} - 1)

    with P scaled so that P(0) = 1 without aberrations, times 12, which makes the stitched features about as large as
    the phase. Its imaginary part is the likelihood's gradient by the phase, where single-slice ptychography starts, its
    real part that by the log-amplitude.

    In: patterns (n, 64, 64), geometry (n, 3). Out: (n, 2, 16, 16), imaginary and real part.
    """

    def call(self, patterns: Any, geometry: Any) -> Any:
        counts = patterns[:, self.inner, self.inner]
        area = float(self.disk.sum())
        mean = ops.sum(counts * self.disk, axis=(1, 2), keepdims=True) / area
        change = counts / ops.maximum(mean, 1 / area) - 1
        chi = geometry[:, 1, None, None] * self.squared + geometry[:, 2, None, None] * self.squared**2
        scale = self.disk / area
        real, imaginary = ops.cos(chi) * scale, -ops.sin(chi) * scale
        probe_real, probe_imaginary = self.transformed(real, imaginary)
        wave_real, wave_imaginary = self.transformed(real * change, imaginary * change)
        return (
            _GRADIENT_SCALE
            * 2
            * ops.stack(
                [
                    probe_real * wave_imaginary - probe_imaginary * wave_real,
                    probe_real * wave_real + probe_imaginary * wave_imaginary,
                ],
                axis=1,
            )
        )


@keras.saving.register_keras_serializable("airpi")
class CentreOfMass(layers.Layer):
    r"""Centre of mass of each pattern, at its probe position: the gradient of a phase object however strong.

    For psi = P exp(i phi) the mean wave vector is <k> = \int |P|^2 \nabla \phi / 2 \pi (Lazic et al. 2016). The patch
    holds <k> [k0] times a Gaussian at the probe position, so wide that neighbours meet, and so high that the stitched
    image of a dense scan is <k>.

    In: patterns (n, 64, 64). Out: (n, 2, 16, 16), along rows and columns.
    """

    def build(self, *_: Any) -> None:
        k = (np.arange(DETECTOR) - DETECTOR // 2) / BRIGHT_FIELD_RADIUS
        self.k = np.stack(np.meshgrid(k, k, indexing="ij"), -1).reshape(-1, 2).astype("float32")
        r = (np.arange(OBJECT) - OBJECT // 2) * PATCH_PIXEL
        gaussian = np.exp(-(r[:, None] ** 2 + r[None] ** 2) / (2 * _SPOT**2))
        self.spot = (PATCH_SIDE**2 / 4 * gaussian / (2 * np.pi * _SPOT**2)).astype("float32")

    def call(self, patterns: Any) -> Any:
        counts = ops.reshape(patterns, (-1, DETECTOR**2))
        electrons = ops.maximum(ops.sum(counts, axis=1, keepdims=True), 1.0)
        centre = ops.matmul(counts, self.k) / electrons
        return centre[:, :, None, None] * self.spot


def pattern_encoder(fine_channels: int, coarse_channels: int, blocks: int, head: int, features: int) -> keras.Model:
    """Encoder of single patterns: `patterns` (n, 64, 64) [electrons], `geometry` (n, 3) to (n, features + 4, 16, 16).

    4 x 4 pixels -> 8 x 8 -> residual blocks -> perceptron -> object window; the last features are `CentreOfMass`'s and
    `FirstOrder`'s.
    """
    patterns = keras.Input((DETECTOR, DETECTOR), name="patterns")
    geometry = keras.Input((3,), name="geometry")
    x, level = PatternCounts(fine_channels, dtype="float32")(patterns)
    condition = layers.Dense(32, activation="swish")(layers.Concatenate()([geometry, level]))
    x = layers.Activation("swish")(modulate(x, condition))
    x = layers.Conv2D(coarse_channels, 3, strides=2, padding="same", kernel_initializer="he_normal")(x)
    x = layers.Activation("swish")(modulate(x, condition))
    for _ in range(blocks):
        y = layers.Conv2D(coarse_channels, 3, padding="same", kernel_initializer="he_normal")(x)
        y = layers.Activation("swish")(modulate(y, condition))
        x = x + Gain()(layers.Conv2D(coarse_channels, 3, padding="same", kernel_initializer="he_normal")(y))
    x = layers.Conv2D(24, 1)(layers.Activation("swish")(x))
    x = layers.Dense(head)(layers.Flatten()(x))
    x = layers.Activation("swish")(modulate(layers.Reshape((1, 1, head))(x), condition))
    learned = layers.Reshape((features, OBJECT, OBJECT))(layers.Dense(features * OBJECT**2)(layers.Flatten()(x)))
    centre = CentreOfMass(name="centre_of_mass", dtype="float32")(patterns)
    linear = FirstOrder(name="first_order", dtype="float32")(patterns, geometry)
    patch = layers.Concatenate(axis=1, name="feature_patch", dtype="float32")([learned, centre, linear])
    return keras.Model([patterns, geometry], patch, name="encoder")


@keras.saving.register_keras_serializable("airpi")
class PatternCounts(CountEncoding):
    """`CountEncoding` of single patterns: (n, 64, 64) to (n, 16, 16, filters) and the level (n, 1)."""

    def build(self, *_: Any) -> None:
        self.kernel = self.add_weight(shape=(4, 4, 2, self.filters), initializer="he_normal", name="kernel")
        self.bias = self.add_weight(shape=(self.filters,), initializer="zeros", name="bias")

    def call(self, patterns: Any) -> tuple[Any, Any]:
        counts = ops.maximum(patterns, 0.0)
        electrons = ops.maximum(ops.sum(counts, axis=(1, 2)), 1.0)[:, None, None, None]
        root = ops.sqrt(counts)[..., None]
        quarter_kernel, root_kernel = 5.0 * self.kernel[:, :, :1], 12.0 * self.kernel[:, :, 1:]
        scale = ops.rsqrt(electrons)
        x = ops.conv(root, root_kernel, strides=4) * scale
        x = x + ops.conv(ops.sqrt(root), quarter_kernel, strides=4) * ops.sqrt(scale)
        offset = self.bias - ops.sum(0.12 * quarter_kernel, (0, 1, 2)) - ops.sum(0.02 * root_kernel, (0, 1, 2))
        level = ops.log(electrons[:, :, 0, 0]) / (7 * 2.302585)
        return x + offset, ops.minimum(level, 1.0)


@keras.saving.register_keras_serializable("airpi")
class Spread(layers.Layer):
    """Numbers (n, d) on all pixels of an image (n, rows, columns, c): (n, rows, columns, d)."""

    def call(self, numbers: Any, image: Any) -> Any:
        return ops.zeros_like(image[..., :1]) + numbers[:, None, None, :]


@keras.saving.register_keras_serializable("airpi")
class NoiseScaled(layers.Layer):
    r"""The first-order features over \sqrt{1 + a / \rho}, so that their counting noise is never far above 1.

    \rho are the electrons in an area of 1 / k0^2, the level's 10^{7 level} a pattern over the squared step; a is the
    variance of the stitched `FirstOrder` features at one electron in that area.

    In: (n, rows, columns, features + 2) with the first-order features before level and coverage, and geometry (n, 4).
    Out: (n, rows, columns, 2).
    """

    def call(self, x: Any, geometry: Any) -> Any:
        density = ops.exp(7 * 2.302585 * x[..., -2:-1]) / geometry[:, None, None, 1:2] ** 2
        return x[..., -4:-2] * ops.rsqrt(1 + _NOISE_OF_ONE_ELECTRON / density)


@keras.saving.register_keras_serializable("airpi")
class Sharpened(layers.Layer):
    r"""x, and x with every spatial frequency q [k0] multiplied by (q / 2)^2, and by (q / 2)^4.

    By the Laplacian of nine points, -\nabla^2 / (2 \pi)^2, twice. In: x (n, rows, columns, c), geometry (n, 4). Out:
    (n, rows, columns, 3 c).
    """

    def call(self, x: Any, geometry: Any) -> Any:
        channels = x.shape[-1]
        laplacian = np.array([[1, 4, 1], [4, -20, 4], [1, 4, 1]], "float32") / 6
        kernel = ops.convert_to_tensor(np.tile(laplacian[:, :, None, None], (1, 1, channels, 1)))
        scale = -1 / (4 * math.pi * geometry[:, None, None, :1]) ** 2
        once = scale * ops.depthwise_conv(x, kernel, padding="same")
        twice = scale * ops.depthwise_conv(once, kernel, padding="same")
        return ops.concatenate([x, once, twice], axis=-1)


@keras.saving.register_keras_serializable("airpi")
class IntegratedCentreOfMass(layers.Layer):
    r"""The phase whose gradient the centres of mass are, without what is longer than the kernel (DPC).

    .. math:: \phi(r) = 2 \pi \nabla^{-2} \nabla \cdot \langle k \rangle
              = p \sum_m \frac{m \cdot \langle k \rangle(r - m p)}{|m|^2} \cos^2\frac{\pi |m|}{2 M}, \quad |m| < M,

    p the pixel [1 / k0], and over \sqrt{1 + b / \rho} as in `NoiseScaled`.

    In: all features (n, rows, columns, c), with the centres of mass before the first-order features, level and
    coverage, and geometry (n, 4). Out: (n, rows, columns, 1).
    """

    def build(self, *_: Any) -> None:
        m = np.arange(-INTEGRATION_REACH, INTEGRATION_REACH + 1, dtype=float)
        squared = m[:, None] ** 2 + m[None] ** 2
        taper = np.where(
            squared < INTEGRATION_REACH**2, np.cos(np.pi * np.sqrt(squared) / 2 / INTEGRATION_REACH) ** 2, 0
        )
        along = np.stack(np.meshgrid(m, m, indexing="ij"), -1) * (taper / np.maximum(squared, 1))[..., None]
        self.kernel = np.asarray(-along[..., None], "float32")  # ops.conv correlates

    def call(self, x: Any, geometry: Any) -> Any:
        density = ops.exp(7 * 2.302585 * x[..., -2:-1]) / geometry[:, None, None, 1:2] ** 2
        reach = (INTEGRATION_REACH, INTEGRATION_REACH)
        padded = ops.pad(x[..., -6:-4], ((0, 0), reach, reach, (0, 0)))
        phase = ops.conv(padded, ops.convert_to_tensor(self.kernel), padding="valid")
        return phase * geometry[:, None, None, :1] * ops.rsqrt(1 + _NOISE_OF_INTEGRATION / density)


@keras.saving.register_keras_serializable("airpi")
class LocalScale(layers.Layer):
    """Root mean square of x (n, rows, columns, 1) over 17 x 17 pixels, above 0.001."""

    def call(self, x: Any) -> Any:
        side = 2 * _SCALE_REACH + 1
        along_rows = ops.average_pool(x**2, (1, side), strides=1, padding="same")
        return ops.sqrt(ops.average_pool(along_rows, (side, 1), strides=1, padding="same") + 1e-6)


@keras.saving.register_keras_serializable("airpi")
class PhaseAndError(layers.Layer):
    """Phase [rad] and the standard deviation of its error [rad], (n, 1, rows, columns) each.

    In: linear phase l, its local scale s and integrated centres of mass d, (n, rows, columns, 1) each, and x (n, rows,
    columns, 4). The phase is l + s x_0 + x_1 + x_3 d, the deviation s exp(x_2 - 1).
    """

    def call(self, linear: Any, scale: Any, integrated: Any, x: Any) -> tuple[Any, Any]:
        phase = linear + scale * x[..., :1] + x[..., 1:2] + integrated * x[..., 3:]
        error = scale * ops.exp(ops.clip(x[..., 2:3] - 1.0, -6.0, 6.0))
        return ops.transpose(phase, (0, 3, 1, 2)), ops.transpose(error, (0, 3, 1, 2))


def modulate_pixels(x: Any, condition: Any, name: str | None = None) -> Any:
    """Scale and shift every channel of x (n, rows, columns, c) by learned functions of the condition at each pixel."""
    change = layers.Conv2D(2 * x.shape[-1], 1, kernel_initializer="zeros", name=name)(condition)
    scale, shift = ops.split(change, 2, axis=-1)  # the gradient of two slices takes five times as long
    return x * (1 + scale) + shift


@keras.saving.register_keras_serializable("airpi")
class Limited(layers.Layer):
    """x / sqrt(mean x^2 + 0.1) over the channels of each pixel: linear for weak features, bounded for strong ones."""

    def call(self, x: Any) -> Any:
        return x * ops.rsqrt(ops.mean(x**2, axis=-1, keepdims=True) + 0.1)


def image_block(x: Any, condition: Any, name: str) -> Any:
    """x + gain * conv(swish(modulated conv(limited x))); its layers have names that start with `name`."""
    channels = x.shape[-1]
    first, second = (
        layers.Conv2D(channels, 3, padding="same", kernel_initializer="he_normal", name=f"{name}_{which}")
        for which in ("first", "second")
    )
    y = layers.Activation("swish")(modulate_pixels(first(Limited()(x)), condition, f"{name}_modulation"))
    return x + Gain(name=f"{name}_gain")(second(y))


def linear_phase(first_order: Any, geometry: Any, condition: Any) -> Any:
    """Linear filters of the first-order features, added with gains that the condition decides: what a linear method
    makes of the scan. Starts from 0. (n, rows, columns, 2) to (n, rows, columns, 1)."""
    x = Sharpened(dtype="float32")(first_order, geometry)
    x = layers.Conv2D(FILTERS, 2 * FILTER_REACH + 1, padding="same", use_bias=False, dtype="float32")(x)
    gains = layers.Conv2D(FILTERS, 1, kernel_initializer="zeros", dtype="float32")(condition)
    return ops.sum(x * gains, axis=-1, keepdims=True)


def image_network(features: int, channels: list[int], blocks: list[int]) -> keras.Model:
    """U-Net from the stitched features to the phase.

    It corrects a linear filter of the first-order features, and sees that and them relative to the filter's local
    scale, so that weak and strong specimens look alike to it.

    `image_features` (n, features + 2, rows, columns), rows and columns multiples of 4, and `image_geometry` (n, 5):
    pixel size and scan step [1 / k0], phases of defocus and C_s at the aperture's edge [rad], k0 [1/A]. Out: `phase`
    and `phase_error` [rad], (n, 1, rows, columns).

    All lengths are relative to 1 / k0 but those of the specimen: how far atoms are apart, how wide they are and how far
    they move. Only k0 says what those are in the image.

    Parameters
    ----------
    features : int
        Of the encoder.
    channels, blocks : list of int
        Channels at full, half and quarter resolution; residual blocks down, at the bottom, and up.
    """
    inputs = keras.Input((features + EXTRA_CHANNELS, None, None), name="image_features")
    geometry = keras.Input((5,), name="image_geometry")
    all_features = layers.Permute((2, 3, 1), dtype="float32")(inputs)
    integrated = IntegratedCentreOfMass(dtype="float32")(all_features, geometry)
    first_order = NoiseScaled(dtype="float32")(all_features, geometry)
    numbers = ops.concatenate([geometry[:, :4], ops.log(geometry[:, 4:])], axis=1)
    known = layers.Concatenate(dtype="float32")(
        [all_features[..., features:], Spread(dtype="float32")(numbers, first_order)]
    )
    state = layers.Conv2D(24, 1, activation="swish", dtype="float32")(known)
    linear = linear_phase(first_order, geometry, layers.Conv2D(24, 1, activation="swish", dtype="float32")(state))
    scale = LocalScale(dtype="float32")(linear)
    condition = layers.Conv2D(24, 1, activation="swish")(
        layers.Concatenate(dtype="float32")([known, ops.log(scale) / 3])
    )
    conditions = [condition]
    for _ in channels[1:]:
        conditions.append(layers.AveragePooling2D(2)(conditions[-1]))
    relative = Limited(dtype="float32")(layers.Concatenate(dtype="float32")([linear, first_order]) / scale)
    x = layers.Conv2D(channels[0], 3, padding="same", kernel_initializer="he_normal")(relative)
    learned = layers.Conv2D(channels[0], 3, padding="same", kernel_initializer="he_normal")(
        layers.Concatenate(dtype="float32")([all_features, integrated])
    )
    x = modulate_pixels(x, condition) + Gain()(modulate_pixels(learned, condition))
    skips = []
    for level, of_level in enumerate(channels):
        if level:
            x = layers.Conv2D(of_level, 2, strides=2, kernel_initializer="he_normal")(x)
        bottom = level == len(channels) - 1
        for number in range(blocks[1] if bottom else blocks[0]):
            x = image_block(x, conditions[level], f"{BLOCK}{level}_down_{number}")
        skips.append(x)
    for level in reversed(range(len(channels) - 1)):
        coarse = Gain()(layers.Conv2D(channels[level], 1)(Limited()(x)))
        x = skips[level] + layers.UpSampling2D(2)(coarse)
        for number in range(blocks[2]):
            x = image_block(x, conditions[level], f"{BLOCK}{level}_up_{number}")
    small = keras.initializers.RandomNormal(stddev=1e-3)
    out = layers.Conv2D(4, 3, padding="same", kernel_initializer=small, dtype="float32")(x)
    phase, error = PhaseAndError(name="phase_and_error", dtype="float32")(linear, scale, integrated, out)
    return keras.Model([inputs, geometry], {"phase": phase, "phase_error": error}, name="image_network")


def receptive_margin(channels: list[int], blocks: list[int]) -> int:
    """Pixels around one that the image network sees at most, along an axis, rounded up to a multiple of 4."""
    levels = len(channels)
    reach = 2.0 + FILTER_REACH + 2 + _SCALE_REACH  # first and last convolution; filter, Laplacians and scale
    for level in range(levels):
        number = blocks[1] if level == levels - 1 else blocks[0] + blocks[2]
        reach += 2 * number * 2**level + 2**level
    return 4 * math.ceil(reach / 4)


def stitching_matrices(positions: int, oversample: int, relative_step: float) -> tuple[NDArray, NDArray]:
    """Along one axis: features times window (pixels, positions * 16), and the window alone (pixels, positions).

    Rows of zeros make the pixels a multiple of 4, as the image network wants them.

    Parameters
    ----------
    positions, oversample : int
        Scan positions; image pixels a step.
    relative_step : float
        [1 / k0]
    """
    pixel = relative_step / oversample
    half = math.ceil(PATCH_SIDE / 2 / pixel)
    offsets = np.arange(-half, half + 1)
    window = np.where(np.abs(offsets * pixel) < PATCH_SIDE / 2, np.cos(np.pi * offsets * pixel / PATCH_SIDE) ** 2, 0.0)
    fine = window[:, None] * interpolation_matrix(OBJECT, PATCH_PIXEL, 2 * half + 1, pixel)
    pixels = (positions - 1) * oversample + 1
    padding = -pixels % 4
    features = np.zeros((pixels + 2 * half, positions, OBJECT), np.float32)
    weights = np.zeros((pixels + 2 * half, positions), np.float32)
    for n in range(positions):
        here = slice(n * oversample, n * oversample + 2 * half + 1)
        features[here, n], weights[here, n] = fine, window
    features = np.pad(features[half:-half].reshape(pixels, -1), ((0, padding), (0, 0)))
    return features, np.pad(weights[half:-half], ((0, padding), (0, 0)))


@keras.saving.register_keras_serializable("airpi")
class StitchedNetwork(keras.Model):
    """Encoder, stitching and image network of square scans.

    In: `patterns` (n, p, p, 64, 64) [electrons], `geometry` (n, 3), `features_matrix` (n, pixels, 16 p) and
    `window_matrix` (n, pixels, p) as from `stitching_matrices`, `pixel_size` (n, 1) [1 / k0], `aperture_radius` (n, 1)
    k0 [1/A]. Out: (n, pixels, pixels, 3): phase [rad], its error [rad] and the coverage.

    Parameters
    ----------
    encoder, image : dict
        Arguments of `pattern_encoder`, and of `image_network` but `features`.
    """

    def __init__(self, encoder: dict, image: dict, **kwargs: Any) -> None:
        super().__init__(**({"dtype": "float32"} | kwargs))  # its parts choose their own precision
        self.arguments = {"encoder": encoder, "image": image}
        self.encoder = pattern_encoder(**encoder)
        self.image = image_network(encoder["features"] + PHYSICAL_FEATURES, **image)
        self.built = True  # its parts are

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | self.arguments

    def stitched(self, patterns: Any, patches: Any, inputs: dict, step: Any) -> Any:
        """Features, level and coverage (n, features + 4, pixels, pixels) of patches (n p p, features + 2, 16, 16)."""
        (n, positions), features = ops.shape(patterns)[:2], patches.shape[1]
        rows, window = inputs["features_matrix"], inputs["window_matrix"]
        pixels = ops.shape(rows)[1]
        electrons = ops.maximum(ops.sum(patterns, axis=(3, 4)), 0.0)
        x = ops.reshape(patches, (n, positions, positions, features, OBJECT, OBJECT))
        x = x * electrons[..., None, None, None]
        x = ops.transpose(x, (0, 1, 4, 2, 3, 5))  # n, position row, patch row, position column, feature, patch column
        x = ops.matmul(rows, ops.reshape(x, (n, positions * OBJECT, positions * features * OBJECT)))
        x = ops.reshape(x, (n, pixels, positions, features, OBJECT))
        x = ops.transpose(x, (0, 3, 1, 2, 4))  # n, feature, pixel row, position column, patch column
        across = ops.transpose(rows, (0, 2, 1))[:, None]
        x = ops.matmul(ops.reshape(x, (n, features, pixels, positions * OBJECT)), across)
        weight = ops.matmul(ops.matmul(window, electrons), ops.transpose(window, (0, 2, 1)))
        along = ops.sum(window, axis=2)
        seen = along[:, :, None] * along[:, None]
        level = ops.log(ops.maximum(weight / ops.maximum(seen, 1e-6), 1.0)) / (7 * 2.302585)
        coverage = seen * step[:, :, None] ** 2 / (PATCH_SIDE**2 / 4)
        x = x / ops.maximum(weight, 1e-6)[:, None]
        return ops.concatenate([x, ops.minimum(level, 1.0)[:, None], coverage[:, None]], axis=1)

    def feature_image(self, inputs: dict) -> Any:
        """Features, level and coverage (n, features + 6, pixels, pixels) of the patterns."""
        patterns, geometry = inputs["patterns"], inputs["geometry"]
        flat = ops.reshape(patterns, (-1, DETECTOR, DETECTOR))
        of_patterns = ops.repeat(geometry, ops.shape(patterns)[1] ** 2, axis=0)
        return self.stitched(patterns, self.encoder([flat, of_patterns]), inputs, geometry[:, :1])

    def call(self, inputs: dict) -> Any:
        geometry = inputs["geometry"]
        x = inputs["features"] if "features" in inputs else self.feature_image(inputs)
        numbers = [inputs["pixel_size"], geometry, inputs["aperture_radius"]]
        image = self.image([x, ops.concatenate(numbers, axis=1)])
        maps = ops.concatenate([image["phase"], image["phase_error"], x[:, -1:]], axis=1)
        return ops.transpose(maps, (0, 2, 3, 1))
