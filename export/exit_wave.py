r"""Networks from the detector's own grid and the probe to the exit wave, as models of the engine's contract.

The paper's U-Net takes the whole detector on 64 x 64 pixels and the probe, and gives the exit wave, amplitude and
phase. `object_model` puts what is around it into one Keras model: the probe from five numbers, Fourier transforms as
matrix products, and the object patch,

.. math:: o(r) = 1 + \frac{[\psi_{out}(r) - \psi_{in}(r)]\, \psi_{in}^*(r)}
        {|\psi_{in}(r)|^2 + \epsilon \max |\psi_{in}|^2}

which is psi_out / psi_in where there is a probe, and 1 where there is none. Grid kind `whole_detector`, see
docs/models.md.
"""

from __future__ import annotations

import json
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from airpi_py4d.plan import CITATION
from export.to_onnx import INPUTS
from export.to_onnx import OUTPUT as APERTURE_OUTPUT

PIXELS = 64
#: epsilon of the object patch.
FLOOR = 1e-4
#: Radius of the aperture on the grid that the probe in real space is summed over [px]; no grid point lies on the edge.
APERTURE = 32.5

GRID = {
    "kind": "whole_detector",
    "pixels": PIXELS,
    "description": "the detector's longer side on 64 pixels; optical axis at pixel 32",
}
GEOMETRY = {
    "shape": ["batch", 5],
    "axes": "batch, (scan step, defocus phase, spherical phase, aperture radius, scan step)",
    "unit": "1/k0, rad, rad, px, A",
    "description": f"{INPUTS['geometry']['description']}; radius of the bright-field disk on the grid; scan step",
}
OUTPUT = {
    **APERTURE_OUTPUT,
    "pixels": PIXELS,
    "shape": ["batch", PIXELS, PIXELS, 2],
    "pixel_size": "1 / (64 * k-pixel of the grid) A",
    "description": "psi_out(r) / psi_in(r) around the central probe position, which is pixel 32; its angle is the "
    "phase of the object in rad, positive for a positive projected potential; 1 where there is no probe",
}


def metadata(name: str, version: str, domain: dict, **entries: str) -> dict[str, str]:
    """`metadata_props` of a model on the whole detector, schema version 1; `entries` are added."""
    patterns = {
        **INPUTS["patterns"],
        "description": "3x3 neighbouring diffraction patterns, the whole detector on the grid, not normalised; optical "
        "axis at pixel 32, electrons beyond the detector 0; detector axes rotated to the scan axes",
    }
    return {
        "airpi_schema": "1",
        "name": name,
        "version": version,
        "inputs": json.dumps({"patterns": patterns, "geometry": GEOMETRY}),
        "grid": json.dumps(GRID),
        "output": json.dumps(OUTPUT),
        "domain": json.dumps(domain),
        "citation": CITATION,
        **entries,
    }


def _complex(wave: Any) -> tuple[Any, Any]:
    """Real and imaginary part of amplitude and phase along the last axis."""
    return wave[..., 0] * ops.cos(wave[..., 1]), wave[..., 0] * ops.sin(wave[..., 1])


def _polar(real: Any, imaginary: Any) -> Any:
    """Amplitude and phase along a new last axis."""
    amplitude = ops.sqrt(real**2 + imaginary**2)
    # an angle at 0 is undefined; where nothing is there it is 0
    return ops.stack([amplitude, ops.arctan2(imaginary, ops.where(amplitude > 0, real, 1.0))], axis=-1)


