"""The nouns of English captions, found by HanTa's tagger, which brings its model along (Wartena 2019)."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.evaluate.sets import EvaluationError

# The BNC's tags (CLAWS C5): singular, plural, and neutral for number, such as "people". Names are left out.
TAGS = ("NN1", "NN2", "NN0")
OF = "PRF"
# What puts two nouns into different roles: prepositions and verbs, not "and" or a comma.
RELATION = ("PR", "TO", "V")
_TOKEN = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s]")


class Noun(NamedTuple):
    """A noun of a text.

    Attributes:
        begin, end: its place in the text.
        text: as it stands there.
        lemma: its dictionary form.
        tag: of TAGS.
        relations: prepositions and verbs of the text before it.
    """

    begin: int
    end: int
    text: str
    lemma: str
    tag: str
    relations: int


def nouns(text: str) -> list[Noun]:
    """Nouns that stand for a thing: not the first part of a compound (the "tennis" of "a tennis ball"), and not what
    "of" follows, which is mostly a place or a number ("on top of", "a group of").

    Of 179 found in 60 captions, 30 each of COCO and Flickr30K, read by hand, 176 are nouns, and 175 things.

    Raises:
        EvaluationError: HanTa is not installed.
    """
    places = list(_TOKEN.finditer(text))
    tagged = _tagger().tag_sent([place.group() for place in places]) if places else []
    tags = [tag for _, _, tag in tagged] + [""]
    found, relations = [], 0
    for number, (place, (word, lemma, tag)) in enumerate(zip(places, tagged, strict=True)):
        if tag in TAGS and tags[number + 1] not in (*TAGS, OF) and len(word) > 1 and word.isascii():
            found.append(Noun(*place.span(), word, lemma.lower(), tag, relations))
        relations += tag.startswith(RELATION)
    return found


def words(text: str) -> set[str]:
    """The words of a text, in lower case."""
    return {place.group().lower() for place in _TOKEN.finditer(text)}


@functools.cache
def _tagger() -> Any:
    try:
        from HanTa import HanoverTagger
    except ImportError:
        raise EvaluationError(
            "HanTa, which finds the nouns of captions, is not installed: pip install 'clip-pipeline[perturb]', or "
            "pip install HanTa."
        ) from None
    return HanoverTagger.HanoverTagger(str(Path(HanoverTagger.__file__).with_name("morphmodel_en.pgz")))
