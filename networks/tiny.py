"""A latent diffusion model, a captioner and a CLIP of at most a few megabytes: no download, only folders.

They have the parts, and the formats, of Stable Diffusion v1.5, of LLaVA v1.5 and of CLIP, so one loading code serves
both. Their weights are drawn from fixed seeds (by other versions of the libraries, other weights), but for three parts.
The text encoders say which words a caption has, and every word of `WORDS` is one token; the denoiser's target is the
velocity, as in Stable Diffusion 2: with both it follows captions after some hundred steps, with either alone it hardly
does. The autoencoder begins as one that keeps the mean colour of every 8 × 8 pixels, which a minute of training from
random weights does not reach, and CLIP's vision tower as one that measures waves, by which shapes differ. The
captioner's sentences are words by chance.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from networks.weights import quiet_transformers
from utils.files import digest
from utils.folders import made_folder
from utils.rng import derive_seed, seeded

_SEED = 0  # of the weights; another one is another model
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'-!?\"():;/&%"
_START, _END = "<|startoftext|>", "<|endoftext|>"
# Common words of captions of drawn things and of everyday photographs. All else is spelt letter by letter.
_COMMON = """
    a an the and or of in on at to with is are was it its this that has have which by near over under beside there
    red orange yellow green blue cyan purple violet pink magenta brown black white gray grey teal navy olive maroon lime
    mint cream dark light bright pale small large big tiny medium little huge
    circle disc disk ring square diamond triangle cross star bar stripe stripes dot dots heart hexagon pentagon ellipse
    oval rectangle box crescent arrow plus wave moon wedge hoop shape shapes figure
    left right top bottom upper lower middle centre center corner side edge
    background plain canvas picture image photo drawing painting cartoon anime sits stands drawn filled outline flat
    dog cat bird fish horse car truck ship plane airplane boat house tree grass sky water flower man woman person
    colour color colours colors coloured colored round one two three four
