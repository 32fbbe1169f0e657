"""What each ingredient of later papers adds to VLDD: the study of README.md, on Flickr8k with small towers.

    python -m tests.benchmarks.study 100 --image_root IMAGES --ann_root ANNOTATIONS --trunk_images CIFAR10_NPZ

runs, from the root of the repository, buffer.py once, distill.py for each row of `ROWS` and `HEADS`, and eval.py, which
puts all rows of equal networks beside random pairs, coresets and all data. Sets lie in runs/study/<pairs>/<row>, tables
and pages in runs/study/<pairs>/compare and compare_heads. What is there is not made again.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CONFIG = "configs/vldd/flickr8k_mini_study.yaml"
SIMILARITY = "--mini_batches consecutive --sim_type lowrank --sim_rank 10 --alpha 3 --loss_type WBCE"
LORS = f"--num_pairs {{less}} {SIMILARITY}"
# Row → the flags that it adds; {less} is one pair fewer, {most} and {rest} are three and two fifths of the pairs.
ROWS = {
    "vldd": "",
    "lors": f"{LORS} --mini_batch_size 20",
    "kmeans": "--pair_init kmeans",
    "starts": "--independent_starts",
    "ema": "--ema_decay 0.9",
    "shortcut": "--shortcut 4",
    "phases": "--num_pairs {most} {rest} --min_start_epoch 0 1 --max_start_epoch 2 3",
    "blend": "--blend 1",
}
TOWERS = "--image_trainable false --image_projection"  # RepBlend's: two heads on frozen trunks
# A step on heads costs a small part of one on trunks, so students can go five epochs of the experts' way.
FAR = "--iterations 200 --expert_epochs 5 --syn_steps 32 --max_start_epoch 3 --mini_batch_size 50"
HEADS = {
    "heads": FAR,
    "heads_lors": f"{FAR} {LORS}",
    "repblend": f"{FAR} {LORS} --blend 1",
    "heads_kmeans": f"{FAR} --pair_init kmeans",
    "heads_ema": f"{FAR} --ema_decay 0.9",
    "heads_starts": f"{FAR} --independent_starts",
    "heads_shortcut": f"{FAR} --shortcut 8",
    "heads_phases": f"{FAR} --num_pairs {{most}} {{rest}} --min_start_epoch 0 2 --max_start_epoch 2 4",
    "heads_blend": f"{FAR} --blend 1",
    "heads_short": "--iterations 200",
    "heads_best": f"{FAR} --shortcut 8 --ema_decay 0.9 --iterations 400 --eval_it 100",
}


def commands(pairs: int, data: list[str]) -> Iterator[tuple[Path, list[str]]]:
    """What each command leaves behind, and its words; `data` says where photographs and captions are."""
    home = Path("runs/study", str(pairs))
    numbers = {"less": pairs - 1, "most": pairs * 3 // 5, "rest": pairs - pairs * 3 // 5}
    for rows, towers, kind in ((ROWS, [], ""), (HEADS, TOWERS.split(), "_heads")):
        experts = Path(f"runs/study/buffers{kind}")
        shared = ["--config", CONFIG, *data, *towers]
        last = experts / "flickr/ConvNetD3W32/tfidf/expert_003/epoch_008.safetensors"
        yield last, ["buffer.py", *shared, "--buffer_path", str(experts), "--resume"]
        for name, flags in rows.items():
            own = ["--num_pairs", str(pairs), *flags.format(**numbers).split()]
            words = [*shared, "--buffer_path", str(experts), *own, "--save_dir", str(home / name), "--resume"]
            (steps,) = flags.rpartition("--iterations ")[2].split()[:1] if "--iterations" in flags else ["150"]
            yield home / name / f"distilled_{steps}.pt", ["distill.py", *words]
        sets = [f"{name}={home / name / 'distilled_best.pt'}" for name in rows]
        asked = ["--data", "random", "herding", "kcenter", "forgetting", "distilled", "full", "--num_pairs", str(pairs)]
        place = home / f"compare{kind}"
        words = [*shared, "--buffer_path", str(experts), "--compare", *sets, *asked, "--save_dir", str(place)]
        yield place / "result.json", ["eval.py", *words]


def main() -> None:
    if not sys.argv[1:]:
        sys.exit(__doc__)
    pairs, data = int(sys.argv[1]), sys.argv[2:]
    for done, words in commands(pairs, data):
        if not done.exists():
            print("python", *words)
            subprocess.run([sys.executable, *words], check=True)


if __name__ == "__main__":
    main()
