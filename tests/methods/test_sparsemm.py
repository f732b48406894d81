import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import sparsight
from sparsight import CompressedCache, recipe
from sparsight.methods import SparseMM, VLCache, with_shipped_scores
from sparsight.models.inputs import prepare
from sparsight.models.loading import load_checkpoint
from sparsight.reader import head_scores_path, model_path
from sparsight.reader.transcript import random_transcript
from sparsight.utils.head_scores import read_scores


@pytest.mark.parametrize("kind", [str, Path])
def test_head_scores_may_be_a_path(tmp_path: Path, kind: type) -> None:
    scores = [[0.5, 1.0], [2.0, 3.25]]
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"scores": scores}))
    assert SparseMM(heads=kind(path)) == SparseMM(heads=scores) == recipe("sparsemm", heads=kind(path))
    with pytest.raises(ValueError, match=r"There is no file .*none\.json with head scores"):
        SparseMM(heads=kind(tmp_path / "none.json"))


@pytest.mark.parametrize("heads", [5, [1.0, 2.0], [[1.0], [2.0, 3.0]], [["a"]], [[-1.0]], [[None]]])
def test_what_are_no_head_scores_is_refused(heads: object) -> None:
    with pytest.raises(ValueError, match="Head scores must be as many numbers of at least 0 for every layer"):
        SparseMM(heads=heads)  # type: ignore[arg-type]


def test_the_shipped_scores_are_added_for_the_shipped_model_only(tmp_path: Path) -> None:
    scored = SparseMM(0.2, heads=head_scores_path())
    for name in (model_path(), str(model_path())):
        assert with_shipped_scores(SparseMM(0.2), name) == scored
    assert with_shipped_scores(SparseMM(0.2), "llava-hf/llava-1.5-7b-hf") == SparseMM(0.2)
    copy = shutil.copytree(model_path(), tmp_path / "copy")
    assert with_shipped_scores(SparseMM(0.2), copy) == SparseMM(0.2)
    own = SparseMM(0.2, heads=[[1.0]])
    assert with_shipped_scores(own, model_path()) == own
    assert with_shipped_scores(VLCache(), model_path()) == VLCache()


def test_the_shipped_model_answers_with_its_scores() -> None:
    model, _ = sparsight.load(device="cpu")
    page = random_transcript(np.random.default_rng(0))
    inputs = prepare(load_checkpoint(model.name_or_path), [page.picture], "Read the page.").to("cpu", model.dtype)
    cache = CompressedCache(model, with_shipped_scores(SparseMM(0.2), model.name_or_path), inputs)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=1)
    kept = [layer[0] for layer in cache.report().kept]
    scores = read_scores(head_scores_path())
    # In every layer the head with the highest score keeps the most.
    assert all(counts[of.index(max(of))] == max(counts) for counts, of in zip(kept, scores, strict=True))
    assert len({count for counts in kept for count in counts}) > 3
