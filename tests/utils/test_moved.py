"""Deterministic operations: what is switched on, what is refused, and that all is as before in the end."""

import os

import pytest
import torch

from utils.devices import deterministic
from utils.errors import UserError

CUDNN = torch.backends.cudnn


def state():
    return torch.are_deterministic_algorithms_enabled(), CUDNN.deterministic, CUDNN.benchmark


def test_on_within_the_block_only(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(CUDNN, "benchmark", True)
    before = state()
    with deterministic(False):
        assert state() == before and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with pytest.raises(ZeroDivisionError), deterministic():
        assert state() == (True, True, False) and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        raise ZeroDivisionError
    assert state() == before


@pytest.mark.parametrize(
    "message, what",
    [
        ("index_add_cuda_ does not have a deterministic implementation, but you set 'x'. You can", "index_add_cuda_"),
        ("Deterministic behavior was enabled with either `x` or `y`, but this operation", "an operation of CUDA"),
    ],
)
def test_what_has_no_such_way_is_told_in_one_line(message, what):
    said = f"^{what} may give other bits each time; leave out --deterministic, or give --device cpu$"
    with pytest.raises(UserError, match=said), deterministic():
        raise RuntimeError(message)
    with pytest.raises(RuntimeError, match="another"), deterministic():
        raise RuntimeError("another. deterministic")


def test_an_operation_that_torch_refuses():
    """One of those that have no deterministic way on a CPU either."""
    with pytest.raises(UserError, match=r"^put_ may give other bits each time"), deterministic():
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]), accumulate=False)
