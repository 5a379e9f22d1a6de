"""Losses and scores, in backend-neutral Keras 3."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray


def exit_wave_error(target: Any, patch: Any) -> tuple[Any, Any]:
    r"""Squared L2 error of the exit wave, and its value for an empty specimen.

    .. math:: e = \sum_r |\psi_{in}|^2 |o_{pred} - o|^2 = \sum_r |\psi_{pred} - \psi_{out}|^2

    Parameters
    ----------
    target : tensor, shape (n, 16, 16, 3)
        Real and imaginary part of o - 1 and the weight |psi_in|^2, sum 1.
    patch : tensor, shape (n, 16, 16, 2)
        Predicted object patch.

    Returns
    -------
    error, strength : tensor, shape (n,)
        e for the prediction, and for o_pred = 1.
    """
    weight = target[..., 2]
    real = patch[..., 0] - 1 - target[..., 0]
    imaginary = patch[..., 1] - target[..., 1]
    error = ops.sum(weight * (real**2 + imaginary**2), axis=(1, 2))
    strength = ops.sum(weight * (target[..., 0] ** 2 + target[..., 1] ** 2), axis=(1, 2))
    return error, strength


#: Squared relative error that a phase image's error is not asked to go below.
_LEAST_RELATIVE_ERROR = 1e-4
#: g [rad^2]: mean phases of specimens much weaker than this count less.
_OFFSET_FLOOR = 2.5e-3
#: delta [rad^2], of a correlation.
_LEAST_VARIANCE = 1e-8
#: h [rad^2]: a teacher's images that are weaker than this count less.
_TEACHER_FLOOR = 1e-5
#: Of the likelihood of the error's size in the loss of a phase image.
_LIKELIHOOD_WEIGHT = 0.1


@keras.saving.register_keras_serializable("airpi")
class StitchedExitWaveError(keras.losses.Loss):
    r"""Exit wave error of the mean of K predictions from independent counts, relative to the specimen's strength.

    An image is the mean of overlapping patches, so what counts is the error of the mean: for predictions a and b from
    two independent draws of the counting noise and the true object o, whatever the network's bias and variance,

    .. math:: E|\bar{o}_K - o|^2 = \text{bias}^2 + \text{variance} / K
              = E\,\mathrm{Re}[(a - o)(b - o)^*] + \frac{1}{2K} E|a - b|^2

    K = 1 is the plain squared error, whose best answer to few electrons is an object of almost no phase. Patches share
    electrons with their neighbours: `overlapping_kernels` says what K a scan step gives. Summed over the window with
    the weight |psi_in|^2 and divided by half the empty specimen's error plus a floor: specimens stronger than the floor
    count alike.

    In: target (2 n, 16, 16, 4), real and imaginary part of o - 1, the weight, sum 1, and 1 / K, the second n being the
    first n again; prediction (2 n, 16, 16, 2), a, then b.

    Parameters
    ----------
    strength_floor : float
        Empty specimen's error up to which specimens count less the weaker they are.
    """

    def __init__(self, strength_floor: float, name: str = "stitched_exit_wave_error", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self.strength_floor = strength_floor

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"strength_floor": self.strength_floor}

    def call(self, target: Any, patch: Any) -> Any:
        count = ops.shape(target)[0] // 2
        target = target[:count]
        weight = target[..., 2]
        true = target[..., :2] + ops.convert_to_tensor([1.0, 0.0], dtype=patch.dtype)
        a, b = patch[:count] - true, patch[count:] - true
        squared = ops.sum(a * b + 0.5 * target[..., 3:] * (a - b) ** 2, axis=-1)
        strength = ops.sum(weight * ops.sum(target[..., :2] ** 2, axis=-1), axis=(1, 2))
        return ops.mean(ops.sum(weight * squared, axis=(1, 2)) / (0.5 * strength + self.strength_floor))


@keras.saving.register_keras_serializable("airpi")
class PhaseImageError(keras.losses.Loss):
    r"""Relative error of a phase image, of its derivatives, and the likelihood of the error that it gives itself.

    With means < > weighted by the coverage c (at most 1), the true phase phi of mean m and variance v, the predicted
    one p, the mean d of the error p - phi, and n = N / rho, rho the electrons in an area of 1 / k0^2, a few times the
    variance of a linear estimate of the phase,

    .. math:: e = \frac{\langle (p - \phi - d)^2 \rangle + n}{v + f_0 + n}, \quad
              e' = \frac{\langle |\nabla (p - \phi)|^2 \rangle + 2 n}
                        {\langle |\nabla \phi|^2 \rangle + f_0 + 2 n}, \quad
              e'' = \frac{\langle [\nabla^2 (p - \phi)]^2 \rangle + 20 n}
                         {\langle [\nabla^2 \phi]^2 \rangle + f_0 + 20 n}, \quad
              e_0 = \frac{d^2 + n}{v + m^2 + g + n}, \quad
              r = \frac{\langle (p - \bar p) (\phi - m) \rangle}{\sqrt{(v_p + \delta) (v + \delta)}}, \quad
              L = \sqrt{e + \epsilon} + \sqrt{e' + \epsilon} / 2 + \sqrt{e'' + \epsilon} / 4
                  + \sqrt{e_0 + \epsilon} / 2 + \kappa (1 - r)
                  + \lambda \frac{\langle [s^2] ([p - \phi]^2 / 2 s^2 + \ln s) \rangle}{v + f_0 + n}

    The root lets scans of many electrons, whose errors are small, count about as much as those of few. The noise n in
    the numerators makes errors below it count little: without it the steep root at 0 rewards a network so much for
    leaving what is almost empty exactly empty that it gives no weak specimen at all where it can't tell the two. The
    gradient (differences of neighbouring pixels; the mean over both axes of the roots) and the Laplacian (of five)
    lift high frequencies, which are weak and make an image sharp; white noise of variance n has 2 n (along each axis)
    and 20 n in them. The correlation doesn't depend on the phase's size, which shrinks where noise exceeds the
    specimen. Far below the noise it alone decides: all that lowers the other terms there is less phase, and if that
    is less by another factor in every place, it blurs what a linear filter still shows. The last term, in which what
    stands in brackets is held fixed, makes s the standard deviation of the error: the likelihood of a normal
    distribution, weighted by the variance (Seitzer et al. 2022), so that strong errors don't drown the rest.

    With a teacher, another image q of the same counts whose errors are smaller, and r_q the correlation with it,

    .. math:: L + \tau \left(\sqrt{\langle (p - q)^2 \rangle / (\langle q^2 \rangle + h) + \epsilon} + 1 - r_q\right).

    No noise is in it: q is a function of the counts that the network sees. Where q is 0 everywhere there is no teacher,
    and L alone counts.

    In: target (n, rows, columns, 2): phi [rad] and 1 / rho, the same at all pixels, and with a teacher a third channel,
    q [rad]; prediction (n, rows, columns, 3): p, s [rad], c.

    Parameters
    ----------
    strength_floor : float
        f_0 [rad^2]: specimens weaker than this count less.
    teacher_weight : float
        tau; 0 without a teacher.
    correlation_weight : float
        kappa.
    noise_of_one_electron : float
        N [rad^2].
    """

    def __init__(
        self,
        strength_floor: float,
        teacher_weight: float = 0.0,
        correlation_weight: float = 1.0,
        noise_of_one_electron: float = 4.0,
        name: str = "phase_image_error",
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, **kwargs)
        self.strength_floor, self.teacher_weight = strength_floor, teacher_weight
        self.correlation_weight, self.noise_of_one_electron = correlation_weight, noise_of_one_electron

    def get_config(self) -> dict[str, Any]:
        names = ("strength_floor", "teacher_weight", "correlation_weight", "noise_of_one_electron")
        return super().get_config() | {name: getattr(self, name) for name in names}

    def call(self, target: Any, prediction: Any) -> Any:
        true, phase, deviation = target[..., 0], prediction[..., 0], prediction[..., 1]
        noise = self.noise_of_one_electron * target[:, 0, 0, 1]
        floor = self.strength_floor
        weight = ops.minimum(prediction[..., 2], 1.0)
        error = phase - true

        def mean(values: Any, weights: Any = weight) -> Any:
            return ops.sum(weights * values, axis=(1, 2)) / ops.sum(weights, axis=(1, 2))

        def root(above: Any, below: Any, of_noise: Any) -> Any:
            return ops.sqrt((above + of_noise) / (below + of_noise) + _LEAST_RELATIVE_ERROR)

        def correlation(other: Any) -> Any:
            middles = mean(phase), mean(other)
            spreads = [mean(x**2) - m**2 + _LEAST_VARIANCE for x, m in zip((phase, other), middles, strict=True)]
            return (mean(phase * other) - middles[0] * middles[1]) / ops.sqrt(spreads[0] * spreads[1])

        offset, level = mean(error), mean(true)
        variance = mean(true**2) - level**2
        loss = root(mean(error**2) - offset**2, variance + floor, noise)
        loss = loss + 0.5 * root(offset**2, variance + level**2 + _OFFSET_FLOOR, noise)
        loss = loss + self.correlation_weight * (1 - correlation(true))
        if self.teacher_weight:
            teacher = target[..., 2]
            relative = root(mean((phase - teacher) ** 2), mean(teacher**2) + _TEACHER_FLOOR, 0.0)
            taught = ops.cast(ops.any(teacher != 0, axis=(1, 2)), phase.dtype)
            loss = loss + self.teacher_weight * taught * (relative + 1 - correlation(teacher))
        down, right = (slice(None), slice(1, None)), (slice(None), slice(None), slice(1, None))
        up, left = (slice(None), slice(None, -1)), (slice(None), slice(None), slice(None, -1))
        for after, before in ((down, up), (right, left)):
            change, true_change = error[after] - error[before], true[after] - true[before]
            above, below = mean(change**2, weight[after]), mean(true_change**2, weight[after])
            loss = loss + 0.25 * root(above, below + floor, 2 * noise)
        inner = (slice(None), slice(1, -1), slice(1, -1))

        def laplacian(x: Any) -> Any:
            rows, columns = x[:, 2:, 1:-1] + x[:, :-2, 1:-1], x[:, 1:-1, 2:] + x[:, 1:-1, :-2]
            return rows + columns - 4 * x[inner]

        above, below = (mean(laplacian(x) ** 2, weight[inner]) for x in (error, true))
        loss = loss + 0.25 * root(above, below + floor, 20 * noise)
        fixed, size = ops.stop_gradient(error) ** 2, ops.stop_gradient(deviation) ** 2
        likelihood = mean(size * (0.5 * fixed / deviation**2 + ops.log(deviation)))
        return ops.mean(loss + _LIKELIHOOD_WEIGHT * likelihood / (variance + floor + noise))


def overlapping_kernels(relative_step: NDArray) -> NDArray[np.float64]:
    """How many predictions from independent electrons a pixel of the image is the mean of, K >= 1.

    The weights |psi_in|^2 of eq. 7 spread over an effective area of about 0.5 / k0^2, (0.7 / step)^2 positions whose
    3x3 kernels together see (0.7 / step + 2)^2 patterns: as many as K = (0.7 / step + 2)^2 / 9 separate kernels.

    Parameters
    ----------
    relative_step : ndarray
        Scan step times k0.

    Examples
    --------
    >>> overlapping_kernels(np.array([0.1, 0.7])).round(2)
    array([9., 1.])
    """
    return np.maximum((0.7 / relative_step + 2) ** 2 / 9, 1.0)


def phase_scores(target: NDArray, patch: NDArray) -> tuple[float, float]:
    """Pearson's correlation and slope of predicted against true phase, all patches' pixels weighted by eq. 7.

    Parameters
    ----------
    target : ndarray, shape (n, 16, 16, 3 or more)
    patch : ndarray, shape (n, 16, 16, 2)
    """
    weight = target[..., 2].astype(np.float64)
    weight = np.where(weight > weight.max((1, 2), keepdims=True) / 10, weight, 0)
    true = np.arctan2(target[..., 1], 1 + target[..., 0])
    predicted = np.arctan2(patch[..., 1], patch[..., 0])
    true = true - np.average(true, weights=weight)
    predicted = predicted - np.average(predicted, weights=weight)
    covariance = np.sum(weight * true * predicted)
    variance = np.sum(weight * true**2)
    return float(covariance / np.sqrt(variance * np.sum(weight * predicted**2))), float(covariance / variance)
