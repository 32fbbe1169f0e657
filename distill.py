"""Learn a small set that trains a network as the real data does.

    python distill.py --dataset=flickr --syn_steps=8 --expert_epochs=1 --max_start_epoch=2 --lr_img=1000 --lr_txt=1000 \
        --lr_lr=1e-02 --num_queries 100 --buffer_path=BUFFERS --image_root=IMAGES --ann_root=ANNOTATIONS --save_dir=OUT

Reads the trajectories of buffer.py; writes distilled_<step>.pt, distilled_best.pt, log.jsonl, pictures and report.html
to OUT. `--resume` goes on where a killed run stopped.
"""

import sys

from methods.command import command

if __name__ == "__main__":
    sys.exit(command("distill"))
