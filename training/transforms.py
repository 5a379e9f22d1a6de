"""Fourier transforms of waves, in place: planned by FFTW, or CuPy's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pyfftw


@cache
def transforms(shape: tuple[int, int, int], xp: Any = np) -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    """A buffer and its transforms over the last two axes, to k and back, neither normalised.

    Parameters
    ----------
    shape : (int, int, int)
        Waves, rows, columns.
    xp : module
        NumPy or CuPy.

    Returns
    -------
    waves : array of complex64
        Always the same one of a shape.
    forward, backward : callable
        They change `waves` in place; one after the other multiplies it by the number of its pixels.
    """
    if xp is np:
        waves = pyfftw.empty_aligned(shape, "complex64")
        options = {"axes": (1, 2), "flags": ("FFTW_MEASURE",)}
        backward = pyfftw.FFTW(waves, waves, direction="FFTW_BACKWARD", **options)
        return waves, pyfftw.FFTW(waves, waves, **options).execute, backward.execute
    waves = xp.empty(shape, xp.complex64)

    def forward_there() -> None:
        waves[:] = xp.fft.fft2(waves)

    def backward_there() -> None:
        waves[:] = xp.fft.ifft2(waves, norm="forward")

    return waves, forward_there, backward_there
