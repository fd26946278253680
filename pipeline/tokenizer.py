"""Captions → token ids: a SentencePiece model or open_clip's byte-pair encoding behind one call.

Both are called as `tokenize(texts) -> (B, L) int64`, L = context length, and cut what is too long.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from data_prep.record import DataError

MODEL_FILE = "sentencepiece.model"
# Words whose ids open_clip's tokenizer keeps at hand.
REMEMBERED = 100_000


class TokenizerError(DataError):
    """A tokenizer that is missing, or that does not fit the text tower."""


class Tokenizer(Protocol):
    """What the loader, the evaluators and the export need of a tokenizer."""

    context_length: int
    vocab_size: int

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B,) texts → (B, L) int64."""
        ...


@dataclass
class SentencePieceTokenizer:
    """bos, pieces, eos, then padding; texts are cleaned as open_clip's HFTokenizer cleans them."""

    path: Path
    context_length: int
    pieces: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        import sentencepiece
        from open_clip.tokenizer import get_clean_fn

        if not self.path.is_file():
            raise TokenizerError(
                f"{self.path}: no SentencePiece model there. `python -m data_prep vocabulary DATA --out FILE` makes "
                "one; the recipe names it in tokenizer.path."
            )
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise TokenizerError(f"{self.path}: not a SentencePiece model ({error}).") from None
        self.vocab_size: int = self.pieces.vocab_size()
        self.pad_id, self.bos_id, self.eos_id = self.pieces.pad_id(), self.pieces.bos_id(), self.pieces.eos_id()
        if min(self.pad_id, self.bos_id, self.eos_id) < 0:
            raise TokenizerError(
                f"{self.path}: has no pad, bos or eos piece (ids {self.pad_id}, {self.bos_id}, {self.eos_id}). "
                "Train it with `python -m data_prep vocabulary`, which reserves them."
            )
        self._clean = get_clean_fn("whitespace")

    def __call__(self, texts: Sequence[str]) -> Tensor:
        pieces = self.pieces.encode([cleaned(text, self._clean) for text in texts])
        return padded(pieces, self.context_length, self.bos_id, self.eos_id, self.pad_id)


@dataclass
class OpenClipTokenizer:
    """open_clip's SimpleTokenizer, the byte-pair encoding of the original CLIP."""

    context_length: int

    def __post_init__(self) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self._simple = SimpleTokenizer(context_length=self.context_length)
        self.vocab_size: int = self._simple.vocab_size
        self._ids: dict[str, list[int]] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        start, end = self._simple.all_special_ids[:2]
        return padded([self._encode(text) for text in texts], self.context_length, start, end, 0)

    def _encode(self, text: str) -> list[int]:
        """SimpleTokenizer's ids, word by word, so that a word that has been seen costs a look-up."""
        ids: list[int] = []
        for word in self._simple.pat.findall(cleaned(text, self._simple.clean_fn).lower()):
            ids += self._ids.get(word) or self._ids_of(word)
        return ids

    def _ids_of(self, word: str) -> list[int]:
        if len(self._ids) >= REMEMBERED:
            self._ids.clear()
            self._simple.cache.clear()  # it would grow for as long as there are new words
        letters = "".join(self._simple.byte_encoder[byte] for byte in word.encode("utf-8"))
        self._ids[word] = [self._simple.encoder[piece] for piece in self._simple.bpe(letters).split(" ")]
        return self._ids[word]


def cleaned(text: str, clean: Callable[[str], str]) -> str:
    """What open_clip's `clean` makes of a text, at once where that is only to even out blanks.

    ftfy and html.unescape, a third of the time that tokenising takes, leave printable ASCII without & as it is.
    """
    plain = text.isascii() and text.isprintable() and "&" not in text
    return " ".join(text.split()) if plain else clean(text)


def padded(pieces: Sequence[list[int]], length: int, start: int, end: int, pad: int) -> Tensor:
    """(B, length) int64: start, ids, end, then padding; what is too long is cut before the end."""
    token_BL = np.full((len(pieces), length), pad, dtype=np.int64)
    for row, ids in enumerate(pieces):
        ids = [start, *ids[: length - 2], end]
        token_BL[row, : len(ids)] = ids
    return torch.from_numpy(token_BL)


def load(kind: str, path: Path, text_cfg: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a recipe, checked against open_clip's text_cfg.

    Raises:
        TokenizerError: the model file is missing or malformed, its pieces outnumber the embedding, or the tower
            would pool a token that is not the end of the text.
    """
    context_length = int(text_cfg.get("context_length", 77))
    if kind == "open_clip":
        tokenizer: Tokenizer = OpenClipTokenizer(context_length)
    else:
        tokenizer = sentencepiece = SentencePieceTokenizer(path, context_length)
        _check_pooling(sentencepiece, text_cfg)
    embeddings = int(text_cfg.get("vocab_size", 49408))
    if tokenizer.vocab_size > embeddings:
        raise TokenizerError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the text tower {embeddings} embeddings. "
            f"Set model.config.text_cfg.vocab_size to {tokenizer.vocab_size}, or train a smaller vocabulary."
        )
    return tokenizer


def store(kind: str, path: Path, folder: Path) -> Path:
    """Copy what a run's tokenizer needs into `folder`, and return the path to load it from."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / MODEL_FILE
    if kind == "sentencepiece" and path != target:
        if not path.is_file():
            raise TokenizerError(f"{path or 'tokenizer.path'}: no such file. The recipe names it in tokenizer.path.")
        shutil.copyfile(path, target)
    return target


def _check_pooling(tokenizer: SentencePieceTokenizer, text_cfg: dict[str, Any]) -> None:
    # open_clip's default, argmax, takes the largest id for the end of the text; in SentencePiece it is any piece.
    pool, eos, pad = text_cfg.get("pool_type", "argmax"), text_cfg.get("eos_id", 2), text_cfg.get("pad_id", 0)
    if pool != "eos" or eos != tokenizer.eos_id or pad != tokenizer.pad_id:
        raise TokenizerError(
            f"model.config.text_cfg has pool_type {pool!r}, eos_id {eos}, pad_id {pad}; with this SentencePiece model "
            f"it must be pool_type: eos, eos_id: {tokenizer.eos_id}, pad_id: {tokenizer.pad_id}, or a wrong token "
            "would stand for the text."
        )
