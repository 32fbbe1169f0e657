"""Judge data by the networks it trains: distilled pairs, as many random ones, or all there is.

    python eval.py --distilled OUT/distilled_best.pt --data random distilled full --num_eval 5
    python eval.py --compare VLDD=A/distilled_best.pt LoRS=B/distilled_best.pt --data random herding distilled full
    python eval.py --distilled OUT/distilled_best.pt --cross nf_resnet50+bert vit+bert

Reads what distill.py wrote (its data set and towers are recorded there; flags win); prints one table row a data set and
writes result.json. Other towers than the recorded ones make it a cross-architecture evaluation.
"""

import sys

from methods.command import command

if __name__ == "__main__":
    sys.exit(command("eval"))
