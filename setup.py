# SPDX-License-Identifier: Apache-2.0
"""Build the C++ libraries of pyfmt; all else about the package stands in pyproject.toml.

    pyfmt/_native.<python>.so   NumPy side: pybind11, csrc/numpy_bindings.cpp + csrc/cpu, no torch
    pyfmt/_torch_ops.so         torch side: stable ABI, csrc/torch_bindings{,_matmul}.cpp + csrc/cpu
    pyfmt/_torch_ops_cuda.so    GPUs: stable ABI, csrc/torch_bindings_cuda*.cpp + csrc/cuda

The kernels in csrc/cpu are compiled once and linked into both. The torch side is built where
torch >= 2.10 is installed in the building Python; it is no Python module and names neither a
Python nor a CUDA library, so one build serves torch 2.10 and later, CPU or CUDA, on any Python.

The GPU library is built beside it wherever nvcc >= 12.8 is, also against a CPU torch: CUDA's
runtime is linked statically, and what torch must tell is looked up when the library is used.

Environment: CXX (the compiler), CXXFLAGS (added last), MAX_JOBS (parallel compilations),
PYFMT_SANITIZE=1 (address and undefined-behaviour sanitizers), NVCC (the CUDA compiler; empty: do
without), PYFMT_CUDA_ARCHS (for example "90a-real;90-virtual", the default).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
OBJECTS = ROOT / "build" / "objects"
MAC = sys.platform == "darwin"

NATIVE = "pyfmt._native"
TORCH_OPS = "pyfmt._torch_ops"
TORCH_OPS_CUDA = "pyfmt._torch_ops_cuda"
NO_MODULES = (TORCH_OPS, TORCH_OPS_CUDA)  # libraries that no Python imports
TORCH_MINIMUM = (2, 10)

# Bits are a contract: no FMA contraction, no fast-math, no -march=native. Wider vectors are chosen
# at run time.
FLAGS = "-std=c++17 -fPIC -pthread -ffp-contract=off -fno-math-errno -fvisibility=hidden".split()
FLAGS += ["-Wall", "-Wextra", "-Icsrc"]
OPTIMIZE = ["-O3", "-DNDEBUG"]
SANITIZE = ["-O1", "-g", "-fno-omit-frame-pointer"]
SANITIZER = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

NVCC_MINIMUM = (12, 8)
CUDA_ARCHS = "90a-real;90-virtual"
NVCC_FLAGS = """-std=c++17 -O3 --fmad=false -prec-div=true -prec-sqrt=true -ftz=false
--expt-relaxed-constexpr -Xptxas=-v -Xcompiler=-fPIC,-fvisibility=hidden -DNDEBUG""".split()


def find_torch() -> tuple[Path | None, str]:
    """Return torch's folder and version; or None and the reason why torch is of no use here."""
    spec = importlib.util.find_spec("torch")  # finds without importing
    if spec is None or not spec.submodule_search_locations:
        return None, "torch is not installed in the Python that builds"
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    wanted = ".".join(map(str, TORCH_MINIMUM))
    header = root / "include" / "torch" / "headeronly" / "version.h"
    text = header.read_text() if header.is_file() else ""
    found = re.findall(r"#define TORCH_VERSION_(?:MAJOR|MINOR) (\d+)", text)
    version = tuple(map(int, found))
    if version < TORCH_MINIMUM:
        older = ".".join(found) or "without stable-ABI headers"
        return None, f"torch >= {wanted} is needed, found torch {older} in {root}"
    return root, ".".join(found)


def find_nvcc() -> tuple[Path | None, str]:
    """Return nvcc's path and version; or None and the reason why the GPU library is not built."""
    asked = os.environ.get("NVCC")
    if asked == "":
        return None, "NVCC is empty"
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    found = shutil.which(asked or "nvcc") or next(
        (nvcc for home in homes if home and (nvcc := shutil.which("nvcc", path=f"{home}/bin"))),
        None,
    )
    if found is None:
        return None, "there is no nvcc on the PATH or in CUDA_HOME"
    words = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", words)
    if release is None or tuple(map(int, release.groups())) < NVCC_MINIMUM:
        wanted = ".".join(map(str, NVCC_MINIMUM))
        return None, f"nvcc >= {wanted} is needed, found {release[0] if release else 'none'}"
    return Path(found), ".".join(release.groups())


def cuda_root(nvcc: Path) -> Path:
    """Return the folder of the CUDA toolkit that an nvcc (or a wrapper of it) belongs to."""
    words = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull],
        capture_output=True,
        text=True,
        check=False,
    ).stderr
    top = re.search(r"^#\$ TOP=(.+)$", words, re.M)
    return Path(top[1]).resolve() if top else nvcc.resolve().parent.parent


