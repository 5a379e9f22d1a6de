"""The paper's demonstrations in simulation, by one command: ``python -m training.benchmark FOLDER``.

cases     which specimens are scanned how, and what each is for
scans     their simulation by abTEM (`training.reference`), once, kept in the folder
methods   images of them: AIRPI, SSB, DPC, single-slice ptychography, the oracle
metrics   what is measured of an image
parts     the paper's figures as rows of a table
figures   and as pictures
"""
