"""Texts: cleaning, and statements made from questions with their answers."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_prep.record import Record

MAX_CHARACTERS = 2000
# Of ten annotators, how many must have given the answer that a statement is made from.
MIN_AGREEMENT = 3

_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class TextRules:
    """What is done to texts.

    Attributes:
        min_words: of a caption that trains.
        yes_no_cap: of an image's questions, how many yes/no ones may become statements; None means all.
        scrub: take e-mail addresses, phone numbers and URLs out of captions and statements.
    """

    min_words: int = 1
    yes_no_cap: int | None = None
    scrub: bool = False


@dataclass
class Texts:
    """An image's cleaned texts, (reason, text) of those dropped, and what was scrubbed how often."""

    captions: list[str] = field(default_factory=list)
    statements: list[str] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    scrubbed: Counter[str] = field(default_factory=Counter)


class BadText(ValueError):  # noqa: N818 (it describes a text, not a failure of ours)
    """A text that cannot be used; the message is the reason under which it is counted."""


def clean(text: str) -> str:
    """Unicode NFC, control characters out, white space single and trimmed.

    Raises:
        BadText: nothing is left, or more than 2,000 characters are.
    """
    # Cc: control characters; Cs: halves of surrogate pairs, which no file can hold. White space stays a space.
    kept = text
    if not text.isprintable():
        kept = "".join(c if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs") else "" for c in text)
    # Composed last: a control character between a letter and its accent would keep them apart.
    result = _SPACE.sub(" ", unicodedata.normalize("NFC", kept)).strip()
    if not result:
        raise BadText("empty_text")
    if len(result) > MAX_CHARACTERS:
        raise BadText("too_long_text")
    return result


def clean_text(text: str, rules: TextRules) -> str:
    """A text as shards hold it.

    Raises:
        BadText: see `clean`.
    """
    return clean(scrub(text, Counter()) if rules.scrub else text)


def clean_texts(record: Record, rules: TextRules) -> Texts:
    """Clean a record's captions and, for training, make statements of its questions."""
    result = Texts()
    trains = record.evaluation is None

    def add(texts: list[str], text: str, min_words: int = 1) -> None:
        if rules.scrub:
            text = scrub(text, result.scrubbed)
        try:
            cleaned = clean(text)
            if len(cleaned.split()) < min_words:
                raise BadText("too_short_text")
            texts.append(cleaned)
        except BadText as error:
            result.dropped.append((str(error), text))

    for caption in record.captions:
        add(result.captions, caption, rules.min_words if trains else 1)
    yes_no = 0
    for question in record.questions if trains else ():
        asked, answer = str(question["question"]), agreed_answer(question)
        yes_no += answer in ("yes", "no")
        if answer is None:
            result.dropped.append(("low_agreement", asked))
        elif answer in ("yes", "no") and rules.yes_no_cap is not None and yes_no > rules.yes_no_cap:
            result.dropped.append(("yes_no_cap", asked))
        else:
            add(result.statements, statement(asked, answer))
    return result


_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_URL = re.compile(r"(?:https?://|www\.)\S+")
# How phone numbers without a country's code are read.
PHONE_REGION = "US"


def scrub(text: str, counts: Counter[str]) -> str:
    """The text without e-mail addresses, URLs and phone numbers, each counted in `counts`."""
    for name, pattern in (("email", _EMAIL), ("url", _URL)):
        text, number = pattern.subn(" ", text)
        counts[name] += number
    if sum(character.isdigit() for character in text) >= 7:
        import phonenumbers

        for match in reversed(list(phonenumbers.PhoneNumberMatcher(text, PHONE_REGION))):
            text = f"{text[: match.start]} {text[match.end :]}"
            counts["phone"] += 1
    return text


def statement(question: str, answer: str) -> str:
    """A question and its answer as one sentence, by the first rule of RULES that fits; else both, labelled.

    >>> statement("What color is the bus?", "red")
    'the bus is red'
    >>> statement("Why is he running?", "late")
    'Question: Why is he running? Answer: late'
    """
    asked = question.strip().rstrip("?").strip()
    for rule in RULES:
        match = rule.question.fullmatch(asked)
        if match and rule.answer.fullmatch(answer):
            parts = {name: (value or "").strip() for name, value in match.groupdict().items()}
            parts["verb"] = parts.get("verb", "is").lower() or "is"
            parts |= {"answer": answer, "a": _article(answer), "yes": "not" if answer == "no" else ""}
            return _SPACE.sub(" ", rule.form.format(**parts)).strip()
    return f"Question: {question.strip()} Answer: {answer}"


@dataclass(frozen=True)
class Rule:
    """What is asked and what is answered → the form of the statement, `{yes}` standing for the `not` of a no."""

    question: re.Pattern[str]
    form: str
    answer: re.Pattern[str]


def _rule(question: str, form: str, answer: str = ".+") -> Rule:
    return Rule(re.compile(question, re.IGNORECASE), form, re.compile(answer, re.IGNORECASE))


def _article(noun: str) -> str:
    return "an" if noun[:1].lower() in "aeiou" else "a"


_YES_NO = "yes|no"
_VERB = r"(?P<verb>is|are|was|were)"
_THE = r"(?:the|this|that|these|those|his|her|their|its)"
_OWN = r"(?:the|his|her|their|its)"  # without "this" and "these", which may be the whole noun
_NOUN = rf"(?P<noun>{_THE} .+)"
_RELATION = (
    r"(?:(?:to|on) the (?:left|right) of|(?:left|right) of|in front of|next to|on top of|under|above|below|"
    r"behind|beside|near|between|over)"
)
_PLACE = rf"(?:{_RELATION}|in|inside|on|at|outside)"

# The first rule that fits wins. They rather leave a question to the labelled form than make a false sentence of it:
# "Is the traffic light green?" must not become "the traffic is light green", so a bare quality is only taken from
# "the NOUN QUALITY", two words, and a longer rest has to open with a word that cannot belong to the noun.
RULES = (
    _rule(rf"what (?:is the )?colou?r of {_NOUN}", "{noun} is {answer}"),
    _rule(rf"what colou?r {_VERB} (?P<noun>.+)", "{noun} {verb} {answer}"),
    _rule(r"what shape is (?P<noun>.+)", "{noun} is {a} {answer}"),
    _rule(r"how many (?P<noun>.+?) are (?:there|visible|shown)(?P<rest>.*)", "there are {answer} {noun} {rest}"),
    _rule(r"how many (?P<noun>\w+) are (?P<rest>in .+|on .+)", "there are {answer} {noun} {rest}"),
    _rule(r"is there any (?P<noun>.+)", "there is {noun}", "yes"),
    _rule(r"are there any (?P<noun>.+)", "there are {noun}", "yes"),
    _rule(r"(?P<verb>is|are) there (?P<noun>.+)", "there {verb} {yes} {noun}", _YES_NO),
    _rule(rf"{_VERB} (?P<noun>{_THE} .+?) (?P<rest>{_RELATION} .+)", "{noun} {verb} {yes} {rest}", _YES_NO),
    _rule(rf"{_VERB} (?P<noun>{_THE} \w+) (?P<rest>{_PLACE} {_THE} \w+)", "{noun} {verb} {yes} {rest}", _YES_NO),
    _rule(rf"{_VERB} (?P<noun>{_OWN} \w+) (?P<rest>\w+|(?:\w{{2,}}ing|an?) .+)", "{noun} {verb} {yes} {rest}", _YES_NO),
    _rule(rf"{_VERB} (?P<noun>this|that|it) (?P<rest>an? .+)", "{noun} {verb} {yes} {rest}", _YES_NO),
    _rule(rf"where {_VERB} (?P<noun>{_THE} \w+)", "{noun} {verb} {answer}", rf"{_PLACE} .+"),
    _rule(r"what is (?P<rest>(?:in|on|under|above|below|next to|left of|right of) .+)", "{answer} is {rest}", r"\w+"),
    _rule(r"what (?P<kind>sport|animal|room|food|fruit) is (?:this|that|it|shown)", "the {kind} is {answer}"),
)


def agreed_answer(question: Mapping[str, Any]) -> str | None:
    """The answer that a statement may be made from: the dataset's majority, if at least three of ten gave it."""
    answer = str(question.get("multiple_choice_answer") or "")
    if not answer:
        return None
    votes = Counter(str(given.get("answer", "")) for given in question.get("answers", ()))
    return answer if not votes or votes[answer] >= MIN_AGREEMENT else None