def cuda_archs() -> list[tuple[str, bool, bool]]:
    """Return (architecture, machine code?, PTX?) for each of PYFMT_CUDA_ARCHS."""
    archs = []
    for word in re.split(r"[;,\s]+", os.environ.get("PYFMT_CUDA_ARCHS") or CUDA_ARCHS):
        match = re.fullmatch(r"(\d+[af]?)(-real|-virtual)?", word.replace(".", ""))
        if match is None:
            raise PlatformError(
                f"PYFMT_CUDA_ARCHS: cannot read {word!r}; expected a list such as {CUDA_ARCHS!r} "
                "(-real: machine code only, -virtual: PTX only)"
            )
        archs.append((match[1], match[2] != "-virtual", match[2] != "-real"))
    return archs


def nvcc_command(nvcc: Path, cxx: Sequence[str]) -> list[str]:
    """Return the command that compiles a .cu file."""
    command = [str(nvcc), *NVCC_FLAGS, f"-ccbin={shutil.which(cxx[0])}"]
    for arch, machine, ptx in cuda_archs():
        kinds = [f"sm_{arch}"] * machine + [f"compute_{arch}"] * ptx
        command.append(f"-gencode=arch=compute_{arch},code=[{','.join(kinds)}]")
    return command


class Toolchain:
    """A C++ compiler with a cache of objects, named by source, command and compiler.

    All of a checkout's own paths are relative, so that a copy of it takes the objects along.
    """

    def __init__(self) -> None:
        self.sanitize = os.environ.get("PYFMT_SANITIZE", "0") not in ("", "0")
        self.flags = FLAGS + (SANITIZE + SANITIZER if self.sanitize else OPTIMIZE)
        if b"clang" not in self.identity:
            # GCC sees uninitialized values inside its own AVX-512 headers.
            self.flags += ["-Wno-maybe-uninitialized"]
        self.flags += shlex.split(os.environ.get("CXXFLAGS", ""))

    @cached_property
    def cxx(self) -> list[str]:
        asked = os.environ.get("CXX")
        for name in [asked] if asked else ["c++", "g++", "clang++"]:
            command = shlex.split(name)
            if shutil.which(command[0]):
                return command
        raise PlatformError(
            f"pyfmt needs a C++17 compiler and there is no {asked or 'c++, g++ or clang++'} here. "
            "Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: "
            "xcode-select --install) or set CXX to its path."
        )

    @cached_property
    def identity(self) -> bytes:
        return subprocess.run([*self.cxx, "--version"], capture_output=True, check=False).stdout

    def compile(
        self, source: Path, flags: Sequence[str] = (), compiler: Sequence[str] = ()
    ) -> Path:
        """Compile one file unless its object is newer than the source and all it includes.

        What the compiler said is kept beside the object (nvcc's resource report).
        """
        command = [*(compiler or (*self.cxx, *self.flags)), *flags]
        source = source.relative_to(ROOT)
        key = hashlib.sha256(self.identity + "\0".join([*command, str(source)]).encode())
        target = OBJECTS / f"{source.stem}-{key.hexdigest()[:12]}.o"
        if self._fresh(target):
            return target
        print(f"compiling {source}", flush=True)
        OBJECTS.mkdir(parents=True, exist_ok=True)
        draft = target.with_suffix(f".{os.getpid()}.o")
        words = self._run(
            [*command, "-MMD", "-MF", f"{draft}.d", "-c", str(source), "-o", str(draft)],
            quiet=bool(compiler),
        )
        target.with_suffix(".log").write_text(words)
        os.replace(f"{draft}.d", target.with_suffix(".d"))
        os.replace(draft, target)
        return target

    def link(self, objects: Sequence[Path], target: Path, flags: Sequence[str]) -> None:
        """Link a shared library, put in place in one step: a running process keeps its old one."""
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_suffix(f".{os.getpid()}.tmp")
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if MAC else ["-shared"]
        sanitizer = SANITIZER if self.sanitize else []
        objects_ = map(str, objects)
        self._run([*self.cxx, *shared, "-pthread", *sanitizer, *objects_, "-o", str(draft), *flags])
        os.replace(draft, target)

    @staticmethod
    def _fresh(target: Path) -> bool:
        listed = target.with_suffix(".d")
        if not (target.is_file() and listed.is_file()):
            return False
        # "x.o: a.cpp b.h \" with blanks in names escaped by a backslash.
        names = re.split(r"(?<!\\)\s+", listed.read_text().split(": ", 1)[1].replace("\\\n", " "))
        needed = [ROOT / name.replace("\\ ", " ") for name in names if name]
        made = target.stat().st_mtime_ns
        return all(file.is_file() and file.stat().st_mtime_ns <= made for file in needed)

    @staticmethod
    def _run(command: list[str], quiet: bool = False) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        if done.returncode:
            print(shlex.join(command), done.stdout + done.stderr, sep="\n", file=sys.stderr)
            raise CompileError(f"{command[0]} exited with {done.returncode}; its words are above")
        if done.stderr and not quiet:
            print(done.stderr, file=sys.stderr)
        return done.stderr


