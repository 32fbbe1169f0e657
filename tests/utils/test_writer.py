"""Writing in the background: order, bounds, failures, and copies that do not follow the tensors."""

import threading
import time

import pytest
import torch

from utils.writer import HostCopy, Writer


def test_all_is_done_in_order_when_it_ends():
    done = []
    with Writer() as writer:
        for number in range(20):
            writer.submit(lambda number=number: (time.sleep(0.001), done.append(number)))
    assert done == list(range(20))


def test_the_work_goes_on_meanwhile_but_not_far_ahead():
    free, done = threading.Event(), []

    def job():
        free.wait(10)
        done.append(threading.current_thread() is threading.main_thread())

    with Writer(waiting=1) as writer:
        writer.submit(job)
        writer.submit(job)  # one is being done, one waits
        threading.Timer(0.2, free.set).start()
        began = time.monotonic()
        writer.submit(job)
        assert 0.1 < time.monotonic() - began < 5 and done[:1] == [False]
    assert done == [False] * 3


class Full(BaseException):
    """Stands for what may go wrong, even a kill."""


def fail():
    raise Full("the disk is full")


def test_a_job_that_fails_is_the_last():
    done = []
    with pytest.raises(Full, match="the disk is full"), Writer(waiting=1) as writer:
        writer.submit(fail)
        for number in range(10):
            writer.submit(lambda number=number: done.append(number))
    assert done == []


def test_a_failure_at_the_end_is_told():
    with pytest.raises(Full), Writer() as writer:
        writer.submit(fail)


def test_another_error_comes_first_and_what_was_handed_on_is_written():
    done = []
    with pytest.raises(KeyboardInterrupt), Writer() as writer:
        writer.submit(lambda: (time.sleep(0.05), done.append(1)))
        raise KeyboardInterrupt
    assert done == [1]
    with pytest.raises(KeyboardInterrupt), Writer() as writer:
        writer.submit(fail)
        raise KeyboardInterrupt


def test_copies_stay_as_they_were():
    tensor = torch.arange(3.0, requires_grad=True)
    tree = {"a": [tensor, None, (tensor.detach(), 2)], "b": "text"}
    copy = HostCopy(tree)
    with torch.no_grad():
        tensor += 1
    found = copy.get()
    assert found["a"][0].tolist() == found["a"][2][0].tolist() == [0, 1, 2] and not found["a"][0].requires_grad
    assert found["a"][1] is None and found["a"][2][1] == 2 and found["b"] == "text" and isinstance(found["a"][2], tuple)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_of_a_gpu_stay_as_they_were():
    tensor = torch.zeros(2**24, device="cuda")
    for step in range(20):
        tensor += 1
        if step == 9:
            copy = HostCopy({"a": tensor})
    assert (copy.get()["a"] == 10).all() and copy.get()["a"].is_pinned()
