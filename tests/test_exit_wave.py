"""The paper's network and loss: architecture, every term against NumPy in float64, both backends."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from airpi_py4d import optics
from training import exit_wave_loss, unet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def centred_fft(wave):
    """psi(k), centred at pixel 32, of psi(r), probe at pixel 32; unitary."""
    return np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(wave, axes=(-2, -1)), norm="ortho"), axes=(-2, -1))


@pytest.fixture(scope="module")
def waves():
    """Incident, true and predicted psi(r), shape (3, 64, 64): phase objects behind three different probes."""
    rng = np.random.default_rng(1)
    incident = np.stack(
        [
            optics.probe(64, 0.2, 300e3, 20.0, 40.0),
            optics.probe(64, 0.3, 200e3, 25.0, 0.0, 1e4),
            optics.probe(64, 0.15, 80e3, 30.0),
        ]
    )
    true = incident * np.exp(1j * rng.normal(0, 0.5, incident.shape)) * 0.98
    change = rng.uniform(0.5, 1.2, incident.shape) * np.exp(1j * rng.normal(0, 0.7, incident.shape))
    predicted = true * change + rng.normal(0, 1e-3, incident.shape)
    return incident, true, predicted


@pytest.fixture(scope="module")
def batch(waves):
    """Target and prediction as the loss takes them, float64."""
    incident, true, predicted = (centred_fft(wave) for wave in waves)
    target = np.stack([true.real, true.imag, incident.real, incident.imag], -1)
    return target, np.stack([np.abs(predicted), np.angle(predicted)], -1)


def reference_terms(waves):
    """Eq. 11 in NumPy, float64, from psi(r)."""
    incident, true, predicted = waves
    incident_k, true_k, predicted_k = (centred_fft(wave) for wave in waves)
    axes = (1, 2)

    def intensities(a, b, c):
        return (((np.abs(a) ** 2 - np.abs(b) ** 2) ** 2).sum(axes)) / (np.abs(c) ** 4).sum(axes)

    def phases(a, b):
        floor = exit_wave_loss.FLOOR
        seen = np.abs(b) ** 2 / (np.abs(b) ** 2 + floor)
        unit = a / np.sqrt(np.abs(a) ** 2 + floor)  # cos + i sin but where there is no wave
        return (seen * np.abs(unit - np.exp(1j * np.angle(b))) ** 2).mean(axes)

    objects = [np.angle(wave / incident) for wave in (predicted, true)]
    error, correlation = [], []
    for n, wave in enumerate(incident):
        inside = np.abs(wave) ** 2 > (np.abs(wave) ** 2).max() / 10
        ours, theirs = (phase[n][inside] for phase in objects)
        error.append((np.angle(np.exp(1j * (ours - theirs))) ** 2).mean())
        correlation.append((1 - np.corrcoef(ours, theirs)[0, 1]) / 2)
    return {
        "intensity_k": intensities(predicted_k, true_k, incident_k),
        "phase_k": phases(predicted_k, true_k),
        "intensity_r": intensities(predicted, true, incident),
        "phase_r": phases(predicted, true),
        "object_phase": np.array(error),
        "object_correlation": np.array(correlation),
    }


@pytest.mark.parametrize("term", exit_wave_loss.WEIGHTS)
def test_every_term_is_its_equation(waves, batch, term):
    target, prediction = batch
    found = exit_wave_loss.loss_terms(target.astype(np.float32), prediction.astype(np.float32))[term]
    expected = reference_terms(waves)[term]
    assert (expected > 1e-3).all()
    np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_the_loss_is_the_weighted_sum(batch, waves):
    target, prediction = (array.astype(np.float32) for array in batch)
    expected = {name: term.mean() for name, term in reference_terms(waves).items()}
    published = {"intensity_k": 1, "phase_k": 3, "intensity_r": 1, "phase_r": 1} | dict.fromkeys(
        ("object_phase", "object_correlation"), 1
    )
    for weights in (None, dict(zip(expected, (0.5, 2, 1, 0, 10, 3), strict=True))):
        found = float(exit_wave_loss.ExitWaveLoss(weights)(target, prediction))
        assert found == pytest.approx(
            sum((weights or published)[name] * value for name, value in expected.items()), rel=1e-3
        )
    with pytest.raises(ValueError, match=r"weights has the terms \['phase'\]"):
        exit_wave_loss.ExitWaveLoss({"phase": 1.0})


def test_a_perfect_prediction_costs_nothing_but_of_an_empty_specimen_the_correlation(batch):
    target, _ = batch
    wave = target[..., 0] + 1j * target[..., 1]
    perfect = np.stack([np.abs(wave), np.angle(wave)], -1).astype(np.float32)
    assert float(exit_wave_loss.ExitWaveLoss()(target, perfect)) < 3e-4
    empty = np.concatenate([target[..., 2:], target[..., 2:]], -1)
    wave = target[..., 2] + 1j * target[..., 3]
    perfect = np.stack([np.abs(wave), np.angle(wave)], -1).astype(np.float32)
    assert float(exit_wave_loss.ExitWaveLoss()(empty, perfect)) == pytest.approx(0.5, abs=1e-3)


def kernels(count, seed=0):
    """Inputs of the networks: counts of probes at Scherzer defocus, and their target."""
    rng = np.random.default_rng(seed)
    probe = centred_fft(optics.probe(64, 0.2, 300e3, 20.0, 17.0, 1e4))
    probe = np.broadcast_to(probe, (count, 64, 64))
    inputs = {
        "patterns": rng.poisson(200 * np.abs(probe[:, None, None]) ** 2, (count, 3, 3, 64, 64)),
        "probe": np.stack([np.abs(probe), np.angle(probe)], -1),
        "scan_step": rng.uniform(0.1, 1.0, (count, 1)),
    }
    wave = probe * np.exp(0.3j)
    target = np.stack([wave.real, wave.imag, probe.real, probe.imag], -1)
    return {name: array.astype(np.float32) for name, array in inputs.items()}, target.astype(np.float32)


def test_features_are_counts_to_the_tenth_weighted_by_distance():
    inputs, _ = kernels(2)
    features = np.asarray(unet.WeightedCounts()(**inputs), np.float64)
    for n, step in enumerate(inputs["scan_step"][:, 0]):
        weight = np.full((3, 3), 1 / (50 * step * 2**0.5))
        weight[[0, 1, 1, 2], [1, 0, 2, 1]] = 1 / (50 * step)
        weight[1, 1] = 1
        expected = weight[:, :, None, None] * inputs["patterns"][n].astype(np.float64) ** 0.1
        expected = (expected - expected.mean()) / expected.std()
        np.testing.assert_allclose(features[n, ..., :9], expected.reshape(9, 64, 64).transpose(1, 2, 0), atol=1e-4)
        for channel in (0, 1):
            probe = inputs["probe"][n, ..., channel]
            np.testing.assert_allclose(features[n, ..., 9 + channel], (probe - probe.mean()) / probe.std(), atol=1e-3)


def test_the_papers_network_has_its_size():
    network = unet.unet(32, 3, 3)
    assert network.count_params() == pytest.approx(2.1e6, rel=0.03)
    assert network.output_shape == (None, 64, 64, 2)
    kinds = [type(layer).__name__ for layer in network.layers]
    # one convolution in front, three a block in 6 blocks, three strided ones; three transposed; the outputs'
    assert kinds.count("Conv2D") == 1 + 3 * 6 + 3 + 1
    assert kinds.count("Conv2DTranspose") == 3
    assert kinds.count("BatchNormalization") == kinds.count("Activation") == 1 + 3 * 6 + 3 + 3
    assert all(layer.activation is keras.activations.silu for layer in network.layers if "Activation" in str(layer))
    scales = [weight for weight in network.weights if weight.name.endswith("_scale")]
    assert len(scales) == 2
    for scale in scales:
        assert float(scale.value) == pytest.approx(1e-4)
        assert scale.trainable


@pytest.mark.parametrize("build", [unet.unet, unet.complex_unet])
def test_an_untrained_network_gives_the_probe_and_learns(build):
    keras.utils.set_random_seed(1)
    network = build(4, 3, 1)
    inputs, target = kernels(8)
    wave = network.predict(inputs, verbose=0)
    np.testing.assert_allclose(wave[..., 0], inputs["probe"][..., 0], atol=2e-3)
    inside = inputs["probe"][..., 0] > 0.01
    np.testing.assert_allclose(wave[..., 1][inside], inputs["probe"][..., 1][inside], atol=2e-2)
    network.compile(keras.optimizers.Adam(3e-3), exit_wave_loss.ExitWaveLoss())
    history = network.fit(inputs, target, epochs=12, batch_size=4, verbose=0).history["loss"]
    assert np.isfinite(history).all()
    assert history[-1] < 0.9 * history[0]


def test_both_penalties():
    layer = unet.ExitWaveOutput()
    probe = np.zeros((2, 64, 64, 2), np.float32)
    probe[..., 0] = np.sqrt([1.0, 1.5])[:, None, None] / 64
    probe[1, ..., 1] = 4.0
    layer(np.zeros_like(probe), probe)
    intensity, phase = (float(value) for value in layer.losses)
    assert intensity == pytest.approx(0.25, rel=1e-3)
    assert phase == pytest.approx((4 - np.pi) / 2, rel=1e-4)


def test_complex_convolution_is_complex():
    rng = np.random.default_rng(2)
    for strides, transposed in ((1, False), (2, False), (2, True)):
        layer = unet.ComplexConvolution(3, strides, transposed)
        x = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
        turned = np.concatenate([-x[..., 2:], x[..., :2]], -1)  # times i
        ours, theirs = np.asarray(layer(x)), np.asarray(layer(turned))
        np.testing.assert_allclose(theirs, np.concatenate([-ours[..., 3:], ours[..., :3]], -1), atol=1e-5)
    # the cardioid keeps the angle and scales by (1 + cos) / 2
    z = rng.normal(size=50) + 1j * rng.normal(size=50)
    found = np.asarray(unet.Cardioid()(np.stack([z.real, z.imag], -1).astype(np.float32)))
    np.testing.assert_allclose(found[:, 0] + 1j * found[:, 1], z * (1 + np.cos(np.angle(z))) / 2, atol=1e-4)


LOSS_OF_A_BATCH = """
import sys
import keras, numpy as np
from training import exit_wave_loss, unet
assert keras.backend.backend() == "jax"
network = keras.saving.load_model(sys.argv[1], compile=False)
batch = dict(np.load(sys.argv[2]))
target = batch.pop("target")
prediction = network(batch, training=True)
loss = exit_wave_loss.ExitWaveLoss()(target, prediction)
print(float(loss), *(float(penalty) for penalty in network.losses))
"""


@pytest.mark.parametrize("build", [unet.unet, unet.complex_unet])
def test_jax_gives_tensorflows_loss(build, tmp_path):
    network = build(4, 3, 2)
    rng = np.random.default_rng(3)
    # large enough scales to move both penalties off 0
    network.set_weights([w + rng.normal(0, 0.05, w.shape) if w.ndim else np.array(0.05) for w in network.get_weights()])
    network.save(tmp_path / "network.keras")
    inputs, target = kernels(4)
    np.savez(tmp_path / "batch.npz", target=target, **inputs)
    assert keras.backend.backend() == "tensorflow"
    loss = float(exit_wave_loss.ExitWaveLoss()(target, network(inputs, training=True)))
    expected = [loss, *(float(penalty) for penalty in network.losses)]
    done = subprocess.run(
        [sys.executable, "-c", LOSS_OF_A_BATCH, *(str(tmp_path / name) for name in ("network.keras", "batch.npz"))],
        env=os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.array(done.stdout.split(), float)
    assert found[0] > 0.1
    assert (found[1:] > 0).any()
    np.testing.assert_allclose(found, expected, rtol=2e-3)
