"""What the CPU at hand can do, and C++ for it, compiled at first use."""

import ctypes
import os
import shlex
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch


def compiled(source: Path, job: str) -> ctypes.CDLL:
    """
    A C++ file as a library, with OpenMP; it takes a second.

    Args:
        source (`Path`): The file, whose functions are `extern "C"`.
        job (`str`): What they do, a plural, for the error.

    Returns:
        `ctypes.CDLL`: The library.

    Raises:
        `ValueError`: if there is no compiler (`g++`, or what `CXX` names), or it cannot compile this.
    """
    compiler = os.environ.get("CXX") or "g++"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "library.so"
        options = ["-xc++", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-o", str(output), "-"]
        try:
            subprocess.run(
                [*shlex.split(compiler), *options],
                check=True,
                capture_output=True,
                text=True,
                input=source.read_text(),
            )
            return ctypes.CDLL(str(output))
        except FileNotFoundError as error:
            raise ValueError(f"{job} are compiled at first use, and {compiler} is not there.") from error
        except subprocess.CalledProcessError as error:
            exits = f"{compiler} exits with {error.returncode}"
            reason = next((line for line in error.stderr.splitlines() if "error" in line), exits)
            raise ValueError(f"{job} cannot be compiled here: {reason}") from error
        except OSError as error:
            raise ValueError(f"{job} cannot be compiled here: {error}") from error


def compiled_or_none(source: Path, job: str) -> ctypes.CDLL | None:
    """[`compiled`], or after a warning `None`, for work that plain torch can do as well."""
    try:
        return compiled(source, job)
    except ValueError as error:
        warnings.warn(f"plain torch takes several times as long: {error}", stacklevel=3)
        return None


def multiplies_in(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products in a dtype; without, they take many times as long as float32."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    # What torch has besides is plain loops.
    if not torch.backends.mkldnn.is_available():
        return False
    is_bfloat16 = dtype == torch.bfloat16
    operators = torch.ops.mkldnn
    return bool(operators._is_mkldnn_bf16_supported() if is_bfloat16 else operators._is_mkldnn_fp16_supported())
