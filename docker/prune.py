"""Delete from a virtual environment what a running image never reads, and print how much that was.

python prune.py /app/.venv [--keep pip]

C++ headers, static libraries and CMake files serve compilers; test suites serve the packages' authors; pip
and setuptools install packages. Run it with the environment's own Python: nothing here is imported from it.
"""

import argparse
import shutil
from pathlib import Path

UNUSED = (
    "torch/include",
    "torch/share",
    "torch/test",
    "torch/bin/[!t]*",  # all but torch_shm_manager, which `import torch` looks for
    "torch/bin/test_*",
    "torch/lib/*.a",
    "torch/lib/lib*_test.so",
    "caffe2",
    "functorch/_src/__pycache__",
    "numpy/**/tests",
    "numpy/_core/include",
    "scipy/**/tests",
    "sklearn/**/tests",
    "pyarrow/include",
    "pyarrow/tests",
    "pyarrow/src",
    "matplotlib/tests",
    "sympy/**/tests",
    "networkx/**/tests",
    "onnx/test",
    "onnx/backend/test",
    "mpmath/tests",
    "onnxruntime/transformers",
    "onnxruntime/capi/libonnxruntime.so*",  # for C; Python's extension has it all inside
    "openvino/include",
    "openvino/cmake",
    "openvino/libs/cache.json",  # kernels for the GPU plugin
    "openvino/libs/libopenvino_intel_[gn]pu_plugin.so",
    "openvino/libs/libopenvino_[gjpt]*_frontend.so*",  # all frontends but ONNX and OpenVINO's own
)
INSTALLERS = ("pip", "setuptools", "wheel", "pkg_resources", "_distutils_hack")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("environment", type=Path)
    parser.add_argument("--keep", action="append", default=[], choices=INSTALLERS)
    arguments = parser.parse_args()
    (packages,) = (arguments.environment / "lib").glob("python3*/site-packages")
    names = [*UNUSED]
    for name in INSTALLERS:
        if name not in arguments.keep:
            names += [name, f"{name}-*.dist-info"]
    if "setuptools" not in arguments.keep:
        names.append("distutils-precedence.pth")
    freed = 0
    for name in names:
        for path in sorted(packages.glob(name)):
            freed += _size_bytes(path)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    print(f"pruned {freed / 2**20:.0f} MiB from {packages}")  # noqa: T201


def _size_bytes(path: Path) -> int:
    if path.is_symlink() or not path.exists():
        return 0
    if path.is_file():
        return path.stat().st_size
    return sum(one.lstat().st_size for one in path.rglob("*") if one.is_file())


if __name__ == "__main__":
    main()
