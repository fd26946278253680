"""A run's tokenizer as a fast Hugging Face tokenizer, with identical ids.

open_clip reads a folder's tokenizer through transformers, so this is how a vocabulary of one's own gets there. Cleaning
(ftfy, HTML's entities) is open_clip's own, and no tokenizer's. Of SentencePiece's models, known to differ, beside some
1 in 10,000 strings of random Unicode: a compatibility letter before an accent that composes with it (Ⓥ and U+0303),
which `tokenizers` normalises letter by letter.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from data_prep.record import DataError
from pipeline.tokenizer import HuggingFaceTokenizer, OpenClipTokenizer, SentencePieceTokenizer, Tokenizer

SPACE = "▁"
# sentencepiece_model.proto
BPE = 2
NORMAL, USER_DEFINED = 1, 4

# A combining mark after another character, where `tokenizers` would normalise the two as one and lose the mark.
MARK = r"(?<=.)(?=[\p{M}\x{200c}\x{200d}])"
# Keeps the two apart meanwhile: a format character, which no normalisation touches and open_clip's cleaning removes.
APART = "\u206f"


class ExportError(DataError):
    """A model that this format cannot hold, or whose export is not equal to it."""


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and its configuration into `folder`; raises as `converted` does."""
    converted(tokenizer).save_pretrained(folder)


def converted(tokenizer: Tokenizer) -> Any:
    """The same tokenizer as an object of transformers', which pads to the same length with the same id.

    Raises:
        ExportError: the model is not BPE (a unigram model's segmentation is not one of merges), or it was trained with
            options that change how text is split and have no counterpart here.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _from_sentencepiece(tokenizer)
    if isinstance(tokenizer, OpenClipTokenizer):
        return _from_open_clip(tokenizer)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    fast = copy.deepcopy(tokenizer.theirs)
    fast.model_max_length = tokenizer.context_length
    return fast


def _from_open_clip(tokenizer: OpenClipTokenizer) -> Any:
    """CLIPTokenizer, which has two tokens under other names."""
    from transformers import CLIPTokenizer

    simple = tokenizer.simple
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return CLIPTokenizer(
        vocab={names.get(piece, piece): number for piece, number in simple.encoder.items()},
        merges=sorted(simple.bpe_ranks, key=simple.bpe_ranks.get),
        # open_clip pads with 0, which is this piece; inside a text it stays what it is.
        pad_token=simple.decoder[tokenizer.pad_id],
        split_special_tokens=True,
        model_max_length=tokenizer.context_length,
    )


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> Any:
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.pieces.serialized_model_proto())
    _refuse_what_has_no_counterpart(proto, tokenizer.path)
    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    pad, unk, bos, eos = (
        tokenizer.pieces.id_to_piece(number)
        for number in (tokenizer.pad_id, tokenizer.pieces.unk_id(), tokenizer.bos_id, tokenizer.end_id)
    )
    fast = Tokenizer(
        models.BPE(
            vocabulary,
            merges(vocabulary, scores),
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    fast.normalizer = _normalizer(proto.normalizer_spec.precompiled_charsmap)
    fast.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=SPACE, prepend_scheme="never", split=proto.trainer_spec.split_by_whitespace
    )
    fast.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, tokenizer.bos_id), (eos, tokenizer.end_id)]
    )
    special = [AddedToken(piece, normalized=False, special=True) for piece in (pad, unk, bos, eos)]
    fast.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token=pad,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        model_max_length=tokenizer.context_length,
        # A caption that spells `<s>` has not asked for the token.
        split_special_tokens=True,
        model_input_names=["input_ids", "attention_mask"],
    )


def merges(vocabulary: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, in the order in which SentencePiece would merge them.

    SentencePiece merges whichever neighbours make the piece of the best score, so a piece's score ranks each of its
    merges alike.

    Args:
        vocabulary: piece → id.
        scores: of the pieces that text can become; control, byte and unknown pieces take no part.
    """
    found = [
        (-score, vocabulary[piece[:cut]], vocabulary[piece[cut:]], piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _normalizer(charsmap: bytes) -> Any:
    """SentencePiece's own rules, its removal of needless spaces, and its marks for those that stay."""
    from tokenizers import Regex, normalizers

    rules: list[Any] = []
    if charsmap:
        rules = [
            normalizers.Replace(Regex(MARK), APART),
            normalizers.Precompiled(charsmap),
            normalizers.Replace(APART, ""),
        ]
    return normalizers.Sequence(
        [
            *rules,
            normalizers.Replace(Regex("^ +"), ""),
            normalizers.Replace(Regex(f"[ {SPACE}]+$"), ""),
            normalizers.Replace(Regex(" +"), SPACE),
            normalizers.Prepend(SPACE),
        ]
    )


def _refuse_what_has_no_counterpart(proto: Any, path: Path) -> None:
    if proto.trainer_spec.model_type != BPE:
        raise ExportError(
            f"{path}: not a BPE model (type {proto.trainer_spec.model_type}). Other tools cannot be given it with "
            "identical ids: train the vocabulary with `python -m data_prep vocabulary --type bpe`."
        )
    wanted = {"add_dummy_prefix": True, "remove_extra_whitespaces": True, "escape_whitespaces": True}
    found = {name: getattr(proto.normalizer_spec, name) for name in wanted}
    suffix = proto.trainer_spec.treat_whitespace_as_suffix
    own = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    if found != wanted or suffix or own:
        raise ExportError(
            f"{path}: trained with {found}, treat_whitespace_as_suffix {suffix} and the user-defined symbols {own}; "
            "this format holds SentencePiece's defaults. Train the vocabulary with `python -m data_prep vocabulary`."
        )
