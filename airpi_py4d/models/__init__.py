"""The models: which there are, what each says of itself, and whether a shipped file is the one that was shipped.

Models ship in this folder; those of your own may lie in the folder that the environment variable AIRPI_MODELS names.
Nothing is ever downloaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from airpi_py4d.report import _DOMAIN_UNITS, shown

#: Version of the metadata schema that this package reads.
SCHEMA = "1"
#: Kinds of grids that the engine serves.
GRIDS = ("aperture", "whole_detector")
#: Metadata key of a model's second network, an ONNX file in base64.
IMAGE_NETWORK = "image_network"
VARIABLE = "AIRPI_MODELS"
_SHIPPED = Path(__file__).parent
_MANIFEST = _SHIPPED / "SHA256SUMS"
_METADATA_PROPS = 14  # field number of ModelProto in onnx.proto
_WIDTH, _INDENT = 110, 14


class Entry(NamedTuple):
    """A model in one of the folders.

    Attributes
    ----------
    name : str
        What to give as `model`: the file's name without ``.onnx``.
    version : str
        From its metadata; empty if they can't be read.
    path : Path
    problem : str
        Why it can't be used, or empty.
    """

    name: str
    version: str
    path: Path
    problem: str


def _folders() -> tuple[Path, ...]:
    """The shipped models' folder, and the user's."""
    named = os.environ.get(VARIABLE)
    if not named:
        return (_SHIPPED,)
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"the environment variable {VARIABLE} is {named!r}, which is no folder; set it to the folder of your ONNX "
            "files, or unset it."
        )
    return _SHIPPED, folder


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of the length-delimited fields of a Protocol Buffers message, others left out.

    Source: https://protobuf.dev/programming-guides/encoding/
    """
    place = 0

    def varint() -> int:
        nonlocal place
        number = shift = 0
        while True:
            byte = message[place]
            place += 1
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return number

    while place < len(message):
        number, kind = divmod(varint(), 8)
        if number == 0:
            raise IndexError("field number 0")
        if kind == 0:
            varint()
        elif kind in (1, 5):
            place += 8 if kind == 1 else 4
        elif kind == 2:
            length = varint()
            place += length
            if place > len(message):
                raise IndexError("cut off")
            yield number, message[place - length : place]
        else:
            raise IndexError(f"wire type {kind}")


def read_metadata(content: bytes, origin: str) -> dict[str, str]:
    """`metadata_props` of an ONNX file, read without ONNX Runtime.

    Parameters
    ----------
    content : bytes
        Of the file.
    origin : str
        What to call it in messages.

    Raises
    ------
    ValueError
        If it isn't an ONNX file, or has no airpi metadata.
    """
    try:
        entries = [dict(_fields(value)) for number, value in _fields(memoryview(content)) if number == _METADATA_PROPS]
        metadata = {str(entry[1], "utf-8"): str(entry.get(2, b""), "utf-8") for entry in entries}
    except (IndexError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"model {origin} is not an ONNX file, or cut off ({error}).") from error
    if "airpi_schema" not in metadata:
        raise ValueError(f"model {origin} has no airpi metadata; export it with export.to_onnx, which writes them.")
    return metadata


def manifest() -> dict[str, str]:
    """SHA-256 of every shipped ONNX file, by its name.

    Examples
    --------
    >>> len(manifest()["airpi-2.onnx"])
    64
    """
    lines = _MANIFEST.read_text(encoding="ascii").splitlines()
    return {name: digest for digest, name in (line.split() for line in lines)}


def read(path: Path) -> tuple[bytes, str]:
    """Content of a model file, and its SHA-256; a shipped one must be as it was shipped.

    Raises
    ------
    ValueError
        If a shipped file was changed (says both hashes), or lies among them without having been shipped.
    """
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if path.resolve().parent != _SHIPPED.resolve():
        return content, digest
    shipped = manifest().get(path.name)
    if shipped is None:
        raise ValueError(
            f"model {path} was not shipped with this version of airpi_py4d: {_MANIFEST.name} doesn't name it. Keep "
            f"models of your own in another folder, and name that in the environment variable {VARIABLE}."
        )
    if digest != shipped:
        raise ValueError(
            f"model {path} was changed since it was shipped: its SHA-256 is {digest}, expected {shipped}. Install "
            "airpi_py4d again: pip install --force-reinstall --no-deps airpi_py4d."
        )
    return content, digest


def _entry(path: Path) -> Entry:
    metadata: dict[str, str] = {}
    problem = ""
    try:
        metadata = read_metadata(read(path)[0], str(path))
        kind = json.loads(metadata.get("grid", "{}")).get("kind")
        if metadata["airpi_schema"] != SCHEMA:
            problem = f"metadata of schema {metadata['airpi_schema']!r}, unknown to this version of airpi_py4d"
        elif kind not in GRIDS:
            problem = f"takes patterns on a {kind!r} grid: for other programs, not for airpi_py4d"
    except (OSError, ValueError, AttributeError) as error:
        problem = str(error)
    return Entry(path.stem, metadata.get("version", ""), path, problem)


def list() -> tuple[Entry, ...]:
    """Models that are shipped and those in the folder that AIRPI_MODELS names, the shipped ones first.

    A file that can't be used is listed with its problem.

    Raises
    ------
    ValueError
        If AIRPI_MODELS names no folder.

    Examples
    --------
    >>> from airpi_py4d import models
    >>> entry = models.list()[0]
    >>> entry.name, entry.version, entry.problem
    ('airpi-2', '1', '')
    """
    return tuple(_entry(path) for folder in _folders() for path in sorted(folder.glob("*.onnx")))


