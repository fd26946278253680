"""image.onnx and text.onnx: towers whose outputs are unit-norm embeddings, for any number of inputs at a time.

Opset 20, the newest that torch's exporter writes by itself; ONNX Runtime 1.17 and newer run it.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from pipeline.export import preparation, towers
from pipeline.export.huggingface_tokenizer import ExportError
from pipeline.model import first_line
from pipeline.trained import TrainedModel

OPSET = 20
# One file holds 2 GB (protobuf's limit): weights beyond this go into FILE.onnx.data, the graph's own share left free.
LARGEST = 1_800_000_000


def write(trained: TrainedModel, folder: Path) -> None:
    """Write the towers, check them with onnx.checker, and write what their inputs are made by.

    Raises:
        ExportError: torch cannot write a tower as ONNX, or onnx refuses what it wrote; the reason is quoted.
    """
    for name, tower in towers.traceable(trained).items():
        path = folder / f"{name}.onnx"
        try:
            write_tower(tower, path)
        except Exception as error:  # whatever torch, onnxscript and onnx raise
            raise ExportError(
                f"{path.name}: the {name} tower cannot be written as ONNX ({first_line(_reason(error))}). "
                "The other formats may hold it."
            ) from error
    preparation.write(trained, folder)


def write_tower(tower: towers.Traceable, path: Path) -> None:
    """Write one tower, with its weights beside it where they are too large for one file, and check it."""
    import onnx

    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    torch.onnx.export(
        tower.module,
        (tower.example,),
        path,
        input_names=[tower.input],
        output_names=["embeddings"],
        dynamic_shapes={tower.input: {0: "batch"}},
        opset_version=OPSET,
        external_data=sum(tensor.nbytes for tensor in tower.module.state_dict().values()) > LARGEST,
        dynamo=True,
        verbose=False,
    )
    onnx.checker.check_model(str(path), full_check=True)


def _reason(error: BaseException) -> BaseException:
    """torch says in the first line which step failed, and its cause says why."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
