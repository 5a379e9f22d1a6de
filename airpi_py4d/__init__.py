"""Live phase imaging for 4D-STEM by deep learning (AIRPI), in py4DSTEM and HyperSpy.

Importing this package gives py4DSTEM's DataCube the method `airpi_reconstruct` and HyperSpy's Signal2D the method
`airpi`, whichever is imported first.
"""

from airpi_py4d import hyperspy, models, py4dstem
from airpi_py4d.acquisition import Acquisition
from airpi_py4d.calibration import calibrate
from airpi_py4d.diagnosis import diagnose
from airpi_py4d.engine import reconstruct
from airpi_py4d.hosts import when_imported
from airpi_py4d.result import Reconstruction

__all__ = ["Acquisition", "Reconstruction", "calibrate", "diagnose", "models", "reconstruct"]

when_imported("py4DSTEM.datacube.datacube", py4dstem.attach)
when_imported("hyperspy._signals.signal2d", hyperspy.attach)
