"""Recipe: a compression method as data."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from sparsight.compression import Allocate, BlockBounds, DecodeRule, Evict, Exact, LastQuery, LowRank, Reduce, Score
from sparsight.utils import checks
from sparsight.utils.suggest import unknown

KINDS: dict[str, dict[str, type]] = {
    role: {part.kind: part for part in get_args(parts)}
    for role, parts in {"score": Score, "allocate": Allocate, "reduce": Reduce, "decode": DecodeRule}.items()
}
"""The parts that a recipe can be made of: by role, then by kind."""

PARTS: dict[str, Mapping[str, type]] = {**KINDS, "index": {part.kind: part for part in (Exact, BlockBounds, LowRank)}}
"""The same, and the parts of parts by the name of their field."""


@dataclass(frozen=True)
class Recipe:
    """A compression method: score x allocate x reduce x decode rule, with its numbers.

    Args:
        name: what the method is called.
        budget: fraction of the prompt's KV entries that may be kept, averaged over the layers, in (0, 1].
        score: how important each position is.
        allocate: how the budget is shared among the layers.
        reduce: which entries stay and what becomes of the others.
        decode: what becomes of each new entry.
        vision_budget: the budget is a fraction of the vision tokens, to which every text token adds one entry, as some
            papers count. Which entries stay is up to the score; those of AirCache and LOOK-M rank text first.

    Raises:
        ValueError: the budget is not in (0, 1], or the reduction does not go with the allocation or the decode rule.
    """

    name: str
    budget: float
    score: Score
    allocate: Allocate
    reduce: Reduce
    decode: DecodeRule
    vision_budget: bool = False

    def __post_init__(self) -> None:
        checks.fraction("budget", self.budget)
        if self.allocate.head_wise and not self.reduce.per_head:
            raise ValueError(
                f"Allocation {self.allocate.kind!r} gives each KV head its own number of entries, but under reduction "
                f"{self.reduce.kind!r} as configured the heads share one choice: give the reduction per_head=True, or "
                "take another."
            )
        if isinstance(self.decode, LastQuery) and not self.decode.per_head and self.reduce.per_head:
            raise ValueError(
                f"Decode rule {self.decode.kind!r} as configured drops one position in all KV heads of a layer, but "
                f"under reduction {self.reduce.kind!r} as configured each keeps its own: give the reduction "
                "per_head=False, or the rule per_head=True."
            )

        if self.decode.recalls and self.reduce.merges:
            raise ValueError(
                f"Decode rule {self.decode.kind!r} fetches entries back as they were, but reduction "
                f"{self.reduce.kind!r} merges them into others: take 'evict'."
            )

    def fitted(self, length: int, vision: int) -> "Recipe":
        """The recipe for a prompt of ``length`` tokens, ``vision`` of them of images or videos.

        Its budget is a fraction of all tokens. Its windows, that is the queries that a score looks at and the last
        entries that always stay, are at most two thirds of the entries kept: with a fixed size, nothing else would be
        kept at a small budget.
        """
        budget = (length - vision + self.budget * vision) / length if self.vision_budget else self.budget
        most = max(1, 2 * round(budget * length) // 3)
        reduce = self.reduce
        if isinstance(reduce, Evict) and reduce.last > most:
            reduce = dataclasses.replace(reduce, last=most)
        score = self.score.within(most)
        return dataclasses.replace(self, budget=budget, score=score, reduce=reduce, vision_budget=False)

    def combined(self, **kinds: str | None) -> "Recipe":
        """The recipe with other parts, by role and kind, with their default numbers.

        ``VLCache().combined(reduce="merge-nearest")`` is VL-Cache that merges what it would evict. Its name then
        lists the parts. None keeps a role's part. ``score="mixkv:post-vision"`` is a score that wraps another.

        Raises:
            ValueError: a role has no part of that kind, or a part wraps no other.
        """
        chosen = {role: kind for role, kind in kinds.items() if kind is not None}
        if not chosen:
            return self
        parts = {role: _part(role, _nested(role, kind)) for role, kind in chosen.items()}
        return dataclasses.replace(self, name=" + ".join([self.name, *chosen.values()]), **parts)

    def to_json(self) -> str:
        """The recipe as one JSON object."""
        data: dict[str, Any] = {"name": self.name, "budget": self.budget, "vision_budget": self.vision_budget}
        for role in KINDS:
            data[role] = _as_data(getattr(self, role))
        return json.dumps(data)

    @staticmethod
    def from_json(text: str) -> "Recipe":
        """The recipe that :meth:`to_json` wrote.

        Raises:
            ValueError: the text is not a recipe's JSON.
        """
        data = json.loads(text)
        try:
            parts = {role: _part(role, data[role]) for role in KINDS}
            return Recipe(data["name"], data["budget"], **parts, vision_budget=data["vision_budget"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"Not a recipe: {error} is wrong or missing in {text!r}.") from error


def _as_data(part: Any) -> dict[str, Any]:
    """The JSON object of one part, and of the part that it wraps."""
    numbers = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    wrapped = {name: _as_data(value) for name, value in numbers.items() if dataclasses.is_dataclass(value)}
    return {"kind": part.kind, **numbers, **wrapped}


def _nested(role: str, kinds: str) -> dict[str, Any]:
    """The JSON object of a part by kind; ``outer:inner`` is one of kind ``outer`` that wraps one of kind ``inner``."""
    outer, colon, inner = kinds.partition(":")
    part = KINDS[role].get(outer)
    if colon and part is not None and role not in (field.name for field in dataclasses.fields(part)):
        raise ValueError(f"{role.capitalize()} {outer!r} wraps no other: {kinds!r} must be {outer!r}.")
    return {"kind": outer, **({role: _nested(role, inner)} if colon else {})}


def _part(role: str, data: dict[str, Any]) -> Any:
    """One part from its JSON object."""
    numbers = {name: _part(name, value) if isinstance(value, dict) else value for name, value in data.items()}
    kind = numbers.pop("kind")
    if kind not in PARTS[role]:
        raise unknown(role, kind, PARTS[role])
    return PARTS[role][kind](**numbers)


def check_recipe(recipe: Any) -> None:
    """Raise ValueError unless ``recipe`` is a recipe."""
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe must be a Recipe such as VLCache(budget=0.1), got a {type(recipe).__name__}.")
