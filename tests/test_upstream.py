"""The authors' checkpoint layout, made here with random weights, through the engine; waves on the whole detector."""

import json

import h5py
import keras
import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf

from airpi_py4d import Acquisition, models, optics, reconstruct
from airpi_py4d.demo import demo_path
from airpi_py4d.model import Contract, Model
from airpi_py4d.plan import Plan
from export import exit_wave, self_contained, to_onnx, upstream

DEMO = Acquisition(80e3, 25.0, (0.25, 0.25), (0.05, 0.05), center=(31, 31))
N = 64


def published_variables(rng, scale=0.6):
    """Names and values of a checkpoint of 32 filters and depth 3, as the published code makes it."""
    variables = {}

    def convolution(path, channels, filters, transposed=False):
        shape = (3, 3, filters, channels) if transposed else (3, 3, channels, filters)
        variables[f"{path}/kernel"] = rng.normal(0, (9 * channels) ** -0.5, shape)
        variables[f"{path}/bias"] = rng.normal(0, 0.1, filters)

    def block(path, channels, filters, transposed=False):
        convolution(f"{path}/conv2d", channels, filters, transposed)
        for name in ("gamma", "moving_variance"):
            variables[f"{path}/normalization_layer/{name}"] = rng.uniform(0.7, 1.3, filters)
        for name in ("beta", "moving_mean"):
            variables[f"{path}/normalization_layer/{name}"] = rng.normal(0, 0.1, filters)

    block("Convolution_Block", 11, 32)
    for level, filters in enumerate((32, 64, 128)):
        for number in range(3):
            block(f"Contraction_Block/{level}/conv_stack/conv_blocks/{number}", filters, filters)
        block(f"Contraction_Block/{level}/contraction", filters, 2 * filters)
    for level, filters in enumerate((128, 64, 32)):
        block(f"Expansion_Block/{level}/expansion", 2 * filters, filters, transposed=True)
        for number in range(3):
            channels = 2 * filters if number == 0 else filters
            block(f"Expansion_Block/{level}/conv_stack/conv_blocks/{number}", channels, filters)
    convolution("Amplitude_Output/conv", 32, 1)
    convolution("Phase_Output/conv_s", 32, 1)
    variables["Amplitude_Output/scale"] = np.array(0.4 * scale)
    variables["Phase_Output/scale"] = np.array(scale)
    return {name: value.astype(np.float32) for name, value in variables.items()}


def write_checkpoint(folder, variables):
    """As a Keras model of these attributes saves its weights in TensorFlow's format."""
    root = tf.train.Checkpoint()
    for name, value in variables.items():
        *path, last = name.split("/")
        parent = root
        for part in path:
            if getattr(parent, part, None) is None:
                setattr(parent, part, tf.train.Checkpoint())
            parent = getattr(parent, part)
        setattr(parent, last, tf.Variable(value))
    folder.mkdir(exist_ok=True)
    root.write(str(folder / "cp-best.ckpt"))
    return folder


