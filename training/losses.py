"""Losses and scores, in backend-neutral Keras 3."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

#: Strength below which all specimens weigh the same in `relative_exit_wave_error`.
STRENGTH_FLOOR = 0.02


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


@keras.saving.register_keras_serializable("airpi")
def relative_exit_wave_error(target: Any, patch: Any) -> Any:
    """Mean over the batch of e / (e_empty / 2 + 0.02): weak specimens count as much as strong ones."""
    error, strength = exit_wave_error(target, patch)
    return ops.mean(error / (0.5 * strength + STRENGTH_FLOOR))


def phase_correlation(target: NDArray, patch: NDArray) -> float:
    """Pearson's correlation of predicted and true phase over all patches' pixels, weighted by eq. 7.

    Parameters
    ----------
    target : ndarray, shape (n, 16, 16, 3)
    patch : ndarray, shape (n, 16, 16, 2)
    """
    weight = target[..., 2].astype(np.float64)
    weight = np.where(weight > weight.max((1, 2), keepdims=True) / 10, weight, 0)
    true = np.arctan2(target[..., 1], 1 + target[..., 0])
    predicted = np.arctan2(patch[..., 1], patch[..., 0])
    true = true - np.average(true, weights=weight)
    predicted = predicted - np.average(predicted, weights=weight)
    covariance = np.sum(weight * true * predicted)
    return float(covariance / np.sqrt(np.sum(weight * true**2) * np.sum(weight * predicted**2)))
