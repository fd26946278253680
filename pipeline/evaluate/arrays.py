"""Arrays of any length in a folder, written block by block and read a slice at a time: .npy, or one .safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from data_prep.locations import appearing

SAFETENSORS = "embeddings.safetensors"

Array = NDArray[np.floating]
# Name → (rows, columns).
Shapes = Mapping[str, tuple[int, int]]
# Name → the array's rows, some at a time.
Blocks = Callable[[str], Iterable[Array]]


class Form(NamedTuple):
    """How arrays lie in a folder.

    Attributes:
        write: (folder, shapes, dtype, blocks); float16 or float32.
        read: (folder, name) → what gives rows when it is sliced, and reads them then.
    """

    write: Callable[[Path, Shapes, np.dtype, Blocks], None]
    read: Callable[[Path, str], Any]


def _write_npy(out: Path, shapes: Shapes, dtype: np.dtype, blocks: Blocks) -> None:
    for name, shape in shapes.items():
        with appearing(out / f"{name}.npy") as file:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for block in blocks(name):
                file.write(block.tobytes())


def _write_safetensors(out: Path, shapes: Shapes, dtype: np.dtype, blocks: Blocks) -> None:
    """By hand, since the library wants all tensors in memory (github.com/huggingface/safetensors, "Format")."""
    begin, header = 0, {}
    for name, (rows, width) in shapes.items():
        end = begin + rows * width * dtype.itemsize
        kind = {"float16": "F16", "float32": "F32"}[dtype.name]
        header[name] = {"dtype": kind, "shape": [rows, width], "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with appearing(out / SAFETENSORS) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            for block in blocks(name):
                file.write(block.tobytes())


def _read_npy(folder: Path, name: str) -> Any:
    return np.load(folder / f"{name}.npy", mmap_mode="r")


def _read_safetensors(folder: Path, name: str) -> Any:
    return safe_open(str(folder / SAFETENSORS), "np").get_slice(name)


FORMS = {
    "safetensors": Form(_write_safetensors, _read_safetensors),
    "npy": Form(_write_npy, _read_npy),
}
