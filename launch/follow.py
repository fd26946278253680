"""How a run is getting on: what its scheduler says of its jobs, and its own files of training."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import typer
import yaml

from launch.job import LaunchError
from launch.program import state_of
from launch.submission import ENDED, LOGS, Submission, folder

# A run that trains writes a line a step; one that has written none for so long hangs, or its steps are very long.
STALLED_S = 600
# Ends of files that are looked at: hundreds of steps of metrics, thousands of lines of a log.
METRICS_TAIL, LOG_TAIL = 1 << 17, 1 << 20


@dataclass(frozen=True)
class Row:
    """One task.

    Attributes:
        stage: its name.
        run: its run folder.
        state: in the scheduler's words; in those of the run's files where no scheduler knows it.
        place: what it runs on, and how often it has begun again.
        figures: what training has to say: step, loss, …
        reason: why it waits, or how it ended.
    """

    stage: str
    run: Path
    state: str
    place: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""


def rows(run: Path, found: Submission | None, states: Callable[[Submission], list[dict[str, Any]]]) -> list[Row]:
    """A row for each task that was submitted with a run folder; without a submission, what its files say.

    Raises:
        LaunchError: the folder is no run's, or the scheduler gives no answer.
    """
    if found:
        return [_row(one | {"state": one["state"] or _left(run, one["id"])}) for one in states(found)]
    if not (run / "config.yaml").is_file() and not (run / "exit.json").is_file():
        raise LaunchError(f"{run}: no run was submitted with this folder, and none has begun in it.")
    return [_row({"stage": "train", "run": str(run), "state": ""})]


def _left(run: Path, id_: str) -> str:
    """How a job ended that its scheduler has forgotten, by the exit code that its script left; "" if it left none."""
    try:
        return state_of(int((folder(run) / f"{ENDED}{id_}").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return ""


def _row(one: Mapping[str, Any]) -> Row:
    run, state, reason = Path(one["run"]), one["state"], one.get("reason", "")
    place = {"nodes": str(one.get("nodes", "")), "restarts": str(one.get("restarts") or "")}
    if one["stage"] != "train":
        return Row(one["stage"], run, state or "unknown", place, reason=reason)
    verdict, lines = verdict_of(run), metrics(run)
    silent_s = silence(run, since=one.get("began"))
    if state == "RUNNING" and silent_s is not None and silent_s > STALLED_S:
        state, reason = "RUNNING, stalled", f"has written nothing for {_duration(silent_s)}"
    elif not state and verdict:
        state = state_of(verdict["code"])
    elif not state:
        state = "RUNNING" if silent_s is not None and silent_s < STALLED_S else "ended without a word"
    if verdict.get("reason") and not state.startswith(("RUNNING", "PENDING")):
        reason = str(verdict["reason"])
    return Row("train", run, state, place, figures(lines, total(run), going=state == "RUNNING") | _age(run), reason)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The last lines of metrics.jsonl; one that is broken, or still being written, is left out."""
    found = []
    for line in tail(run / "metrics.jsonl", METRICS_TAIL):
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and {"step", "wall_s", "samples_seen"} <= values.keys():
            found.append(values)
    return found


def figures(lines: Sequence[Mapping[str, Any]], steps: int | None, *, going: bool) -> dict[str, str]:
    """What the last lines of metrics.jsonl come to, as it is shown."""
    if not lines:
        return {}
    first, last = lines[0], lines[-1]
    samples, seconds = last["samples_seen"] - first["samples_seen"], last["wall_s"] - first["wall_s"]
    rate = samples / seconds if samples > 0 and seconds > 0 else last.get("samples_per_s") or 0
    shown = {"step": f"{last['step']}/{steps}" if steps else str(last["step"]), "samples/s": f"{rate:.4g}"}
    if last.get("loss") is not None:
        shown["loss"] = f"{last['loss']:.4f}"
    if going and steps and rate:
        left = (steps - last["step"]) * last["samples_seen"] / max(last["step"], 1) / rate
        shown["ETA"] = str(timedelta(seconds=round(left)))
    return shown


def total(run: Path) -> int | None:
    """Steps of the whole run, where its recipe says so; of epochs, to within a step for each."""
    try:
        train = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["train"]
        if train["steps"]:
            return int(train["steps"])
        samples = train["samples"]
        if train["epochs"]:
            environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
            samples = train["epochs"] * environment["samples"]
        steps: int = math.ceil(samples / train["batch_size"])
        return steps
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):  # it has not begun, or is being written
        return None


