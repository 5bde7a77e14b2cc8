"""Step 2: which words of a caption name a thing, from a language model, by rule, or from a file.

Whatever names them, an entity must stand in the caption as whole words, and the authors' rules
apply (no bare colours, no name that is part of another one).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_kosmosg.construction.annotations import Annotations
from megatron_kosmosg.construction.noun_phrases import noun_phrases
from megatron_kosmosg.construction.on_demand import OnDemand
from megatron_kosmosg.construction.read_ahead import in_batches
from megatron_kosmosg.construction.step_rows import Row, StepFolder, rejected_row
from megatron_kosmosg.data.kinds.entity_placement import order_entities
from megatron_kosmosg.data.kinds.record import Rejected, list_field, text_field
from megatron_kosmosg.data.scripts import find_words
from megatron_kosmosg.preprocess.tags import tag_entities

MAX_NAME_WORDS = 6
ABSENT = "entity is not in the caption"
UNFIT = "entity is a colour, or its words belong to another one"
LONG = f"entity of more than {MAX_NAME_WORDS} words"
BEYOND = "more than --max-entities"
_COMMAS = re.compile("[,\uff0c\u3001]")
"""ASCII's, and those of Chinese and Japanese."""
_ARTICLES = re.compile(r"(?:a|an|the)\s+", re.IGNORECASE)


class Answerer(Protocol):
    """A language model that is asked for the entities of captions."""

    def __call__(self, captions: list[str]) -> list[str]:
        """The model's answer for each caption."""
        ...


@dataclass(frozen=True)
class Entities:
    """Step 2: the entities of each caption, named by a model, by a file, or by neither (noun
    phrases)."""

    captions: StepFolder
    model: OnDemand[Answerer] | None
    annotations: Annotations | None
    batch_size: int
    max_entities: int

    def rows(self, shard: int) -> Iterator[Row]:
        """Yields rows {"key", "caption", "entities": [{"text", "span"}], "left_out": [reason, ...]}
        of a shard."""
        model = None if self.model is None else self.model.get()
        captioned = [row for row in self.captions.read(shard) if "rejected" not in row]
        for batch in in_batches(captioned, self.batch_size):
            answers = [""] * len(batch)
            if model is not None:
                answers = model([row["caption"] for row in batch])
            for row, answer in zip(batch, answers, strict=True):
                try:
                    yield row | self._found(row, answer)
                except Rejected as rejected:
                    yield rejected_row(row["key"], rejected)

    def _found(self, row: Row, answer: str) -> Row:
        caption = row["caption"]
        if self.annotations is not None:
            annotated = list_field(self.annotations.find(row["key"]), "entities")
            entities, left_out = annotated_entities(caption, annotated)
        elif self.model is not None:
            entities, left_out = named_entities(caption, parse_answer(answer))
        else:
            entities, left_out = named_entities(caption, noun_phrases(caption))
        beyond = len(entities) - self.max_entities
        if not entities:
            raise Rejected("no entity in the caption", f"{caption!r}: {answer}"[:300])
        left_out += [BEYOND] * max(0, beyond)
        return {"entities": entities[: self.max_entities], "left_out": left_out}


def parse_answer(answer: str) -> list[str]:
    """The names in a model's answer: the first JSON list, else its first line cut at commas.

    Raises Rejected for an answer that is neither (the authors look for a #, too).
    """
    start = answer.find("[")
    if start >= 0:
        try:
            names, _ = json.JSONDecoder().raw_decode(answer[start:])
        except json.JSONDecodeError as error:
            raise Rejected("answer is not a list", answer[:200]) from error
        if not all(isinstance(name, str) for name in names):
            raise Rejected("answer is not a list of texts", answer[:200])
    else:
        lines = [line.strip() for line in answer.splitlines() if line.strip()]
        if not lines or "#" in lines[0] or "{" in lines[0]:
            raise Rejected("answer is not a list", answer[:200])
        names = _COMMAS.split(lines[0])
    return [_ARTICLES.sub("", name.strip(" \t\"'.;:"), count=1) for name in names]


def named_entities(caption: str, names: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The entities among `names` with spans, in the caption's order, and why others are not."""
    different = list({name.lower(): name for name in names if name.strip()}.values())
    short = [name for name in different if len(name.split()) <= MAX_NAME_WORDS]
    present = [name for name in short if find_words(name, caption)]
    entities = [entity for _, entity in tag_entities(caption, present)]
    left_out = [LONG] * (len(different) - len(short))
    left_out += [ABSENT] * (len(short) - len(present))
    left_out += [UNFIT] * (len(present) - len(entities))
    return entities, left_out


def annotated_entities(
    caption: str, annotated: Sequence[Any]
) -> tuple[list[dict[str, Any]], list[str]]:
    """(entities, reasons of those left out) for the user's own entities: strings, or {"text"} with
    or without "span".

    Spans are believed, after a check that they hold the text. Raises Rejected.
    """
    if annotated and all(isinstance(entity, dict) and "span" in entity for entity in annotated):
        placed, _ = order_entities(caption, list(annotated))
        entities = [{name: entity.fields[name] for name in ("text", "span")} for entity in placed]
        return entities, [UNFIT] * (len(annotated) - len(placed))
    names = []
    for entity in annotated:
        if isinstance(entity, dict):
            names.append(text_field(entity, "text"))
        elif isinstance(entity, str):
            names.append(entity)
        else:
            raise Rejected("entity is neither text nor an object", repr(entity)[:80])
    return named_entities(caption, names)
