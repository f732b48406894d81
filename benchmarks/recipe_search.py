"""The search for the `sparsight` recipe, on pages of the training split.

    python -m benchmarks.recipe_search runs/recipe-search.jsonl docs/recipe-search.md

Methods and the chosen recipe are also measured on the held-out pages of docs/accuracy.md.

Every example is prefilled once. Each candidate then answers with the entries that it keeps: one forward pass over the
right answers, in which all other entries of the prompt are masked. An answer counts as right if every token is the most
likely one given those before it, which is when greedy decoding gives it. Results go to a JSON lines file, one line an
example; a stopped run goes on where it was.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn import functional
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from sparsight import Recipe, recipe
from sparsight.attention.interface import mark
from sparsight.cache.plan import make_plan
from sparsight.compression import AcrossHeads, AcrossLayers, Allocate, Evict, MixKV, PostVision, Uniform, VisualHeads
from sparsight.compression.allocate import LayerStatistics
from sparsight.compression.distinct_values import distinctness
from sparsight.compression.score import Window, pooled
from sparsight.eval.collate import conversations
from sparsight.eval.converse import Conversations
from sparsight.eval.prefill_snapshot import PrefillSnapshot
from sparsight.eval.significance import paired_p_value
from sparsight.eval.tasks import task
from sparsight.methods import with_shipped_scores
from sparsight.models.loading import load_checkpoint, load_model
from sparsight.reader import model_path
from sparsight.reader.page import random_page
from sparsight.reader.skills import WHICH_IMAGE, Example, ask_page, compare, look_at, look_up, pick, read_out

BUDGETS = (0.01, 0.05, 0.1, 0.2, 0.4)
SPLIT = "train"
SEED, HELDOUT_SEED = 14, 1
TOGETHER = 24
"""Candidates of one forward pass."""

PUBLISHED = ("snapkv", "pyramidkv", "adakv", "mixkv", "bacon", "tgv-kv", "kvzip", "sparsemm")
Masks = list[Tensor]
"""For each layer the entries that stay, bool ``[H_kv, T]``."""


def two_pages(rng: np.random.Generator) -> Example:
    """A question about one of two pages."""
    pages = tuple(random_page(rng, 16, SPLIT) for _ in range(2))
    which = int(rng.integers(2))
    question, answer = ask_page(rng, pages[which], 1)[0]
    return Example(pages, ((pick(rng, WHICH_IMAGE, nth=("first", "second")[which], question=question), answer),))


TASKS: dict[str, Callable[[np.random.Generator, int], Example]] = {
    "look-up:32": lambda rng, number: look_up(rng, SPLIT, 32),
    "conversation:4": lambda rng, number: look_up(rng, SPLIT, 32, questions=4),
    "transcribe:4": lambda rng, number: read_out(rng, SPLIT, 4),
    "two-pages:16": lambda rng, number: two_pages(rng),
    "growing:64": lambda rng, number: look_up(rng, SPLIT, 8 * (1 + number % 8)),
    "transcribe:12": lambda rng, number: read_out(rng, SPLIT, 12),
    "scene, 3 questions": lambda rng, number: look_at(rng, SPLIT, questions=3),
    "pages and scenes": lambda rng, number: compare(rng, SPLIT),
}
"""The first five are those of docs/accuracy.md; the others guard against a recipe for these alone."""


class Features:
    """What one prefill showed, for all candidates: attention of the post-vision queries, keys and values."""

    def __init__(self, snapshot: PrefillSnapshot) -> None:
        span = snapshot.prompt.spans[0]
        self.snapshot, self.length = snapshot, span.length
        self.vision, self.grids = snapshot.prompt.vision_mask[0], snapshot.prompt.grids[0]
        self.keys = torch.stack([states.key[0] for states in snapshot.states]).float()
        self.values = torch.stack([states.value[0] for states in snapshot.states]).float()
        queries, rows = range(span.post_vision, span.stop), range(max(0, span.post_vision - 25), span.post_vision)
        # [L, H_kv, group, queries, T]
        self.attention = self._attention(queries)
        self.of_rows = self._attention(rows)

    def _attention(self, queries: range) -> Tensor:
        places = torch.arange(queries.start, queries.stop)
        later = torch.arange(self.length) > places[:, None]
        layers = []
        for states, key in zip(self.snapshot.states, self.keys, strict=True):
            query = states.query[0, :, places].float().unflatten(0, (len(key), -1))
            layers.append((query @ key[:, None].mT * states.scaling).masked_fill(later, -torch.inf).softmax(-1))
        return torch.stack(layers)

    def pooled(self, score: Tensor, pool: Window, pooling: str = "max") -> Tensor:
        """Scores ``[L, H_kv, T]``, each layer's pooled."""
        return torch.stack([pooled(layer, pool, self.grids, pooling) for layer in score])

    def mean(self) -> Tensor:
        """Mean attention of the post-vision queries ``[L, H_kv, T]``."""
        return self.attention.mean((2, 3))

    def last(self) -> Tensor:
        """Attention of the last query ``[L, H_kv, T]``."""
        return self.attention[:, :, :, -1].mean(2)

    def both(self) -> Tensor:
        """Mean of the two."""
        return (self.mean() + self.last()) / 2

    def peaks(self, of: str = "both") -> Tensor:
        """Largest weight of a vision token, of the last query, the mean of all queries, or the mean of these two."""
        largest = self.attention[..., self.vision].amax(-1).mean(2)
        last, mean = largest[..., -1], largest.mean(-1)
        return {"last": last, "mean": mean, "both": (last + mean) / 2, "none": torch.ones_like(last)}[of]

    def distinct(self, of: str = "values") -> Tensor:
        """What makes a vision token stand out, scaled to [0, 1] in each head ``[L, H_kv, T]``; 0 for text."""
        if of == "values":
            return torch.stack([distinctness(value, self.vision) for value in self.values])
        if of == "norms":
            found = self.values.norm(dim=-1)
        else:
            units = functional.normalize(self.keys if of == "keys" else self.values, dim=-1)
            found = -(units * units[:, :, self.vision].mean(2, keepdim=True)).sum(-1)
        own = found[..., self.vision]
        low, high = own.amin(-1, keepdim=True), own.amax(-1, keepdim=True)
        return torch.where(self.vision, (found - low) / (high - low), 0.0)

    def scores_of(self, chosen: Recipe) -> Tensor:
        """A recipe's scores ``[L, H_kv, T]``."""
        prefills = self.snapshot.observe(chosen)
        make_plan(prefills)
        return torch.stack([prefill.scores[0] for prefill in prefills])