def verdict_of(run: Path) -> dict[str, Any]:
    """What exit.json says; empty while there is none, or half of one."""
    try:
        found = json.loads((run / "exit.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and "code" in found else {}


def silence(run: Path, since: float | None = None) -> float | None:
    """Seconds since training has written anything, its last step, or what it writes when it begins; or since then."""
    times = [path.stat().st_mtime for name in ("metrics.jsonl", "environment.json") if (path := run / name).is_file()]
    return max(0.0, time.time() - max(*times, since or 0.0)) if times else None


def _age(run: Path) -> dict[str, str]:
    path = run / "metrics.jsonl"
    return {"last line": f"{_duration(time.time() - path.stat().st_mtime)} ago"} if path.is_file() else {}


def _duration(seconds: float) -> str:
    seconds = max(0, round(seconds))
    return f"{seconds} s" if seconds < 100 else str(timedelta(seconds=seconds))


def last_lines(run: Path, found: Submission | None, states: Sequence[Mapping[str, Any]], lines: int) -> str:
    """The last lines of each task's log that there is: of the rank that failed first, where one did.

    Args:
        run: the run folder that was submitted with.
        found: what was submitted; None for nothing.
        states: of its tasks.
        lines: how many of each task's.

    Raises:
        LaunchError: there is no log, and exit.json says nothing either.
    """
    told = []
    for one in states or [{"stage": "train", "run": str(run), "id": ""}]:
        log = folder(run) / LOGS / f"{one['stage']}-{one['id']}.log"
        verdict = verdict_of(Path(one["run"])) if one["stage"] == "train" else {}
        failed = verdict.get("reason") and verdict.get("rank") is not None
        head = [f"--- {log}"] if log.is_file() else []
        if failed:
            host = f" on {verdict['host']}" if verdict.get("host") else ""
            head.append(f"--- {one['run']}: rank {verdict['rank']}{host} ended first: {verdict['reason']}")
        if log.is_file():
            text = [_shown(line) for line in tail(log, LOG_TAIL)]
            # srun marks lines by rank; those of torchrun are marked by node, and it marks none itself.
            by_rank = getattr(found.cluster, "launcher", "srun") == "srun" if found else True
            own = [line for line in text if failed and by_rank and _rank(line) == verdict["rank"]]
            head += (own or text)[-lines:]
        if head:
            told.append("\n".join(head))
    if not told:
        raise LaunchError(
            f"{run}: there are no logs. A job that waits has none yet; one on this machine writes to its terminal."
        )
    return "\n".join(told)


def _rank(line: str) -> int | None:
    found = re.match(r" *(\d+): ", line)
    return int(found[1]) if found else None


def _shown(line: str) -> str:
    """What a terminal would show of a line that is written over itself."""
    return next((part for part in reversed(line.split("\r")) if part.strip()), "")


def tail(path: Path, size: int) -> list[str]:
    """The whole lines among a file's last bytes, and what stands after them; none of a file that is not there."""
    try:
        with path.open("rb") as file:
            begin = max(0, file.seek(0, 2) - size)
            file.seek(begin)
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    lines = text.rstrip("\n").split("\n") if text else []
    return lines[1:] if begin else lines


def show(found: Sequence[Row]) -> None:
    """Print rows: as a table on a terminal, one a line elsewhere."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        for row in found:
            typer.echo(line(row))
        return
    names = list(
        dict.fromkeys(name for row in found for part in (row.place, row.figures) for name, at in part.items() if at)
    )
    table = Table("stage", "run", "state", *names, "reason")
    for row in found:
        cells = {**row.place, **row.figures}
        texts = [row.stage, row.run.name, row.state, *(cells.get(name, "") for name in names), row.reason]
        table.add_row(*map(escape, texts))
    console.print(table)


def line(row: Row) -> str:
    """A row as one line of words."""
    cells = [f"{name} {value}" for part in (row.place, row.figures) for name, value in part.items() if value]
    return f"{row.stage} {row.run}: " + ", ".join([row.state, *cells]) + (f" ({row.reason})" if row.reason else "")
