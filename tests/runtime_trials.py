"""What ONNX Runtime's options and smaller number formats do to a model's speed and to its image of the demo's scan.

    python tests/runtime_trials.py [--model NAME_OR_FILE] [--repeats 3]

Prints a table: for every variant the size of its networks, their CPU time a position on one thread, and what of it is
the image network's, the speed beside the model as shipped, xc with the truth, and the largest difference of the phase
from that of the model as shipped. A variant that ONNX Runtime doesn't run on this machine is a row that says so. CPU
only.
"""

from __future__ import annotations

import argparse
import base64
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from speed_limits import NETWORKS, timed_parts

from airpi_py4d import Acquisition, demo, models, reconstruct
from airpi_py4d.model import DEFAULT_MODEL, Model
from airpi_py4d.models import IMAGE_NETWORK
from export import reduced

LEVELS = onnxruntime.GraphOptimizationLevel
#: Inputs of each network that static quantisation takes the ranges from.
CALIBRATED = 4

Networks = list[bytes]
Inputs = list[dict[str, np.ndarray]]


class Variant(NamedTuple):
    """Networks, the second of which only some models have, and the options of their sessions."""

    networks: Networks
    options: onnxruntime.SessionOptions


def options(level: Any = LEVELS.ORT_ENABLE_ALL, **settings: Any) -> onnxruntime.SessionOptions:
    """One thread, asleep while it waits; a level of graph optimisation and what else is given."""
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads, made.graph_optimization_level, made.log_severity_level = 1, level, 3
    made.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, value in settings.items():
        setattr(made, name, value)
    return made


def networks(name: str) -> Networks:
    """The model's networks, without metadata."""
    model = onnx.load_from_string(models.read(models.find(name))[0])
    properties = {entry.key: entry.value for entry in model.metadata_props}
    del model.metadata_props[:]
    second = [base64.b64decode(properties[IMAGE_NETWORK])] if IMAGE_NETWORK in properties else []
    return [model.SerializeToString(), *second]


def offline(networks: Networks) -> Networks:
    """Optimised once, as files that are loaded without optimisation."""
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for number, content in enumerate(networks):
            file = Path(folder) / f"{number}.onnx"
            written = options(optimized_model_filepath=str(file))
            onnxruntime.InferenceSession(content, written, providers=["CPUExecutionProvider"])
            made.append(file.read_bytes())
    return made


class Recorded(CalibrationDataReader):
    """Inputs that a network had."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = iter(inputs)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._inputs, None)


def static(networks: Networks, recorded: list[Inputs]) -> Networks:
    """Weights and what they are multiplied with in int8, whose ranges are those of recorded inputs."""
    return [
        reduced.quantised(
            onnx.load_from_string(content),
            quantize_static,
            calibration_data_reader=Recorded(inputs),
            quant_format=QuantFormat.QDQ,
        ).SerializeToString()
        for content, inputs in zip(networks, recorded, strict=True)
    ]


def loaded(name: str, variant: Variant) -> Model:
    """The model with the variant's sessions in place of its own."""
    model = Model(name, "cpu", 1)
    for attribute, content in zip(("_session", "_image_session"), variant.networks, strict=False):
        session = onnxruntime.InferenceSession(content, variant.options, providers=["CPUExecutionProvider"])
        setattr(model, attribute, session)
    return model