def published_network(variables, patterns, probe):
    """psi_out(r) of one kernel (3, 3, 64, 64) and a probe (64, 64), operation by operation."""

    def block(x, path, strides=1, transposed=False):
        kernel, bias = variables[f"{path}/conv2d/kernel"], variables[f"{path}/conv2d/bias"]
        if transposed:
            shape = (1, 2 * x.shape[1], 2 * x.shape[2], len(bias))
            x = tf.nn.conv2d_transpose(x, kernel, shape, 2, "SAME") + bias
        else:
            x = tf.nn.conv2d(x, kernel, strides, "SAME") + bias
        gamma, beta, mean, variance = (
            variables[f"{path}/normalization_layer/{name}"]
            for name in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        return tf.nn.silu(gamma * (x - mean) / np.sqrt(variance + 1e-3) + beta)

    channels = np.zeros((N, N, 9))
    for row in range(3):
        for column in range(3):
            for i in range(N):
                for j in range(N):
                    channels[i, j, 3 * column + row] = patterns[row, column, -i % N, -j % N] ** 0.1
    channels = (channels - channels.mean()) / channels.std()
    waves = [(x - x.mean()) / max(x.std(), 1e-8) for x in (np.abs(probe), np.angle(probe))]
    x = tf.constant(np.concatenate([channels, np.stack(waves, -1)], -1)[None], tf.float32)
    x = block(x, "Convolution_Block")
    skips = []
    for level in range(3):
        for number in range(3):
            x = block(x, f"Contraction_Block/{level}/conv_stack/conv_blocks/{number}")
        skips.append(x)
        x = block(x, f"Contraction_Block/{level}/contraction", strides=2)
    for level in range(3):
        x = tf.concat([block(x, f"Expansion_Block/{level}/expansion", transposed=True), skips.pop()], -1)
        for number in range(3):
            x = block(x, f"Expansion_Block/{level}/conv_stack/conv_blocks/{number}")
    changes = [
        variables[f"{path}/scale"]
        * (tf.nn.conv2d(x, variables[f"{path}/{name}/kernel"], 1, "SAME") + variables[f"{path}/{name}/bias"])
        for path, name in (("Amplitude_Output", "conv"), ("Phase_Output", "conv_s"))
    ]
    amplitude, phase = (np.asarray(change)[0, :, :, 0] for change in changes)
    return (amplitude + np.abs(probe) ** 0.2) ** 5 * np.exp(1j * (phase + np.angle(probe)))


def fine_probe(acquisition, k_pixel):
    """psi_in(r) on 64 pixels, from a grid eight times finer in k."""
    wave = optics.probe(
        8 * N,
        1 / (N * k_pixel),
        acquisition.energy,
        acquisition.semiangle,
        acquisition.defocus,
        acquisition.spherical_aberration,
    )[7 * N // 2 : 9 * N // 2, 7 * N // 2 : 9 * N // 2]
    return wave / np.sqrt((np.abs(wave) ** 2).sum())


@pytest.fixture(scope="module")
def variables():
    return published_variables(np.random.default_rng(7))


@pytest.fixture(scope="module")
def path(variables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    upstream.main([str(write_checkpoint(folder / "published", variables)), str(folder / "published.onnx")])
    return folder / "published.onnx"


@pytest.fixture(scope="module")
def scan():
    """8 x 9 positions of the demo, 63 x 63 px."""
    found = []
    with h5py.File(demo_path()) as file:
        file.visititems(lambda _, entry: found.append(entry) if getattr(entry, "ndim", 0) == 4 else None)
        return found[0][24:32, 30:39]


class TestConversion:
    def test_as_published(self, path, variables):
        """The whole path from counts to the object against the published operations, one by one."""
        acquisition = Acquisition(80e3, 25.0, (0.25, 0.25), (0.05, 0.05), (32, 32), defocus=15.0)
        inputs = upstream.example_inputs(3, seed=4)
        plan = Plan.of(acquisition, Model(path, "cpu").contract, np.zeros((3, 3, N, N), np.uint16))
        patches = Model(path, "cpu")(inputs["patterns"], plan.geometry(3))
        probe = fine_probe(acquisition, 0.05)
        intensity = np.abs(probe) ** 2
        for patterns, patch in zip(inputs["patterns"], patches, strict=True):
            wave = published_network(variables, patterns, probe)
            expected = wave / probe
            seen = intensity > 0.1 * intensity.max()
            assert np.abs(expected - 1)[seen].max() > 0.1
            np.testing.assert_allclose(patch[seen], expected[seen], atol=0.01)
            far = intensity < 1e-6 * intensity.max()
            assert far.any()
            assert np.abs(patch[far] - 1).max() < np.abs(expected[far] - 1).max()

    def test_graph(self, path):
        graph = onnx.load(path)
        onnx.checker.check_model(graph, full_check=True)
        assert {node.domain for node in graph.graph.node} == {""}
        assert [(entry.domain, entry.version) for entry in graph.opset_import if entry.domain == ""] == [("", 17)]
        assert all(entry.doc_string for entry in (*graph.graph.input, *graph.graph.output))

    def test_described(self, path):
        text = " ".join(str(models.describe(path)).split())
        assert "whole_detector: the detector's longer side on 64 pixels" in text
        assert "Friedrich" in text
        assert text.startswith("published, version 1")

    def test_domain(self):
        ranges = upstream.domain()
        assert ranges["defocus_phase"] == pytest.approx((-2.466, -0.0365), rel=0.01)
        assert ranges["spherical_phase"][1] == pytest.approx(0.646, rel=0.01)

    @pytest.mark.filterwarnings("ignore:.*outside of:UserWarning")
    def test_empty_specimen(self, variables, tmp_path, scan):
        """Without changes of the probe the object is 1."""
        silent = variables | {f"{name}_Output/scale": np.float32(0) for name in ("Amplitude", "Phase")}
        output = tmp_path / "silent.onnx"
        upstream.main([str(write_checkpoint(tmp_path / "silent", silent)), str(output)])
        result = reconstruct(scan, DEMO, model=output, device="cpu", strict=False)
        assert np.abs(result.object - 1).max() < 1e-4

    def test_missing_variable(self, variables, tmp_path, capsys):
        cut = {name: value for name, value in variables.items() if "Expansion_Block/1/expansion/conv2d" not in name}
        with pytest.raises(SystemExit):
            upstream.main([str(write_checkpoint(tmp_path / "cut", cut)), str(tmp_path / "cut.onnx")])
        assert "expansion_block/1/expansion/conv2d/kernel is missing" in capsys.readouterr().err
        assert not (tmp_path / "cut.onnx").exists()

    def test_other_width(self, variables, tmp_path):
        other = variables | {"Convolution_Block/conv2d/kernel": np.zeros((3, 3, 11, 16), np.float32)}
        with pytest.raises(ValueError, match=r"convolution_block/conv2d/kernel has the shape .*16\), expected"):
            upstream.load(write_checkpoint(tmp_path / "other", other))

    def test_no_checkpoint(self, tmp_path):
        with pytest.raises(ValueError, match="holds no TensorFlow checkpoint"):
            upstream.load(tmp_path)


@pytest.mark.filterwarnings("ignore:.*outside of:UserWarning")
class TestHosts:
    @pytest.fixture(scope="class")
    @staticmethod
    def engine(scan, path):
        result = reconstruct(scan, DEMO, model=path, device="cpu", strict=False)
        assert np.isfinite(result.object).all()
        assert result.phase.std() > 1e-3
        return result.phase

    def test_py4dstem(self, scan, path, engine):
        cube = pytest.importorskip("py4DSTEM").DataCube(scan)
        cube.calibration.set_origin(tuple(np.full(scan.shape[:2], 31.0) for _ in range(2)))
        phase = cube.airpi_reconstruct(
            80e3,
            25.0,
            force_scan_sampling=0.25,
            force_reciprocal_sampling=0.05,
            force_com_rotation=0.0,
            force_com_transpose=False,
            model=path,
            device="cpu",
            strict=False,
            verbose=False,
        )
        np.testing.assert_allclose(phase.data, engine, atol=1e-4)

    def test_hyperspy(self, scan, path, engine):
        phase = (
            pytest.importorskip("hyperspy.api")
            .signals.Signal2D(scan)
            .airpi(
                beam_energy=80.0,
                convergence_angle=25.0,
                scan_step=0.25,
                k_step=0.05,
                center=(31, 31),
                rotation=0.0,
                flip=False,
                model=path,
                device="cpu",
                strict=False,
                show_progressbar=False,
            )
        )
        np.testing.assert_allclose(phase.data, engine, atol=1e-4)


class TestPlan:
    CONTRACT = Contract("example", "1", N, None, N, {})

    @pytest.mark.parametrize(("shape", "k_pixel"), [((64, 64), 0.05), ((128, 128), 0.025), ((48, 64), 0.05)])
    def test_whole_detector(self, shape, k_pixel):
        acquisition = Acquisition(80e3, 25.0, (0.25, 0.25), (k_pixel, k_pixel), center=(shape[0] // 2, shape[1] // 2))
        plan = Plan.of(acquisition, self.CONTRACT, np.zeros((3, 3, *shape), np.uint16))
        assert plan.grid_k_pixel == pytest.approx(0.05)
        radius = acquisition.aperture_radius
        assert plan.geometry(2).tolist()[1] == pytest.approx([0.25 * radius, 0, 0, radius / 0.05, 0.25], rel=1e-6)
        counts = np.random.default_rng(0).poisson(2.0, (1, *shape))
        resampled = plan.resampling()(counts)
        if shape == (48, 64):
            np.testing.assert_allclose(resampled[:, 8:56], counts, atol=1e-4)
        if shape == (64, 64):
            np.testing.assert_allclose(resampled, counts, atol=1e-4)
        assert resampled.sum() == pytest.approx(counts.sum(), rel=0.02)

    def test_self_contained_is_refused(self, path):
        with pytest.raises(ValueError, match="takes the whole detector; a self-contained graph is made of 'aperture'"):
            self_contained.self_contained(path.read_bytes(), "mine")


class TestExitWave:
    GEOMETRY = np.float32([[0.3, -1.2, 0.4, 9.3, 0.25], [0.3, 0.0, 0.0, 20.0, 0.25]])

    @staticmethod
    def transmitted(waves, phase, space):
        """A network that always gives the exit wave psi_in(r) exp(i phase(r)) of known probes."""
        probe = keras.Input((N, N, 2), name="probe")
        transmitted = waves * np.exp(1j * phase)
        if space == "reciprocal":
            centred = np.fft.ifftshift(transmitted, axes=(1, 2))
            transmitted = np.fft.fftshift(np.fft.fft2(centred, norm="ortho"), axes=(1, 2))
        pairs = np.stack([np.abs(transmitted), np.angle(transmitted)], -1).astype(np.float32)
        return keras.Model({"probe": probe}, 0 * probe + pairs)

    @pytest.mark.parametrize("space", ["real", "reciprocal"])
    def test_object(self, space, tmp_path):
        geometry = self.GEOMETRY
        maker = exit_wave.ProbeInRealSpace() if space == "real" else exit_wave.ProbeInReciprocalSpace()
        probe = maker(geometry)
        if space == "reciprocal":
            probe = exit_wave.ToRealSpace()(probe)
        probe = np.asarray(probe)
        waves = probe[..., 0] * np.exp(1j * probe[..., 1])
        rows, columns = np.mgrid[-32:32, -32:32]
        phase = 0.4 * np.cos(rows / 3) + 0.3 * np.sin(columns / 4 + 1)
        model = exit_wave.object_model(self.transmitted(waves, phase, space), space)
        graph = to_onnx.convert(model, exit_wave.metadata("example", "1", {}))
        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        patterns = np.ones((2, 3, 3, N, N), np.float32)
        patch = session.run(None, {"patterns": patterns, "geometry": geometry})[0] @ [1, 1j]
        seen = np.abs(waves) ** 2 > 0.1 * (np.abs(waves) ** 2).max(axis=(1, 2), keepdims=True)
        expected = np.broadcast_to(np.exp(1j * phase), patch.shape)
        np.testing.assert_allclose(patch[seen], expected[seen], atol=2e-3)
        assert (
            json.loads({entry.key: entry.value for entry in graph.metadata_props}["grid"])["kind"] == "whole_detector"
        )

    def test_probes(self):
        """Both against `airpi_py4d.optics`."""
        energy, semiangle = 80e3, 25.0
        k0, lam = optics.aperture_radius(energy, semiangle), optics.wavelength(energy)
        defocus, spherical = 1.2 / (np.pi * lam * k0**2), 0.4 / (0.5 * np.pi * lam**3 * k0**4)
        acquisition = Acquisition(
            energy, semiangle, (0.25, 0.25), (0.05, 0.05), defocus=defocus, spherical_aberration=spherical
        )
        k_pixel = k0 / 9.3
        real = np.asarray(exit_wave.ProbeInRealSpace()(self.GEOMETRY[:1]))[0]
        wave = fine_probe(acquisition, k_pixel)
        np.testing.assert_allclose(real[..., 0] * np.exp(1j * real[..., 1]), wave, atol=0.01 * np.abs(wave).max())
        other = np.asarray(exit_wave.ToRealSpace()(exit_wave.ProbeInReciprocalSpace()(self.GEOMETRY[:1])))[0]
        wave = optics.probe(N, 1 / (N * k_pixel), energy, semiangle, defocus, spherical)
        np.testing.assert_allclose(other[..., 0] * np.exp(1j * other[..., 1]), wave, atol=1e-5)

    def test_scan_step_is_handed_on(self):
        step = keras.Input((1,), name="scan_step")
        probe = keras.Input((N, N, 2), name="probe")
        factor = keras.ops.reshape(keras.ops.concatenate([step, 1 + 0 * step], axis=-1), (-1, 1, 1, 2))
        model = exit_wave.object_model(keras.Model({"scan_step": step, "probe": probe}, probe * factor), "real")
        patch = model.predict([np.ones((1, 3, 3, N, N), np.float32), self.GEOMETRY[:1]], verbose=0)
        assert patch[0, 32, 32] == pytest.approx([0.25, 0], abs=1e-3)

    def test_unknown_space(self):
        with pytest.raises(ValueError, match="space is 'k', expected 'real' or 'reciprocal'"):
            exit_wave.object_model(None, "k")
