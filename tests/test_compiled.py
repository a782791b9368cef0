"""Compiling is a way to compute: without a compiler, all is as it was, and that is said once."""

import warnings

import pytest
import torch

from cifd_clip.compiled import Compiled


def squares(values: torch.Tensor) -> torch.Tensor:
    return (values * values).sum(0)


def test_without_a_compiler_a_function_runs_as_written_and_says_so_once():
    function, values = Compiled(squares, "cpu"), torch.randn(4, 3)
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.warns(UserWarning, match="^squares can't be compiled here .*no-such") as said:
            assert torch.equal(function(values), squares(values))
        assert len(said) == 1 and "\n" not in str(said[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(function(values[:2]), squares(values[:2]))


def test_a_mistake_in_the_function_is_not_taken_for_a_missing_compiler():
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Compiled(lambda a, b: a @ b, "cpu")(torch.ones(2, 3), torch.ones(2, 3))
