"""Text encoders: what they give, what their fingerprints tell apart, and embeddings kept on disk."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from networks.text import build_text_encoder
from networks.towers import TowerConfig
from utils.errors import UserError

CAPTIONS = [
    *("a red circle above a blue square", "a blue square below a red circle", "a green star next to a red square"),
    *("two dogs run over the grass", "a dog runs on a lawn of grass", "two brown dogs play in the grass"),
    *("a man rides a bicycle down the street", "a man on a bicycle in the street", "a woman rides a bike in a street"),
    *("children swim in a pool", "a child jumps into the swimming pool", "kids splash water in a pool"),
] * 2
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def encoder(name="tfidf", captions=CAPTIONS, **options):
    return build_text_encoder(TowerConfig(text_encoder=str(name), **options), lambda: list(captions))


def refuse():
    pytest.fail("the training captions were asked for")


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# tf-idf


def test_tfidf_knows_a_paraphrase():
    net = encoder(text_dim=8)
    a, paraphrase, unrelated = net.encode(["a dog on the grass", "two dogs run on a lawn", "a woman in the street"])
    assert cosine(a, paraphrase) > cosine(a, unrelated) + 0.3


def test_tfidf_scale_width_and_determinism():
    net, again = encoder(text_dim=8), encoder(text_dim=8)
    values = net.encode(CAPTIONS)
    assert values.dtype == np.float32 and values.shape == (len(CAPTIONS), 8) and net.width == 8
    assert abs(values.std() - 0.5) < 0.05
    assert np.array_equal(values, again.encode(CAPTIONS)) and net.fingerprint == again.fingerprint
    assert np.allclose(net.encode(CAPTIONS[3:4])[0], values[3], atol=1e-5), "alone or in company"
    assert encoder(text_dim=10_000).width <= len(CAPTIONS), "no wider than the captions allow"
    assert np.isfinite(net.encode(["xyzzy", ""])).all()


def test_tfidf_fingerprint_tells_captions_and_width():
    prints = {encoder(text_dim=8).fingerprint, encoder(text_dim=9).fingerprint, encoder(captions=["a b"]).fingerprint}
    assert len(prints) == 3


def test_tfidf_without_words():
    with pytest.raises(UserError, match="cannot learn from these 1 captions"):
        encoder(captions=["..."]).width  # noqa: B018


# Transformers


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=12)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    BertModel(BertConfig(vocab_size=5 + len(words), max_position_embeddings=12, **SMALL)).save_pretrained(folder)
    return folder


def test_bert_folder_is_the_library_on_its_own(bert):
    from transformers import AutoModel, AutoTokenizer

    net, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    texts = [*CAPTIONS[:9], "a dog " * 40]  # the last is cut at the limit
    ours = encoder(bert)
    values = ours.encode(texts)
    assert values.shape == (10, 16) == (10, ours.width) and values.dtype == np.float32
    means = encoder(bert, text_pooling="mean").encode(texts)
    for text, value, mean in zip(texts, values, means, strict=True):
        with torch.no_grad():
            hidden = net(**tokenizer(text, return_tensors="pt", truncation=True, max_length=12)).last_hidden_state[0]
        assert np.allclose(value, hidden[0].numpy(), atol=1e-5)
        assert np.allclose(mean, hidden.mean(0).numpy(), atol=1e-5)
    assert encoder(bert).encode([]).shape == (0, 16)


def test_fingerprint_is_of_the_content(bert, tmp_path):
    import shutil

    first = encoder(bert)
    before = first.fingerprint
    first.encode(CAPTIONS)
    assert first.fingerprint == before == encoder(bert).fingerprint
    used = encoder(bert)
    used.encode(CAPTIONS)  # padding and cutting leave marks in the tokenizer
    assert used.fingerprint == before
    shutil.copytree(bert, tmp_path / "copy")
    assert encoder(tmp_path / "copy").fingerprint == before, "the folder's name does not matter"
    assert encoder(bert, text_pooling="mean").fingerprint != before
    settings = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(settings | {"num_attention_heads": 4}))
    assert encoder(tmp_path / "copy").fingerprint != before
    random = encoder(bert, text_pretrained=False)
    assert random.fingerprint != before and random.fingerprint == encoder(bert, text_pretrained=False).fingerprint


def test_frozen_in_evaluation_mode_and_chance_untouched(bert):
    state = torch.random.get_rng_state()
    net = encoder(bert)
    assert np.array_equal(net.encode(CAPTIONS), net.encode(CAPTIONS))
    net, _ = net._loaded
    assert not net.training and not any(weight.requires_grad for weight in net.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


def test_text_weights(bert, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(2)
    masked = BertForMaskedLM(BertConfig.from_pretrained(bert))
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma"): value for name, value in masked.state_dict().items()
    } | {"bert.pooler.dense.weight": torch.zeros(16, 16), "bert.pooler.dense.bias": torch.zeros(16)}
    torch.save(state, tmp_path / "bert.bin")
    net, _ = encoder(bert, text_weights=str(tmp_path / "bert.bin"))._loaded
    assert torch.equal(net.embeddings.word_embeddings.weight, masked.bert.embeddings.word_embeddings.weight)
    name = "bert.embeddings.word_embeddings.weight"
    torch.save(state | {name: state[name][:3]}, tmp_path / "bert.bin")
    with pytest.raises(UserError, match=r"'embeddings\.word_embeddings\.weight' of shape"):
        encoder(bert, text_weights=str(tmp_path / "bert.bin")).width  # noqa: B018
    folder = encoder("bert", text_weights=str(bert))
    assert folder.fingerprint == encoder(bert).fingerprint


def test_distilbert_and_clip_folders(tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, DistilBertConfig, DistilBertModel

    from networks.text import _learn_byte_pairs, _learn_word_pieces

    torch.manual_seed(3)
    DistilBertModel(DistilBertConfig(vocab_size=200, dim=16, n_layers=1, n_heads=2, hidden_dim=32)).save_pretrained(
        tmp_path / "distil"
    )
    _learn_word_pieces(CAPTIONS, 200).save_pretrained(tmp_path / "distil")
    assert encoder(tmp_path / "distil").encode(CAPTIONS).shape == (24, 16)

    tokenizer = _learn_byte_pairs(CAPTIONS, 400)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    clip = CLIPTextConfig(vocab_size=400, projection_dim=6, max_position_embeddings=20, **SMALL, **special)
    CLIPTextModelWithProjection(clip).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    net = encoder(tmp_path / "clip")
    assert net.encode(CAPTIONS).shape == (24, 6)
    assert np.allclose(net.encode(CAPTIONS[:1]), net.encode(CAPTIONS)[:1], atol=1e-5), "padding changes nothing"


@pytest.mark.parametrize(("name", "width", "size"), [("distilbert", 768, 66_362_880), ("clip", 512, 63_428_096)])
def test_random_encoders_of_published_size(name, width, size):
    net = encoder(name, text_pretrained=False)
    values = net.encode(CAPTIONS[:3])
    assert values.shape == (3, width)
    assert sum(weight.numel() for weight in net._loaded[0].parameters()) == size
    assert cosine(values[0], values[1]) < 0.99999, "sentences differ"


def test_bert_has_its_published_size():
    from transformers import AutoModel

    config = encoder("bert", text_pretrained=False)._config()
    with torch.device("meta"):
        assert sum(weight.numel() for weight in AutoModel.from_config(config).parameters()) == 109_482_240


def test_learned_vocabularies_are_the_same_in_every_process():
    code = f"""
