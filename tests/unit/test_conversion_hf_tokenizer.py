"""The exported tokenizer gives SentencePiece's ids in the authors' dictionary order."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.conversion import hf_tokenizer
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.toy import assets

TOY = assets.path() / "sentencepiece.model"
GOLDEN = {  # ids of the toy's model, so that a change of library or model is seen
    "a red circle": [4, 17, 14],
    "  a   red\tcircle\n": [4, 17, 14],
    "": [],
    "   ": [],
    "A RED circle.": [129, 66, 3, 272, 3, 14, 67],
    "the photo of a dog": [54, 26, 24, 4, 164, 154],
    "ﬁve": [140, 119],
    "ｒｅｄ": [17],
    "naïve": [230, 3, 119],
    "café": [86, 79, 148, 3],
    "火星": [66, 3],
    "a 🚀 b": [4, 66, 3, 90],
    "red\u200bcircle": [17, 14],
    "red\u3000circle": [17, 14],
    "<s>": [66, 3, 68, 3],
    "</s> a": [66, 3, 68, 3, 4],
    "<image>": [66, 3, 229, 296, 3],
    "a <image></image> red": [4, 66, 3, 229, 296, 3, 229, 296, 3, 17],
    "＜s＞": [66, 3, 68, 3],
    "<pad><mask>": [66, 3, 77, 196, 3, 294, 162, 3],
    "circle▁circle": [14, 14],
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "tokenizer"
    hf_tokenizer.write_tokenizer(TOY, folder, 99)
    return folder


@pytest.fixture(scope="module")
def html_model(tmp_path_factory) -> Path:
    """A unigram model of text with brackets, whose pieces hold `<`, `</` and the like."""
    words = "image line doc s pad mask chunk unk red a photo in the snow".split()
    lines = [f"<{w}> {v} </{w}> <b>{v}{w}</b> a<{v} {w}>2" for w in words for v in words]
    return trained(tmp_path_factory.mktemp("html") / "m.model", lines, vocab_size=100)


def test_golden_ids(toy) -> None:
    native, exported = Tokenizer(TOY), AutoTokenizer.from_pretrained(toy)
    for text, ids in GOLDEN.items():
        assert native.encode(text) == ids, text
        assert exported.encode(text, add_special_tokens=False) == ids, text


def test_a_prompt_starts_with_bos_and_has_no_eos(toy) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy)
    assert tokenizer("a red circle").input_ids == [0, 4, 17, 14]
    padded = tokenizer(["a red circle", "a"], padding=True)
    assert padded.input_ids[1] == [0, 4, 1, 1] and padded.attention_mask[1] == [1, 1, 0, 0]
    assert tokenizer.decode([0, 4, 17, 14, 2], skip_special_tokens=True) == "a red circle"


def test_special_tokens_have_the_dictionarys_ids(toy) -> None:
    native, exported = Tokenizer(TOY), AutoTokenizer.from_pretrained(toy)
    assert len(exported) == native.vocab_size == 327
    assert exported.convert_tokens_to_ids(["<image>", "</image>", "</line>"]) == [
        native.image_id,
        native.end_image_id,
        native.vocab_size - 1,
    ]
    ids = (exported.bos_token_id, exported.pad_token_id, exported.eos_token_id)
    assert ids == (native.bos_id, native.pad_id, native.eos_id)
    assert exported.unk_token_id == native.unk_id and exported.model_max_length == 99


def test_the_sentencepiece_model_lies_beside(toy) -> None:
    assert hf_tokenizer.folder_model(toy).read_bytes() == TOY.read_bytes()
    hf_tokenizer.check_same_tokens(TOY, toy)
    assert json.loads((toy / "tokenizer_config.json").read_text())["split_special_tokens"] is True


@pytest.mark.parametrize("which", ["toy", "html"])
def test_random_text_full_of_brackets(which, toy, html_model, tmp_path) -> None:
    model, folder = TOY, toy
    if which == "html":
        model, folder = html_model, tmp_path / "tokenizer"
        hf_tokenizer.write_tokenizer(model, folder, 99)
        assert any("<" in token for token in hf_tokenizer.token_list(model)[4:-6])
    native, exported = Tokenizer(model), AutoTokenizer.from_pretrained(folder)
    parts = ["a", "red", " ", "<", "s", ">", "<s>", "<image>", "/", "</doc>", "\n", "火", "▁", "ﬁ"]
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choices(parts, k=draw.randint(0, 12)))
        expected = native.encode(text)
        assert exported.encode(text, add_special_tokens=False) == expected, text
        after = range(native.num_pieces + 1, len(exported))
        specials = {native.bos_id, native.pad_id, native.eos_id, *after}
        assert not specials & set(expected)


def test_another_models_tokens_are_refused(toy, html_model) -> None:
    with pytest.raises(ConversionError, match="id 4 is .* embedding rows"):
        hf_tokenizer.check_same_tokens(html_model, toy)


def test_a_longer_vocabulary_with_the_same_beginning_passes(toy, tmp_path) -> None:
    shutil.copytree(toy, tmp_path / "longer")
    path = tmp_path / "longer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][-1], "id": 327, "content": "<new>"})
    path.write_text(json.dumps(content))
    hf_tokenizer.check_same_tokens(TOY, tmp_path / "longer")


def test_kosmos_2_folders_without_tokenizer_json(toy, tmp_path) -> None:
    """The slow form: pieces and <mask> from the SentencePiece model, the rest listed."""
    shutil.copyfile(TOY, tmp_path / hf_tokenizer.MODEL_FILE)
    with pytest.raises(ConversionError, match="id 322 is None"):
        hf_tokenizer.check_same_tokens(TOY, tmp_path)
    tags = {"</doc>": 322, "<image>": 323, "</image>": 324, "</chunk>": 325, "</line>": 326}
    (tmp_path / "added_tokens.json").write_text(json.dumps({**tags, "<grounding>": 327}))
    hf_tokenizer.check_same_tokens(TOY, tmp_path)


ALPHABET = "abcdeéßñ'-.,!?<>sxo   \t\nＡ①日🚀\u200b/"
"""Of the BPE models' letters, and some that they do not know."""


