"""Prepare what distillation consumes: for captioned images, trajectories of expert networks trained on all of them.

    python buffer.py --dataset=flickr --train_epochs=10 --num_experts=20 --image_encoder=nfnet --text_encoder=bert \
        --buffer_path=BUFFERS --image_root=IMAGES --ann_root=ANNOTATIONS

Reads images and annotations (`--image_root`, `--ann_root`); writes snapshots and manifest.json to
BUFFERS/<dataset>/<image_encoder>/<text_encoder>. `--resume` goes on where a killed run stopped.
"""

import sys

from methods.command import command

if __name__ == "__main__":
    sys.exit(command("buffer"))