import hashlib
from networks.text import _learn_byte_pairs, _learn_word_pieces
for learn in (_learn_byte_pairs, _learn_word_pieces):
    vocabulary = learn({CAPTIONS!r}, 300).get_vocab()
    print(len(vocabulary), hashlib.sha256(repr(sorted(vocabulary.items())).encode()).hexdigest())
"""
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout != "", runs[0].stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "bert"}, "pretrained weights of bert-base-uncased are not here and the hub is out of reach"),
        ({"name": "distilbrt"}, "did you mean 'distilbert'"),
        ({"name": "clip"}, "openai/clip-vit-base-patch32 are not here"),
        ({"name": "bert", "text_pretrained": False, "text_weights": "w.pt"}, "the vocabulary of bert-base-uncased"),
        ({"name": "tfidf", "text_weights": "w.pt"}, "drop --text_weights"),
    ],
)
def test_errors_are_one_line_at_once(options, says):
    start = time.monotonic()
    with pytest.raises(UserError, match=says) as caught:
        encoder(**options).width  # noqa: B018
    assert time.monotonic() - start < 10 and "\n" not in str(caught.value)


def test_folders_that_are_no_encoder(bert, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    with pytest.raises(UserError, match="cannot be loaded"):
        encoder(tmp_path).width  # noqa: B018
    shutil.copytree(bert, tmp_path / "part")
    state = load_file(tmp_path / "part" / "model.safetensors")
    lost = next(name for name in state if "query.weight" in name)
    save_file({name: value for name, value in state.items() if name != lost}, tmp_path / "part" / "model.safetensors")
    with pytest.raises(UserError, match=f"lack {lost}"):
        encoder(tmp_path / "part").width  # noqa: B018


def test_importing_is_cheap():
    code = "import sys, networks.text, networks.towers, networks.convnet, networks.flat; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("timm", "transformers", "tokenizers", "sklearn", "torchvision", "huggingface_hub", "safetensors"):
        assert f"'{heavy}'" not in loaded