@pytest.mark.parametrize(
    "settings",
    [{}, {"normalization_rule_name": "identity"}, {"max_sentencepiece_length": 3}],
)
def test_a_bpe_model_gives_sentencepieces_ids(tmp_path, settings: dict) -> None:
    """On thousands of texts: random ones, those it was trained on, long runs of one letter."""
    draw = random.Random(0)
    words = ["".join(draw.choices(ALPHABET[:19], k=draw.randint(1, 9))) for _ in range(400)]
    lines = [" ".join(draw.choices(words, k=8)) for _ in range(800)]
    model = trained(tmp_path / "bpe.model", lines, vocab_size=400, model_type="bpe", **settings)
    hf_tokenizer.write_tokenizer(model, tmp_path / "tokenizer", 99)
    hf_tokenizer.check_same_tokens(model, tmp_path / "tokenizer")
    native, exported = Tokenizer(model), AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    texts = ["".join(draw.choices(ALPHABET, k=draw.randint(0, 40))) for _ in range(1500)]
    texts += [*lines, *(letter * count for letter in "aes.日" for count in range(30))]
    found = exported(texts, add_special_tokens=False).input_ids
    expected = [ids.tolist() for ids in native.encode_batch(texts)]
    assert [t for t, one, other in zip(texts, found, expected, strict=True) if one != other] == []
    assert exported.convert_ids_to_tokens(range(len(exported))) == hf_tokenizer.token_list(model)
    assert exported.decode(exported.encode("abc dé"), skip_special_tokens=True) == "abc dé"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "char"}, "needs a unigram or BPE model"),
        ({"model_type": "bpe", "split_by_whitespace": False}, "needs no piece of several words"),
        ({"model_type": "bpe", "byte_fallback": True}, "needs no byte fallback"),
    ],
)
def test_models_that_the_form_cannot_express_are_refused(tmp_path, settings, message) -> None:
    lines = ["a red dog in the snow and a red cat"] * 30
    model = trained(tmp_path / "m.model", lines, vocab_size=300, **settings)
    with pytest.raises(ConversionError, match=message):
        hf_tokenizer.write_tokenizer(model, tmp_path / "out", 99)
    assert not (tmp_path / "out").exists()


def trained(path: Path, lines: list[str], **settings) -> Path:
    """A SentencePiece model of as many pieces as the lines give."""
    settings = {"hard_vocab_limit": False, "minloglevel": 2, **settings}
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, **settings
        )
    return path
