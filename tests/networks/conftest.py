"""No test here may reach a model hub, and none may wait for one."""

import pytest
import torch


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory, monkeypatch):
    """An empty hub cache, so that a test means the same on a machine that has weights."""
    from huggingface_hub import constants

    empty = str(tmp_path_factory.mktemp("hub"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", empty)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small gain nothing from threads, and threads that wait for each other on a busy machine lose."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
