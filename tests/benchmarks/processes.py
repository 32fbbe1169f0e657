"""How much sooner two processes have trained the same experts than one: `torchrun` of buffer.py.

    python -m tests.benchmarks.processes

Timed from the first snapshot to the last, so that starting Python does not count. Each process has one thread of a CPU,
or a GPU of its own: where there are not two of them, nothing is measured.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from methods import mtt
from tests.benchmarks.table import NOT_RUN, TITLES, Row, Scale, environment, judged, show

WHAT = "experts of two processes to one, throughput"
EXPERTS = (
    "--dataset digits --model ConvNetD2W32 --batch_size_train 32 --eval_freq 0 "
    "--num_experts {experts} --train_epochs {epochs} --seed 0"
)


def span(world: int, experts: int, epochs: int, device: str) -> float:
    """Seconds between the first snapshot of the first expert and the last of the last."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        words = ["buffer.py", "--method", "mtt", *EXPERTS.format(experts=experts, epochs=epochs).split()]
        words += ["--buffer_path", folder, "--device", device]
        done = subprocess.run([sys.executable, *launcher, *words], env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr}")
        times = [path.stat().st_mtime for path in Path(folder).rglob("epoch_*.safetensors")]
    return max(times) - min(times)


def rows(scale: Scale) -> list[Row]:
    if "buffer" not in getattr(mtt, "SHARED", ()):
        return [Row("processes", WHAT, NOT_RUN, "", "at least 1.7", None, "buffer.py works in one process")]
    places = torch.cuda.device_count() if scale.device == "cuda" else len(os.sched_getaffinity(0))
    if places < 2:
        return [Row("processes", WHAT, NOT_RUN, "", "at least 1.7", None, f"{places} of two {TITLES[scale.device]}s")]
    experts, epochs = scale.of((2, 1), (4, 10), (8, 50))
    one, two = (span(world, experts, epochs, scale.device) for world in (1, 2))
    note = f"{experts} experts of {epochs} epochs: {one:.1f} s and {two:.1f} s"
    return [judged("processes", WHAT, one / two, "x", at_least=1.7, note=note)]


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(environment(device))
    show(rows(Scale(device)))
