"""image.pt2 and text.pt2: towers as torch.export's programs, which need torch and no code of the model's.

torch.export.load unpickles parts of such a file, and torch warns of it: load only what comes from people you trust.
"""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.export import preparation, towers
from pipeline.export.huggingface_tokenizer import ExportError
from pipeline.model import first_line
from pipeline.trained import TrainedModel


def write(trained: TrainedModel, folder: Path) -> None:
    """Write the towers, and what their inputs are made by.

    Raises:
        ExportError: torch cannot trace a tower; the reason is quoted.
    """
    for name, tower in towers.traceable(trained).items():
        try:
            write_tower(tower, folder / f"{name}.pt2")
        except Exception as error:  # whatever torch.export raises: it has no type of its own
            raise ExportError(
                f"{name}.pt2: the {name} tower cannot be traced by torch.export ({first_line(error)}). "
                "The open_clip format holds any tower."
            ) from error
    preparation.write(trained, folder)


def write_tower(tower: towers.Traceable, path: Path) -> None:
    """Trace one tower and save its program."""
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    with torch.no_grad():
        program = torch.export.export(tower.module, (tower.example,), dynamic_shapes=shapes)
    torch.export.save(program, path)
