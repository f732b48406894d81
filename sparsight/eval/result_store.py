"""The folder of a run: results are on disk as soon as they are measured, so that an interrupted run can be resumed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from sparsight.utils.jsonl import append, recover
from sparsight.utils.lock import lock

ExampleResult = dict[str, Any]
"""What was measured about one example, by name."""

RUN, CELLS = "run.json", "cells.jsonl"


class ResultStore:
    """The folder of a run: ``run.json`` describes it, each line of ``cells.jsonl`` has results of one cell.

    A cell is a task with a recipe. A line that was cut short by a crash is dropped, and its results are measured again.
    One process at a time can use a folder.

    Args:
        folder: made if it does not exist.
        about: what all results of the folder have in common, as JSON data.

    Raises:
        ValueError: the folder has other files or a run about something else, is in use, or cannot be written.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder, self.about = folder, dict(about)
        self._cells: dict[tuple[str, str], dict[int, ExampleResult]] = {}
        self._seconds: dict[tuple[str, str], float] = {}
        self._aggregates: dict[tuple[str, str], dict[str, Any]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._run = self._open_run()
            for line in recover(folder / CELLS):
                self._add(line)
        except OSError as error:
            raise ValueError(f"Cannot use {folder} for results: {error.strerror}.") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"The results in {folder} are damaged: give --output another folder.") from error

    def _open_run(self) -> IO[str]:
        """Open ``run.json``, which is also the lock; write it, or check its content if it has any."""
        path = self.folder / RUN
        if not path.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} has files that are no run: give --output another folder.")
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115, open as long as the folder is in use
        lock(file, self.folder)
        file.seek(0)
        text = file.read()
        if text:
            there = json.loads(text)
            for name, value in self.about.items():
                if there.get(name) != value:
                    raise ValueError(
                        f"{self.folder} has a run with {name} {there.get(name)!r}, not {value!r}: "
                        "give --output another folder."
                    )
        else:
            file.write(json.dumps(self.about, indent=2) + "\n")
            file.flush()
        return file

    def __enter__(self) -> "ResultStore":
        return self

    def __exit__(self, *error: object) -> None:
        self._run.close()

    def append(
        self,
        task: str,
        recipe: str,
        examples: Mapping[int, ExampleResult],
        seconds: float,
        aggregate: Mapping[str, Any] | None = None,
    ) -> None:
        """Write results of a cell to disk.

        Args:
            task: the task's label.
            recipe: the recipe as JSON.
            examples: results by the example's number.
            seconds: how long they took.
            aggregate: metrics that are only known for all examples together.
        """
        line = {"task": task, "recipe": json.loads(recipe), "seconds": seconds, "examples": examples}
        if aggregate is not None:
            line["aggregate"] = aggregate
        with open(self.folder / CELLS, "a") as file:
            append(file, [line])
        self._add(json.loads(json.dumps(line)))

    def _add(self, line: dict[str, Any]) -> None:
        cell = line["task"], json.dumps(line["recipe"])
        self._cells.setdefault(cell, {}).update({int(number): result for number, result in line["examples"].items()})
        self._seconds[cell] = self._seconds.get(cell, 0.0) + line["seconds"]
        self._aggregates.setdefault(cell, {}).update(line.get("aggregate", {}))

    def cell(self, task: str, recipe: str) -> dict[int, ExampleResult]:
        """The results of a cell so far, by the example's number."""
        return self._cells.get((task, recipe), {})

    def aggregate(self, task: str, recipe: str) -> dict[str, Any]:
        """The metrics of a cell that are only known for all examples together."""
        return self._aggregates.get((task, recipe), {})

    def seconds(self, task: str, recipe: str) -> float:
        """How long the results of a cell took."""
        return self._seconds.get((task, recipe), 0.0)
