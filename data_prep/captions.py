"""Texts: cleaning, and statements made from questions with their answers."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from typing import Any

MAX_CHARACTERS = 2000
# Of ten annotators, how many must have given the answer that a statement is made from.
MIN_AGREEMENT = 3

_SPACE = re.compile(r"\s+")


class BadText(ValueError):  # noqa: N818 (it describes a text, not a failure of ours)
    """A text that cannot be used; the message is the reason under which it is counted."""


def clean(text: str) -> str:
    """Unicode NFC, control characters out, white space single and trimmed.

    Raises:
        BadText: nothing is left, or more than 2,000 characters are.
    """
    composed = unicodedata.normalize("NFC", text)
    # Cc: control characters; Cs: halves of surrogate pairs, which no file can hold. White space stays a space.
    kept = "".join(c if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs") else "" for c in composed)
    result = _SPACE.sub(" ", kept).strip()
    if not result:
        raise BadText("empty_text")
    if len(result) > MAX_CHARACTERS:
        raise BadText("too_long_text")
    return result


def statement(question: str, answer: str) -> str:
    """A question and its answer as one sentence, by the first rule of RULES that fits; else both, labelled.

    >>> statement("What color is the bus?", "red")
    'the bus is red'
    >>> statement("Why is he running?", "late")
    'Question: Why is he running? Answer: late'
    """
    asked = question.strip().rstrip("?").strip()
    for pattern, form in RULES:
        if match := pattern.fullmatch(asked):
            values = {name: (value or "").strip() for name, value in match.groupdict().items()}
            if "verb" in values:
                values["verb"] = values["verb"].lower()
            if "{yes}" in form:
                if answer not in YES:
                    continue
                values["yes"] = YES[answer]
            return _SPACE.sub(" ", form.format(answer=answer, **values)).strip()
    return f"Question: {question.strip()} Answer: {answer}"


def _rule(pattern: str, form: str) -> tuple[re.Pattern[str], str]:
    return re.compile(pattern, re.IGNORECASE), form


# What "yes" and "no" put into a sentence at {yes}.
YES = {"yes": "", "no": "not"}

_VERB = r"(?P<verb>is|are|was|were)"
_NOUN = r"(?P<noun>(?:the|this|that|these|those|his|her|their|a|an) .+)"

# (question, statement): {answer} is the answer, the other names are parts of the question. The first that fits wins.
RULES = (
    _rule(rf"what (?:is the )?colou?r (?:{_VERB} )?(?:of )?{_NOUN}", "{noun} is {answer}"),
    _rule(r"what colou?r are (?P<noun>.+)", "{noun} are {answer}"),
    _rule(r"what shape is (?P<noun>.+)", "{noun} is a {answer}"),
    _rule(r"how many (?P<noun>.+?) are (?:there|visible|shown)(?P<rest>.*)", "there are {answer} {noun} {rest}"),
    _rule(r"how many (?P<noun>\w+) are (?P<rest>in .+|on .+)", "there are {answer} {noun} {rest}"),
    _rule(r"is there (?P<noun>.+)", "there is {yes} {noun}"),
    _rule(r"are there (?P<noun>.+)", "there are {yes} {noun}"),
    _rule(
        rf"(?P<verb>is|are) {_NOUN} (?P<rest>(?:to the )?(?:left|right) of .+|above .+|below .+)",
        "{noun} {verb} {yes} {rest}",
    ),
    _rule(r"(?P<verb>is|are) (?P<noun>(?:the|this|that|these|those) \w+) (?P<rest>.+)", "{noun} {verb} {yes} {rest}"),
    _rule(r"where is (?P<noun>.+)", "{noun} is {answer}"),
    _rule(r"what is (?P<rest>(?:in|on|under|above|below|next to|left of|right of) .+)", "{answer} is {rest}"),
    _rule(r"what (?P<kind>sport|animal|room|food|fruit) is (?:this|that|it|shown)", "the {kind} is {answer}"),
)


def agreed_answer(question: Mapping[str, Any]) -> str | None:
    """The answer that a statement may be made from: the dataset's majority, if at least three of ten gave it."""
    answer = str(question.get("multiple_choice_answer") or "")
    if not answer:
        return None
    votes = Counter(str(given.get("answer", "")) for given in question.get("answers", ()))
    return answer if not votes or votes[answer] >= MIN_AGREEMENT else None