class ProbeInRealSpace(layers.Layer):
    r"""Probe psi_in(r), amplitude and phase, shape (n, 64, 64, 2), of `geometry` (n, 5); its intensities sum to 1.

    .. math:: \psi_{in}(r) \propto \sum_{|q| < 1} \exp(2 \pi i q R\, m / 64 - i \chi_1 q^2 - i \chi_3 q^4)

    (eq. 2) at the pixels m, q = k / k0, R the aperture's radius on the grid [px], chi_1 and chi_3 the phases of defocus
    and C_s at the aperture's edge. The sum is even in both components of q, so cosines do.
    """

    def call(self, geometry: Any) -> Any:
        index = np.arange(-int(APERTURE), int(APERTURE) + 1) / APERTURE
        squared = index[:, None] ** 2 + index**2
        turns = np.outer(np.arange(PIXELS) - PIXELS // 2, index) * 2 * np.pi / PIXELS
        cosines = ops.cos(geometry[:, 3, None, None] * turns.astype("float32"))
        squared, aperture = squared.astype("float32"), (squared < 1).astype("float32")
        chi = geometry[:, 1, None, None] * squared + geometry[:, 2, None, None] * squared**2
        real, imaginary = (
            ops.matmul(ops.matmul(cosines, part * aperture), ops.transpose(cosines, (0, 2, 1)))
            for part in (ops.cos(chi), -ops.sin(chi))
        )
        scale = 1 / ops.sqrt(ops.sum(real**2 + imaginary**2, axis=(1, 2), keepdims=True))
        return _polar(real * scale, imaginary * scale)


class ProbeInReciprocalSpace(layers.Layer):
    """Probe psi_in(k), amplitude and phase -chi(k) (eq. 3) within +-pi, shape (n, 64, 64, 2); intensities sum to 1."""

    def call(self, geometry: Any) -> Any:
        index = np.arange(PIXELS) - PIXELS // 2
        squared = (index[:, None] ** 2 + index**2).astype("float32") / geometry[:, 3, None, None] ** 2
        aperture = ops.cast(squared <= 1, "float32")
        chi = geometry[:, 1, None, None] * squared + geometry[:, 2, None, None] * squared**2
        amplitude = aperture / ops.sqrt(ops.sum(aperture, axis=(1, 2), keepdims=True))
        return ops.stack([amplitude, ops.arctan2(-ops.sin(chi), ops.cos(chi)) * aperture], axis=-1)


class ToRealSpace(layers.Layer):
    r"""psi(r) of psi(k), both amplitude and phase: the unitary inverse Fourier transform, as matrix products.

    .. math:: \psi(r_m) = \frac{1}{64} \sum_k \exp(2 \pi i k m / 64)\, \psi(k)
    """

    def call(self, wave: Any) -> Any:
        index = np.arange(PIXELS) - PIXELS // 2
        angle = 2 * np.pi * np.outer(index, index) / PIXELS
        c, s = np.cos(angle), np.sin(angle)
        # (re, im) of k to (re, im) of r as one real matrix
        matrix = (np.block([[c, s], [-s, c]]) / np.sqrt(PIXELS)).astype("float32")
        real, imaginary = _complex(wave)
        for _ in range(2):  # columns, then rows; the axes are swapped twice
            both = ops.matmul(ops.concatenate([real, imaginary], axis=-1), matrix)
            both = ops.transpose(both, (0, 2, 1))
            real, imaginary = both[:, :PIXELS], both[:, PIXELS:]
        return _polar(real, imaginary)


class ObjectPatch(layers.Layer):
    """Real and imaginary part of o(r), shape (n, 64, 64, 2), of exit wave and probe in real space."""

    def call(self, exit_wave: Any, probe: Any) -> Any:
        (a, b), (c, d) = _complex(exit_wave), _complex(probe)
        a, b = a - c, b - d
        intensity = c**2 + d**2
        weight = 1 / (intensity + FLOOR * ops.max(intensity, axis=(1, 2), keepdims=True))
        return ops.stack([1 + (a * c + b * d) * weight, (b * c - a * d) * weight], axis=-1)


def object_model(network: keras.Model, space: str) -> keras.Model:
    """Keras model of the contract's inputs and output around a network that gives the exit wave.

    Parameters
    ----------
    network : keras.Model
        Inputs by name, of which it may lack any: `patterns` (n, 3, 3, 64, 64) [electrons], `probe` (n, 64, 64, 2),
        amplitude and phase [rad] of psi_in, `scan_step` (n, 1) [A]. Output: the exit wave (n, 64, 64, 2), amplitude and
        phase. Both waves are centred at pixel 32 and normalised so that the probe's intensities sum to 1.
    space : {"real", "reciprocal"}
        Of both waves.

    Returns
    -------
    keras.Model
        `patterns` and `geometry` (n, 5) in, `object_patch` (n, 64, 64, 2) out.
    """
    if space not in ("real", "reciprocal"):
        raise ValueError(f"space is {space!r}, expected 'real' or 'reciprocal'.")
    patterns = keras.Input((3, 3, PIXELS, PIXELS), name="patterns")
    geometry = keras.Input((5,), name="geometry")
    probe = (ProbeInRealSpace() if space == "real" else ProbeInReciprocalSpace())(geometry)
    known = {"patterns": patterns, "probe": probe, "scan_step": geometry[:, 4:]}
    exit_wave = network({entry.name: known[entry.name] for entry in network.inputs})
    if space == "reciprocal":
        exit_wave, probe = ToRealSpace()(exit_wave), ToRealSpace()(probe)
    return keras.Model([patterns, geometry], ObjectPatch(name="object_patch")(exit_wave, probe))
