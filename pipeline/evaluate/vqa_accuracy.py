"""The official VQA accuracy: how answers are normalised, and what one earns (Antol et al. 2015, Goyal et al. 2017).

It does what the challenge's own evaluation code does (github.com/GT-Vision-Lab/VQA, vqaEval.py as of March 2021), its
oddities included, since published figures have them:

- Where all annotators gave the same answer, nothing but white space is normalised, not even upper case.
- A mark of punctuation is left out wherever it stands if it touches a space anywhere in the answer, or if any comma of
  the answer stands between two digits; otherwise each becomes a space. Colons and apostrophes are no such marks.
- A full stop goes unless a digit follows, but only the first 32 of them do.
- "none" is the number 0, and "somebody'd" loses its apostrophe where all other contractions gain theirs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# Others' answers that must agree for an answer to be wholly right.
AGREEMENT = 3
ARTICLES = frozenset(("a", "an", "the"))
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
STOPS = 32
_NUMBERS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS.split())}

_DIGIT_COMMA = re.compile(r"\d,\d")
_STOP = re.compile(r"\.(?!\d)")
# As they are to be; each is known by what it is with one of its apostrophes left out.
_CONTRACTIONS = """
    ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't oughtn't
    shan't shouldn't wasn't weren't won't wouldn't couldn't've hadn't've mightn't've shouldn't've wouldn't've
    could've might've must've not've should've they've we've what've where've who've would've you've
    he'd how'd it'd someone'd something'd there'd they'd where'd who'd you'd
    he'd've it'd've she'd've somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've you'd've
    how'll it'll somebody'll someone'll something'll they'll what'll who'll why'll you'll
    there're they're what're why're you're
    he's how's somebody's someone's that's there's what's when's where's who's why's
    ma'am o'clock 'twas 'ow's'at y'all y'all'll y'all'd've
"""
CONTRACTIONS = {"somebody'd": "somebodyd"} | {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
}


def trimmed(answer: str) -> str:
    """Line breaks and tabs as spaces, and none at the ends."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalised(answer: str) -> str:
    """An answer as it is compared where annotators differ.

    >>> normalised("The two-tone cat.")
    '2 tone cat'
    """
    text = trimmed(answer)
    joins = _DIGIT_COMMA.search(text) is not None
    text = text.translate(
        {ord(mark): "" if joins or f"{mark} " in text or f" {mark}" in text else " " for mark in PUNCTUATION}
    )
    words = [NUMBERS.get(word, word) for word in _STOP.sub("", text, count=STOPS).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@dataclass(frozen=True)
class Key:
    """What answers to one question earn.

    Attributes:
        differ: whether annotators gave more than one answer, so that answers are compared normalised.
        earned: answer, as it is compared → its accuracy, above 0; all others earn nothing.
    """

    differ: bool
    earned: dict[str, float]

    @staticmethod
    def of(answers: Sequence[str]) -> Key:
        """From what the annotators gave, ten of them in the official data sets."""
        given = [trimmed(answer) for answer in answers]
        differ = len(set(given)) > 1
        votes = Counter(normalised(answer) if differ else answer for answer in given)
        shares = {answer: _leave_one_out(count, len(given)) for answer, count in votes.items()}
        return Key(differ, {answer: share for answer, share in shares.items() if share > 0})


def _leave_one_out(matches: int, annotators: int) -> float:
    """The mean of min(matches / 3, 1) over the sets of all annotators but one: 0, .3, .6, .9, 1 for 0 to 4 of ten."""
    agreeing = matches * min((matches - 1) / AGREEMENT, 1)
    others = (annotators - matches) * min(matches / AGREEMENT, 1)
    return (agreeing + others) / annotators
