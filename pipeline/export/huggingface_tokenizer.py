"""A SentencePiece BPE model as the files of a fast Hugging Face tokenizer, with identical ids.

open_clip reads a folder's tokenizer through transformers, so this is how a vocabulary of one's own gets there.
"""

from __future__ import annotations

from pathlib import Path

from data_prep.record import DataError
from pipeline.tokenizer import SentencePieceTokenizer

BPE = 2  # TrainerSpec.ModelType
SPACE = "▁"


class ExportError(DataError):
    """A model that this format cannot hold, or whose export is not equal to it."""


def write(tokenizer: SentencePieceTokenizer, folder: Path) -> None:
    """Write tokenizer.json and its configuration into `folder`.

    Raises:
        ExportError: the model is not BPE: a unigram model's segmentation is not one of merges.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.pieces.serialized_model_proto())
    if proto.trainer_spec.model_type != BPE:
        raise ExportError(
            f"{tokenizer.path}: not a BPE model. Train the vocabulary with --type bpe, or keep to this pipeline."
        )
    scores = {piece.piece: piece.score for piece in proto.pieces}
    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    pad, unk, bos, eos = (
        tokenizer.pieces.id_to_piece(number)
        for number in (tokenizer.pad_id, tokenizer.pieces.unk_id(), tokenizer.bos_id, tokenizer.eos_id)
    )
    special = {pad, unk, bos, eos}
    fast = Tokenizer(models.BPE(vocabulary, merges(vocabulary, scores, special), unk_token=unk, fuse_unk=True))
    steps = [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if proto.normalizer_spec.precompiled_charsmap:
        steps.insert(0, normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    fast.normalizer = normalizers.Sequence(steps)
    fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, tokenizer.bos_id), (eos, tokenizer.eos_id)]
    )
    fast.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in sorted(special)])
    PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token=pad,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        model_max_length=tokenizer.context_length,
        # A caption that spells `<s>` has not asked for the token.
        split_special_tokens=True,
    ).save_pretrained(folder)


def merges(vocabulary: dict[str, int], scores: dict[str, float], special: set[str]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, in the order in which SentencePiece would merge them.

    SentencePiece merges whichever neighbours make the piece of the best score, so a piece's score ranks each of its
    merges alike.
    """
    found = [
        (-scores[piece], vocabulary[piece[:cut]], vocabulary[piece[cut:]], piece[:cut], piece[cut:])
        for piece in vocabulary
        if piece not in special
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    return [(left, right) for *_, left, right in sorted(found)]
