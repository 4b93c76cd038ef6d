"""Functions on whole layers, fused by `torch.compile` where a compiler works."""

import logging
import warnings
from collections.abc import Callable
from threading import Timer
from typing import Any

import torch


logger = logging.getLogger(__name__)

# Smaller layers take less time than compiling for them.
SMALLEST_COMPILED = 1 << 14

_SECONDS_OF_SILENCE = 2.0


class Kernel:
    """A function that is compiled for large layers, and runs eagerly for small ones or where no compiler works."""

    compiles = True

    def __init__(self, function: Callable[..., Any], name: str, layout: tuple[int, int] = (1, 1)):
        self.function = function
        self.name = name
        self.layout = layout
        # torch.compile counts recompilations by code object, and kernels of several patterns would share one.
        function.__code__ = function.__code__.replace(co_name=name)
        self.compiled: Callable[..., Any] | None = torch.compile(function, dynamic=True, fullgraph=True)
        self.met: set[tuple[Any, ...]] = set()

    @torch.no_grad()
    def __call__(self, groups: int, *args: Any) -> Any:
        if not Kernel.compiles or not self.compiled or groups < SMALLEST_COMPILED:
            return self.function(*args)
        timer = None
        if (shape_class := self._shape_class(groups, args)) not in self.met:
            self.met.add(shape_class)
            line = f"compiling the mask kernel {self.name} (up to a minute), or loading it from an earlier run ..."
            timer = Timer(_SECONDS_OF_SILENCE, logger.warning, [line])
            timer.start()
        try:
            return self.compiled(*args)
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

    def _shape_class(self, groups: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the calls that one compiled kernel serves have in common: all but sizes, and padding of rows."""
        tensors = [t for arg in args for t in (arg if isinstance(arg, list) else [arg]) if isinstance(t, torch.Tensor)]
        digits, size = self.layout
        padded = [tensor.numel() // size * digits != groups for tensor in tensors if tensor.dtype == torch.uint8]
        return (*padded, *((tensor.dtype, tensor.device, tensor.is_contiguous()) for tensor in tensors))
