"""Every path that needs a CUDA device, run on one, with figures: `make gpu-check`."""

from __future__ import annotations

import datetime
import json
import logging
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_prep.record import DataError
from pipeline import begin, ranks
from pipeline.checkpoint import write_atomically
from pipeline.generated import write_pictures
from pipeline.gpu_bench import LIMIT_S, SIZES, Bench, Figures, Skipped
from pipeline.gpu_paths import CHECKS

# No check begins, and no run of the trainer goes on, after so many seconds: ten minutes with what is around them.
BUDGET_S = 570

log = logging.getLogger(__name__)


def gpu_check(out: Path, device: str) -> bool:
    """Run the checks that BUDGET_S leaves time for, and write figures to `out` as each ends; whether all is well.

    Raises:
        DataError: there is no such device.
    """
    if device not in SIZES:
        raise DataError(f"--device {device}: the checks know {', '.join(SIZES)}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise DataError(
            "no CUDA device is to be seen by torch, so nothing was checked. Run this on a machine that has one, or "
            "the same checks at a small size with --device cpu."
        )
    end = time.monotonic() + BUDGET_S
    precision = "bf16" if device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    accelerator = ranks.start(processes=None, cpu=device == "cpu", precision=precision, timeout_s=LIMIT_S)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        bench = Bench(accelerator.device, SIZES[device], Path(folder), accelerator, precision, end)
        write_pictures(bench.data, bench.size.pictures, bench.size.pixels)
        for name, check in CHECKS.items():
            results[name] = attempt(check, bench)
            log.info("%s: %s", name, in_words(results[name]))
            write_atomically(out, json.dumps({**about(bench.device), "checks": results}, indent=1))
    table = Table("check", "", "seconds", "figures", box=None)
    for name, result in results.items():
        mark = "skipped" if "skipped" in result else "ok" if result["ok"] else "[bold red]failed[/]"
        table.add_row(name, mark, f"{result['seconds']:.1f}", escape(in_words(result)))
    Console().print(table)
    return all(result["ok"] for result in results.values())


def attempt(check: Callable[[Bench], Figures], bench: Bench) -> dict[str, Any]:
    """{ok, seconds, and figures, error, or the reason why it was skipped}."""
    began, result = time.monotonic(), dict[str, Any]()
    if began > bench.end:
        return {"ok": False, "skipped": f"{BUDGET_S} s are over", "seconds": 0.0}
    try:
        result = {"ok": True, "figures": check(bench)}
    except Skipped as reason:
        result = {"ok": True, "skipped": str(reason)}
    except Exception as error:
        log.debug("%s", check.__name__, exc_info=True)
        result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    return {**result, "seconds": round(time.monotonic() - began, 2)}


def about(device: torch.device) -> dict[str, Any]:
    """When, and on what."""
    driver = None
    with suppress(OSError, subprocess.CalledProcessError):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "code": begin.code_version(),
    }


def in_words(result: Mapping[str, Any]) -> str:
    """One line of a result."""
    if "figures" not in result:
        return str(result.get("skipped") or result["error"]).split("\n")[0]
    figures = result["figures"].items()
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures
    )
