import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import sparsight
from sparsight.models import loading
from sparsight.models.loading import Checkpoint, load_checkpoint, load_model
from sparsight.reader import model_path
from tests.support import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return load_checkpoint(str(folder))


def test_weights_are_loaded_in_the_requested_type(checkpoint: Checkpoint) -> None:
    assert load_model(checkpoint).dtype == torch.float32
    model = load_model(checkpoint, device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.device.type == "cpu"
    assert not model.training


def test_unknown_types_and_devices_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="Unknown dtype 'float3': did you mean 'float32'"):
        load_model(checkpoint, dtype="float3")
    with pytest.raises(ValueError, match="There is no device 'banana'"):
        load_model(checkpoint, device="banana")


def test_a_path_that_is_not_a_folder_is_refused_without_a_request_to_the_hub(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    for name in (str(tmp_path / "nothing"), str(file), "./nothing", "~/nothing", "a/b/c"):
        with pytest.raises(ValueError, match=f"There is no model folder {name}"):
            load_checkpoint(name)


def test_a_hub_id_is_refused_at_once_where_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("it would retry"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    sentence = r"^There is no folder nobody/nothing, and the Hugging Face Hub cannot be reached: [^\n]+\.$"
    with pytest.raises(ValueError, match=sentence):
        load_checkpoint("nobody/nothing")


def test_a_hub_id_that_the_hub_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("it would retry"))
    monkeypatch.setattr(loading, "file_exists", lambda *_: False)
    with pytest.raises(ValueError, match="There is neither a folder nobody/nothing nor a public model of that name on"):
        load_checkpoint("nobody/nothing")


def test_a_cached_hub_id_is_loaded_without_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--somebody--llava"
    shutil.copytree(folder, cached / "snapshots" / "0")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    loading._check_hub("somebody/llava", "somebody/llava")


def test_a_name_that_no_model_can_have_is_reported() -> None:
    with pytest.raises(ValueError, match=r"^some body is not a model that can be loaded: Repo id must use [^\n]+\.$"):
        load_checkpoint("some body")


@pytest.mark.parametrize("config", [None, "{", "{}", '{"model_type": "unheard-of"}'])
def test_a_folder_without_a_model_is_reported(tmp_path: Path, config: str | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=rf"^{tmp_path} is not a model that can be loaded: [^\n]+\.$"):
        load_checkpoint(str(tmp_path))


@pytest.mark.parametrize("model_type", ["clip_vision_model", "llama", "bert"])
def test_a_text_only_or_vision_only_model_is_refused(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=f"is a '{model_type}' model, not a vision-language model"):
        load_checkpoint(str(tmp_path))


def test_a_language_model_is_loaded_where_text_is_allowed(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(str(tiny.llama(tmp_path)), text=True)
    assert checkpoint.text_only
    assert checkpoint.processor.eos_token == "</s>"
    assert type(load_model(checkpoint)).__name__ == "LlamaForCausalLM"
    assert pickle.loads(pickle.dumps(checkpoint)).text_only


def test_a_vision_language_model_is_loaded_where_text_is_allowed(folder: Path) -> None:
    checkpoint = load_checkpoint(str(folder), text=True)
    assert not checkpoint.text_only
    assert hasattr(checkpoint.processor, "image_processor")


def test_a_model_that_writes_no_text_is_refused_where_text_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}')
    with pytest.raises(ValueError, match="is a 'clip_vision_model' model, not a vision-language or language model"):
        load_checkpoint(str(tmp_path), text=True)


def test_a_name_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"^smollm2 is not installed: `sparsight models --install smollm2` does it\.$"):
        load_checkpoint("smollm2", text=True)


def test_a_model_without_a_processor_is_reported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(ValueError, match=rf"^The processor of {tmp_path} cannot be loaded: [^\n]+$"):
        load_checkpoint(str(tmp_path))


def test_a_processor_without_images_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # AutoProcessor returns the tokenizer if a repository has nothing else.
    only_words = SimpleNamespace(from_pretrained=lambda name, **settings: tiny.tokenizer())
    monkeypatch.setattr("sparsight.models.loading.AutoProcessor", only_words)
    with pytest.raises(ValueError, match=f"{folder} has no processor for images"):
        load_checkpoint(str(folder))


def test_a_model_without_weights_is_reported(tmp_path: Path) -> None:
    tiny.llava(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"^The weights of {tmp_path} cannot be loaded: [^\n]+$"):
        load_model(load_checkpoint(str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match=rf"^The weights of {tmp_path} cannot be loaded: [^\n]+$"):
        load_model(load_checkpoint(str(tmp_path)))


def test_weights_that_are_incomplete_are_refused(tmp_path: Path) -> None:
    tiny.llava(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layers.1.mlp." not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"^The weights of {tmp_path} are incomplete: 3 are missing, .*layers.1.mlp"):
        load_model(load_checkpoint(str(tmp_path)))


def test_load_gives_the_shipped_model_and_its_processor() -> None:
    model, processor = sparsight.load(device="cpu")
    assert Path(model.name_or_path) == model_path()
    assert (model.dtype, model.device.type, model.training) == (torch.bfloat16, "cpu", False)
    assert processor.image_token == "<image>"


def test_load_takes_a_folder_a_device_and_a_type(folder: Path) -> None:
    for name in (folder, str(folder)):
        model, processor = sparsight.load(name, device="cpu", dtype="float16")
        assert model.dtype == torch.float16
        assert processor.tokenizer.eos_token == "</s>"
    with pytest.raises(ValueError, match=r"There is no model folder \./nothing"):
        sparsight.load("./nothing")


@pytest.mark.parametrize("name", ["x\x1b[31m" + "y" * 10_000, "../x\x1b[31m" + "y" * 10_000])
def test_long_names_with_control_characters_are_cut_and_escaped(name: str) -> None:
    with pytest.raises(ValueError, match=r"x\\x1b\[31my") as refused:
        load_checkpoint(name)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 800
