"""What a language model is asked for the entities of a caption: as the authors' builder does, for
nouns of the foreground without adjectives."""

from __future__ import annotations

CAPTION = "{caption}"
"""Where the caption goes in a prompt."""
PROMPT = """\
Name the people, animals and things in the foreground of the picture that the sentence describes. \
Copy each name word for word from the sentence, without article or adjectives. Leave out places, \
backgrounds and words such as "photo". Answer with a JSON list of strings and nothing else.

Sentence: a small dog and two cats on a red sofa in a living room
Answer: ["dog", "cats", "sofa"]

Sentence: a photo of a woman riding a bicycle in the rain
Answer: ["woman", "bicycle"]

Sentence: {caption}
Answer:"""
