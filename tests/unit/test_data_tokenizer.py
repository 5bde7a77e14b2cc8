"""The authors' dictionary order over a SentencePiece model."""

from __future__ import annotations

import io

import numpy as np
import pytest
import sentencepiece

from megatron_kosmosg.data.tokenizer import Tokenizer
from tests.support.data_helpers import WORDS, spm_model_bytes, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("spm")))


def dictionary() -> dict[str, int]:
    """The fairseq dictionary built the way its loader does: specials, pieces 3.., specials."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=spm_model_bytes())
    symbols = ["<s>", "<pad>", "</s>", "<unk>"]
    symbols += [processor.id_to_piece(i) for i in range(3, processor.get_piece_size())]
    symbols += ["<mask>", "</doc>", "<image>", "</image>", "</chunk>", "</line>"]
    return {symbol: i for i, symbol in enumerate(symbols)}


def test_ids_are_those_of_the_fairseq_dictionary(tokenizer):
    table = dictionary()
    processor = sentencepiece.SentencePieceProcessor(model_proto=spm_model_bytes())
    text = "the red circle \u4e2d\u56fd with dots \u00e9 <image>"
    expected = [table.get(piece, table["<unk>"]) for piece in processor.encode_as_pieces(text)]
    assert tokenizer.encode(text) == expected
    assert tokenizer.unk_id in expected
    assert tokenizer.image_id not in expected
    assert tokenizer.vocab_size == len(table)
    assert (tokenizer.image_id, tokenizer.end_image_id) == (table["<image>"], table["</image>"])


def test_paper_vocabulary_follows_from_64000_pieces():
    pieces = 64000
    # <s> <pad> </s> <unk>, pieces 3..63999, then six specials of which <image> is the third.
    assert pieces + 1 + 6 == 64007 and pieces + 1 + 2 == 64003


def test_blank_text_has_no_tokens_and_spaces_collapse(tokenizer):
    assert tokenizer.encode("") == tokenizer.encode(" \n ") == []
    assert tokenizer.encode("  red\n circle ") == tokenizer.encode("red circle")


def test_decode_inverts_encode_and_drops_specials(tokenizer):
    text = " ".join(WORDS)
    ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.image_id, tokenizer.eos_id]
    assert tokenizer.decode(ids) == text


def test_sentence_ends_need_a_mark_and_a_new_word(tokenizer):
    def ends(text: str) -> list[str]:
        ids = np.array(tokenizer.encode(text))
        places = np.flatnonzero(tokenizer.sentence_ends(ids)) + 1
        return [tokenizer.decode(part) for part in np.split(ids, places) if len(part)]

    assert ends("the dog ran. the red hill ! now") == ["the dog ran.", "the red hill !", "now"]
    assert ends("a.b red") == ["a.b red"]
    assert ends('the dog ran." the hill') == ['the dog ran."', "the hill"]
    assert ends("red circle") == ["red circle"]


def test_sentences_of_every_script_end_where_their_marks_stand(tmp_path):
    texts = ["走吧。”他 是吗？好！！「行」です．天３．５", "है।कु ہے۔کت نعم؟هل!لا"]
    with (tmp_path / "spm.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts * 20),
            model_writer=file,
            vocab_size=60,
            model_type="char",
            character_coverage=1.0,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    tokenizer = Tokenizer(tmp_path / "spm.model")

    def ends(text: str) -> list[str]:
        ids = np.array(tokenizer.encode(text))
        places = np.flatnonzero(tokenizer.sentence_ends(ids)) + 1
        return [tokenizer.decode(part) for part in np.split(ids, places) if len(part)]

    assert ends("走吧。他好！是吗？好") == ["走吧。", "他好!", "是吗?", "好"]
    # A quotation goes on; two marks are one end; a bracket may begin.
    assert ends("走吧。”他是。天") == ["走吧。”他是。", "天"]
    assert ends("走吧。” 他") == ["走吧。”", "他"]
    assert ends("好！！「行」") == ["好!!", "「行」"]
    assert ends("です．天３．５") == ["です.", "天3.5"]
    assert ends("है।कु") == ["है।", "कु"]
    assert ends("ہے۔کت") == ["ہے۔", "کت"]
    assert ends("نعم؟هل!لا") == ["نعم؟", "هل!لا"]


def test_fingerprint_and_errors(tokenizer, tmp_path):
    assert tokenizer.fingerprint == Tokenizer(write_tokenizer(tmp_path)).fingerprint
    with pytest.raises(FileNotFoundError, match="data.tokenizer_model"):
        Tokenizer(tmp_path / "none.model")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 5),
        model_writer=out,
        vocab_size=60,
        model_type="bpe",
        pad_id=3,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "padded.model").write_bytes(out.getvalue())
    with pytest.raises(ValueError, match="no pad piece"):
        Tokenizer(tmp_path / "padded.model")