class Scan:
    """The demo's scan, with its truth."""

    def __init__(self, model: str) -> None:
        with demo._quiet():
            datacube = demo._import_py4dstem().read(str(demo.demo_path()))
            phase = datacube.airpi_reconstruct(datacube.metadata["simulation"]["energy_eV"], model=model, device="cpu")
        made = phase.metadata["gen_params"]
        known = {name: made["acquisition"][name]["value"] for name in demo._SHARED_CALIBRATION}
        self.data, self.truth = datacube.data, datacube.tree("phase_truth").data
        self.acquisition, self.oversample = Acquisition(**known), made["oversample"]

    def reconstruct(self, model: Model) -> tuple[np.ndarray, list[float]]:
        """Phase, and CPU time of each network [microseconds a position]."""
        seconds: Counter[str] = Counter()
        with timed_parts(seconds):
            phase = reconstruct(self.data, self.acquisition, model=model).phase
        return phase, [1e6 * seconds[part] / self.truth.size for part in NETWORKS]

    def correlation(self, phase: np.ndarray) -> float:
        down, right = self.oversample
        return demo._correlation(phase[::down, ::right], self.truth)

    def inputs(self, model: Model, count: int) -> list[Inputs]:
        """The first inputs of each network."""
        recorded: list[Inputs] = [[], []]
        sessions = {"_session": recorded[0], "_image_session": recorded[1]}

        class Recorder:
            def __init__(self, session: Any, inputs: Inputs) -> None:
                self._session, self._inputs = session, inputs

            def run(self, names: Any, inputs: dict[str, np.ndarray]) -> Any:
                self._inputs.append(inputs)
                return self._session.run(names, inputs)

        for attribute, inputs in sessions.items():
            if hasattr(model, attribute):
                setattr(model, attribute, Recorder(getattr(model, attribute), inputs))
        reconstruct(self.data, self.acquisition, model=model)
        return [inputs[:count] for inputs in recorded if inputs]


def variants(name: str, scan: Scan) -> Iterator[tuple[str, Callable[[], Variant]]]:
    """Name of every variant, and a function that makes it."""
    shipped = networks(name)

    def of(conversion: Callable[[onnx.ModelProto], onnx.ModelProto]) -> Variant:
        return Variant([conversion(onnx.load_from_string(part)).SerializeToString() for part in shipped], options())

    yield "as shipped", lambda: Variant(shipped, options())
    yield "no graph optimisation", lambda: Variant(shipped, options(LEVELS.ORT_DISABLE_ALL))
    yield "basic optimisation", lambda: Variant(shipped, options(LEVELS.ORT_ENABLE_BASIC))
    yield "extended, without blocked layouts", lambda: Variant(shipped, options(LEVELS.ORT_ENABLE_EXTENDED))
    yield "optimised offline", lambda: Variant(offline(shipped), options(LEVELS.ORT_DISABLE_ALL))
    yield "without memory patterns", lambda: Variant(shipped, options(enable_mem_pattern=False))
    yield "float16", lambda: of(reduced.half)
    yield "bfloat16", lambda: of(lambda part: reduced.half(part, TensorProto.BFLOAT16))
    yield "int8, dynamic", lambda: of(reduced.quantised)
    yield (
        "int8, static",
        lambda: Variant(static(shipped, scan.inputs(loaded(name, Variant(shipped, options())), CALIBRATED)), options()),
    )


def table(name: str, repeats: int) -> Iterator[str]:
    """Lines of the table, as they come."""
    scan = Scan(name)
    yield "| variant | MB | networks [us a position] | image network | speed | xc | largest difference [rad] |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    reference: tuple[np.ndarray, float] | None = None
    for label, make in variants(name, scan):
        try:
            variant = make()
            model = loaded(name, variant)
            found = [scan.reconstruct(model) for _ in range(repeats)]
        except Exception as error:  # each library raises classes of its own
            yield f"| {label} | doesn't run: {str(error).strip().splitlines()[0][:100]} | | | | | |"
            continue
        phase, times = min(found, key=lambda each: sum(each[1]))
        reference = reference or (phase, sum(times))
        size = sum(map(len, variant.networks)) / 1e6
        difference = np.abs(phase - reference[0]).max()
        yield (
            f"| {label} | {size:.1f} | {sum(times):.1f} | {times[1]:.1f} | {reference[1] / sum(times):.2f} "
            f"| {scan.correlation(phase):.4f} | {difference:.1e} |"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    chosen = parser.parse_args(arguments)
    print(f"{chosen.model}, ONNX Runtime {onnxruntime.__version__}, one thread, {chosen.repeats} repeats", end="\n\n")
    for line in table(chosen.model, chosen.repeats):
        print(line, flush=True)


if __name__ == "__main__":
    main()
