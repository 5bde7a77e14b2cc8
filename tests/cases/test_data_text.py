"""Words of other scripts: entities are found and sentences end where their readers see it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from tests.support.commands import REPOSITORY
from tests.support.data_helpers import encode_image, write_jsonl
from tests.support.data_inputs import preprocess
from tests.support.peak_memory import peak_memory

CAPTIONS = {
    "Chinese": ("一只猫，坐在红色沙发上，旁边有一只狗。", ["猫", "沙发", "狗"]),
    "Japanese": ("ソファの上に猫がいて、犬もいます。", ["ソファ", "猫", "犬"]),
    "Thai": ("แมวนั่งบนโซฟากับหมา", ["แมว", "โซฟา", "หมา"]),
    "Korean": ("고양이와 개가 소파에 앉아 있다.", ["고양이", "개", "소파"]),
    "two scripts": ("猫cat和狗", ["猫", "cat", "狗"]),
    "slash": ("a cat/dog on a sofa", ["cat", "dog", "sofa"]),
    "hyphen": ("a cat-dog on a sofa", ["cat", "dog", "sofa"]),
}
"""{name: (caption, its entities)}."""

SENTENCES = {
    "Chinese": (4, "这只猫坐在红色的沙发上。你喜欢它吗？太好了！我们去公园吧。"),
    "Japanese": (3, "猫はソファに座っています。犬は走るのが好きですか？はい！"),
    "Arabic": (4, "القطة تجلس على الأريكة. هل تحبها؟ نعم! الكلب يركض."),
    "Hindi": (2, "बिल्ली सोफे पर बैठी है। कुत्ता पार्क में दौड़ता है।"),
    "Urdu": (2, "بلی صوفے پر بیٹھی ہے۔ کتا باغ میں دوڑتا ہے۔"),
    "English": (4, 'He said "let us go." Then he left. Do you like it? It costs 3.5 dollars.'),
    "Chinese quotation": (2, "他说：“走吧。”然后离开了。天气很好。"),
    "Japanese quotation": (2, "彼は「行こう。」と言った。天気がいい。"),
    "Japanese points": (2, "猫です．犬は３．５才です．"),
    "ellipses": (3, "He left… Then he came… Done."),
}
"""{name: (number of sentences, document)}."""

MODELS = {
    "bpe": {"model_type": "bpe"},
    "unigram": {"model_type": "unigram"},
    "bpe as written": {"model_type": "bpe", "normalization_rule_name": "identity"},
}
"""SentencePiece trainers' options. By default they turn full-width marks into ASCII's."""


def write_model(path: Path, texts: list[str], **options) -> Path:
    """A SentencePiece model that has seen these texts."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts * 20),
            model_writer=file,
            vocab_size=300,
            character_coverage=1.0,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
    return path


@pytest.mark.parametrize("name", CAPTIONS)
def test_entities_are_kept_or_counted_in_every_script(tmp_path, commands, name):
    caption, words = CAPTIONS[name]
    model = write_model(tmp_path / "spm.model", [caption], model_type="bpe")
    (tmp_path / "image.png").write_bytes(encode_image(np.zeros((8, 8, 3), np.uint8)))
    entities = [
        {"text": word, "span": [at, at + len(word)], "image": "image.png", "mask": None}
        for word in words
        for at in [caption.index(word)]
    ]
    record = {"key": "a", "caption": caption, "image": "image.png", "entities": entities}
    source = write_jsonl(tmp_path / "entities.jsonl", [record])
    done = preprocess(commands, "compositional", model, tmp_path / "out", source)
    kept = done.must_succeed().samples["a"].info["entities"]
    assert [entity["text"] for entity in kept] == words and done.rejects == []


def test_an_entity_inside_another_is_left_out_and_counted(tmp_path, commands, model):
    (tmp_path / "image.png").write_bytes(encode_image(np.zeros((8, 8, 3), np.uint8)))
    entities = [
        {"text": word, "span": span, "image": "image.png", "mask": None}
        for word, span in (("red house", [2, 11]), ("house", [6, 11]))
    ]
    record = {"key": "a", "caption": "a red house .", "image": "image.png", "entities": entities}
    source = write_jsonl(tmp_path / "entities.jsonl", [record])
    done = preprocess(commands, "compositional", model, tmp_path / "out", source).must_succeed()
    assert len(done.samples["a"].info["entities"]) == 1
    # A line of the summary, not one with a path.
    assert re.search(r"(?m)^[^/\n]*entit[^/\n]* 1$", done.ran.out)


@pytest.fixture(scope="module")
def sentence_counts(tmp_path_factory, commands) -> dict[str, dict[str, int]]:
    """{model: {name: sentences that were found}}."""
    folder = tmp_path_factory.mktemp("sentences")
    texts = [text for _, text in SENTENCES.values()]
    source = write_jsonl(folder / "documents.jsonl", [{"text": text} for text in texts])
    counts = {}
    for number, (name, options) in enumerate(MODELS.items()):
        model = write_model(folder / f"{number}.model", texts, **options)
        done = preprocess(commands, "text", model, folder / str(number), source).must_succeed()
        offsets = np.load(f"{done.prefix}.sentence_offsets.npy")
        counts[name] = dict(zip(SENTENCES, np.diff(offsets).tolist(), strict=True))
    return counts


@pytest.mark.parametrize("name", SENTENCES)
def test_every_sentence_ends_where_its_mark_stands(sentence_counts, name):
    number, _ = SENTENCES[name]
    assert {model: counts[name] for model, counts in sentence_counts.items()} == dict.fromkeys(
        sentence_counts, number
    )


@pytest.fixture(scope="module")
def long_documents(tmp_path_factory, model) -> list[tuple[int, float, str]]:
    """(bytes, MB at the peak, output) of preprocessing a text without a blank line, two sizes."""
    folder = tmp_path_factory.mktemp("long")
    line = "a small red house and a dog ran over the hill with stripes\n"
    found = []
    for thousands in (34, 100):
        text = folder / f"{thousands}.txt"
        text.write_text(line * (1000 * thousands))
        peak, output = peak_memory(
            REPOSITORY / "tools" / "preprocess_data.py",
            *("--kind", "text", "--input", text, "--tokenizer-model", model),
            *("--output-prefix", folder / "out"),
        )
        found.append((text.stat().st_size, peak, output))
    return found


def test_a_text_that_becomes_one_long_document_gets_a_hint(long_documents):
    assert "--text-documents" in long_documents[-1][2]


def test_the_memory_for_a_long_document_is_bounded(long_documents):
    (smaller, peak, _), (larger, higher_peak, _) = long_documents
    assert (higher_peak - peak) / ((larger - smaller) / 1e6) < 8, "MB for each further MB"
