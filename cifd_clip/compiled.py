"""Functions of many small operations, which a GPU runs as a few kernels."""

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch


class Compiled:
    """A function of tensors, compiled where the first of them is on a GPU.

    Without a compiler (no Triton, no C compiler) it runs as it is written, and says so once.

    Args:
        function: pure, of tensors of any number of rows.
        device_type: where it is compiled.
    """

    def __init__(self, function: Callable[..., Any], device_type: str = "cuda"):
        self.function, self.device_type = function, device_type
        self.usable = True

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        return torch.compile(self.function, dynamic=True)

    def __call__(self, *tensors: torch.Tensor) -> Any:
        """The function's result."""
        if not self.usable or tensors[0].device.type != self.device_type:
            return self.function(*tensors)
        try:
            return self._compiled(*tensors)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of Dynamo, Inductor or Triton
            result = self.function(*tensors)  # which a mistake in the function itself ends
            self.usable = False
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"{self.function.__name__} can't be compiled here and runs as many small kernels, "
                f"which costs some percent of a step ({type(error).__name__}: {reason})",
                stacklevel=2,
            )
            return result
