"""Build hyperconv_ext; everything it needs to say is in pyproject.toml."""

from setuptools import setup

setup()
