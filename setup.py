"""Which packages there are: the engine, and its kernels (folder ``kernels/``, import name ``dpo_kernels``).

All metadata is in pyproject.toml, which cannot map one package of several to another folder.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["dpo_engine", "dpo_engine.*"]), "dpo_kernels"],
    package_dir={"dpo_kernels": "kernels/dpo_kernels"},
)
