"""Trains the toy SentencePiece model: unigram, nmt_nfkc, default ids, each toy word one piece."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import sentencepiece

from megatron_kosmosg.files import replacing
from megatron_kosmosg.toy.toy_captions import ALL_WORDS
from megatron_kosmosg.toy.toy_records import document

VOCABULARY = 320
NUM_DOCUMENTS = 1500
WORD_REPEATS = 3000
"""Times each toy word stands in the training text, so that none is worth cutting."""
ENGLISH_REPEATS = 4
ENGLISH_SENTENCES = (
    "The old dog slept by the door while rain fell on the garden.",
    "She carried two cups of tea up the narrow stairs.",
    "We walked along the river until the sun went down behind the hills.",
    "My brother keeps his tools in a wooden box under the bench.",
    "Could you close the window, please? It is getting cold in here!",
    "Every morning the baker opens his shop before the street is awake.",
    "They found a small boat, half full of sand, near the harbour.",
    "The teacher wrote three questions on the board and waited.",
    "Nobody knew why the clock had stopped at ten past four.",
    "A fox jumped over the quiet brown fence and vanished.",
    "In winter the lake freezes, and children skate from shore to shore.",
    "He read the letter twice, folded it, and put it in his pocket.",
    "Fresh bread, butter and honey were waiting on the kitchen table.",
    "The train to the city leaves at nine and arrives just before noon.",
    "Her grandmother taught her to sew buttons and to bake apple pies.",
    "Birds were singing in the tall trees above the empty road.",
    "If you mix blue with yellow, you will get green.",
    "The picture on the wall showed a ship in a heavy storm.",
    "After the film they talked about music, travel and good food.",
    "A quick question: have you seen my keys anywhere?",
    "The museum keeps drawings, maps, masks and very old coins.",
    "It took us an hour to reach the top, but the view was worth it.",
    "Please write your name, your address and today's date below.",
    "Some people like the quiet of the village, others the noise of town.",
    "The engineer measured the bridge and made a careful sketch.",
    "Their cat sat on the warm stones and watched the fish swim.",
    "There were 12 chairs, 3 tables and 1 large lamp in the room.",
    "He painted the old gate white, then added a thin black line.",
    "Summer evenings smell of grass, dust and cut wood.",
    "What would you change, and what would you keep as it is?",
    "The child drew a house with a round sun and a crooked tree.",
    "Large waves broke over the rocks; the wind never rested.",
    "I have never eaten a better soup than the one she cooked.",
    "The farmer's wagon rolled slowly past the fields of maize.",
    "Take the second street on the left and ask at the yellow house.",
    "Zebras, foxes, quails and oxen are all animals.",
)
"""Everyday English, so that the toy tokenizer can also spell words of other texts."""


def corpus(seed: int) -> list[str]:
    """Toy documents (training combinations), every toy word often, and plain English."""
    documents = [document(np.random.default_rng((seed, i)), False) for i in range(NUM_DOCUMENTS)]
    words = [*dict.fromkeys(ALL_WORDS), "."]
    order = np.random.default_rng(seed)
    lists = [" ".join(order.permutation(words)) for _ in range(WORD_REPEATS)]
    return documents + lists + list(ENGLISH_SENTENCES) * ENGLISH_REPEATS


def train(path: Path, seed: int) -> None:
    """Writes the model file. Raises ValueError when a toy word is not one piece."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(seed)),
        model_writer=out,
        model_type="unigram",
        vocab_size=VOCABULARY,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc",
        num_threads=1,
        minloglevel=2,
    )
    check(out.getvalue())
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(out.getvalue())


def check(model: bytes) -> None:
    """Raises ValueError when a toy word after a space is not one known piece."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    for word in (*ALL_WORDS, "."):
        pieces = processor.encode(f"a {word}", out_type=str)
        if pieces != ["\u2581a", f"\u2581{word}"]:
            raise ValueError(f"the word {word!r} is cut into {pieces[1:]}; raise WORD_REPEATS")