"""
WORDS = tuple(_COMMON.split())
# The smallest of Stable Diffusion's parts: 8 pixels a latent, as there. One group of channels (there 32), for `_carry`.
_VAE = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 1,
    "sample_size": 64,
    "scaling_factor": 0.18215,
}
_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
}
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LANGUAGE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LEVEL, _GAIN = 4.0, 8.0  # of the constant channels beside the colours; of colours in latents, whose variance is then 1
# The tiny CLIP: one patch, the picture, as `_keep_waves` wants it. 4 · 45 channels: three colours, and what they share.
_WAVES = tuple((i, j) for i in range(9) for j in range(9) if i + j <= 8)
_CLIP_LAYER = {"num_hidden_layers": 1, "num_attention_heads": 4}
_CLIP_VISION = {"hidden_size": 4 * len(_WAVES), "intermediate_size": 8 * len(_WAVES), **_CLIP_LAYER}
_CLIP_VISION |= {"image_size": 32, "patch_size": 32}
_CLIP_TEXT = {"hidden_size": 64, "intermediate_size": 128, **_CLIP_LAYER}
_CLIP_DIM = 64
_PIXELS, _PATCH = 28, 14  # the captioner sees (28 / 14)² = 4 patches
_MARKS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")


def tiny_diffusion(cache_dir: Path | str) -> Path:
    """The folder of the tiny diffusion model below `cache_dir`, made there once."""
    words = _byte_pairs(WORDS)
    name = digest("tiny diffusion 4", _SEED, words, _LETTERS, _VAE, _UNET, _TEXT, _NOISE)[:12]
    return _made(Path(cache_dir) / f"tiny_diffusion_{name}", lambda folder: _write_diffusion(folder, words))


def tiny_llava(cache_dir: Path | str, words: Sequence[str] = WORDS) -> Path:
    """The folder of the tiny captioner below `cache_dir`, made there once. It says, and understands, only `words`."""
    name = digest("tiny llava 1", _SEED, list(words), _VISION, _LANGUAGE, _PIXELS, _PATCH)[:12]
    return _made(Path(cache_dir) / f"tiny_llava_{name}", lambda folder: _write_llava(folder, words))


def tiny_clip(cache_dir: Path | str) -> Path:
    """The folder of the tiny CLIP below `cache_dir`, made there once: it knows nothing yet, and learns quickly."""
    words = _byte_pairs(WORDS)
    name = digest("tiny clip 2", _SEED, words, _CLIP_VISION, _CLIP_TEXT, _CLIP_DIM)[:12]
    return _made(Path(cache_dir) / f"tiny_clip_{name}", lambda folder: _write_clip(folder, words))


def _made(folder: Path, write: Callable[[Path], None]) -> Path:
    with quiet_transformers():
        return made_folder(folder, write, "the model is made anew")


def _write_diffusion(folder: Path, merges: list[tuple[str, str]]) -> None:
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = _write_tokenizer(folder / "tokenizer", merges)
    marks = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=77, **_TEXT, **marks)
    with seeded(derive_seed(_SEED, "tiny diffusion")):
        parts = {"text_encoder": CLIPTextModel(config), "vae": AutoencoderKL(**_VAE)}
        parts["unet"] = UNet2DConditionModel(**_UNET)
        _keep_words(parts["text_encoder"], (tokenizer.bos_token_id, tokenizer.eos_token_id))
        _keep_colours(parts["vae"])
    pipeline = StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(**_NOISE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


@torch.no_grad()
def _keep_words(encoder: nn.Module, marks: Sequence[int]) -> None:
    """Make a text encoder's states at and after a caption's end the mean of its words, whatever their order.

    Most of 77 states are behind the end. As drawn they tell nothing, and what a denoiser attends to drowns in them.
    """
    for name, weight in encoder.named_parameters():
        if "token_embedding" in name:
            nn.init.normal_(weight)
            weight[list(marks)] = 0  # the marks, with which captions are filled up, add nothing
        elif any(part in name for part in ("position_embedding", "q_proj", "k_proj", "fc2")):
            nn.init.zeros_(weight)  # attention to all that precedes alike, and no more layers than that
        elif name.endswith(("v_proj.weight", "out_proj.weight")):
            nn.init.eye_(weight)


@torch.no_grad()
def _keep_colours(vae: Any) -> None:
    """Start an autoencoder as one whose latents are `_GAIN` times the mean colours of squares.

    The first eight channels, from end to end, are +r, −r, +g, −g, +b, −b and a constant ± `_LEVEL`, so large that the
    norm divides all pictures by about the same; the activation silu passes x as silu(x) − silu(−x). All others are
    random and small: room to learn. The posterior is nearly certain, as Stable Diffusion's.
    """
    signs = torch.tensor([1.0, -1.0])
    mean, blend = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.5, 0.25])
    for name, module in vae.named_modules():
        kind = name.rpartition(".")[2]
        if kind in ("conv2", "to_out"):  # the ends of residual branches
            end = module[0] if kind == "to_out" else module
            nn.init.zeros_(end.weight)
            nn.init.zeros_(end.bias)
        elif kind == "conv_shortcut":
            _carry(module, torch.ones(1, 1))
        elif "samplers.0.conv" in name:
            taps = mean if "downsamplers" in name else blend
            _carry(module, taps[:, None] * taps)
    for part, entry, leave in ((vae.encoder, 1.0, _GAIN), (vae.decoder, 1 / _GAIN, 1.0)):
        _carry(part.conv_in)
        part.conv_in.bias[6:8] = signs * _LEVEL
        # What the norm divides by, for colours of a variance of 0.5.
        nn.init.constant_(
            part.conv_norm_out.weight, (2 * (_LEVEL**2 + 3 * 0.5) / len(part.conv_norm_out.weight)) ** 0.5
        )
        part.conv_out.weight[:3] = 0
        part.conv_out.weight[3:] *= 2 * leave
        nn.init.zeros_(part.conv_out.bias)
        for colour in range(3):
            pair = slice(2 * colour, 2 * colour + 2)
            part.conv_in.weight[pair, colour, 1, 1] = signs * entry
            part.conv_out.weight[colour, pair, 1, 1] = signs * leave
    nn.init.zeros_(vae.quant_conv.bias)
    nn.init.zeros_(vae.post_quant_conv.bias)
    vae.quant_conv.bias[4:] = -4.0  # the logarithm of the variance; colours have one of about 30
    vae.quant_conv.weight.copy_(torch.eye(8)[:, :, None, None])
    vae.quant_conv.weight[4:] = 0
    vae.post_quant_conv.weight.copy_(torch.eye(4)[:, :, None, None])


def _carry(conv: nn.Conv2d, tap: Tensor | None = None) -> None:
    """Make a convolution pass each of the first eight channels through the filter `tap` (without one: not at all)."""
    conv.weight[:8] = 0
    conv.weight[8:] *= 0.1
    nn.init.zeros_(conv.bias)
    if tap is not None:
        conv.weight[range(8), range(8)] = tap


def _byte_pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    """The merges that make one token of every word: the most frequent pair first, of equals the first by alphabet."""
    spelt = [[*word[:-1], f"{word[-1]}</w>"] for word in dict.fromkeys(words)]
    merges = []
    while counts := Counter(pair for parts in spelt for pair in pairwise(parts)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spelt = [_merged(parts, best) for parts in spelt]
    return merges


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """A word's parts, with every occurrence of a pair made one part, from the left."""
    out: list[str] = []
    for part in parts:
        # A part that was merged just now is longer than the pair's first, so it is not taken twice.
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def _write_tokenizer(folder: Path, merges: list[tuple[str, str]], letters: Sequence[str] = _LETTERS) -> Any:
    """CLIP's tokenizer over letters and the words of `merges`, from files that every version of the library reads."""
    from transformers import CLIPTokenizer

    entries = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), _START, _END]
    vocabulary = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    marks = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **marks}
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(marks), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def _write_clip(folder: Path, merges: list[tuple[str, str]]) -> None:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    # With all 256 bytes nothing is unknown: the unknown token is the end's, behind which a sentence is not read.
    tokenizer = _write_tokenizer(folder, merges, sorted(ByteLevel.alphabet()))
    marks = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config={"vocab_size": len(tokenizer), "max_position_embeddings": 77, **_CLIP_TEXT, **marks},
        vision_config=_CLIP_VISION,
        projection_dim=_CLIP_DIM,
    )
    with seeded(derive_seed(_SEED, "tiny clip")):
        net = CLIPModel(config)
        _keep_words(net.text_model, (tokenizer.bos_token_id, tokenizer.eos_token_id))
        _keep_waves(net.vision_model)
    net.save_pretrained(folder)
    side = _CLIP_VISION["image_size"]
    square = {"height": side, "width": side}
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square).save_pretrained(folder)


