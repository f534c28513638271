"""Writes a run's metrics to a JSON-lines file, TensorBoard and a progress bar."""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from brewjax.console import plain_console
from brewjax.paths import write_text

METRICS = "metrics.jsonl"
SPEED_STEPS = 16  # of a mean: rows come late and two at once where a checkpoint is saved, and at the end


class MetricsWriter:
    """Writes one row for each step; on a restart it first drops rows after the step that training resumes from.

    Args:
      folder: gets `metrics.jsonl` and `tensorboard/`.
      resumed_step: the last step of the checkpoint; 0 for a new run.
      steps: of the whole run.
    """

    def __init__(self, folder: Path, resumed_step: int, steps: int):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        rows = read_metrics(path)
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= resumed_step))
        self._seconds_before = rows[-1]["seconds"] if rows else 0.0
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 (closed in __exit__)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)
        self._console = plain_console()
        self._progress = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._bar = self._progress.add_task("train", total=steps, completed=resumed_step, loss=float("nan"), speed=0.0)
        self._steps = steps
        self._start_time = time.perf_counter()
        self._tokens = 0.0
        self._recent = deque([(self._start_time, 0.0)], SPEED_STEPS)  # when steps were written, and tokens until then

    def __enter__(self) -> MetricsWriter:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
        self._file.close()
        self._board.close()

    def write(self, step: int, row: dict[str, float]) -> None:
        """Records one step: its metrics (`loss` and `tokens` among them), and two that are measured here:
        `tokens_per_second` over the last steps, and `seconds` of training so far, over all restarts."""
        now = time.perf_counter()
        self._tokens += row["tokens"]
        then, tokens = self._recent[0]
        self._recent.append((now, self._tokens))
        row = row | {
            "tokens_per_second": (self._tokens - tokens) / (now - then),
            "seconds": self._seconds_before + now - self._start_time,
        }
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        for name, value in row.items():
            self._board.add_scalar(f"train/{name}", value, step)
        self._progress.update(self._bar, completed=step, loss=row["loss"], speed=row["tokens_per_second"])
        if not self._console.is_terminal and step % max(1, self._steps // 10) == 0:
            self._console.print(
                f"step {step}/{self._steps}  loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s"
            )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Reads a metrics file, without an incomplete last line.

    Args:
      path: of the file, a JSON object a line.

    Returns:
      The rows, in order: metrics by name; none if there is no file.
    """
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]
