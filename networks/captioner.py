"""A vision-language model that answers one question about each image: LLaVA, or its like in the transformers library.

Each image has its own seed, and answers do not depend on the images beside it (up to rounding, which may tip a word):
a word is drawn by adding Gumbel noise of the image's own generator to the logits and taking the largest, which is a
draw from their softmax. Source: LLaVA v1.5 (Liu et al., CVPR 2024).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from networks.diffusion import TINY, is_hub_id
from networks.tiny import tiny_llava
from networks.weights import NO_CODE, from_folder_or_hub, load_transformer, quiet_transformers
from utils.errors import UserError
from utils.rng import seeded

if TYPE_CHECKING:
    from PIL.Image import Image

# Names of LLaVA's own code base → the same weights in the format of the transformers library.
RENAMED = {
    "liuhaotian/llava-v1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "liuhaotian/llava-v1.5-13b": "llava-hf/llava-1.5-13b-hf",
}
_IMAGE = "<image>"


def load_captioner(
    source: str,
    cache_dir: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    flag: str = "caption_model",
) -> Captioner:
    """The captioner of a hub id, a folder, or "tiny", which is made offline below `cache_dir` and says random words.

    UserError naming `--flag` where it is not to be had.
    """
    if source == TINY:
        source = str(tiny_llava(cache_dir))
    if source in RENAMED:
        print(f"{source} is in a format of its own; using {RENAMED[source]}, the same weights", file=sys.stderr)
        source = RENAMED[source]
    if source.startswith("liuhaotian/"):
        raise UserError(f"--{flag} {source} is in a format of its own; give one of llava-hf/, or {', '.join(RENAMED)}")
    folder = Path(source).expanduser()
    if not folder.is_dir() and not is_hub_id(source):
        raise UserError(f"no captioner at {source}; --{flag} takes a model's folder or hub id, or tiny")
    source = str(folder) if folder.is_dir() else source

    def load(local: bool) -> Captioner:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        net = load_transformer(AutoModelForImageTextToText, source, local, **_precision(dtype))
        with quiet_transformers(bars=not local):
            processor = AutoProcessor.from_pretrained(source, local_files_only=local, **NO_CODE)
        return Captioner(net.eval().requires_grad_(False).to(device), processor)

    with seeded(0):  # some versions draw a network before they load it
        what, remedy = f"the weights of {source}", f"pass --{flag} FOLDER or --{flag} tiny"
        return from_folder_or_hub(load, source, "captioner", what, remedy)


def _precision(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The option of `from_pretrained` for it, which was renamed in version 4.56 of the transformers library."""
    from transformers import __version__

    major, minor = (int(part) for part in __version__.split(".")[:2])
    return {"dtype" if (major, minor) >= (4, 56) else "torch_dtype": dtype}


class Captioner:
    """Answers questions about images."""

    def __init__(self, net: Any, processor: Any) -> None:
        self.net, self.processor = net, processor
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"  # answers begin where questions end
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    @torch.inference_mode()
    def __call__(
        self,
        images: Sequence[Image],
        questions: Sequence[str],
        seeds: Sequence[int] | None = None,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        top_p: float | None = None,
        num_beams: int = 1,
    ) -> list[str]:
        """The answer to each question about its image, without marks, stripped.

        temperature   0 takes the likeliest word each time; above, words are drawn, and need one seed an image
        top_p         draw from the likeliest words of this total probability only
        num_beams     width of the search for an answer; UserError for a width above 1 where words are drawn
        """
        if temperature and num_beams > 1:
            raise UserError(f"--num_beams {num_beams} searches and --temperature {temperature:g} draws; give one")
        drawn = [OwnDraws(seeds, temperature, top_p)] if temperature else []
        with quiet_transformers():
            inputs = self.processor(
                images=[image.convert("RGB") for image in images],
                text=[self._prompt(question) for question in questions],
                padding=True,
                return_tensors="pt",
            ).to(self.net.device, self.net.dtype)
            # The model's own settings may draw too; drawing is done above.
            greedy = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "num_beams": num_beams}
            tokens = self.net.generate(
                **inputs,
                **greedy,
                max_new_tokens=max_new_tokens,
                logits_processor=drawn,
                pad_token_id=self.processor.tokenizer.pad_token_id,
            )
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(answers, skip_special_tokens=True)]

    def _prompt(self, question: str) -> str:
        """A user's turn with the image, by the model's template; without one, LLaVA's."""
        question = question.replace(_IMAGE, "").strip()
        if getattr(self.processor, "chat_template", None) is None:
            return f"USER: {_IMAGE}\n{question} ASSISTANT:"
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        return self.processor.apply_chat_template([turn], add_generation_prompt=True)


class OwnDraws:
    """Adds noise to logits (B, V) so that the largest of a row is a draw from it, by that row's own generator."""

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float | None) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores.float() / self.temperature
        if self.top_p is not None:
            logits = logits.masked_fill(~_likeliest(logits, self.top_p), -torch.inf)
        drawn = [torch.empty(logits.shape[1]).exponential_(generator=generator) for generator in self.generators]
        return logits - torch.stack(drawn).log().to(logits.device)  # minus the log of an exponential is Gumbel


def _likeliest(logits: Tensor, top_p: float) -> Tensor:
    """Which words (B, V) bool make up the first `top_p` of the probability; the likeliest one always does."""
    ordered, order = logits.softmax(-1).sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.empty_like(before, dtype=torch.bool).scatter_(-1, order, before < top_p)
