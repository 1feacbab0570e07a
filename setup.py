"""Builds fastcifar._C where torch is importable (pip install --no-build-isolation .), else a pure-Python package.

Without torch or without a C++ compiler (CXX, else c++) the package installs all the same, runs its references, and
`python -m fastcifar doctor` says so. A compiler that is there and fails is an error, never a silent fallback.
FASTCIFAR_HOST=1 adds fastcifar._host, the raw kernels on numpy buffers, which the tests and the benchmarks use.
"""

import importlib.util
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import build_config

FLAGS, LINK_FLAGS = build_config.flags()


def torch_extension(version: str):
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "fastcifar._C",
        build_config.EXTENSION_SOURCES,
        depends=build_config.HEADERS,
        extra_compile_args=[*FLAGS, *build_config.STABLE_ABI, f"-DFASTCIFAR_VERSION={version}"],
        extra_link_args=LINK_FLAGS,
        py_limited_api=True,
    )


def host_extension():
    import pybind11
    from setuptools import Extension

    return Extension(
        "fastcifar._host",
        build_config.HOST_SOURCES,
        depends=build_config.HEADERS,
        include_dirs=[pybind11.get_include()],
        extra_compile_args=FLAGS,
        extra_link_args=LINK_FLAGS,
        language="c++",
    )


def why_pure():
    """What is missing for the extension, or None."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not importable in the build (pip install --no-build-isolation)"
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    return None if shutil.which(compiler) else f"there is no C++ compiler ({compiler})"


def main() -> None:
    if reason := why_pure():
        print(f"fastcifar: building without the C++ extension, because {reason}: ops run their PyTorch references")
        setup()
        return
    from torch.utils.cpp_extension import BuildExtension

    version = re.search(r'^version = "(.+)"', Path("pyproject.toml").read_text(), re.M).group(1)
    extensions = [torch_extension(version)]
    if os.environ.get("FASTCIFAR_HOST") == "1":
        extensions.append(host_extension())
    setup(
        ext_modules=extensions,
        cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


main()
