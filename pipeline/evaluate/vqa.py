"""Zero-shot VQA: each candidate answer makes a statement of the question, and the one nearest to the image answers it.

Which type of answer a question has (yes/no, number, other), and so which candidates, is taken from the set, where the
annotators' answers decided it: a figure is of a model that is told as much.

Shapes: N images, Q questions, q questions of the same words, C candidates, D = embedding width.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from data_prep.captions import statement
from pipeline.evaluate.embed import distinct, rows
from pipeline.evaluate.result import Result
from pipeline.evaluate.sets import EvaluationError, Item
from pipeline.evaluate.statistics import Floats, Ints, Sampled, group_intervals
from pipeline.evaluate.ties import scores
from pipeline.evaluate.vqa_accuracy import AGREEMENT, Key, normalised, trimmed
from pipeline.evaluate.vqa_candidates import ANSWER_TYPES, Candidates

TASK = "zeroshot_vqa"
BLOCK = 16_384  # statements that are embedded, and held, at a time
FIELDS = ("question", "question_type", "answer_type", "answers")


class Question(NamedTuple):
    """One question about one image.

    Attributes:
        text: as it was asked.
        question_type: its first words, by which the official evaluation groups questions.
        answer_type: yes/no, number or other.
        answers: of all annotators.
        image: index of its image.
    """

    text: str
    question_type: str
    answer_type: str
    answers: tuple[str, ...]
    image: int


def questions(items: Sequence[Item]) -> list[Question]:
    """The questions of a set, image after image.

    Raises:
        EvaluationError: there are none, or one lacks answers or what it is grouped by.
    """
    found = []
    for image, item in enumerate(items):
        for asked in item.record.get("questions", ()):
            where = f"{item.file}: question {asked.get('question_id')} of {item.key}"
            if missing := [name for name in FIELDS if not asked.get(name)]:
                raise EvaluationError(
                    f"{where} has no {missing[0]}. Those of VQA's test split are not published: measure on val."
                )
            if asked["answer_type"] not in ANSWER_TYPES:
                raise EvaluationError(
                    f"{where} has the answer_type {asked['answer_type']!r}; known are {', '.join(ANSWER_TYPES)}."
                )
            answers = tuple(str(given["answer"]) for given in asked["answers"])
            if len(answers) <= AGREEMENT:
                raise EvaluationError(
                    f"{where} has {len(answers)} answers. The official accuracy leaves one out and wants {AGREEMENT} "
                    "of the others to agree, so it needs more; VQA has ten."
                )
            found.append(Question(asked["question"], asked["question_type"], asked["answer_type"], answers, image))
    if not found:
        raise EvaluationError(f"{items[0].file.parent}: no image has a question. Build the dataset again.")
    return found


def statements(asked: Sequence[Question], answers: Candidates) -> int:
    """How many there are to be embedded, but for those of several questions.

    Raises:
        EvaluationError: there is none for an answer type that occurs.
    """
    counts = Counter(question.answer_type for question in asked)
    if without := [name for name in counts if not answers[name]]:
        raise EvaluationError(
            f"{counts[without[0]]:,} questions have an answer of the type {without[0]}, and there are no candidates of "
            "that type. Name a file with some, one a line: --answers FILE."
        )
    return sum(len(answers[answer_type]) for answer_type, _ in _by_words(asked))


def measure(
    image_ND: Tensor,
    asked: Sequence[Question],
    answers: Candidates,
    embed: Callable[[Sequence[str]], Tensor],
) -> Result:
    """vqa_accuracy of all questions, and of those with each type of answer; each question weighs the same.

    Where several candidates are nearest, a question earns the mean of what they earn, so that nothing is won by their
    order. Chance is what equal embeddings earn: the mean of what all candidates of a question do.

    Args:
        image_ND: unit-norm.
        asked: (Q,) the questions.
        answers: answer type → candidates; at least one for each type that is asked for.
        embed: distinct texts → (their number, D) unit-norm, on the images' device; called for at most BLOCK texts, or
            those of one question, at a time.
    """
    books = {answer_type: _Book(candidates) for answer_type, candidates in answers.items()}
    earned_Q, chance_Q, best_Q = (np.zeros(len(asked)) for _ in range(3))
    for block in _blocks(asked, answers):
        said = {(kind, text): [statement(text, answer) for answer in answers[kind]] for kind, text, _ in block}
        unique = distinct([sentence for sentences in said.values() for sentence in sentences])
        look_up = rows(unique, embed(unique))
        for kind, text, numbers in block:
            image_q = [asked[number].image for number in numbers]
            score_qC = scores(image_ND[image_q], look_up(said[kind, text]))
            nearest_qC = (score_qC == score_qC.amax(dim=1, keepdim=True)).double().cpu().numpy()
            earning_qC = np.stack([books[kind].earnings(asked[number].answers) for number in numbers])
            earned_Q[numbers] = (nearest_qC * earning_qC).sum(axis=1) / nearest_qC.sum(axis=1)
            chance_Q[numbers], best_Q[numbers] = earning_qC.mean(axis=1), earning_qC.max(axis=1)
    return _result(len(image_ND), asked, answers, earned_Q, chance_Q, best_Q)


class _Book:
    """Candidates by how they are compared with annotators' answers."""

    def __init__(self, candidates: Sequence[str]) -> None:
        self._size = len(candidates)
        self._places: dict[bool, dict[str, list[int]]] = {True: defaultdict(list), False: defaultdict(list)}
        for place, candidate in enumerate(candidates):
            self._places[True][normalised(candidate)].append(place)
            self._places[False][trimmed(candidate)].append(place)

    def earnings(self, answers: Sequence[str]) -> Floats:
        """(C,) the accuracy of each candidate."""
        key, earned_C = Key.of(answers), np.zeros(self._size)
        for answer, share in key.earned.items():
            earned_C[self._places[key.differ].get(answer, [])] = share
        return earned_C