@torch.no_grad()
def _keep_waves(vision: Any) -> None:
    """Start a vision tower as one that says how much of which wave a picture has, whatever its colours.

    The patch is 45 cosine waves in each of three colours. Attention copies it to the class token, and the perceptron
    adds the absolute values of the three to channels of their own. By those a linear layer tells the toy's shapes
    apart, which from random weights hundreds of its pictures do not teach; they only teach colours.
    """
    patch, layer = vision.embeddings.patch_embedding.weight, vision.encoder.layers[0]
    for name, weight in vision.named_parameters():
        if any(part in name for part in ("class_embedding", "position_embedding", "q_proj", "k_proj")):
            nn.init.zeros_(weight)
        elif "fc" in name:
            weight *= 0.3
    middle, count = (torch.arange(patch.shape[-1]) + 0.5) * torch.pi / patch.shape[-1], len(_WAVES)
    patch.zero_()
    for colour in range(3):
        for at, (i, j) in enumerate(_WAVES, colour * count):
            # High waves are louder, for pictures have less of them. All are so loud that training moves them little.
            loud = 8 * max(1, i * i + j * j) ** 0.75
            patch[at, colour] = loud * torch.cos(i * middle)[:, None] * torch.cos(j * middle)
    nn.init.eye_(layer.self_attn.v_proj.weight)
    nn.init.eye_(layer.self_attn.out_proj.weight).mul_(2)  # attention is the mean of the patch and of an empty token
    signed = torch.eye(3 * count)
    into, out = layer.mlp.fc1.weight, layer.mlp.fc2.weight
    into[: 6 * count] = 0
    into[: 6 * count, : 3 * count] = 2 * torch.cat([signed, -signed])
    out[3 * count :, : 6 * count] = 0.5 * torch.eye(count).repeat(1, 6)


def _write_llava(folder: Path, words: Sequence[str]) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    processor = _llava_processor(words)
    tokenizer = processor.tokenizer
    marks = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=_PIXELS, patch_size=_PATCH, **_VISION),
        text_config=LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, **_LANGUAGE, **marks),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    with seeded(derive_seed(_SEED, "tiny llava")):
        model = LlavaForConditionalGeneration(config)
    # Random weights would as soon say <pad> as a word, nothing at all, or words without end.
    model.generation_config.suppress_tokens = tokenizer.convert_tokens_to_ids([m for m in _MARKS if m != "</s>"])
    model.generation_config.min_new_tokens = 3
    model.generation_config.exponential_decay_length_penalty = (6, 1.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _llava_processor(words: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    entries = [*_MARKS, *dict.fromkeys([*words, ".", ",", "?", ":", "user", "assistant"])]
    learned = Tokenizer(models.WordLevel({entry: index for index, entry in enumerate(entries)}, unk_token="<unk>"))
    learned.normalizer, learned.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learned,
        padding_side="left",
        additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"],
        **dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), _MARKS[:4], strict=True)),
    )
    square = {"height": _PIXELS, "width": _PIXELS}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": _PIXELS}, crop_size=square),
        tokenizer=tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