class BuildExt(build_ext):
    """Compile everything in one parallel pass, then link one library per extension."""

    def run(self) -> None:
        self.toolchain = Toolchain()
        torch, words = find_torch()
        if torch:
            print(f"pyfmt: building the NumPy side and the torch side (torch {words})", flush=True)
        else:
            print(
                f"pyfmt: building the NumPy side only: {words}. For the torch ops install torch "
                "first, then pyfmt with `pip install --no-build-isolation`.",
                flush=True,
            )
            self._leave_out(TORCH_OPS)
        self.torch = torch
        self.nvcc, reason = (None, "it needs the torch side") if torch is None else find_nvcc()
        if self.nvcc:
            print(f"pyfmt: building the GPU library (nvcc {reason})", flush=True)
        else:
            print(f"pyfmt: not building the GPU library: {reason}", flush=True)
            self._leave_out(TORCH_OPS_CUDA)
        super().run()

    def _leave_out(self, name: str) -> None:
        self.extensions = [e for e in self.extensions if e.name != name]
        if self.inplace:  # a library of an earlier build would serve old code
            (ROOT / self.get_ext_filename(name)).unlink(missing_ok=True)

    def get_ext_filename(self, fullname: str) -> str:
        # setuptools asks for both
        if fullname in NO_MODULES or f"pyfmt.{fullname}" in NO_MODULES:
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        compile_ = self.toolchain.compile
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            # The bindings first: they take longest.
            bindings = {
                ext.name: [
                    pool.submit(compile_, ROOT / source, self.compile_flags(ext.name))
                    for source in ext.sources
                ]
                for ext in self.extensions
            }
            gpu = sorted((CSRC / "cuda").glob("*.cu")) if self.nvcc else []
            nvcc = nvcc_command(self.nvcc, self.toolchain.cxx) if self.nvcc else []
            gpu_kernels = [pool.submit(compile_, source, (), nvcc) for source in gpu]
            kernels = list(pool.map(compile_, sorted((CSRC / "cpu").glob("*.cpp"))))
            for ext in self.extensions:
                target = Path(self.get_ext_fullpath(ext.name)).absolute()
                cuda = ext.name == TORCH_OPS_CUDA
                objects = [k.result() for k in gpu_kernels] if cuda else kernels
                objects = [*(b.result() for b in bindings[ext.name]), *objects]
                self.toolchain.link(objects, target, self.link_flags(ext.name))

    def compile_flags(self, name: str) -> list[str]:
        if name in NO_MODULES:
            major, minor = TORCH_MINIMUM
            target = f"0x{major:02x}{minor:02x}000000000000ULL"
            flags = [f"-isystem{self.torch / 'include'}", f"-DTORCH_TARGET_VERSION={target}"]
            if name == TORCH_OPS_CUDA:
                archs = ";".join(
                    f"{arch}-real" * machine + ";" * (machine and ptx) + f"{arch}-virtual" * ptx
                    for arch, machine, ptx in cuda_archs()
                )
                flags.append(f'-DPYFMT_CUDA_ARCHS="{archs}"')
            return flags
        include = Path(sysconfig.get_path("include"))
        if not (include / "Python.h").is_file():
            raise PlatformError(
                f"pyfmt needs the C headers of Python and {include}/Python.h is missing. Install "
                "them (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)."
            )
        try:
            import pybind11
        except ImportError:
            raise PlatformError(
                "pyfmt needs pybind11 to build and this Python has none. Run `pip install pybind11`"
                ", or leave out --no-build-isolation."
            ) from None
        return [f"-isystem{include}", f"-isystem{pybind11.get_include()}"]

    def link_flags(self, name: str) -> list[str]:
        if name not in NO_MODULES or MAC:
            return []
        # Named without a path: at run time the loader takes the libtorch_cpu that is there already.
        flags = [f"-L{self.torch / 'lib'}", "-Wl,--as-needed", "-ltorch_cpu"]
        if name == TORCH_OPS_CUDA:
            root = cuda_root(self.nvcc)
            flags += [f"-L{root / lib}" for lib in ("lib64", "lib")]
            flags += ["-lcudart_static", "-ldl", "-lrt"]
        return flags if self.toolchain.sanitize else [*flags, "-Wl,--no-undefined"]


class Build(build):
    """Start from an empty build/lib: a wheel holds nothing of an earlier build."""

    def run(self) -> None:
        if (ROOT / "build") in Path(self.build_lib).resolve().parents:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    ext_modules=[
        Extension(NATIVE, ["csrc/numpy_bindings.cpp"]),
        Extension(TORCH_OPS, ["csrc/torch_bindings.cpp", "csrc/torch_bindings_matmul.cpp"]),
        Extension(
            TORCH_OPS_CUDA,
            sorted(str(p.relative_to(ROOT)) for p in CSRC.glob("torch_bindings_cuda*.cpp")),
        ),
    ],
    cmdclass={"build": Build, "build_ext": BuildExt},
)