def at_level(extra: Tensor, attention: Tensor) -> Tensor:
    """``extra`` ``[L, H_kv, T]`` brought to the mean of the attention in each head, as MixKV does."""
    return extra * attention.mean(-1, keepdim=True) / extra.mean(-1, keepdim=True).clamp(min=1e-12)


def relative(score: Tensor) -> Tensor:
    """Scores ``[L, H_kv, T]`` divided by the largest of their head."""
    return score / score.amax(-1, keepdim=True)


@dataclass(frozen=True)
class Candidate:
    """A score ``[L, H_kv, T]`` of the features, an allocation, and the share of the most recent entries."""

    name: str
    score: Callable[[Features], Tensor]
    allocate: Callable[[Features], Allocate] = lambda features: Uniform()
    recent: float = 0.1

    def masks(self, features: Features) -> list[Masks]:
        """The entries that stay at each budget."""
        score, allocate, reduce = self.score(features), self.allocate(features), Evict(recent=self.recent)
        found = []
        for budget in BUDGETS:
            always = reduce.always(max(1, round(budget * features.length)), features.length)
            statistics = [LayerStatistics(layer, 0.0, features.vision, always) for layer in score]
            found.append(kept(list(score), allocate.shares(statistics, budget), reduce))
        return found


def kept(score: Sequence[Tensor], ratios: Sequence[Any], reduce: Any) -> Masks:
    """The entries that stay for scores ``[H_kv, T]`` of each layer and the shares that its heads keep."""
    masks = []
    for layer, ratio in zip(score, ratios, strict=True):
        heads, length = layer.shape
        mask = torch.zeros(heads, length, dtype=torch.bool)
        counts = [max(1, round(each * length)) for each in (ratio if isinstance(ratio, list) else [ratio])]
        for head in range(heads) if len(counts) > 1 else [slice(heads)]:
            own = slice(head, head + 1) if isinstance(head, int) else head
            mask[own].scatter_(1, reduce.select(layer[own], counts[own.start or 0]), True)
        masks.append(mask)
    return masks


