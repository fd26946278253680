"""Runs exported ONNX towers on what lies in another folder: python FILE FOLDER INPUTS; see parity.compare.

Run as a script in a process of its own, with onnxruntime and numpy only.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime


def main(folder: Path, inputs: Path) -> None:
    """Embed pixels.npy and tokens.npy: one by itself, then the others together."""
    found = {}
    for output, tower, name in (("images", "image", "pixels"), ("texts", "text", "tokens")):
        session = onnxruntime.InferenceSession(folder / f"{tower}.onnx", providers=["CPUExecutionProvider"])
        rows = np.load(inputs / f"{name}.npy")
        parts = [session.run(["embeddings"], {name: part})[0] for part in (rows[:1], rows[1:])]
        found[output] = np.concatenate(parts)
    np.savez(inputs / "found.npz", images=found["images"], texts=found["texts"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
