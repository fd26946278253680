"""Zero-shot VQA: which candidate answers a question, and what it earns."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from data_prep.captions import statement
from pipeline.evaluate import vqa
from pipeline.evaluate.sets import EvaluationError, Item
from pipeline.evaluate.vqa import Question
from pipeline.evaluate.vqa_accuracy import normalised

ANSWERS = {"yes/no": ("yes", "no"), "number": ("1", "2", "3"), "other": ("red", "blue", "green", "t-shirt")}
AXES = 64


def asked(text, answer_type, answers, image=0, question_type="what"):
    return Question(text, question_type, answer_type, tuple(answers), image)


def one_axis_each():
    """(embed, coordinates): each text that is asked for gets an axis of its own, so that scores can be chosen."""
    axis: dict[str, int] = {}

    def embed(texts):
        assert len(set(texts)) == len(texts)
        return torch.eye(AXES)[[axis.setdefault(text, len(axis)) for text in texts]]

    return embed, axis


def liking(axis, question, **scores):
    """An image whose similarity to the statement of each answer is given."""
    image = torch.zeros(AXES)
    for answer, score in scores.items():
        image[axis[statement(question, answer)]] = score
    return image


def measured(questions, likes, images=1, answers=ANSWERS):
    """Figures where each image likes the statements of a question as said: (image, question, {answer: score})."""
    embed, axis = one_axis_each()
    embed(list(dict.fromkeys(statement(one.text, answer) for one in questions for answer in answers[one.answer_type])))
    image_ND = torch.zeros(images, AXES)
    for image, text, scores in likes:
        image_ND[image] += liking(axis, text, **scores)
    return vqa.measure(image_ND, questions, answers, embed)


def test_the_nearest_statement_answers():
    questions = [
        asked("What color is the bus?", "other", ["blue"] * 7 + ["red"] * 3),
        asked("Is there a bus?", "yes/no", ["yes"] * 10),
        asked("How many buses are there?", "number", ["2"] * 8 + ["two"] + ["3"]),
    ]
    likes = [
        (0, "What color is the bus?", {"red": 0.4, "blue": 0.3}),
        (0, "Is there a bus?", {"yes": 0.1, "no": 0.2}),
        (0, "How many buses are there?", {"1": 0.2, "2": 0.3}),
    ]
    found = measured(questions, likes)
    assert found.metrics == pytest.approx(
        {
            "vqa_accuracy": (0.9 + 0 + 1) / 3,
            "vqa_accuracy_yes_no": 0,
            "vqa_accuracy_number": 1,
            "vqa_accuracy_other": 0.9,
        }
    )
    assert found.task == "zeroshot_vqa"
    assert found.images == 1


def test_a_tie_earns_the_mean_of_what_its_candidates_do():
    questions = [asked("What color is the bus?", "other", ["blue"] * 7 + ["red"] * 3)]
    tie = [(0, "What color is the bus?", {"red": 0.4, "blue": 0.4, "green": 0.4})]
    assert measured(questions, tie).metrics["vqa_accuracy"] == pytest.approx((0.9 + 1 + 0) / 3)


def test_a_collapsed_model_scores_chance():
    random_N = torch.randn(3, 65, generator=torch.Generator().manual_seed(0))
    image, text = F.normalize(random_N[:2], dim=1)
    questions = [
        asked("What color is the bus?", "other", ["blue"] * 7 + ["red"] * 3, 0),
        asked("Is there a bus?", "yes/no", ["yes"] * 10, 1),
        asked("How many buses are there?", "number", ["7"] * 10, 1),
    ]
    found = vqa.measure(image.repeat(2, 1), questions, ANSWERS, lambda texts: text.repeat(len(texts), 1))
    assert found.metrics == pytest.approx(found.chance)
    assert found.chance == pytest.approx(
        {
            "vqa_accuracy": ((1 + 0.9) / 4 + 1 / 2 + 0) / 3,
            "vqa_accuracy_yes_no": 1 / 2,
            "vqa_accuracy_number": 0,
            "vqa_accuracy_other": 1.9 / 4,
        }
    )


def test_questions_without_a_right_candidate_earn_nothing_and_are_counted():
    questions = [
        asked("What color is the bus?", "other", ["mauve"] * 10),
        asked("What color is the car?", "other", ["mauve"] * 8 + ["red"] * 2),
    ]
    likes = [(0, one.text, {"red": 0.4}) for one in questions]
    found = measured(questions, likes)
    assert found.metrics["vqa_accuracy"] == pytest.approx(0.3)
    about = found.describe()
    assert about["without_right_candidate"] == 1
    assert about["best_possible"]["vqa_accuracy"] == pytest.approx(0.3)
    assert about["candidates"] == {"yes/no": 2, "number": 3, "other": 4}


def test_candidates_are_compared_as_annotators_answers_are():
    """Verbatim where all annotators agree, normalised where they do not."""
    like = [(0, "What is it?", {"t-shirt": 0.5})]
    for answers, earned in ((["t shirt"] * 10, 0), (["t shirt"] * 9 + ["shirt"], 1), (["t-shirt"] * 10, 1)):
        assert measured([asked("What is it?", "other", answers)], like).metrics["vqa_accuracy"] == earned


def test_types_that_are_not_asked_for_have_no_figure():
    found = measured([asked("Is it?", "yes/no", ["yes"] * 10)], [(0, "Is it?", {"yes": 1.0})])
    assert list(found.metrics) == ["vqa_accuracy", "vqa_accuracy_yes_no"]


def small_set():
    """40 questions about 9 images, and embeddings of all their statements, some of them equal."""
    chance = random.Random(5)
    texts = {
        "yes/no": ["Is there a bus?", "Is it late?"],
        "number": ["How many buses are there?"],
        "other": ["What color is the bus?", "Why?", "What is on the table?"],
    }
    pool = {"yes/no": ["yes", "no", "Yes"], "number": ["1", "two", "3", "4"], "other": ["red", "Red", "t shirt", "x"]}
    questions = []
    for number in range(40):
        kind = chance.choice(list(texts))
        few = chance.sample(pool[kind], chance.choice([1, 2, 3]))
        text = chance.choice(texts[kind])
        answers = [chance.choice(few) for _ in range(10)]
        questions.append(asked(text, kind, answers, number % 8, " ".join(text.split()[:2])))
    said = {statement(one, answer) for kind in texts for one in texts[kind] for answer in ANSWERS[kind]}
    generator = torch.Generator().manual_seed(1)
    # Few directions, so that statements tie.
    directions = F.normalize(torch.randn(5, 8, generator=generator), dim=1)
    embedded = {text: directions[chance.randrange(5)] for text in sorted(said)}
    return questions, F.normalize(torch.randn(9, 8, generator=generator), dim=1), embedded


def plainly(questions, image_ND, embedded):
    """What each question earns, by the official definition, one thing at a time."""
    found = []
    for one in questions:
        candidates = ANSWERS[one.answer_type]
        score = [
            round(float(image_ND[one.image].double() @ embedded[statement(one.text, answer)].double()), 6)
            for answer in candidates
        ]
        winners = [answer for answer, value in zip(candidates, score, strict=True) if value == max(score)]
        earned = []
        for answer in winners:
            given, wanted = list(one.answers), answer
            if len(set(given)) > 1:
                given, wanted = [normalised(other) for other in given], normalised(answer)
            shares = [min(sum(o == wanted for o in others) / 3, 1) for others in itertools.combinations(given, 9)]
            earned.append(sum(shares) / 10)
        found.append(sum(earned) / len(earned))
    return found


@pytest.mark.parametrize("block", [1, 5, 16_384])
def test_a_small_set_is_scored_as_by_definition(monkeypatch, block):
    """Whatever is held at a time, each statement is embedded once."""
    monkeypatch.setattr(vqa, "BLOCK", block)
    questions, image_ND, embedded = small_set()
    calls = []

    def embed(texts):
        calls.append(list(texts))
        return torch.stack([embedded[text] for text in texts])

    found = vqa.measure(image_ND, questions, ANSWERS, embed)
    assert sorted(text for texts in calls for text in texts) == sorted(embedded)
    assert all(len(texts) <= max(block, 4) for texts in calls)
    expected = plainly(questions, image_ND, embedded)
    assert any(share not in (0, 1) for share in expected)
    assert found.sampled["vqa_accuracy"].values.tolist() == pytest.approx(expected)
    assert found.metrics["vqa_accuracy"] == pytest.approx(np.mean(expected))
    for kind, name in (("yes/no", "yes_no"), ("number", "number"), ("other", "other")):
        of_kind = [share for one, share in zip(questions, expected, strict=True) if one.answer_type == kind]
        assert found.metrics[f"vqa_accuracy_{name}"] == pytest.approx(np.mean(of_kind))
    listed = found.describe()["question_types"]
    assert sum(row["questions"] for row in listed) == len(questions) == found.describe()["questions"]
    for row in listed:
        of_type = [e for one, e in zip(questions, expected, strict=True) if one.question_type == row["question_type"]]
        assert row["vqa_accuracy"] == pytest.approx(np.mean(of_type))
        assert row["interval"][0] <= row["vqa_accuracy"] <= row["interval"][1]


def test_an_interval_draws_images_and_not_questions():
    """An image with many questions is drawn with all of them, so that the interval is as wide as of few images."""
    many = [asked("Is it?", "yes/no", ["yes" if image % 2 else "no"] * 10, image) for image in range(4)] * 50
    image_ND = torch.eye(2)[[0] * 4]
    found = vqa.measure(image_ND, many, ANSWERS, lambda texts: torch.eye(2)[: len(texts)])
    assert found.metrics["vqa_accuracy"] == 0.5
    assert found.intervals["vqa_accuracy"] == (0, 1)
    json.dumps(found.describe())


def raw(number=1, answer="red", answer_type="other", **changes):
    """A question as it lies in a sample's json."""
    return {
        "question_id": number,
        "question": "What is it?",
        "question_type": "what is",
        "answer_type": answer_type,
        "multiple_choice_answer": answer,
        "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": place + 1} for place in range(10)],
    } | changes