def masks_of(features: Features, method: Callable[[float], Recipe]) -> list[Masks]:
    """The entries that a recipe keeps at each budget."""
    found = []
    for budget in BUDGETS:
        prefills = features.snapshot.observe(method(budget))
        plan = make_plan(prefills)
        ratios = [layer[0] for layer in plan.ratios]
        found.append(kept([prefill.scores[0] for prefill in prefills], ratios, prefills[0].recipe_of(0).reduce))
    return found


def methods() -> Iterator[tuple[str, Callable[[float], Recipe]]]:
    """Published methods, the recipes after and before this search, and the latter with MixKV's score."""
    before = replace(recipe("vl-cache"), score=PostVision(pool=(1, 5)), allocate=Uniform())
    made = {"full cache": recipe("full")} | {
        name: with_shipped_scores(recipe(name), model_path()) for name in PUBLISHED
    }
    made |= {
        "sparsight": recipe("sparsight"),
        "before": before,
        "before, MixKV": replace(before, score=MixKV(before.score)),
    }
    for name, one in made.items():
        yield name, partial(_at, one)


def _at(one: Recipe, budget: float) -> Recipe:
    return one if one.name == "full" else replace(one, budget=budget)


def candidates() -> Iterator[Candidate]:
    """What was tried, from the recipe before this search to the one after it."""

    def question(features: Features, pool: Window = (1, 5), pooling: str = "max") -> Tensor:
        return features.pooled(features.mean(), pool, pooling)

    def rows(features: Features) -> Tensor:
        return features.pooled(features.of_rows.mean((2, 3)), (1, 5))

    def expected(features: Features) -> Tensor:
        return features.scores_of(recipe("expected-attention"))

    yield Candidate("pooling 5, average", partial(question, pooling="average"))
    yield Candidate("or last vision rows", lambda f: torch.maximum(relative(question(f)), relative(rows(f))))
    yield Candidate("or expected attention", lambda f: torch.maximum(relative(question(f)), relative(expected(f))))
    yield Candidate("across heads, floor 0.2", question, lambda f: AcrossHeads(floor=0.2))
    yield Candidate("across heads, floor 0.5", question, lambda f: AcrossHeads(floor=0.5))
    yield Candidate("across layers", question, lambda f: AcrossLayers(), 0)
    kinds = ("norms", "keys", "cosines", "values")

    def and_distinct(kind: str, features: Features) -> Tensor:
        own = question(features)
        return own + at_level(features.distinct(kind), own)

    def by_peaks(features: Features) -> Allocate:
        return VisualHeads(scores=tuple(map(tuple, features.peaks().square().tolist())), equal=0.2)

    for kind in kinds:
        yield Candidate(f"and {kind}", partial(and_distinct, kind))
    yield Candidate("heads by peaks", question, by_peaks)
    for kind in kinds:
        yield Candidate(f"heads by peaks, and {kind}", partial(and_distinct, kind), by_peaks)

    def competing(
        name: str,
        weight: float = 0.15,
        floor: float = 0.1,
        of: str = "both",
        power: int = 1,
        kind: str = "values",
        attention: Callable[[Features], Tensor] = Features.both,
        pool: Window = (1, 5),
    ) -> Candidate:
        def score(features: Features) -> Tensor:
            second = features.peaks(of).pow(power)[..., None] * features.distinct(kind)
            return features.pooled(attention(features), pool) + weight * second

        return Candidate(f"now and later{', ' * bool(name)}{name}", score, lambda f: AcrossLayers(floor=floor), 0)

    yield competing("")
    for weight in (0.0, 0.05, 0.1, 0.2, 0.4):
        yield competing(f"weight {weight}", weight=weight)
    for floor in (0.0, 0.2, 0.4):
        yield competing(f"floor {floor}", floor=floor)
    for of in ("last", "mean", "none"):
        yield competing(f"peaks: {of}", of=of)
    yield competing("peaks squared", power=2)
    for kind in kinds[:-1]:
        yield competing(kind, kind=kind)
    yield competing("attention: mean", attention=Features.mean)
    yield competing("attention: last", attention=Features.last)
    pools: tuple[Window, ...] = (1, (1, 3), (1, 7), (3, 3))
    for pool in pools:
        yield competing(f"pooling {pool}", pool=pool)


