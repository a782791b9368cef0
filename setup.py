"""Everything is declared in setup.cfg; this file lets every installer find it."""

from setuptools import setup

setup()
