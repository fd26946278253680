"""The official VQA accuracy, by cases that were worked by hand from what the challenge's code does."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluate.vqa import _Book
from pipeline.evaluate.vqa_accuracy import CONTRACTIONS, PUNCTUATION, normalised

# (as it was given, as it is compared where annotators differ)
NORMALISED = [
    ("Red", "red"),
    ("  two\tblack\ncats ", "2 black cats"),
    ("a\t\nb", "b"),
    # Number words, as whole words only; "none" is one of them, larger numbers are not.
    ("none", "0"),
    ("zero", "0"),
    ("Ten", "10"),
    ("eleven", "eleven"),
    ("someone", "someone"),
    ("twenty one", "twenty 1"),
    # Articles, as whole words only; nothing may be left.
    ("the red bus", "red bus"),
    ("A an THE", ""),
    ("theatre", "theatre"),
    ("plan a", "plan"),
    # Punctuation within a word becomes a space; where it touches a space anywhere, it goes everywhere.
    ("t-shirt", "t shirt"),
    ("t-shirt - red", "tshirt red"),
    ("black/white", "black white"),
    ("black / white", "black white"),
    ("salt,pepper", "salt pepper"),
    ("salt, pepper", "salt pepper"),
    ("salt, pepper,oil", "salt pepperoil"),
    ("(left)", "left"),
    ("[x]{y}<z>", "x y z"),
    ('"stop"', "stop"),
    ("what?!", "what"),
    ("a+b=c@d_e`f\\g", "b c d e f g"),
    # Each mark by itself: the hyphen touches a space, the slash does not.
    ("on- off/on", "on off on"),
    # A comma between digits: all marks go, wherever they are.
    ("1,000", "1000"),
    ("1,000-2,000", "10002000"),
    ("1,000 t-shirt", "1000 tshirt"),
    ("1,a", "1"),
    # Colons and apostrophes stay.
    ("10:30", "10:30"),
    ("dog's", "dog's"),
    # A full stop goes unless a digit follows; 32 of them at most.
    ("u.s.", "us"),
    ("2.5", "2.5"),
    ("5.", "5"),
    ("v.2", "v.2"),
    ("." * 34 + "x", "..x"),
    # Contractions get their apostrophe, also where one of two lacks; words that look like others do not.
    ("dont know", "don't know"),
    ("isnt", "isn't"),
    ("couldnt've", "couldn't've"),
    ("couldn'tve", "couldn't've"),
    ("couldntve", "couldntve"),
    ("DONT", "don't"),
    ("yall", "y'all"),
    ("oclock", "o'clock"),
    ("twas", "'twas"),
    ("ow's'at", "'ow's'at"),
    ("well", "well"),
    ("were", "were"),
    ("im", "im"),
    ("ive", "ive"),
    # The one that loses its apostrophe.
    ("somebody'd", "somebodyd"),
    # Marks go first, then number words and articles, then contractions.
    ("one-two", "1 2"),
    ("the.", ""),
    ("a.m.", "am"),
    ("(isnt)", "isn't"),
]


@pytest.mark.parametrize(("answer", "expected"), NORMALISED, ids=[repr(one) for one, _ in NORMALISED])
def test_answers_are_normalised_as_by_the_official_code(answer, expected):
    assert normalised(answer) == expected


def of_ten(*answers):
    """Those, and as many others, all different, as make ten."""
    return [*answers, *(f"other{number}" for number in range(10 - len(answers)))]


# (answer, what ten annotators gave, what it earns)
EARNED = [
    ("cat", of_ten(), 0.0),
    ("cat", of_ten("cat"), 0.3),
    ("cat", of_ten("cat", "cat"), 0.6),
    ("cat", of_ten(*["cat"] * 3), 0.9),
    ("cat", of_ten(*["cat"] * 4), 1.0),
    ("cat", of_ten(*["cat"] * 9), 1.0),
    ("cat", ["cat"] * 10, 1.0),
    ("dog", ["cat"] * 10, 0.0),
    # Where annotators differ, both sides are normalised.
    ("Cat", of_ten("cat", "CAT", "the cat"), 0.9),
    ("two", of_ten("2", "two", "2."), 0.9),
    ("none", of_ten("0", "zero"), 0.6),
    ("t shirt", of_ten("t-shirt", "t-shirt", "T shirt", "tshirt"), 0.9),
    ("the", of_ten("a", "an"), 0.6),
    ("dont", of_ten("don't"), 0.3),
    # Where they do not, only white space is.
    ("Cat", ["cat"] * 10, 0.0),
    ("2", ["two"] * 10, 0.0),
    ("two", ["two"] * 10, 1.0),
    ("t shirt", ["t-shirt"] * 10, 0.0),
    ("cat.", ["cat"] * 10, 0.0),
    (" cat\n", ["cat"] * 10, 1.0),
    ("cat", ["cat", " cat", "cat\t", "\ncat", *["cat"] * 6], 1.0),
    ("Cat", ["cat", " cat", "cat\t", "\ncat", *["cat"] * 6], 0.0),
    # "Differ" is asked before they are normalised: "2" and "two" do, so that upper case is no matter.
    ("TWO", ["2"] * 9 + ["two"], 1.0),
]


def earned(answer, answers):
    """What a candidate earns, among others."""
    return _Book(["no such answer", answer, "nor this"]).earnings(answers)[1]


@pytest.mark.parametrize(("answer", "answers", "expected"), EARNED)
def test_answers_earn_what_the_official_code_gives(answer, answers, expected):
    assert earned(answer, answers) == pytest.approx(expected, abs=1e-12)


def test_contractions_lack_one_apostrophe():
    """All but one: that is what the official table holds, 114 of which can be met in lower case."""
    assert len(CONTRACTIONS) == 114
    for short, whole in CONTRACTIONS.items():
        if short != "somebody'd":
            assert short in {whole[:i] + whole[i + 1 :] for i in range(len(whole)) if whole[i] == "'"}


@given(st.lists(st.sampled_from(["a b", "2", "two", "x-y", "X y", "x y"]), min_size=4, max_size=12), st.data())
def test_it_is_the_mean_over_what_is_left_without_one_annotator(answers, data):
    """The definition, annotator by annotator."""
    answer = data.draw(st.sampled_from(answers))
    compared = [normalised(one) for one in answers] if len(set(answers)) > 1 else answers
    wanted = normalised(answer) if len(set(answers)) > 1 else answer
    shares = [
        min(sum(one == wanted for one in others) / 3, 1)
        for others in itertools.combinations(compared, len(answers) - 1)
    ]
    assert earned(answer, answers) == pytest.approx(sum(shares) / len(shares), abs=1e-12)


@given(st.text(alphabet="ab1 ,.'-Tthe" + PUNCTUATION, max_size=20))
def test_only_what_is_compared_is_left(answer):
    """No mark of punctuation, no upper case, no article, no double space."""
    found = normalised(answer)
    assert not set(found) & set(PUNCTUATION)
    assert found == found.lower() == " ".join(found.split())
    assert not {"a", "an", "the"} & set(found.split())
