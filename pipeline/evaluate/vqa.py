"""Zero-shot VQA: each candidate answer makes a statement of the question, and the one nearest to the image answers it.

Candidates are what is often answered in training, never the answers of the questions that are asked; but which type of
answer a question has (yes/no, number, other) is taken from the set, as its annotators' answers have it.

Shapes: N images, Q questions, q questions of the same words, C candidates, D = embedding width.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from data_prep import manifest
from data_prep.captions import statement
from data_prep.record import TRAIN
from pipeline.evaluate.embed import distinct, rows
from pipeline.evaluate.result import Result
from pipeline.evaluate.sets import EvaluationError, Item, read_tar
from pipeline.evaluate.statistics import Floats, Ints, Sampled, group_intervals
from pipeline.evaluate.ties import scores
from pipeline.evaluate.vqa_accuracy import AGREEMENT, Key, normalised, trimmed

log = logging.getLogger(__name__)

TASK = "zeroshot_vqa"
YES_NO, NUMBER, OTHER = "yes/no", "number", "other"
# Answer type → how many of training's most frequent answers are candidates; of VQA v2's train answers these are most.
MOST_FREQUENT = {NUMBER: 50, OTHER: 250}
BLOCK = 16_384  # statements that are embedded, and held, at a time
FIELDS = ("question", "question_type", "answer_type", "answers")

Candidates = Mapping[str, Sequence[str]]


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
            if asked["answer_type"] not in (YES_NO, NUMBER, OTHER):
                raise EvaluationError(
                    f"{where} has the answer_type {asked['answer_type']!r}; known are {YES_NO}, {NUMBER} and {OTHER}."
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


def candidates(folder: Path, given: Sequence[str] = ()) -> Candidates:
    """Answer type → the answers to choose from.

    Args:
        folder: of the set; the answers are those of its dataset's train split (see MOST_FREQUENT).
        given: instead of them; those with a digit or a number word answer questions for a number, and no others.

    Raises:
        EvaluationError: there are neither.
    """
    if given:
        numeric = {answer: any(letter.isdigit() for letter in normalised(answer)) for answer in given}
        found = {
            NUMBER: tuple(answer for answer, is_number in numeric.items() if is_number),
            OTHER: tuple(answer for answer, is_number in numeric.items() if not is_number),
        }
    else:
        data = folder.parent.parent
        found = _of_train(data, manifest.read(data).fingerprint(TRAIN)) if _has_train(data) else {}
        if not any(found.values()):
            raise EvaluationError(
                f"{folder}: candidate answers are the most frequent ones of the dataset's train split, and there are "
                "no train questions. Build the dataset with VQA's, or name a file of candidates, one a line: --answers "
                "FILE. (The set's own answers would give the right ones away.)"
            )
    return {YES_NO: ("yes", "no"), **found}


def read_answers(file: Path) -> tuple[str, ...]:
    """Candidate answers from a file, one a line; empty lines are passed over.

    Raises:
        EvaluationError: it is not there, is no text, or has no line.
    """
    try:
        found = distinct([trimmed(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()])
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{file}: looked for candidate answers, one a line: {error}.") from None
    if not found:
        raise EvaluationError(f"{file}: looked for candidate answers, one a line, and found none.")
    return tuple(found)


def _has_train(data: Path) -> bool:
    return (data / manifest.MANIFEST).is_file() and TRAIN in manifest.read(data).manifest["splits"]


@functools.lru_cache(maxsize=1)  # a run that is followed asks again for each checkpoint
def _of_train(data: Path, fingerprint: str) -> dict[str, tuple[str, ...]]:
    """The answers that most train questions have, ties in the order of the alphabet; by answer type."""
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for shard in manifest.read(data).shards.of_split(TRAIN):
        # Statements are made of questions: where there are none, the tar need not be read.
        if any(row["statements"] for row in manifest.read_table(data / manifest.table_of(shard.name), ["statements"])):
            for item in read_tar(data / shard.name):
                for asked in item.record.get("questions", ()):
                    votes[asked.get("answer_type", OTHER)][trimmed(asked.get("multiple_choice_answer", ""))] += 1
    found = {}
    for answer_type, most in MOST_FREQUENT.items():
        ranked = sorted(votes[answer_type].items(), key=lambda vote: (-vote[1], vote[0]))
        found[answer_type] = tuple(answer for answer, _ in ranked if answer)[:most]
    return found


def check(asked: Sequence[Question], answers: Candidates) -> None:
    """Refuse candidates that leave a question without any, and say how many statements are to be embedded.

    Raises:
        EvaluationError: there is none for an answer type that occurs.
    """
    counts = Counter(question.answer_type for question in asked)
    if without := [name for name in counts if not answers[name]]:
        raise EvaluationError(
            f"{counts[without[0]]:,} questions have an answer of the type {without[0]}, and there are no candidates of "
            "that type. Name a file with some, one a line: --answers FILE."
        )
    statements = sum(len(answers[answer_type]) for answer_type, _ in _by_words(asked))
    log.info("%d questions; about %d statements of them and their candidate answers.", len(asked), statements)


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
        unique = distinct([one for statements in said.values() for one in statements])
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
    statements = 0
    for (kind, text), numbers in _by_words(asked).items():
        if block and statements + len(answers[kind]) > BLOCK:
            yield block
            block, statements = [], 0
        # The images of one question may be many: as many at a time as it has candidates make a block.
        step = max(1, BLOCK // len(answers[kind]))
        block += [(kind, text, numbers[begin : begin + step]) for begin in range(0, len(numbers), step)]
        statements += len(answers[kind])
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
    for answer_type in (YES_NO, NUMBER, OTHER):
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
