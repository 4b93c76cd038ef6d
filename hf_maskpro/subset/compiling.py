"""Functions on whole layers, fused by `torch.compile` where a compiler works."""

import atexit
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from types import FunctionType
from typing import Any

import torch


logger = logging.getLogger(__name__)

# Smaller layers take less time than compiling for them.
SMALLEST_COMPILED = 1 << 14

_SECONDS_OF_SILENCE = 2.0


def _keep_kernels_private() -> None:
    """
    Give torch's compiler a cache of the user's own: it reads pickles and libraries from it, and by default that is a
    folder that any user of the machine may have made first.
    """
    # Only here, since it takes a second to import.
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # What torch has set itself, for somebody else's kernels, was not chosen by anybody.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) != default_cache_dir():
        return
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = cache / "hf_maskpro" / "inductor"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        known = folder.lstat()
        private = known.st_uid == os.getuid() and not known.st_mode & 0o022 and os.access(folder, os.W_OK)
    # No home, none to write to, or no user ids, as on Windows.
    except (OSError, RuntimeError, AttributeError):
        private = False
    if not private:
        folder = Path(tempfile.mkdtemp(prefix="hf_maskpro-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def _on_gpu(tensors: list[torch.Tensor]) -> bool:
    return any(tensor.is_cuda for tensor in tensors)


class Kernel:
    """A function that is compiled for large layers, and runs eagerly for small ones or where no compiler works."""

    compiles = True

    def __init__(self, function: Callable[..., Any], name: str, layout: tuple[int, int] = (1, 1)):
        self.function = function
        self.name = name
        self.layout = layout
        # torch.compile counts recompilations by code object, and kernels of several patterns would share one.
        function.__code__ = function.__code__.replace(co_name=name)
        _keep_kernels_private()
        self.compiled: Callable[..., Any] | None = torch.compile(function, dynamic=True, fullgraph=True)
        self.by_shape: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self.met: set[tuple[Any, ...]] = set()

    @torch.no_grad()
    def __call__(self, groups: int, *args: Any) -> Any:
        if not Kernel.compiles or not self.compiled or groups < SMALLEST_COMPILED:
            return self.function(*args)
        timer = None
        tensors = [t for arg in args for t in (arg if isinstance(arg, list) else [arg]) if isinstance(t, torch.Tensor)]
        shapes = tuple(tensor.shape for tensor in tensors) if _on_gpu(tensors) else None
        if (shape_class := (shapes, *self._shape_class(groups, tensors))) not in self.met:
            self.met.add(shape_class)
            line = f"compiling the mask kernel {self.name} (up to a minute), or loading it from an earlier run ..."
            timer = Timer(_SECONDS_OF_SILENCE, logger.warning, [line])
            timer.start()
        try:
            return self.compiled(*args) if shapes is None else self._compiled_for(shapes)(*args)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            self.compiled = None
            warnings.warn(f"the mask kernel {self.name} met too many kinds of layers to compile for all", stacklevel=3)
        except (torch._dynamo.exc.BackendCompilerFailed, torch._inductor.exc.InductorError) as error:
            Kernel.compiles = False
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"masks are computed without torch.compile, about 20x slower: {reason}", stacklevel=3)
        finally:
            if timer is not None:
                timer.cancel()
        return self.function(*args)

    def _compiled_for(self, shapes: tuple[torch.Size, ...]) -> Callable[..., Any]:
        """
        The kernel for a layer shape on a GPU. There divisions by sizes that are known are multiplications, and a model
        has few shapes; on a CPU, where it takes longer to compile, one kernel serves all.
        """
        if shapes not in self.by_shape:
            known = self.function
            code = known.__code__.replace(co_name=f"{self.name} {len(self.by_shape)}")
            function = FunctionType(code, known.__globals__, code.co_name, known.__defaults__, known.__closure__)
            self.by_shape[shapes] = torch.compile(function, dynamic=False, fullgraph=True)
        return self.by_shape[shapes]

    def _shape_class(self, groups: int, tensors: list[torch.Tensor]) -> tuple[Any, ...]:
        """What the calls that one compiled kernel serves have in common: all but sizes, and padding of rows."""
        digits, size = self.layout
        padded = [tensor.numel() // size * digits != groups for tensor in tensors if tensor.dtype == torch.uint8]
        return (*padded, *((tensor.dtype, tensor.device, tensor.is_contiguous()) for tensor in tensors))