def _by_words(asked: Sequence[Question]) -> dict[tuple[str, str], list[int]]:
    """(answer type, question) → the numbers of the questions, so that each statement is made and embedded once."""
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, question in enumerate(asked):
        found[question.answer_type, question.text].append(number)
    return found


def _blocks(asked: Sequence[Question], answers: Candidates) -> Iterator[list[tuple[str, str, list[int]]]]:
    """Questions of the same words together, as many as make at most BLOCK statements, but at least one."""
    block: list[tuple[str, str, list[int]]] = []
    size = 0
    for (kind, text), numbers in _by_words(asked).items():
        if block and size + len(answers[kind]) > BLOCK:
            yield block
            block, size = [], 0
        # The images of one question may be many: as many at a time as it has candidates make a block.
        step = max(1, BLOCK // len(answers[kind]))
        block += [(kind, text, numbers[begin : begin + step]) for begin in range(0, len(numbers), step)]
        size += len(answers[kind])
    yield block


def _result(
    images: int,
    asked: Sequence[Question],
    answers: Candidates,
    earned_Q: Floats,
    chance_Q: Floats,
    best_Q: Floats,
) -> Result:
    image_Q = np.array([question.image for question in asked])
    chosen = {"vqa_accuracy": np.ones(len(asked), dtype=bool)}
    for answer_type in ANSWER_TYPES:
        of_type_Q = np.array([question.answer_type == answer_type for question in asked])
        if of_type_Q.any():
            chosen[f"vqa_accuracy_{answer_type.replace('/', '_')}"] = of_type_Q

    def describe() -> dict[str, Any]:
        return {
            "questions": len(asked),
            "candidates": {answer_type: len(found) for answer_type, found in answers.items()},
            "best_possible": {name: float(best_Q[of_type_Q].mean()) for name, of_type_Q in chosen.items()},
            "without_right_candidate": int((best_Q == 0).sum()),
            "question_types": _each_question_type(images, asked, image_Q, earned_Q, chance_Q),
        }

    return Result(
        TASK,
        images,
        {name: Sampled.of(earned_Q[kept_Q], images=image_Q[kept_Q]) for name, kept_Q in chosen.items()},
        {name: float(chance_Q[kept_Q].mean()) for name, kept_Q in chosen.items()},
        describe,
    )


def _each_question_type(
    images: int, asked: Sequence[Question], image_Q: Ints, earned_Q: Floats, chance_Q: Floats
) -> list[dict[str, Any]]:
    """Of each type of question its name, how many there are, their accuracy with its interval, and chance."""
    names, kind_Q = np.unique([question.question_type for question in asked], return_inverse=True)
    count_K = np.bincount(kind_Q)
    earned_K, chance_K = np.bincount(kind_Q, earned_Q) / count_K, np.bincount(kind_Q, chance_Q) / count_K
    spread_K = group_intervals(Sampled.of(earned_Q, images=image_Q, groups=kind_Q), images)
    columns = (names.tolist(), count_K.tolist(), earned_K.tolist(), spread_K, chance_K.tolist())
    keys = ("question_type", "questions", "vqa_accuracy", "interval", "chance")
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]