def find(model: str | Path) -> Path:
    """Path of a model that is given by its name in one of the folders, or as a file.

    Raises
    ------
    ValueError
        If there is none, or if both folders have one of that name.

    Examples
    --------
    >>> find("airpi-2").name
    'airpi-2.onnx'
    """
    folders = _folders()
    paths = [path for folder in folders for path in sorted(folder.glob("*.onnx"))]
    named = [path for path in paths if path.stem == str(model)]
    if len(named) > 1:
        raise ValueError(
            f"model {str(model)!r} is both shipped and in the folder {folders[1]} of {VARIABLE}; give the file's path, "
            "or rename yours."
        )
    if named:
        return named[0]
    path = Path(model)
    if not path.is_file():
        names = [", ".join(path.stem for path in paths if path.parent == folder) for folder in folders]
        yours = f", nor a model in {folders[1]} ({names[1]})" if len(folders) > 1 else ""
        raise ValueError(f"model is {str(model)!r}: neither a file nor a shipped model ({names[0]}){yours}.")
    return path


def _decoded(text: str) -> Any:
    try:
        return json.loads(text) if text[:1] in ("{", "[") else text
    except ValueError:
        return text


def _paragraph(title: str, text: str) -> str:
    """Title in the margin, text beside it."""
    margin = " " * _INDENT
    lines = [textwrap.fill(line, _WIDTH, initial_indent=margin, subsequent_indent=margin) for line in text.split("\n")]
    return title.ljust(_INDENT) + "\n".join(lines).lstrip()


def _tensor(name: str, entry: Mapping[str, Any]) -> str:
    """An input or output in words."""
    shape = " x ".join(map(str, entry.get("shape", ())))
    axes = f" ({entry['axes']})" if entry.get("axes") else ""
    size = f"; pixel size {entry['pixel_size']}" if "pixel_size" in entry else ""
    return f"{name} [{entry.get('unit', 'unit not stated')}], {shape}{axes}: {entry.get('description', '')}{size}"


def _ranges(domain: Mapping[str, Any]) -> str:
    return "\n".join(
        f"{name} {shown(float(low))} to {shown(float(high), _DOMAIN_UNITS.get(name, ''))}"
        for name, (low, high) in domain.items()
    )


def _sections(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Titles and texts of a model with metadata of the known schema."""
    for name, entry in metadata.get("inputs", {}).items():
        yield "input", _tensor(name, entry)
    grid = metadata.get("grid", {})
    yield "grid", f"{grid.get('kind', 'not stated')}: {grid.get('description', '')}"
    output = metadata.get("output", {})
    for name, entry in metadata.get("outputs", {output.get("name", ""): output}).items():
        yield "output", _tensor(name, entry)
    for title in ("label", "normalisation"):
        yield title, metadata.get(title, "not stated")
    yield "trained on", _ranges(metadata.get("domain", {})) or "not stated"
    training = metadata.get("training", {})
    digest = training.get("data_configuration_sha256", "not stated")
    yield "training", f"{training.get('samples', 'unknown number of')} samples, SHA-256 of their configuration {digest}"
    if "figures" in metadata:
        found = metadata["figures"]
        values = (
            f"{specimen}: {', '.join(f'{dose} {xc:.3f}' for dose, xc in doses.items())}"
            for specimen, doses in found["xc"].items()
        )
        yield "figures", "\n".join([found["description"], *values])
    if "wraps" in metadata:
        wrapped = metadata["wraps"]
        yield "wraps", f"{wrapped['name']}, version {wrapped['version']}, SHA-256 {wrapped['sha256']}"
    yield "licence", metadata.get("license", "not stated")
    yield "cite", metadata.get("citation", "not stated")


@dataclass(frozen=True, repr=False)
class Description:
    """What a model says of itself; prints as text.

    Attributes
    ----------
    path : Path
    sha256 : str
        Of the file.
    metadata : dict
        Decoded.
    """

    path: Path
    sha256: str
    metadata: dict[str, Any]

    def __str__(self) -> str:
        metadata = self.metadata
        parts = [
            f"{metadata.get('name', self.path.stem)}, version {metadata.get('version', 'not stated')}",
            _paragraph("file", f"{self.path}\nSHA-256 {self.sha256}"),
        ]
        if metadata["airpi_schema"] == SCHEMA:
            parts += [_paragraph(title, text) for title, text in _sections(metadata)]
        else:
            parts.append(
                f"Its metadata have schema {metadata['airpi_schema']!r}; this version of airpi_py4d knows schema "
                f"{SCHEMA!r}: update airpi_py4d. As they stand in the file:"
            )
            parts += [_paragraph(key, str(value)) for key, value in metadata.items() if key != IMAGE_NETWORK]
        return "\n".join(parts)

    __repr__ = __str__


def describe(model: str | Path) -> Description:
    """What a model takes and gives, what it was trained on, its licence and how to cite it, from its metadata.

    Parameters
    ----------
    model : str or Path
        Name of a model in one of the folders, or path of an ONNX file, also of one that other versions or programs are
        for.

    Returns
    -------
    Description
        To print, or to read `metadata` of.

    Raises
    ------
    ValueError
        If there is no such model, if a shipped one was changed, or if the file has no airpi metadata.

    Examples
    --------
    >>> print(str(describe("airpi-2")).splitlines()[0])
    airpi-2, version 1
    """
    path = find(model)
    content, digest = read(path)
    metadata = {key: _decoded(text) for key, text in read_metadata(content, str(path)).items()}
    return Description(path, digest, metadata)
