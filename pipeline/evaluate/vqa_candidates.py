"""Candidate answers for zero-shot VQA: what is most often answered in training, or what a file names.

Never the answers of the questions that are asked, which would give the right ones away.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep import manifest
from data_prep.manifest import Shards
from data_prep.record import TRAIN
from pipeline.evaluate.sets import EvaluationError, read_tar
from pipeline.evaluate.vqa_accuracy import normalised, trimmed

YES_NO, NUMBER, OTHER = ANSWER_TYPES = ("yes/no", "number", "other")
# Answer type → how many of the answers that train questions of the type most often have.
MOST_FREQUENT = {NUMBER: 50, OTHER: 250}

Candidates = Mapping[str, Sequence[str]]


def candidates(folder: Path, given: Sequence[str] = ()) -> Candidates:
    """Answer type → the answers to choose from.

    Args:
        folder: of the set; the answers are those of its dataset's train split (see MOST_FREQUENT).
        given: instead of them; those with a digit or a number word answer questions for a number, and no others.

    Raises:
        EvaluationError: there are neither.
    """
    if problem := lacking(folder, given):
        raise EvaluationError(problem)
    if given:
        numeric = {answer: any(letter.isdigit() for letter in normalised(answer)) for answer in given}
        found = {
            NUMBER: tuple(answer for answer, is_number in numeric.items() if is_number),
            OTHER: tuple(answer for answer, is_number in numeric.items() if not is_number),
        }
    else:
        data = folder.parent.parent
        found = _of_train(data, _train_shards(data).fingerprint())
    return {YES_NO: ("yes", "no"), **found}


def lacking(folder: Path, given: Sequence[str] = ()) -> str:
    """Why there are no candidates, and what helps; empty where there are some. Reads no train question."""
    data = folder.parent.parent
    if given or any(_asks(data, shard.name) for shard in _train_shards(data)):
        return ""
    return (
        f"{folder}: candidate answers are the most frequent ones of the dataset's train split, and there are no train "
        "questions. Build the dataset with VQA's, or name a file of candidates, one a line: --answers FILE. (The set's "
        "own answers would give the right ones away.)"
    )


def read_answers(file: Path) -> tuple[str, ...]:
    """Candidate answers from a file, one a line; empty lines are passed over.

    Raises:
        EvaluationError: it is not there, is no text, or has no line.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{file}: looked for candidate answers, one a line: {error}.") from None
    found = tuple(dict.fromkeys(trimmed(line) for line in lines if line.strip()))
    if not found:
        raise EvaluationError(f"{file}: looked for candidate answers, one a line, and found none.")
    return found


def _train_shards(data: Path) -> Shards:
    """None where the folder is no dataset of ours, or has no train split."""
    return manifest.read(data).shards.of_split(TRAIN) if (data / manifest.MANIFEST).is_file() else Shards.of([])


def _asks(data: Path, shard: str) -> bool:
    """Whether a train shard may have questions: statements are made of them, and listed beside the shard."""
    return any(row["statements"] for row in manifest.read_table(data / manifest.table_of(shard), ["statements"]))


@functools.lru_cache(maxsize=1)  # a run that is followed asks again for each checkpoint
def _of_train(data: Path, fingerprint: str) -> dict[str, tuple[str, ...]]:
    """The answers that most train questions have, ties in the order of the alphabet; by answer type."""
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for shard in (shard.name for shard in _train_shards(data) if _asks(data, shard.name)):
        for item in read_tar(data / shard):
            for asked in item.record.get("questions", ()):
                votes[asked.get("answer_type", OTHER)][trimmed(asked.get("multiple_choice_answer", ""))] += 1
    found = {}
    for answer_type, most in MOST_FREQUENT.items():
        ranked = sorted(votes[answer_type].items(), key=lambda vote: (-vote[1], vote[0]))
        found[answer_type] = tuple(answer for answer, _ in ranked if answer)[:most]
    return found