class MaskedCache(Cache):
    """A prefilled prompt, for one forward pass of several candidates that attend to other entries each."""

    def __init__(self, snapshot: PrefillSnapshot, candidates: Sequence[Masks]) -> None:
        layers: list[Any] = []
        for states in snapshot.states:
            layers.append(layer := DynamicLayer())
            layer.keys, layer.values = states.key, states.value
            layer.dtype, layer.device, layer.is_initialized = states.key.dtype, states.key.device, True
        super().__init__(layers=layers)
        self.masks = [torch.stack(masks) for masks in zip(*candidates, strict=True)]
        self.scaling = [states.scaling for states in snapshot.states]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompt and of the new tokens, which are not kept."""
        held: Any = self.layers[layer_idx]
        count = len(key_states)
        key = torch.cat([held.keys.expand(count, -1, -1, -1), key_states], dim=2)
        value = torch.cat([held.values.expand(count, -1, -1, -1), value_states], dim=2)
        return mark(key, partial(self._attend, layer_idx)), value

    def _attend(self, index: int, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        mask, count = self.masks[index], query.shape[2]
        own = torch.ones(count, count, dtype=torch.bool).tril().expand(*mask.shape[:2], -1, -1)
        visible = torch.cat([mask[:, :, None].expand(-1, -1, count, -1), own], dim=-1)
        visible = visible.repeat_interleave(query.shape[1] // mask.shape[1], 1)
        output = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=self.scaling[index], enable_gqa=True
        )
        return output.transpose(1, 2), None


def right(model: Any, snapshot: PrefillSnapshot, conversation: Conversations, candidates: Sequence[Masks]) -> list[Any]:
    """For each candidate the share of right answers, and the surprisal of a token of the right answers."""
    # Each answer without its end, behind its question; the prompt's last token predicts the first token.
    parts, places, last = [], [], -1
    for turn, answer in enumerate(conversation.answers):
        if turn:
            parts.append(conversation.questions[turn - 1][0])
            last += parts[-1].shape[1]
        parts.append(answer[:, :-1])
        places.append(range(last, last + answer.shape[1]))
        last += answer.shape[1] - 1
    ids = torch.cat(parts, dim=1)
    positions = snapshot.prompt.length + torch.arange(ids.shape[1])[None]
    results = []
    for first in range(0, len(candidates), TOGETHER):
        some = candidates[first : first + TOGETHER]
        output = model.get_decoder()(
            input_ids=ids.expand(len(some), -1),
            position_ids=positions.expand(len(some), -1),
            past_key_values=MaskedCache(snapshot, some),
            use_cache=True,
        )
        logits = model.lm_head(output.last_hidden_state)
        logits = torch.cat([snapshot.logits[:, None].expand(len(some), -1, -1), logits], dim=1).float()
        for own in logits.log_softmax(-1):
            exact, surprisal = [], []
            for answer, where in zip(conversation.answers, places, strict=True):
                predicted = own[[place + 1 for place in where]]
                exact.append(float((predicted.argmax(-1) == answer[0]).all()))
                surprisal += (-predicted.gather(1, answer.T)[:, 0]).tolist()
            results.append([round(fmean(exact), 4), round(fmean(surprisal), 4)])
    return results


@torch.inference_mode()
def measure(model: Any, processor: Any, example: Example, tried: Sequence[Candidate]) -> dict[str, Any]:
    """For every method and candidate, what :func:`right` says at each budget."""
    conversation = conversations(processor, [example], model.device, model.dtype)
    snapshot = PrefillSnapshot(model, conversation.inputs)
    features = Features(snapshot)
    masks = {name: masks_of(features, method) for name, method in methods()}
    masks |= {candidate.name: candidate.masks(features) for candidate in tried}
    results = iter(right(model, snapshot, conversation, list(chain.from_iterable(masks.values()))))
    return {name: [next(results) for _ in BUDGETS] for name in masks}


def examples(limit: int, heldout: int) -> Iterator[tuple[str, str, int, Callable[[], Example]]]:
    """Split, task and number of each example, and what makes it; tasks are interleaved."""
    for number in range(heldout):
        for label in list(TASKS)[:5]:
            yield "heldout", label, number, partial(task(label).example, HELDOUT_SEED, number)
    for number in range(limit):
        for label, make in TASKS.items():
            rng = np.random.default_rng([SEED, zlib.crc32(label.encode()), number])
            yield SPLIT, label, number, partial(make, rng, number)


def table(found: Sequence[dict[str, Any]], against: str | None = None) -> str:
    """Share of right answers in percent for every method and candidate; ``*``: differs from one of them."""
    budgets = " | ".join(f"{100 * budget:g} %" for budget in BUDGETS)
    text = f"{len(found)} examples.\n\n| recipe | {budgets} | surprisal |\n"
    text += "|---|" + "---|" * (len(BUDGETS) + 1) + "\n"
    for name in found[0]:
        cells = []
        for index in range(len(BUDGETS)):
            own = np.array([each[name][index][0] for each in found])
            other = np.array([each[against or name][index][0] for each in found])
            cells.append(f"{100 * own.mean():.1f}{'*' * (paired_p_value(own, other) < 0.05)}")
        surprisal = fmean(one[1] for each in found for one in each[name])
        text += f"| {name} | {' | '.join(cells)} | {surprisal:.3f} |\n"
    return text


def report(lines: Sequence[dict[str, Any]]) -> str:
    """The page."""
    text = INTRODUCTION
    for split, title, against in (("heldout", "Held-out pages", "sparsight"), (SPLIT, "Search", None)):
        text += f"\n## {title}\n\n{ABOUT[split]}\n"
        for label in TASKS:
            found = [line["results"] for line in lines if (line["split"], line["task"]) == (split, label)]
            if found:
                text += f"\n### {title}: {label}\n\n{table(found, against)}"
    return text


INTRODUCTION = """# The search for the `sparsight` recipe

