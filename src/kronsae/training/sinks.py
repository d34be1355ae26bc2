"""Metrics sinks: always JSON lines; TensorBoard and Weights & Biases on request."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from kronsae.support.errors import UserError
from kronsae.support.files import writable, write_text

AXES = ("step", "tokens", "seconds", "sae")
WANDB_ID = "wandb-id.txt"


class Sink(Protocol):
    """Receives one row of metrics per SAE and logged step."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def flush(self) -> None:
        """Write buffered rows to disk; called before each checkpoint."""
        ...

    def close(self) -> None: ...


class JsonlSink:
    """Writes ``metrics.jsonl``: one JSON object per SAE and logged step.

    Args:
        path: the file.
        after_step: rows of later steps are dropped on opening, because a resumed run repeats these steps.
    """

    def __init__(self, path: Path, after_step: int) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= after_step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_text(path, text)
        self._path, self._bytes, self._digest = path, len(text), hashlib.sha256(text.encode())  # JSON is ASCII
        self._file = path.open("a", encoding="utf-8")

    @property
    def written(self) -> dict[str, Any]:
        """Return size and SHA-256 of all rows so far, as `kronsae.support.files.fingerprint` does for a file."""
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def write(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(dict(row)) + "\n"
        self._digest.update(line.encode())
        self._bytes += len(line)
        with writable(self._path):
            self._file.write(line)

    def flush(self) -> None:
        with writable(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; after an error of `write` or `flush`, what is not on disk is dropped."""
        with suppress(OSError):
            self._file.close()


def check_history(path: Path, history: Mapping[str, Any] | None) -> None:
    """Raise if the first rows of a file of metrics are not those that `JsonlSink.written` described.

    Args:
        path: the file; one that does not exist is not checked.
        history: a result of `JsonlSink.written`; None: nothing is checked.
    """
    if history is None or not path.exists():
        return
    with path.open("rb") as file:
        start = file.read(history["bytes"])
    if hashlib.sha256(start).hexdigest() != history["sha256"]:
        raise UserError(
            f"'{path}' must be unchanged since it was written; it is damaged. Restore it from a copy, or remove it: "
            "the run then goes on without the metrics of its first steps."
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of ``metrics.jsonl``; a last line truncated by a crash is left out.

    Raises:
        UserError: another line is damaged.
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):  # the last one has no end: it is empty, or was being written
                raise UserError(
                    f"'{path}' is damaged in line {number}. Restore it from a copy, or remove it."
                ) from None
    return rows


class TensorBoardSink:
    """Writes TensorBoard event files: one series per SAE and metric, over tokens.

    Args:
        folder: folder of the event files.
        after_tokens: earlier events of later tokens are hidden, because a resumed run repeats these steps.
    """

    def __init__(self, folder: Path, after_tokens: int) -> None:
        require("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=after_tokens + 1 if after_tokens else None)

    def write(self, row: Mapping[str, Any]) -> None:
        for key, value in _values(row).items():
            self._writer.add_scalar(f"{key}/{row['sae']}", value, row["tokens"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Logs to Weights & Biases; a resumed run continues there under the id stored in its folder."""

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]) -> None:
        require("wandb")
        import wandb

        path = folder / WANDB_ID
        if path.exists():  # keep the name there: the user may have changed it
            which = {"id": path.read_text(encoding="utf-8").strip()}
        else:
            which = {"id": secrets.token_hex(8), "name": folder.resolve().name}
        try:
            self._run = wandb.init(project=project, **which, dir=str(folder), config=dict(config), resume="allow")
        except Exception as error:  # no account, no network, an invalid name: each raises its own class
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise UserError(f"wandb could not be started ({reason}). Try `wandb login`, or leave it out.") from error
        write_text(path, f"{which['id']}\n")

    def write(self, row: Mapping[str, Any]) -> None:
        values = {f"{row['sae']}/{key}": value for key, value in _values(row).items()}
        self._run.log(values | {"tokens": row["tokens"]}, step=row["step"])

    def flush(self) -> None:
        """Do nothing: wandb sends rows by itself."""

    def close(self) -> None:
        self._run.finish()


def _values(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key not in AXES and value is not None}


def require(package: str) -> None:
    """Raise if ``package``, which the extra of the same name installs, is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{package} must be installed to log to it. Install it with: pip install 'kronsae[{package}]'")
