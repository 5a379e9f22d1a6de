r"""Loss of exit waves on the detector's grid, eq. 11 of Friedrich et al. (2023), term by term.

.. math:: L = L_2(|\psi(k)|^2) + 3 [L_2(\sin\phi(k)) + L_2(\cos\phi(k))]
          + L_2(|\psi(r)|^2) + L_2(\sin\phi(r)) + L_2(\cos\phi(r)) + L_2(\phi_{obj}(r)) + L_{xc}(\phi_{obj}(r))

The paper leaves open what L_2 divides by. Here every term is 0 for a perfect and of the order of 1 for a useless
prediction, on any grid: intensities by the sum of the incident ones' squares, the others by the number of pixels. The
object's phase counts where eq. 7 has weight, since elsewhere there is no probe to see it with.
Waves are pairs (real part, imaginary part) of tensors of shape (n, 64, 64), centred at pixel 32 in k, at pixel 0 in r.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from training.simulation import DETECTOR

Wave = tuple[Any, Any]
#: Weights of eq. 11.
WEIGHTS = {
    "intensity_k": 1.0,
    "phase_k": 3.0,
    "intensity_r": 1.0,
    "phase_r": 1.0,
    "object_phase": 1.0,
    "object_correlation": 1.0,
}
#: |psi|^2 below which there is no phase: sine and cosine go to 0 and count no more. The mean is 1 / 4096.
FLOOR = 1e-10


def real_space(wave: Wave) -> Wave:
    """psi(r), the unitary inverse Fourier transform of psi(k); in: centre at pixel 32, out: probe at pixel 0."""
    half = DETECTOR // 2
    real, imaginary = (ops.roll(part, (half, half), axis=(1, 2)) for part in wave)
    # F^-1 x = (F x*)*
    transformed = ops.fft2((real, -imaginary))
    return transformed[0] / DETECTOR, -transformed[1] / DETECTOR


def intensity(wave: Wave) -> Any:
    """|psi|^2, shape (n, 64, 64)."""
    return wave[0] ** 2 + wave[1] ** 2


def intensity_error(predicted: Wave, true: Wave, incident: Wave) -> Any:
    """L2(|psi|^2): sum of squared differences over the sum of the incident intensity's squares, shape (n,)."""
    difference = intensity(predicted) - intensity(true)
    return ops.sum(difference**2, axis=(1, 2)) / ops.sum(intensity(incident) ** 2, axis=(1, 2))


def phase_error(predicted: Wave, true: Wave) -> Any:
    """L2(sin phi) + L2(cos phi): means over the pixels, those without true intensity not counted, shape (n,)."""
    total = 0.0
    true_intensity = intensity(true)
    scale, true_scale = ops.rsqrt(intensity(predicted) + FLOOR), ops.rsqrt(true_intensity + FLOOR)
    seen = ops.sqrt(true_intensity) * true_scale  # 1 where there is a phase
    for ours, theirs in zip(predicted, true, strict=True):
        total = total + ops.mean((ours * scale * seen - theirs * true_scale) ** 2, axis=(1, 2))
    return total


def object_phase(wave: Wave, incident: Wave) -> Any:
    """phi_obj [rad], the angle of psi(r) / psi_in(r), shape (n, 64, 64)."""
    real = wave[0] * incident[0] + wave[1] * incident[1]
    imaginary = wave[1] * incident[0] - wave[0] * incident[1]
    return ops.arctan2(imaginary, real + 1e-9)  # never the angle of 0


def object_mask(incident: Wave) -> Any:
    """1 where |psi_in(r)|^2 is above a tenth of its largest (eq. 7), else 0, shape (n, 64, 64)."""
    strength = intensity(incident)
    return ops.cast(strength > ops.max(strength, axis=(1, 2), keepdims=True) / 10, strength.dtype)


def object_phase_error(predicted: Any, true: Any, mask: Any) -> Any:
    """L2(phi_obj): mean squared difference of the phases [rad^2], the smaller way round, over the mask, shape (n,)."""
    difference = predicted - true
    difference = ops.arctan2(ops.sin(difference), ops.cos(difference))
    return ops.sum(mask * difference**2, axis=(1, 2)) / ops.sum(mask, axis=(1, 2))


def correlation_error(predicted: Any, true: Any, mask: Any) -> Any:
    r"""L_xc = (1 - xc) / 2, xc Pearson's correlation over the mask (eq. 14); 1/2 for an empty specimen, shape (n,)."""
    count = ops.sum(mask, axis=(1, 2), keepdims=True)

    def centred(phase: Any) -> Any:
        return mask * (phase - ops.sum(mask * phase, axis=(1, 2), keepdims=True) / count)

    predicted, true = centred(predicted), centred(true)
    covariance = ops.sum(predicted * true, axis=(1, 2))
    variances = ops.sum(predicted**2, axis=(1, 2)) * ops.sum(true**2, axis=(1, 2))
    return (1 - covariance * ops.rsqrt(variances + 1e-12)) / 2


def loss_terms(target: Any, prediction: Any) -> dict[str, Any]:
    """The terms of eq. 11 without their weights, each of shape (n,).

    Parameters
    ----------
    target : tensor, shape (n, 64, 64, 4)
        Real and imaginary part of psi_out(k), then of psi_in(k).
    prediction : tensor, shape (n, 64, 64, 2)
        Amplitude and phase [rad] of psi_out(k).
    """
    target, prediction = ops.cast(target, "float32"), ops.cast(prediction, "float32")
    true, incident = (target[..., 0], target[..., 1]), (target[..., 2], target[..., 3])
    amplitude, phase = prediction[..., 0], prediction[..., 1]
    predicted = amplitude * ops.cos(phase), amplitude * ops.sin(phase)
    # the predicted phase is known even where the predicted amplitude is 0
    direction = ops.cos(phase), ops.sin(phase)
    predicted_r, true_r, incident_r = real_space(predicted), real_space(true), real_space(incident)
    mask = object_mask(incident_r)
    phases = object_phase(predicted_r, incident_r), object_phase(true_r, incident_r)
    return {
        "intensity_k": intensity_error(predicted, true, incident),
        "phase_k": phase_error(direction, true),
        "intensity_r": intensity_error(predicted_r, true_r, incident_r),
        "phase_r": phase_error(predicted_r, true_r),
        "object_phase": object_phase_error(*phases, mask),
        "object_correlation": correlation_error(*phases, mask),
    }


@keras.saving.register_keras_serializable("airpi")
class ExitWaveLoss(keras.losses.Loss):
    """Eq. 11, see the module; mean over the batch.

    Parameters
    ----------
    weights : dict of str to float, optional
        Of the terms, as in WEIGHTS, which is the default; all must be given.
    """

    def __init__(self, weights: dict[str, float] | None = None, name: str = "exit_wave_loss", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self.weights = dict(WEIGHTS if weights is None else weights)
        if self.weights.keys() != WEIGHTS.keys():
            raise ValueError(f"weights has the terms {sorted(self.weights)}, expected {sorted(WEIGHTS)}.")

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"weights": self.weights}

    def call(self, target: Any, prediction: Any) -> Any:
        terms = loss_terms(target, prediction)
        return sum(self.weights[name] * ops.mean(term) for name, term in terms.items())
