"""Frozen text encoders: captions → sentence embeddings (C, D), computed once and kept on disk.

`bert`, `distilbert` and `clip` are the published ones (VLDD, LoRS); a local folder or a hub id is any other encoder of
the transformers library; `tfidf` needs no download: it is learned from the training captions. Nothing is loaded
before the first embedding is asked for.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from networks.towers import CLIP, FROZEN_SEED, TowerConfig
from networks.weights import (
    NO_CODE,
    from_cache_or_hub,
    from_folder_or_hub,
    load_state,
    load_transformer,
    read_state,
)
from utils.errors import UserError
from utils.files import digest
from utils.progress import progress
from utils.registry import nearest
from utils.rng import derive_seed, seeded

if TYPE_CHECKING:
    from torch import nn

HUB_IDS = {"bert": "bert-base-uncased", "distilbert": "distilbert-base-uncased", "clip": CLIP}
LSA = ("tfidf", "lsa")
_READ = 10_000  # characters of a caption that a vocabulary is learned from
BATCH = 128  # captions a forward pass
_RENAMED = {"gamma": "weight", "beta": "bias"}
SPREAD = 0.5  # standard deviation of tfidf embeddings, about that of BERT's [CLS] (0.53), so that the same rates suit


class TextEncoder(Protocol):
    """What every text encoder offers."""

    @property
    def width(self) -> int:
        """D."""

    @property
    def fingerprint(self) -> str:
        """A digest of all that determines the embeddings."""

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """Embeddings (C, D) float32 of C captions."""


def build_text_encoder(
    cfg: TowerConfig, train_captions: Callable[[], list[str]], device: torch.device | str = "cpu"
) -> TextEncoder:
    """The text encoder of `cfg`.

    train_captions   called where the encoder, or its vocabulary, has to be learned
    UserError (here or at the first use) for an encoder that is unknown or not to be had.
    """
    if cfg.text_encoder.lower() in LSA:
        if cfg.text_weights:
            raise UserError(f"--text_encoder {cfg.text_encoder} is learned from the captions; drop --text_weights")
        return LsaEncoder(train_captions, cfg.text_dim)
    return TransformerEncoder(cfg, train_captions, device)


class LsaEncoder:
    """Latent semantic analysis: tf-idf of words, projected on its first `dim` singular directions.

    Embeddings are centred on the training captions, then scaled to length 0.5 · √D, so a component spreads by about
    0.5. (Measured on Flickr8k, captions asking for captions of the same picture: whitening and word pairs do worse.)
    """

    def __init__(self, train_captions: Callable[[], list[str]], dim: int) -> None:
        self._train_captions, self.dim = train_captions, dim

    @cached_property
    def fingerprint(self) -> str:
        # Of what is put in, not of the fitted matrix: that differs in its last bits between machines.
        return digest("lsa 1", self.dim, SPREAD, self._captions)

    @cached_property
    def width(self) -> int:
        return len(self._fitted[1].components_)

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        words, svd, centre = self._fitted
        points = svd.transform(words.transform(captions))
        points -= centre
        length = np.linalg.norm(points, axis=1, keepdims=True)
        points *= SPREAD * np.sqrt(points.shape[1]) / np.maximum(length, 1e-12)
        return points.astype(np.float32)

    @cached_property
    def _captions(self) -> list[str]:
        return list(self._train_captions())

    @cached_property
    def _fitted(self) -> tuple[Any, Any, np.ndarray]:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        # Every run of letters and digits is a word, also `a` and `2`; a word's second mention counts for less.
        words = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+", dtype=np.float64)
        try:
            table = words.fit_transform(self._captions)
            svd = TruncatedSVD(min(self.dim, *table.shape), n_iter=7, random_state=0)
            return words, svd, svd.fit_transform(table).mean(axis=0)
        except ValueError as error:
            raise UserError(f"tfidf cannot learn from these {len(self._captions)} captions ({error})") from None


class TransformerEncoder:
    """A frozen encoder of the transformers library: first token or mean of the last layer, or CLIP's text embedding."""

    def __init__(
        self, cfg: TowerConfig, train_captions: Callable[[], list[str]], device: torch.device | str = "cpu"
    ) -> None:
        self.cfg, self.device = cfg, torch.device(device)
        self._train_captions = train_captions
        self.source = HUB_IDS.get(cfg.text_encoder.lower(), cfg.text_encoder)
        self.what = f"pretrained weights of {self.source}"
        self.remedy = "pass --text_encoder FOLDER, --text_pretrained false or --text_encoder tfidf"
        if cfg.text_encoder.lower() not in HUB_IDS and not Path(self.source).is_dir():
            # It may still be a hub id; if it turns out not to be, a slip of the keyboard is the likely reason.
            self.remedy += nearest(self.source, (*HUB_IDS, *LSA))

    @cached_property
    def width(self) -> int:
        return self.encode(["a"], quiet=True).shape[1]

    @cached_property
    def fingerprint(self) -> str:
        net, tokenizer = self._loaded
        config = {key: value for key, value in net.config.to_dict().items() if isinstance(value, (int, float))}
        # A pooler above the last layer is not read, and drawn by chance where the file has none.
        state = sorted((name, value) for name, value in net.state_dict().items() if not name.startswith("pooler."))
        kind = [type(net).__name__, self.cfg.text_pooling, self._limit, config, net.config.to_dict().get("hidden_act")]
        names = [name for name, _ in state]
        return digest(kind, _describe_tokenizer(tokenizer), names, *(value for _, value in state))

    @torch.no_grad()
    def encode(self, captions: Sequence[str], quiet: bool = False) -> np.ndarray:
        net, _ = self._loaded
        # Captions of a length share a batch, so that little of it is padding.
        order = sorted(range(len(captions)), key=lambda index: len(captions[index]))
        batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        embeddings = None
        for batch in progress(batches, "embedding captions", disable=quiet):
            tokens = self._tokens([captions[index] for index in batch])
            values = self._pool(net(**tokens), tokens["attention_mask"]).cpu().numpy()
            if embeddings is None:
                embeddings = np.empty((len(captions), values.shape[1]), np.float32)
            embeddings[batch] = values
        return np.empty((0, self.width), np.float32) if embeddings is None else embeddings

    @torch.no_grad()
    def encode_dropped(self, captions: Sequence[str], seed: int) -> torch.Tensor:
        """Embeddings (C, D) on the device, of the frozen network in training mode: its dropout follows `seed`."""
        net, _ = self._loaded
        tokens = self._tokens(captions)
        with seeded(seed, self.device):
            try:
                return self._pool(net.train()(**tokens), tokens["attention_mask"])
            finally:
                net.eval()

    def _tokens(self, captions: Sequence[str]) -> Any:
        _, tokenizer = self._loaded
        return tokenizer(
            list(captions),
            padding="longest",
            truncation=True,
            max_length=self._limit,
            return_token_type_ids=False,  # one sentence, one type; some networks do not take them
            return_tensors="pt",
        ).to(self.device)

    def _pool(self, output: Any, mask: torch.Tensor) -> torch.Tensor:
        if hasattr(output, "text_embeds"):
            return output.text_embeds
        if self.cfg.text_pooling == "cls":
            return output.last_hidden_state[:, 0]
        weight = mask.unsqueeze(-1).to(output.last_hidden_state.dtype)
        return (output.last_hidden_state * weight).sum(1) / weight.sum(1)

    @cached_property
    def _limit(self) -> int:
        """Tokens at most; a tokenizer without a limit of its own says 10³⁰."""
        net, tokenizer = self._loaded
        return min(tokenizer.model_max_length, getattr(net.config, "max_position_embeddings", 512))

    @cached_property
    def _loaded(self) -> tuple[nn.Module, Any]:
        """The network, frozen, in evaluation mode and on the device, and its tokenizer."""
        cfg = self.cfg
        # Also a network that is loaded is first drawn, by some versions of the library.
        with seeded(derive_seed(FROZEN_SEED, "text encoder")):
            if cfg.text_pretrained and not cfg.text_weights:
                net, tokenizer = self._load(self.source)
            elif cfg.text_weights and Path(cfg.text_weights).is_dir():
                net, tokenizer = self._load(cfg.text_weights)
            else:
                net, tokenizer = self._draw()
        return net.float().eval().requires_grad_(False).to(self.device), tokenizer

    def _load(self, source: str) -> tuple[nn.Module, Any]:
        from transformers import AutoConfig, AutoTokenizer

        def load(local: bool) -> tuple[nn.Module, Any]:
            kind = _model_class(AutoConfig.from_pretrained(source, local_files_only=local, **NO_CODE).model_type)
            net = load_transformer(kind, source, local)
            return net, AutoTokenizer.from_pretrained(source, local_files_only=local, **NO_CODE)

        return from_folder_or_hub(load, source, "text encoder", self.what, self.remedy)

    def _draw(self) -> tuple[nn.Module, Any]:
        """The network with weights from a file, or else from a fixed seed."""
        config = self._config()
        tokenizer = self._tokenizer(config)
        kind = _model_class(config.model_type)
        net = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
        if self.cfg.text_weights:
            load_state(net, *_published_state(net, self.cfg.text_weights))
        return net, tokenizer

    def _config(self) -> Any:
        from transformers import AutoConfig, BertConfig, CLIPTextConfig, DistilBertConfig

        # The library's default configurations are those of the published encoders.
        known = {HUB_IDS["bert"]: BertConfig, HUB_IDS["distilbert"]: DistilBertConfig, HUB_IDS["clip"]: CLIPTextConfig}
        if self.source in known:
            return known[self.source]()
        config = from_cache_or_hub(
            lambda local: AutoConfig.from_pretrained(self.source, local_files_only=local, **NO_CODE),
            f"the settings of {self.source}",
            self.remedy,
        )
        return getattr(config, "text_config", config)

    def _tokenizer(self, config: Any) -> Any:
        """The published vocabulary where it is here, else one learned from the training captions."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.source, local_files_only=True, **NO_CODE)
        except Exception:  # again dozens of kinds
            if self.cfg.text_weights:
                raise UserError(
                    f"the vocabulary of {self.source}, which --text_weights needs, is not here; pass a folder with both"
                ) from None
        learn = _learn_byte_pairs if config.model_type.startswith("clip") else _learn_word_pieces
        tokenizer = learn(self._train_captions(), config.vocab_size)
        config.pad_token_id = tokenizer.pad_token_id
        if config.model_type.startswith("clip"):  # it reads its embedding off the end token
            config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        return tokenizer


def _model_class(model_type: str) -> Any:
    from transformers import AutoModel, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection if model_type in ("clip", "clip_text_model") else AutoModel


def _published_state(net: nn.Module, path: str) -> tuple[dict[str, torch.Tensor], str, Sequence[str]]:
    """The state dict of a whole published model as that of its encoder, the file, and what the encoder may lack."""
    prefix = f"{net.base_model_prefix}."
    state = {}
    for name, value in read_state(path, "text_weights").items():
        name = name.removeprefix(prefix)
        # Files of BERT's first years say gamma and beta.
        state[re.sub(r"LayerNorm\.(gamma|beta)$", lambda old: f"LayerNorm.{_RENAMED[old[1]]}", name)] = value
    heads = ("cls.", "vocab_", "embeddings.position_ids", "text_model.embeddings.position_ids")
    return state, path, (*heads, "vision_model.", "visual_projection.", "logit_scale")


def _describe_tokenizer(tokenizer: Any) -> Any:
    vocabulary = sorted(tokenizer.get_vocab().items())
    if not getattr(tokenizer, "is_fast", False):
        return [type(tokenizer).__name__, vocabulary]
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # How the last call padded and cut is no property of the tokenizer.
    return [{key: value for key, value in rules.items() if key not in ("padding", "truncation", "model")}, vocabulary]


def _learn_word_pieces(captions: Iterable[str], size: int) -> Any:
    """An uncased word-piece tokenizer as BERT's: the letters, then the most frequent words, at most `size` in all.

    (The library's own trainer breaks ties in the order of a hash table, another one in every process.)
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normal, split = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = Counter(word for caption in captions for word, _ in split.pre_tokenize_str(normal.normalize_str(caption)))
    letters = sorted(set("".join(words)))
    frequent = sorted(words, key=lambda word: (-words[word], word))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *frequent]
    vocabulary = {piece: index for index, piece in enumerate(list(dict.fromkeys(pieces))[:size])}
    learned = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    learned.normalizer, learned.pre_tokenizer, learned.decoder = normal, split, decoders.WordPiece()
    learned.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=learned,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def _learn_byte_pairs(captions: Iterable[str], size: int) -> Any:
    """A lower-case byte-pair tokenizer as CLIP's, with at most `size` tokens; the end token also pads."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    start, end = "<|startoftext|>", "<|endoftext|>"
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    learned.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[start, end], initial_alphabet=alphabet, show_progress=False
    )
    # The time that it takes grows with the square of a word's length, and a word may be all of a caption.
    learned.train_from_iterator((caption[:_READ] for caption in captions), trainer)
    learned.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, 0), (end, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=learned,
        model_input_names=["input_ids", "attention_mask"],
        pad_token=end,
        unk_token=end,
        bos_token=start,
        eos_token=end,
    )
