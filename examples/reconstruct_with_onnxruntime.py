"""Phase image [rad] of a 4D scan of electron counts by a self-contained model, with NumPy and ONNX Runtime alone.

python reconstruct_with_onnxruntime.py MODEL.onnx SCAN.npy IMAGE.npy --energy 80e3 --semiangle 25 --k_pixel 0.05 ...
(after MODEL.onnx, --help shows all arguments and their units: they come from the model)
"""

import argparse
import json
import sys

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
inputs = json.loads(session.get_modelmeta().custom_metadata_map["inputs"])
parser = argparse.ArgumentParser(description=inputs.pop("patterns")["description"])
for name in ("MODEL.onnx", "SCAN.npy", "IMAGE.npy"):
    parser.add_argument(name)
for name, entry in inputs.items():
    needed = {"default": [entry["default"]]} if "default" in entry else {"required": True}
    parser.add_argument(f"--{name}", type=float, nargs=entry["shape"][0], help=f"[{entry['unit']}]", **needed)
given = vars(parser.parse_args())
data, step = np.load(given["SCAN.npy"], mmap_mode="r"), given["scan_step"][0]
rows, columns = data.shape[:2]
for row in range(rows):
    three = np.pad(data[np.clip([row - 1, row, row + 1], 0, rows - 1)], ((0, 0), (1, 1), (0, 0), (0, 0)), "edge")
    feeds = {name: np.float32(given[name]) for name in inputs}
    feeds["patterns"] = np.stack([three[:, column : column + 3] for column in range(columns)]).astype(np.float32)
    patch, probe, size = session.run(["object_patch", "probe", "patch_pixel_size"], feeds)
    patch, probe, n = patch @ [1, 1j], probe @ [1, 1j], len(probe)
    if row == 0:  # the image's pixel is the step divided by a whole number, at most the model's
        fine = int(np.ceil(step / size[0] - 1e-6))
        half = int(0.375 * n * size[0] * fine / step)  # of the patch; its rim can't be interpolated
        sinc = np.sinc(np.arange(-half, half + 1)[:, None] * step / fine / size[0] - np.arange(n) + n // 2)
        weights = np.abs(sinc @ probe @ sinc.T) ** 2
        total = np.zeros([(count - 1) * fine + 1 + 2 * half for count in (rows, columns)], complex)
    phasors = np.exp(1j * np.angle(1 + sinc @ (patch - 1) @ sinc.T))
    for i, j in np.argwhere(weights > weights.max() / 10):
        total[row * fine + i, j : j + columns * fine : fine] += weights[i, j] * phasors[:, i, j]
np.save(given["IMAGE.npy"], np.angle(total[half:-half, half:-half]).astype(np.float32))
