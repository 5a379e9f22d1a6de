"""Configuration files (TOML)."""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_config(path: Path) -> dict:
    """Read a TOML file.

    Parameters
    ----------
    path : Path
        For instance `training/configs/first_data.toml`.
    """
    return tomllib.loads(Path(path).read_text())
