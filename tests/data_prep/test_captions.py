"""Texts: cleaning is idempotent and leaves nothing odd; statements say what question and answer say, or nothing new."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.captions import BadText, TextRules, agreed_answer, clean, clean_texts, statement
from data_prep.record import Evaluation, Record

ANY_TEXT = st.text(st.characters(), max_size=60)


@given(ANY_TEXT)
def test_cleaning_is_idempotent_and_leaves_one_normal_line(text):
    cleaned = clean("x" + text)  # never empty
    assert clean(cleaned) == cleaned == unicodedata.normalize("NFC", cleaned)
    assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in cleaned)
    assert cleaned == " ".join(cleaned.split())
    cleaned.encode("utf-8")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" A dog \n\t runs.  ", "A dog runs."),
        ("cafe\u0301", "café"),
        ("e\x00\u0301", "é"),
        ("a\x07b\ud800c", "abc"),
        ("a\u00a0b\u2028c", "a b c"),
        ('It\'s "quoted" #1', 'It\'s "quoted" #1'),
    ],
)
def test_cleaning(text, expected):
    assert clean(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"), [("", "empty_text"), (" \n\x00", "empty_text"), ("a" * 2001, "too_long_text")]
)
def test_unusable_texts_have_a_reason(text, reason):
    with pytest.raises(BadText, match=reason):
        clean(text)


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("What colour is the bus?", "red", "the bus is red"),
        ("What color are the buses?", "red", "the buses are red"),
        ("What is the color of the bus?", "red", "the bus is red"),
        ("What color are his eyes ?", "blue", "his eyes are blue"),
        ("How many dogs are there?", "2", "there are 2 dogs"),
        ("How many people are in the picture?", "3", "there are 3 people in the picture"),
        ("Is there a dog?", "yes", "there is a dog"),
        ("Is there a dog?", "no", "there is not a dog"),
        ("Are there any people?", "yes", "there are people"),
        ("Are there any people?", "no", "there are not any people"),
        ("Is the cup left of the plate?", "yes", "the cup is left of the plate"),
        (
            "Is the red circle to the left of the blue square?",
            "no",
            "the red circle is not to the left of the blue square",
        ),
        ("Is the red circle above the blue square?", "yes", "the red circle is above the blue square"),
        ("Is the cat on the mat?", "no", "the cat is not on the mat"),
        ("Is the bus red?", "yes", "the bus is red"),
        ("Is the man wearing a hat?", "no", "the man is not wearing a hat"),
        ("Is this a bus?", "yes", "this is a bus"),
        ("What shape is the sign?", "octagon", "the sign is an octagon"),
        ("Where is the dog?", "on couch", "the dog is on couch"),
        ("What sport is this?", "tennis", "the sport is tennis"),
        ("How many {x} are there?", "{a}", "there are {a} {x}"),
    ],
)
def test_rules(question, answer, expected):
    assert statement(question, answer) == expected


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Why is he running?", "late"),
        ("Is the traffic light green?", "yes"),
        ("Is the train station empty?", "no"),
        ("Is the bus red?", "maybe"),
        ("Where is the dog?", "couch"),
        ("Where is this picture taken?", "zoo"),
        ("What is on the table?", "2 plates"),
        ("Are these your shoes?", "yes"),
    ],
)
def test_what_no_rule_says_well_stays_a_labelled_pair(question, answer):
    assert statement(question, answer) == f"Question: {question} Answer: {answer}"


@given(ANY_TEXT, ANY_TEXT.filter(str.strip))
def test_no_question_breaks_the_rules(question, answer):
    assert answer in statement(question, answer) or answer in ("yes", "no")


@pytest.mark.parametrize(("votes", "expected"), [(10, "red"), (3, "red"), (2, None), (0, None)])
def test_a_statement_needs_three_of_ten_votes(votes, expected):
    answers = [{"answer": "red"}] * votes + [{"answer": str(n)} for n in range(10 - votes)]
    assert agreed_answer({"multiple_choice_answer": "red", "answers": answers}) == expected


def test_a_question_without_answers_has_none():
    assert agreed_answer({"question": "What?"}) is None


# --- what is done to a record's texts


def record(*captions: str, evaluation: Evaluation | None = None) -> Record:
    return Record("x:1", "x", Path("x.jpg"), evaluation, captions)


def test_short_captions_do_not_train_and_are_kept_where_they_are_evaluated():
    rules = TextRules(min_words=3)
    found = clean_texts(record("a dog runs", "a  dog", "  "), rules)
    assert found.captions == ["a dog runs"]
    assert found.dropped == [("too_short_text", "a  dog"), ("empty_text", "  ")]
    assert clean_texts(record("a dog", evaluation=Evaluation("e", "retrieval")), rules).captions == ["a dog"]


@pytest.mark.parametrize(
    ("text", "expected", "counted"),
    [
        ("Write to a.b+c@mail.example.org today", "Write to today", {"email": 1}),
        ("see https://example.org/a?b=c and www.example.com", "see and", {"url": 2}),
        ("call +44 20 7946 0958 now", "call now", {"phone": 1}),
        ("call (650) 253-0000, or 650-253-0001", "call , or", {"phone": 2}),
        ("built 1914-1918, 12 of 300000 bricks", "built 1914-1918, 12 of 300000 bricks", {}),
        ("route 66 at 10:30 in 2014", "route 66 at 10:30 in 2014", {}),
    ],
)
def test_scrubbing(text, expected, counted):
    found = clean_texts(record(text), TextRules(scrub=True))
    assert found.captions == [expected]
    assert +found.scrubbed == counted
    assert clean_texts(record(text), TextRules()).captions == [text]
