"""The packages to install: the engine, and its kernels (folder ``kernels/``, import name ``dpo_kernels``).

All other metadata is in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["dpo_engine", "dpo_engine.*"]), "dpo_kernels"],
    package_dir={"dpo_kernels": "kernels/dpo_kernels"},
)
