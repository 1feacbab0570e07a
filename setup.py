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

# Our folder kernels/ must not stand for Hugging Face's package of that name, from which setuptools loads a hook.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

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


def incremental_build():
    """Ninja in folders that stay: an editable install builds in a temporary one, and so everything, each time. The raw
    kernels, most of the work, are compiled for the extension and linked into the numpy bindings as well."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            if not os.environ.get("FASTCIFAR_SANITIZE"):
                self.build_temp = "build/objects"

        def build_extension(self, ext):
            root = self.build_temp
            kernels = [Path(root, "_C", source).with_suffix(".o") for source in build_config.KERNEL_SOURCES]
            if ext.name == "fastcifar._host":
                ext.extra_objects = [str(kernel) for kernel in kernels]
            self.build_temp = str(Path(root, ext.name.rpartition(".")[2]))
            super().build_extension(ext)
            self.build_temp = root

    return Build.with_options(use_ninja=True)


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
    version = re.search(r'^version = "(.+)"', Path("pyproject.toml").read_text(), re.M).group(1)
    extensions = [torch_extension(version)]
    if os.environ.get("FASTCIFAR_HOST") == "1":
        extensions.append(host_extension())
    setup(
        ext_modules=extensions,
        cmdclass={"build_ext": incremental_build()},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


main()
