"""Batch inference from Python: loaded models, paths and PIL images, and arguments of the wrong type."""

import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import sparsight
from sparsight.batch_inference.api import _LoadedCheckpoint
from sparsight.models.loading import load_checkpoint
from tests.batch_inference.conftest import prompt_of

PROMPT = prompt_of(0)
EXAMPLE = Path(__file__).parents[2] / "examples" / "receipt-1.png"


def texts(source: Any, **options: Any) -> dict[Any, str | None]:
    return {result.id: result.text for result in sparsight.batch(source, PROMPT, max_new_tokens=6, **options)}


def test_paths_and_open_images_are_rows(llava: str, pictures: Path) -> None:
    expected = list(texts(pictures, model=llava).values())
    paths = [pictures / f"{number}.png" for number in range(8)]
    assert texts((path for path in paths), model=Path(llava)) == dict(zip(map(str, paths), expected, strict=True))
    images = [Image.open(path) for path in paths]
    assert texts(images, model=llava) == dict(enumerate(expected))
    rows = [{"id": "two", "images": [paths[0], images[1]]}]
    assert texts(rows, model=llava) == texts([{"id": "two", "images": paths[:2]}], model=llava)


def test_the_default_model_is_the_one_that_ships() -> None:
    answers = [result.text for result in sparsight.batch([EXAMPLE], "How much is JU?")]
    assert answers == ["461"]


def test_open_images_are_upright_rgb_and_their_errors_are_those_of_their_rows(llava: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (40, 30), (200, 0, 0, 100))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    cut = tmp_path / "cut.png"
    cut.write_bytes((tmp_path / "a.png").read_bytes()[:90])
    images = [Image.open(tmp_path / "a.png"), Image.open(cut)]
    found = {result.id: result for result in sparsight.batch(images, PROMPT, model=llava, max_new_tokens=6)}
    assert found[0].text == texts([tmp_path / "a.png"], model=llava)[str(tmp_path / "a.png")]
    assert (found[1].error_kind, found[1].text) == ("damaged picture", None)


def test_a_loaded_model_answers_as_its_folder_does(llava: str, pictures: Path) -> None:
    expected = texts(pictures, model=llava)
    model = AutoModelForImageTextToText.from_pretrained(llava)
    assert texts(pictures, model=model) == expected
    processor = AutoProcessor.from_pretrained(llava)
    processor.chat_template = processor.chat_template.replace("user", "other")
    other = texts(pictures, model=model, processor=processor)
    assert other.keys() == expected.keys()
    assert other != expected
    assert texts(pictures, model=model) == expected


def test_other_processes_get_the_processor_that_was_passed(llava: str) -> None:
    checkpoint = load_checkpoint(llava)
    checkpoint.processor.chat_template = "mine"
    copy = pickle.loads(pickle.dumps(_LoadedCheckpoint(checkpoint.name, checkpoint.config, checkpoint.processor)))
    assert copy.processor.chat_template == "mine"


def test_arguments_of_the_wrong_type_are_refused_at_the_call(llava: str, pictures: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(llava)
    rows = [{"id": 1, "image": pictures / "0.png"}]
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        (
            (model, rows),
            {"model": llava},
            "source must be a path, or an iterable of rows: mappings, paths or PIL images, not a L",
        ),
        ((rows[0],), {"model": llava}, "source must be a path, or an iterable of rows: .*, not a dict"),
        ((5,), {"model": llava}, "source must be .*, not an int"),
        (([5],), {"model": llava}, "Row 0 of source must be a mapping, a path or a PIL image, not an int"),
        ((rows, 5), {"model": llava}, "prompt must be a string or None, not an int"),
        ((rows,), {"model": rows}, "model must be a folder, a hub id, a loaded model or None, not a list"),
        ((rows,), {"model": llava, "recipe": "vl-cache"}, "recipe must be a Recipe, such as .*, not a str"),
        ((rows,), {"model": llava, "device": 0}, "device must be a string, not an int"),
    ]
    for arguments, options, sentence in wrong:
        with pytest.raises(TypeError, match=rf"^{sentence}") as caught:
            sparsight.batch(*arguments, **options)
        assert len(str(caught.value)) < 200
    refused: list[tuple[dict[str, Any], str]] = [
        ({"model": llava, "max_new_tokens": 0}, "max_new_tokens must be an integer above 0, got 0"),
        ({"model": llava, "max_new_tokens": 2.5}, "max_new_tokens must be an integer above 0, got 2.5"),
        ({"model": llava, "batch_size": 0}, "batch_size must be an integer above 0 or None, got 0"),
        ({"model": llava, "processor": object()}, "processor is for a loaded model"),
        ({"model": model, "device": "cpu"}, "device and dtype are for a model given by name"),
    ]
    for options, sentence in refused:
        with pytest.raises(ValueError, match=sentence):
            sparsight.batch(rows, "What?", **options)
