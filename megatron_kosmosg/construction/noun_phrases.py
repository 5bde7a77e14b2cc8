"""Entities of a caption without a model: runs of words between function words.

Made for the short sentences that captioning models write ("a dog and a cat on a red sofa"); longer
prose needs a language model.
"""

from __future__ import annotations

import re

_FUNCTION_WORDS = """
a an the this that these those some any each every another other both several many few all its his
her their our my your it he she they we i you who which whose there here no not
one two three four five six seven eight nine ten dozen lot lots couple pair group bunch number
and or but as than so then while when where if because
of in on at by to from with without for into onto over under above below behind beside besides near
next between among against along across around through toward towards inside outside upon off up
down out about during after before beneath atop
is are was were be been being has have had do does did can could will would may might must
sits sit stands stand lies lie hangs hang holds hold wears wear rides ride walks walk runs run plays
play looks look shows show shown seen made filled covered parked surrounded lit taken displayed
stacked placed set dressed very just only also together alone away back left right
middle top bottom side front edge corner center centre background foreground distance
photo picture image photograph view shot close-up closeup close scene
""".split()
_NOUNS_IN_ING = """
building king ring string wing ceiling painting clothing wedding railing awning thing pudding
dumpling earring clearing swing sling sibling lightning icing stuffing frosting drawing carving
""".split()

FUNCTION_WORDS, NOUNS_IN_ING = frozenset(_FUNCTION_WORDS), frozenset(_NOUNS_IN_ING)
MAX_WORDS = 3
"""Of a longer run the last words are kept: in English the noun comes last."""
_PIECES = re.compile(r"\w+(?:['-]\w+)*|[^\w\s]")


def noun_phrases(caption: str) -> list[str]:
    """The phrases in the caption's order and spelling."""
    phrases: list[str] = []
    run: list[re.Match[str]] = []
    for piece in [*_PIECES.finditer(caption), None]:
        if piece is not None and _is_content(piece.group().lower()):
            run.append(piece)
            continue
        if run:
            kept = run[-MAX_WORDS:]
            phrases.append(caption[kept[0].start() : kept[-1].end()])
        run = []
    return phrases


def _is_content(word: str) -> bool:
    if not word[0].isalpha() or word in FUNCTION_WORDS:
        return False
    is_verb = word.endswith("ing") and word not in NOUNS_IN_ING
    return not is_verb