Written by `benchmarks/recipe_search.py`. All figures are of the small model that ships: the share of right answers in
percent at five budgets, and the mean surprisal of a token of the right answers in nats, over these budgets. An answer
is right if every one of its tokens is the most likely one given those before it; for lists that is exact match, not
ROUGE-L. `tgv-kv` keeps here what it drops while decoding. Of the methods here only `sparsemm` is calibrated to the
model, and only `kvzip` processes the prompt twice.
"""

ABOUT = {
    "heldout": f"""The examples of [accuracy.md](accuracy.md) (held-out pages, seed {HELDOUT_SEED}), measured
after the recipe had been chosen. `before` is the recipe before this search. `*`: differs from `sparsight` at the same
budget in a paired sign-flip test, p < 0.05, without correction for the number of tests.""",
    SPLIT: f"""Pages of the training split, seed {SEED}. `before` is post-vision attention, max-pooled over 5 patches of
a row, with the same budget for every head. The rows after it change its score or its budgets:

- `MixKV`: its value norms and key diversity are mixed in. `pooling 5, average`: average pooling.
- `or last vision rows`, `or expected attention`: the larger of two scores, each divided by its largest: post-vision
  attention, and the attention of the last 25 vision tokens or that of Expected Attention.
- `across heads`, `across layers`: the heads of a layer, or of all layers, compete by post-vision attention.
- `and norms`, `keys`, `cosines`, `values`: added, at the level of the attention, are the norm of the value, the
  difference by cosine from the image's mean key or mean value, and the distance from the image's mean value.
- `heads by peaks`: SparseMM's allocation, by the squared peaks of the prompt itself instead of calibrated scores.
- `now and later`: the chosen recipe, with a weight of 0.15, a floor of 0.1 and pooling (1, 5). The rows after it change
  one number or part each. Attention and peaks are those of the last query and the mean of all, one half each.

The recipe was chosen in earlier rounds on other training pages (seeds 11 to 13, 9 to 24 examples of each task a
round); these tables repeat the search on examples of their own.""",
}


def main(
    output: Annotated[Path, typer.Argument(help="JSON lines file of the results.")],
    page: Annotated[Path, typer.Argument(help="Markdown file of the tables.")],
    limit: Annotated[int, typer.Option(help="Training examples per task.")] = 24,
    heldout: Annotated[int, typer.Option(help="Held-out examples per task.")] = 100,
) -> None:
    """Measure the examples that the file lacks, and write the page from all that it has."""
    torch.set_num_threads(1)
    checkpoint = load_checkpoint(str(model_path()))
    model = load_model(checkpoint)
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    done = {(line["split"], line["task"], line["number"]) for line in lines}
    with output.open("a") as file:
        for split, label, number, make in examples(limit, heldout):
            if (split, label, number) in done:
                continue
            results = measure(model, checkpoint.processor, make(), [*candidates()] if split == SPLIT else [])
            lines.append({"split": split, "task": label, "number": number, "results": results})
            file.write(json.dumps(lines[-1]) + "\n")
            file.flush()
            print(split, label, number, flush=True)
    page.write_text(report(lines))


if __name__ == "__main__":
    typer.run(main)
