"""--memory_budget and --pull through distill.py: what a run will take is told first, and all ways learn the same."""

import re

import pytest
import torch

from methods.command import command
from tests.test_processes import CPU, IMAGES, LOOP, PAIRS, POSTER, RATES
from tests.test_resume_mtt import write_data

FEW = ("--num_experts", "1", "--train_epochs", "2")
STEPS = ("--iterations", "2", "--eval_it", "0", *LOOP[LOOP.index("--syn_steps") :][2:], "--syn_steps", "3")
SOON = ("--num_eval", "1", "--eval_steps", "2")
KINDS = {  # flags of buffer.py (None: it has nothing to do), of both, of distill.py
    "mtt": ((*FEW, "--batch_train", "8"), ("--method", "mtt", *IMAGES), ("--lr_img", "10", *STEPS)),
    "vldd": (FEW, ("--method", "vldd", *PAIRS), (*RATES, "--num_pairs", "6", *STEPS)),
    "podd": (
        None,
        ("--method", "podd", *CPU, "--dataset", "npz", "--model", "ConvNetD1W8", *POSTER),
        ("--max_outer_steps", "2", "--window", "2", "--totwindow", "3", "--batch_size", "8", "--test_freq", "0", *SOON),
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def prepared(request, tmp_path_factory):
    """What distill.py takes in this folder, where buffer.py has been."""
    root = tmp_path_factory.mktemp(request.param)
    write_data(root / "data.npz")
    experts, shared, own = KINDS[request.param]
    shared = (*shared, *(() if request.param == "vldd" else ("--data_path", root / "data.npz")))
    if request.param == "vldd":
        shared = (*shared, "--cache_dir", root / "cache")
    place = () if experts is None else ("--buffer_path", root / "buffers")
    if experts is not None:
        assert command("buffer", [str(word) for word in (*shared, *place, *experts)]) == 0
    return root, (*shared, *place, *own)


def learned(prepared, name, capsys, *flags):
    """Every tensor that was learned, and the line about the inner loop."""
    root, words = prepared
    where = "--outdir" if "podd" in words else "--save_dir"
    assert command("distill", [str(word) for word in (*words, where, root / name, *flags)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("inner loop:")]
    state = torch.load(root / name / "checkpoint.pt", weights_only=True)["learned"]
    tensors = [
        value
        for value in torch.utils._pytree.tree_leaves(state)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]
    return torch.cat([value.flatten() for value in tensors]), told


def test_every_way_learns_the_same_and_says_so_first(prepared, capsys):
    plain, (line,) = learned(prepared, "plain", capsys, "--mode", "unroll")
    whole, (all_kept,) = learned(prepared, "kept", capsys)
    least, (one_kept,) = learned(prepared, "least", capsys, "--memory_budget", "1e-6")
    forward, (pulled,) = learned(prepared, "forward", capsys, "--memory_budget", "1e-6", "--pull", "forward")
    for found in (whole, least, forward):
        assert (found - plain).norm() < 1e-5 * plain.norm()
    numbers = [int(re.search(r"graphs of (\d+) kept", said)[1]) for said in (line, all_kept, one_kept, pulled)]
    assert numbers[0] == numbers[1] > 1 and numbers[2:] == [1, 1]
    assert "more than --memory_budget" in one_kept and "more than" not in all_kept and "not possible" not in pulled


def test_idle_ways_are_told(prepared, capsys):
    learned(prepared, "idle", capsys, "--mode", "unroll")
    root, words = prepared
    where = "--outdir" if "podd" in words else "--save_dir"
    flags = ("--mode", "unroll", "--pull", "forward", "--memory_budget", "1", where, root / "idle", "--resume")
    assert command("distill", [str(word) for word in (*words, *flags)]) == 0
    said = capsys.readouterr().out
    assert "--pull" in said and "--memory_budget" in said and "note:" in said
