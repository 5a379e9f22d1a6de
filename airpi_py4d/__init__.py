"""Live phase imaging for 4D-STEM by deep learning (AIRPI), in py4DSTEM and HyperSpy."""

from airpi_py4d.acquisition import Acquisition
from airpi_py4d.engine import reconstruct
from airpi_py4d.result import Reconstruction

__all__ = ["Acquisition", "Reconstruction", "reconstruct"]
