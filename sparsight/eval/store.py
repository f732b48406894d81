"""The folder of a run: what was measured so far, on disk as soon as it is, so that a stopped run goes on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsight.utils.jsonl import append, recover

Figures = dict[str, Any]
"""What was measured about one example."""

RUN, CELLS = "run.json", "cells.jsonl"


class Store:
    """A run's folder: ``run.json`` says what it is about, each line of ``cells.jsonl`` is some examples of one cell.

    A cell is a task under a recipe. A line that was cut short by a crash is measured again.

    Args:
        folder: where; made if it does not exist.
        about: what all figures of the folder have in common, as JSON has it.

    Raises:
        ValueError: the folder holds something else, or a run about something else, or cannot be written.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder, self.about = folder, dict(about)
        self._cells: dict[tuple[str, str], dict[int, Figures]] = {}
        self._seconds: dict[tuple[str, str], float] = {}
        self._aggregates: dict[tuple[str, str], dict[str, Any]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._claim()
            for line in recover(folder / CELLS):
                self._add(line)
        except OSError as error:
            raise ValueError(f"Cannot use {folder} for results: {error.strerror}.") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"The results in {folder} are damaged: give --output another folder.") from error

    def _claim(self) -> None:
        """Write ``run.json``, or check the one that is there."""
        path = self.folder / RUN
        if path.exists():
            there = json.loads(path.read_text())
            for name, value in self.about.items():
                if there.get(name) != value:
                    raise ValueError(
                        f"{self.folder} holds a run with {name} {there.get(name)!r}, not {value!r}: "
                        "give --output another folder."
                    )
        elif any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} holds something that is no run: give --output another folder.")
        else:
            path.write_text(json.dumps(self.about, indent=2) + "\n")

    def append(
        self,
        task: str,
        recipe: str,
        examples: Mapping[int, Figures],
        seconds: float,
        aggregate: Mapping[str, Any] | None = None,
    ) -> None:
        """Put some examples of a cell on disk, and what was only measured about all of them together."""
        line = {"task": task, "recipe": json.loads(recipe), "seconds": seconds, "examples": examples}
        if aggregate is not None:
            line["aggregate"] = aggregate
        with open(self.folder / CELLS, "a") as file:
            append(file, [line])
        self._add(json.loads(json.dumps(line)))

    def _add(self, line: dict[str, Any]) -> None:
        cell = line["task"], json.dumps(line["recipe"])
        self._cells.setdefault(cell, {}).update({int(number): got for number, got in line["examples"].items()})
        self._seconds[cell] = self._seconds.get(cell, 0.0) + line["seconds"]
        self._aggregates.setdefault(cell, {}).update(line.get("aggregate", {}))

    def cell(self, task: str, recipe: str) -> dict[int, Figures]:
        """The figures of a cell so far, by the number of the example."""
        return self._cells.get((task, recipe), {})

    def aggregate(self, task: str, recipe: str) -> dict[str, Any]:
        """What was measured about all examples of a cell together."""
        return self._aggregates.get((task, recipe), {})

    def seconds(self, task: str, recipe: str) -> float:
        """How long the figures of a cell took."""
        return self._seconds.get((task, recipe), 0.0)