def item(*questions):
    return Item("s0", Path("0.tar"), 0, 0, record={"questions": list(questions)})


def test_questions_belong_to_their_images():
    found = vqa.questions([item(raw(1), raw(2, "2", "number")), item(raw(3))])
    assert [(one.image, one.answer_type, one.answers[0]) for one in found] == [
        (0, "other", "red"),
        (0, "number", "2"),
        (1, "other", "red"),
    ]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([item()], "no image has a question"),
        (
            [item({"question_id": 7, "question": "What is it?"})],
            r"question 7 of s0 has no question_type.*measure on val",
        ),
        ([item(raw(answers=[]))], "has no answers.*test split are not published"),
        ([item(raw(answers=raw()["answers"][:3]))], "has 3 answers.*VQA has ten"),
        ([item(raw(answer_type="colour"))], "answer_type 'colour'; known are yes/no, number, other"),
    ],
)
def test_questions_that_cannot_be_scored_say_why(items, message):
    with pytest.raises(EvaluationError, match=message):
        vqa.questions(items)


def test_a_type_without_candidates_is_refused():
    questions = [asked("How many?", "number", ["2"] * 10)]
    with pytest.raises(EvaluationError, match="1 questions have an answer of the type number"):
        vqa.statements(questions, ANSWERS | {"number": ()})
    assert vqa.statements(questions * 2, ANSWERS | {"other": ()}) == 3
