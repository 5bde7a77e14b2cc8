"""SentencePiece model -> a `tokenizer/` folder of stock transformers with the dictionary's own ids.

The class is PreTrainedTokenizerFast, which takes tokenizer.json literally. XLMRobertaTokenizer, the
obvious choice, builds its pre-tokenizer itself in transformers 5, and then reads `<s>` typed by a
user as the control token whenever the vocabulary lacks `<`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.conversion.exported_folder import read_model_json
from megatron_kosmosg.data.tokenizer import TRAILING_SPECIALS, WORD_START, Tokenizer
from megatron_kosmosg.files import write_json

MODEL_FILE = "sentencepiece.bpe.model"
"""Copied beside tokenizer.json; the name is XLM-R's and Kosmos-2's, whose model is unigram."""
HEAD = ("<s>", "<pad>", "</s>", "<unk>")
PROBES = (
    "a photo of a dog in the garden.",
    "  blanks   collapse \n and\tlines too ",
    "ﬁne ｆｕｌｌ width, ①②, naïve café, Å",
    "火星 🚀 \u200bzero width\u200d, 日本語。",
    "<s> </s> <pad> <unk> <mask> </doc> <image>x</image> </chunk></line>",
    "＜ｓ＞ <<s>> <S> 1 < 2 > 0 <image",
    "",
    "   ",
)
"""Texts whose ids are compared with SentencePiece's before a folder is handed out."""


def token_list(model_path: Path) -> list[str]:
    """The tokens in the order of their ids."""
    pieces = _model(model_path).pieces
    return [*HEAD, *(piece.piece for piece in pieces[3:]), *TRAILING_SPECIALS]


def checked_vocabulary(model_path: Path, rows: int, *, or_fewer: bool = False) -> int:
    """Ids of a SentencePiece model, which must be as many as an embedding has rows.

    or_fewer: or fewer. Raises ConversionError otherwise, and for a file that is no such model.
    """
    try:
        size = Tokenizer(model_path).vocab_size
    except (OSError, ValueError, RuntimeError) as error:
        raise ConversionError(
            f"{model_path} is no usable SentencePiece model ({error}); give one with "
            "--tokenizer-model"
        ) from None
    if size > rows or (size < rows and not or_fewer):
        raise ConversionError(
            f"the tokenizer {model_path} makes {size:,} token ids, the embedding has {rows:,} "
            "rows; give the model that the weights were trained with (--tokenizer-model)"
        )
    return size


