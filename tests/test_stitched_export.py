"""Networks in two parts: what the engine makes of the exported file is what Keras makes in training."""

import keras
import numpy as np
import onnx
import pytest
from scipy import ndimage

from airpi_py4d import Acquisition, reconstruct
from airpi_py4d.model import Model
from airpi_py4d.plan import relative_geometry
from export.stitched import Symmetric, convert, turned
from export.two_parts import join
from training.image_networks import PHYSICAL_FEATURES, StitchedNetwork, receptive_margin, stitching_matrices
from training.simulation import BRIGHT_FIELD_RADIUS, DETECTOR, SMALLEST_PIXEL

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
ENCODER = {"fine_channels": 4, "coarse_channels": 8, "blocks": 1, "head": 16, "features": 2}
FEATURES = ENCODER["features"] + PHYSICAL_FEATURES
IMAGE = {"channels": [8, 8, 8], "blocks": [1, 1, 1]}
POSITIONS = 9


def acquisition(step):
    """Whose detector is the model's grid."""
    k0 = Acquisition(200e3, 21.0, step, (1, 1)).aperture_radius
    k_pixel = k0 / BRIGHT_FIELD_RADIUS
    return Acquisition(
        200e3, 21.0, step, (k_pixel, k_pixel), center=(DETECTOR // 2,) * 2, defocus=12.0, spherical_aberration=1e4
    )


@pytest.fixture(scope="module")
def counts():
    rng = np.random.default_rng(0)
    k = np.arange(DETECTOR) - DETECTOR // 2
    disk = np.hypot(k[:, None], k[None]) <= BRIGHT_FIELD_RADIUS
    mean = disk * rng.uniform(0, 2, (POSITIONS, POSITIONS, DETECTOR, DETECTOR)) + 0.02
    return rng.poisson(mean).astype(np.uint16)


@pytest.fixture(scope="module")
def network():
    keras.utils.set_random_seed(4)
    made = StitchedNetwork(ENCODER, IMAGE)
    rng = np.random.default_rng(4)
    made.set_weights([w + rng.normal(0, 0.1, w.shape).astype(np.float32) for w in made.get_weights()])
    return made


def written(network, features, folder, smallest=0.0):
    graphs = convert(network, features)
    grid = {"kind": "aperture", "pixels": DETECTOR, "aperture_radius": BRIGHT_FIELD_RADIUS, "smallest_pixel": smallest}
    metadata = {"name": "random", "version": "1", "domain": {}, "grid": grid}
    path = folder / f"{type(network).__name__}.onnx"
    onnx.save(join(*graphs, receptive_margin(**IMAGE), metadata), path)
    return Model(path, "cpu")


def spread(counts, smallest):
    """Counts whose pixels, those of the grid, are spread over tents along both axes that are as wide as `smallest`."""
    if not smallest:
        return counts.astype(np.float32)
    half = smallest / 2**0.5
    beside = (half - 0.5) ** 2 / (2 * half**2)
    parts = [beside, 1 - 2 * beside, beside]
    along = ndimage.convolve1d(counts.astype(np.float32), parts, axis=2, mode="constant")
    return ndimage.convolve1d(along, parts, axis=3, mode="constant")


@pytest.mark.parametrize(("step", "smallest"), [(0.1, 0.0), (0.25, 0.0), (0.6, 0.0), (0.25, SMALLEST_PIXEL)])
def test_the_engine_gives_keras_image(network, counts, tmp_path, step, smallest):
    model = written(network, FEATURES, tmp_path, smallest)
    result = reconstruct(counts, acquisition(step), model=model)
    geometry = np.array([relative_geometry(acquisition(step))], np.float32)
    (oversample, _), relative = result.provenance["oversample"], float(geometry[0, 0])
    features, window = stitching_matrices(POSITIONS, oversample, relative)
    inputs = {
        "patterns": spread(counts, smallest)[None],
        "geometry": geometry,
        "features_matrix": features[None],
        "window_matrix": window[None],
        "pixel_size": np.array([[relative / oversample]], np.float32),
        "aperture_radius": np.array([[acquisition(step).aperture_radius]], np.float32),
    }
    pixels = (POSITIONS - 1) * oversample + 1
    phase, error = np.moveaxis(np.asarray(network(inputs))[0, :pixels, :pixels, :2], -1, 0)
    assert phase.std() > 1e-2
    np.testing.assert_allclose(result.phase, phase, atol=1e-3 * phase.std())
    np.testing.assert_allclose(result.phase_error, error, rtol=1e-3)


def test_the_mean_over_symmetries_is_symmetric(network, counts, tmp_path):
    # an image of 8 px: where zeros fill its pixels up to a multiple of 4, they lie on one side only
    counts, here = counts[:8, :8], acquisition(0.1)
    both = written(Symmetric(network), 8 * FEATURES, tmp_path), written(network, FEATURES, tmp_path)
    mean, single = (reconstruct(counts, here, model=model).phase for model in both)
    assert mean.shape == (8, 8)
    # pixel 0 of the detector has no mirror image and stays
    mirrored = np.roll(counts[:, ::-1, :, ::-1], 1, 3)
    swapped = counts.transpose(1, 0, 3, 2)
    for changed, back in ((mirrored, lambda x: x[:, ::-1]), (swapped, lambda x: x.T)):
        of_mean, of_single = (back(reconstruct(changed, here, model=model).phase) for model in both)
        # a patch's pixel 0 has no mirror image either
        np.testing.assert_allclose(of_mean, mean, atol=0.04 * mean.std())
        assert np.abs(of_single - single).max() > 0.1 * single.std()


@pytest.mark.parametrize("operation", range(8))
@pytest.mark.parametrize("centred", [True, False])
def test_symmetries_are_undone(operation, centred):
    x = np.random.default_rng(0).normal(size=(2, 3, 6, 6)).astype(np.float32)
    y = turned(x, operation, centred)
    np.testing.assert_array_equal(turned(y, operation, centred, inverse=True), x)
    assert (np.asarray(y) != x).any() == (operation > 0)
