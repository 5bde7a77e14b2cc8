"""What Megatron itself says of our files: its reader, its builder and its GPT dataset."""

from __future__ import annotations

import numpy as np
import pytest
import sentencepiece
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

from megatron_kosmosg.data.index_file import write_index
from megatron_kosmosg.data.sentences import sentence_table
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.preprocess.text_batches import sentence_lengths
from tests.support.data_helpers import build_dataset, spm_model_bytes, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("megatron")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(write_tokenizer(folder))


@pytest.mark.parametrize("multimodal", [False, True])
@pytest.mark.parametrize("num_documents", [0, 1, 50])
def test_the_index_is_byte_for_byte_megatrons(tmp_path, multimodal, num_documents):
    rng = np.random.default_rng(num_documents)
    dtype = np.uint8 if multimodal else np.int32
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=dtype, multimodal=multimodal)
    lengths, modes, parts = [], [], []
    for _ in range(num_documents):
        mine = rng.integers(0, 9, rng.integers(1, 5)).tolist()
        own = rng.integers(0, 3, len(mine)).tolist()
        data = torch.from_numpy(rng.integers(0, 200, sum(mine)).astype(dtype))
        builder.add_document(data, mine, own if multimodal else None)
        lengths, modes, parts = lengths + mine, modes + own, [*parts, len(mine)]
    builder.finalize(str(tmp_path / "a.idx"))
    write_index(
        tmp_path / "b.idx",
        np.dtype(dtype),
        np.array(lengths, np.int32),
        np.array(modes, np.int8) if multimodal else None,
        np.array(parts, np.int32),
    )
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()


class MegatronTokenizer:
    """The little that GPTDataset asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eod, self.pad, self.vocab_size = (
            tokenizer.eos_id,
            tokenizer.pad_id,
            tokenizer.vocab_size,
        )
        self.unique_identifiers = {"fingerprint": tokenizer.fingerprint}


def test_stock_gpt_dataset_reads_a_text_dataset(folder, tokenizer):
    prefix = build_dataset(folder, "text", 40)
    stock = IndexedDataset(prefix)
    stream = np.concatenate([stock[i] for i in range(len(stock))])
    assert np.count_nonzero(stream == tokenizer.eos_id) == 40
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=16,
        blend=None,
        split="1",
        path_to_cache=None,
        tokenizer=MegatronTokenizer(tokenizer),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
    )
    documents = np.arange(40, dtype=np.int32)
    count = (len(stream) - 1) // 16
    dataset = GPTDataset(stock, prefix, documents, count, Split.train, config)
    following = {}
    for i in range(len(dataset)):
        sample = dataset[i]
        tokens, labels = sample["tokens"].tolist(), sample["labels"].tolist()
        assert len(tokens) == 16 and tokens[1:] == labels[:-1]
        # The loss is masked where the input is a document's end: the marks were understood.
        ends = [j for j, token in enumerate(tokens) if token == tokenizer.eos_id]
        assert sample["loss_mask"].numpy().nonzero()[0].tolist() == [
            j for j in range(16) if j not in ends
        ]
        following[i] = tokens
    # A pass over all samples is a pass over all documents, in another order.
    seen = np.concatenate(list(following.values())[:count])
    assert len(seen) == count * 16 and set(seen.tolist()) <= set(stream.tolist())


def test_sentences_of_a_batch_are_those_of_each_document(tokenizer):
    texts = [
        'red dog . blue " house . " snow',
        "red",
        "a . b . c .",
        "dog ! ) ? red",
        ". . .",
        'stopped . "',
        "the end .",
    ]
    arrays = [tokenizer.encode_array(text) for text in texts]
    ids = np.concatenate([np.append(array, tokenizer.eos_id) for array in arrays])
    found, per_document = sentence_lengths(ids, np.array([len(a) for a in arrays]), tokenizer)
    tables = [sentence_table([array], tokenizer) for array in arrays]
    assert per_document.tolist() == [len(table) for table in tables]
    assert found.tolist() == np.concatenate(tables)[:, 0].tolist()
    assert sum(per_document) > len(texts)


def test_a_batch_of_texts_is_encoded_like_each_alone(tokenizer):
    processor = sentencepiece.SentencePieceProcessor(model_proto=spm_model_bytes())
    texts = ["red dog", "", " ", "\u4e2d red", "blue\nhouse", "a" * 50]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        pieces = processor.encode(text)
        assert ids.dtype == np.int32
        assert ids.tolist() == [p + 1 if p >= 3 else 3 for p in pieces]