def build_tokenizer(model_path: Path, model_max_length: int) -> PreTrainedTokenizerFast:
    """The stock tokenizer of a SentencePiece model.

    A call adds `<s>` and no `</s>`, as prompts have it; control tokens in a text stay text.
    model_max_length: tokens. Raises ConversionError for a model that this form cannot express.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_backend(model_path),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        extra_special_tokens=list(TRAILING_SPECIALS[1:]),
        split_special_tokens=True,
        model_max_length=model_max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    native = Tokenizer(model_path)
    for text in PROBES:
        found, expected = tokenizer.encode(text, add_special_tokens=False), native.encode(text)
        if found != expected:
            raise ConversionError(
                f"{model_path}: the Hugging Face form of this model gives other ids for {text!r}: "
                f"{found} instead of {expected}; the model cannot be exported"
            )
    return tokenizer


def write_tokenizer(model_path: Path, folder: Path, model_max_length: int) -> None:
    """Fills `folder` for `AutoTokenizer.from_pretrained`, the SentencePiece model beside."""
    tokenizer = build_tokenizer(model_path, model_max_length)
    tokenizer.save_pretrained(folder)
    settings = read_model_json(folder / "tokenizer_config.json")
    # Names that transformers 4 knows too.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    write_json(folder / "tokenizer_config.json", settings, indent=2)
    shutil.copyfile(model_path, folder / MODEL_FILE)


def folder_model(folder: Path, otherwise: str = "") -> Path:
    """The SentencePiece model of a tokenizer folder. Raises ConversionError if it has none.

    Args:
        otherwise: what a user can do besides putting it there.
    """
    path = folder / MODEL_FILE
    if not path.is_file():
        raise ConversionError(
            f"{folder} has no {MODEL_FILE}; copy the SentencePiece model that the weights were "
            f"trained with there, under that name{otherwise}"
        )
    return path


def check_same_tokens(model_path: Path, folder: Path) -> None:
    """Raises ConversionError unless the folder's tokenizer has the model's token at every id.

    The folder may have more tokens behind them (Kosmos-2's grounding tokens). It is read from
    tokenizer.json, or else from its own SentencePiece model and added_tokens.json.
    """
    expected, found = token_list(model_path), _tokens_of_folder(folder)
    for index, token in enumerate(expected):
        if found.get(index) != token:
            raise ConversionError(
                f"the tokenizer in {folder} is not that of {model_path}: id {index} is "
                f"{found.get(index)!r} there and {token!r} here; embedding rows would belong to "
                "other words. Give the SentencePiece model that the weights were trained with "
                "(--tokenizer-model)"
            )


def _tokens_of_folder(folder: Path) -> dict[int, str]:
    described = folder / "tokenizer.json"
    if described.is_file():
        content = read_model_json(described)
        try:
            vocabulary = content["model"]["vocab"]
            if isinstance(vocabulary, dict):  # a BPE model's
                found = {index: token for token, index in vocabulary.items()}
            else:
                found = dict(enumerate(token for token, _ in vocabulary))
            added = {entry["id"]: entry["content"] for entry in content["added_tokens"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ConversionError(
                f"{described} is no unigram or BPE tokenizer: {error!r}"
            ) from None
        return {**found, **added}
    found = dict(enumerate(token_list(folder_model(folder))[: -len(TRAILING_SPECIALS) + 1]))
    added = folder / "added_tokens.json"
    if added.is_file():
        found |= {index: token for token, index in read_model_json(added).items()}
    return found


def _model(path: Path) -> Any:
    """The file's ModelProto. Any: protobuf makes this class when it is imported."""
    Tokenizer(path)  # refuses what is no model, or one with other ids for unk, bos and eos
    messages: Any = sentencepiece_model_pb2
    model = messages.ModelProto()
    model.ParseFromString(path.read_bytes())
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    plain = {model.SentencePiece.NORMAL, model.SentencePiece.CONTROL, model.SentencePiece.UNKNOWN}
    expected = {
        "a unigram or BPE model": trainer.model_type in (trainer.UNIGRAM, trainer.BPE),
        "no piece of several words": trainer.model_type != trainer.BPE
        or not any(WORD_START in piece.piece[1:] for piece in model.pieces[3:]),
        "no byte fallback": not trainer.byte_fallback,
        "no word-start marks at word ends": not trainer.treat_whitespace_as_suffix,
        "a blank before the first word": normalizer.add_dummy_prefix,
        "runs of blanks removed": normalizer.remove_extra_whitespaces,
        "no user-defined pieces": all(piece.type in plain for piece in model.pieces),
        "no control piece beyond the first three": all(
            piece.type == model.SentencePiece.NORMAL for piece in model.pieces[3:]
        ),
        "no piece that is a special token": not {p.piece for p in model.pieces[3:]}
        & {*HEAD, *TRAILING_SPECIALS},
    }
    broken = [name for name, holds in expected.items() if not holds]
    if broken:
        raise ConversionError(f"{path}: the Hugging Face form needs {', '.join(broken)}")
    return model


def _backend(path: Path) -> Backend:
    model = _model(path)
    specials = [(token, 0.0) for token in (*HEAD, *TRAILING_SPECIALS)]
    splits = [
        pre_tokenizers.Split(" ", "removed"),
        pre_tokenizers.Metaspace(replacement=WORD_START, prepend_scheme="always"),
    ]
    if model.trainer_spec.model_type == model.trainer_spec.BPE:
        backend = Backend(_bpe(token_list(path), [piece.piece for piece in model.pieces[3:]]))
    else:
        pieces = [(piece.piece, piece.score) for piece in model.pieces[3:]]
        vocabulary = [*specials[: len(HEAD)], *pieces, *specials[len(HEAD) :]]
        backend = Backend(Unigram(vocabulary, unk_id=Tokenizer.unk_id, byte_fallback=False))
        # The unigram table holds the control tokens, so a text must not offer one in one piece: it
        # is cut before the closing bracket.
        stems = "|".join(token[:-1] for token in (*HEAD, *TRAILING_SPECIALS))
        splits.append(pre_tokenizers.Split(Regex(f"(?<={stems})>"), "merged_with_next"))
    charsmap = model.normalizer_spec.precompiled_charsmap
    if charsmap:
        backend.normalizer = normalizers.Precompiled(charsmap)
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    backend.decoder = decoders.Metaspace(replacement=WORD_START, prepend_scheme="always")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", Tokenizer.bos_id)]
    )
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, _ in specials]
    )
    backend.encode_special_tokens = True
    return backend


def _bpe(tokens: list[str], pieces: list[str]) -> BPE:
    """SentencePiece joins the pair whose joint piece stands first; here each pair has a rank."""
    known = set(pieces)
    pairs = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    ids = {token: index for index, token in enumerate(tokens)}
    # Neighbouring unknown characters are one <unk>.
    return BPE(ids, pairs, unk_token=HEAD[Tokenizer.unk_id], fuse_unk=True)
