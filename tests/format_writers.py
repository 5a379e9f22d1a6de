"""Smallest valid files of the formats that no installed package writes, byte for byte after their layout.

Patterns are arrays of shape (scan rows, scan columns, detector rows, detector columns), in the order of the file.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
from numpy.typing import NDArray

_MIB_BITS = {6: ("U08", ">u1"), 12: ("U16", ">u2"), 24: ("U32", ">u4")}
_DM_DATA_TYPES = {"int16": 1, "float32": 2, "uint8": 6, "int32": 7, "uint16": 10, "uint32": 11}
#: Tag types of DigitalMicrograph and how struct packs them.
_DM_INT32, _DM_UINT16, _DM_UINT32, _DM_FLOAT32, _DM_FLOAT64 = 3, 4, 5, 6, 7
_DM_PACKED = {_DM_INT32: "i", _DM_UINT16: "H", _DM_UINT32: "I", _DM_FLOAT32: "f", _DM_FLOAT64: "d"}
_DM_ELEMENTS = {"int16": 2, "float32": 6, "uint8": 10, "int32": 3, "uint16": 4, "uint32": 5}
_DM_THUMBNAIL = 23


def write_mib(path: Path, data: NDArray[Any], bits: int, *, header_file: bool = True) -> None:
    """Merlin .mib of a single chip: per frame an ASCII header of 384 bytes and big-endian counts; and its .hdr.

    `bits` is the counter's depth: 6, 12 or 24.
    """
    rows, columns, height, width = data.shape
    name, dtype = _MIB_BITS[bits]
    with path.open("wb") as file:
        for number, pattern in enumerate(data.reshape(-1, height, width), 1):
            header = (
                f"MQ1,{number:06d},00384,01,{width:04d},{height:04d},{name},   1x1,01,"
                "2024-05-17 10:11:12.123456,0.000500,0,0,0,0,0,0,0,MQ1A,2024-05-17T10:11:12.123456789Z,500000ns,"
                f"{bits},"
            )
            file.write(header.encode("ascii").ljust(384, b"\0"))
            file.write(pattern.astype(dtype).tobytes())
    if header_file:
        lines = [
            "HDR,\t",
            "Time and Date Stamp (day, mnth, yr, hr, min, s):\t17/05/2024 10:11:12",
            f"Frames in Acquisition (Number):\t{rows * columns}",
            f"Frames per Trigger (Number):\t{columns}",
            f"ScanX:\t{columns}",
            f"ScanY:\t{rows}",
            "End\t",
        ]
        path.with_suffix(".hdr").write_text("\n".join(lines) + "\n")


def write_empad(path: Path, data: NDArray[Any], *, step: float, k_pixel: float | None) -> None:
    """EMPAD scan_x#_y#.raw, little-endian float32 in frames of 130 x 128 with two rows of footer, and its .xml.

    `step` [m] of the scan. With `k_pixel` [1/nm] the .xml is of an older version, else of version 1.2.
    """
    rows, columns, height, width = data.shape
    frames = np.full((rows, columns, 130, 128), 1e4, "<f4")
    frames[:, :, :height, :width] = data
    frames.tofile(path)
    if k_pixel is None:
        view = f"<x>{0.72 * max(rows, columns) * step!r}</x><scale_factor>0.72</scale_factor>"
        shape, measured = "", f"<full_scan_field_of_view>{view}</full_scan_field_of_view>"
    else:
        view = f"<get_full_scan_field_of_view>{[rows * step, columns * step]}</get_full_scan_field_of_view>"
        shape = f"<pix_x>{columns}</pix_x><pix_y>{rows}</pix_y>"
        measured = f"<optics>{view}</optics><calibrated_pixelsize>{k_pixel * 1e-9!r}</calibrated_pixelsize>"
    path.with_suffix(".xml").write_text(
        f'<root><raw_file filename="{path.name}"/>{shape}<timestamp isoformat="2024-05-17T10:11:12.123456"/>'
        f"<iom_measurements>{measured}</iom_measurements></root>"
    )


def _dm_tag(name: str, value: Any) -> bytes:
    """A named entry of a tag group: a dictionary, a list of unnamed groups or values, a string, bytes or (type, n)."""
    label = struct.pack(">H", len(name)) + name.encode("ascii")
    if isinstance(value, dict | list):
        content = _dm_group(value)
        return b"\x14" + label + struct.pack(">Q", len(content)) + content
    if isinstance(value, str):
        value = np.frombuffer(value.encode("utf-16-le"), np.uint16)
    description: tuple[int, ...]
    if isinstance(value, np.ndarray):
        description = (20, _DM_ELEMENTS[value.dtype.name], value.size)
        packed = value.astype(value.dtype.newbyteorder("<")).tobytes()
    else:
        kind, number = value
        description, packed = (kind,), struct.pack("<" + _DM_PACKED[kind], number)
    content = b"%%%%" + struct.pack(f">{1 + len(description)}Q", len(description), *description) + packed
    return b"\x15" + label + struct.pack(">Q", len(content)) + content


def _dm_group(entries: dict[str, Any] | list[Any]) -> bytes:
    pairs = [("", value) for value in entries] if isinstance(entries, list) else list(entries.items())
    return b"\x00\x00" + struct.pack(">Q", len(pairs)) + b"".join(_dm_tag(*pair) for pair in pairs)


def _dm_image(
    data: NDArray[Any], data_type: int, dimensions: tuple[int, ...], calibrations: list[tuple[float, float, str]]
) -> dict[str, Any]:
    def calibration(origin: float, scale: float, units: str) -> dict[str, Any]:
        return {"Origin": (_DM_FLOAT32, origin), "Scale": (_DM_FLOAT32, scale), "Units": units}

    return {
        "Calibrations": {
            "Brightness": calibration(0.0, 1.0, ""),
            "Dimension": [calibration(*entry) for entry in calibrations],
        },
        "Data": data.ravel(),
        "DataType": (_DM_UINT32, data_type),
        "Dimensions": [(_DM_UINT32, size) for size in dimensions],
        "PixelDepth": (_DM_UINT32, data.dtype.itemsize),
    }


def write_dm4(
    path: Path,
    data: NDArray[Any],
    *,
    voltage: float,
    scan: tuple[float, str],
    detector: tuple[float, str],
    center: tuple[float, float] = (0.0, 0.0),
) -> None:
    """DigitalMicrograph 4: a thumbnail and a scan of any dimensions, the fastest of the file's last.

    `voltage` [V]; `scan` and `detector` are size and unit of a pixel, `center` the row and column of the optical axis.
    """
    calibrations = [(center[1], *detector), (center[0], *detector), (0.0, *scan), (0.0, *scan)][: data.ndim]
    thumbnail = _dm_image(np.zeros(64, np.int32), _DM_THUMBNAIL, (8, 8), [(0.0, 1.0, "")] * 2)
    image = _dm_image(data, _DM_DATA_TYPES[data.dtype.name], data.shape[::-1], calibrations)
    tags = {"Microscope Info": {"Voltage": (_DM_FLOAT64, voltage), "Illumination Mode": "STEM NANOPROBE"}}
    root = _dm_group(
        {
            "ImageList": [
                {"ImageData": thumbnail, "ImageTags": {}, "Name": "Thumbnail"},
                {"ImageData": image, "ImageTags": tags, "Name": "Diffraction SI"},
            ],
            "Thumbnails": [{"ImageIndex": (_DM_UINT32, 0)}],
        }
    )
    path.write_bytes(struct.pack(">IQI", 4, len(root), 1) + root + bytes(8))


def write_velox(path: Path, data: NDArray[Any], *, voltage: float, k_pixel: float) -> None:
    """Velox .emd: frames of a camera in one HDF5 data set (rows, columns, frames) with a JSON metadata column.

    `voltage` [V], `k_pixel` [1/m].
    """
    frames = data.reshape(-1, *data.shape[2:])
    metadata = {
        "Acquisition": {"AcquisitionStartDatetime": {"DateTime": "1715940672"}},
        "BinaryResult": {
            "DetectorIndex": "0",
            "PixelSize": {"width": repr(k_pixel), "height": repr(k_pixel)},
            "Offset": {"x": "0", "y": "0"},
            "PixelUnitX": "1/m",
            "PixelUnitY": "1/m",
        },
        "Detectors": {"Detector-0": {"DetectorName": "BM-Ceta", "ExposureTime": "0.001"}},
        "Optics": {"AccelerationVoltage": repr(voltage)},
        "Scan": {"FrameTime": "0.001"},
    }
    text = np.frombuffer(json.dumps(metadata).encode().ljust(2048, b"\0"), np.uint8)
    with h5py.File(path, "w") as file:
        file["Version"] = np.array([json.dumps({"format": "Velox", "version": "11"}).encode()])
        group = file.create_group("Data/Image/0123456789abcdef0123456789abcdef")
        group.create_dataset("Data", data=np.moveaxis(frames, 0, 2), chunks=(*frames.shape[1:], 1))
        group["Metadata"] = np.repeat(text[:, None], len(frames), axis=1)


def write_arina(master: Path, data: NDArray[Any], *, pixel_size: float, frames_per_file: int) -> None:
    """Dectris Arina: a _master.h5 with external links to files of bitshuffle-LZ4 frames, and the scan's own .h5.

    `pixel_size` [nm] of the scan.
    """
    stem = master.name.removesuffix("_master.h5")
    frames = data.reshape(-1, *data.shape[2:])
    with h5py.File(master, "w") as file:
        file.create_group("entry").attrs["NX_class"] = "NXentry"
        links = file.create_group("entry/data")
        links.attrs["NX_class"] = "NXdata"
        for number, first in enumerate(range(0, len(frames), frames_per_file), 1):
            part = master.with_name(f"{stem}_data_{number:06d}.h5")
            with h5py.File(part, "w") as part_file:
                part_file.create_dataset(
                    "entry/data/data",
                    data=frames[first : first + frames_per_file],
                    chunks=(1, *frames.shape[1:]),
                    **hdf5plugin.Bitshuffle(cname="lz4"),
                )
            links[f"data_{number:06d}"] = h5py.ExternalLink(part.name, "/entry/data/data")
    with h5py.File(master.with_name(f"{stem}.h5"), "w") as file:
        file.create_group("STEM Metadata").attrs["Pixel Size"] = np.array([pixel_size, pixel_size])
