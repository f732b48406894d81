"""Prompts in files, for engines of a later run."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from sparsight.cache.host_copy import HostCopy
from sparsight.engine.prefix_files import PrefixFiles, fingerprint
from sparsight.engine.prefix_memory import PrefixMemory
from tests.engine.requests import engine
from tests.engine.test_prefix_memory import TURNS, asked, chain, continued, outcome, states
from tests.support import models
from tests.support.models import ONE_IMAGE, THREE_IMAGES


def opened(folder, max_bytes=10**6, family="llava"):
    return PrefixFiles(folder, max_bytes, models.model(family))


def written(folder, *prompts, max_bytes=10**6):
    """The keys and values of some prompts, which are in files now."""
    files, copies = opened(folder, max_bytes), []
    for number, prompt in enumerate(prompts):
        copies.append(states(len(prompt)))
        files.write(prompt, copies[-1], {})
        files._writing[-1].result()
        (path,) = {path for path in folder.glob("*.safetensors") if prompt[-1].hex() in path.name}
        os.utime(path, ns=(number, number))
    files.close()
    return copies


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_later_engine_answers_from_the_files(family, tmp_path):
    first = models.inputs(family, THREE_IMAGES)
    inputs = continued(first, TURNS[0])
    with engine(family, host_memory=2**24, prefix_dir=tmp_path / "new" / "folder") as running:
        asked(running, family, first)
    with engine(family, host_memory=2**24, prefix_dir=tmp_path / "new" / "folder") as later, engine(family) as plain:
        own = asked(later, family, inputs, "streaming-llm")
        assert outcome(own) == outcome(asked(plain, family, inputs, "streaming-llm"))
        assert own.reused_tokens == first["input_ids"].shape[1]
        assert len(later.prefixes) > 0


def test_what_is_read_is_what_was_written(tmp_path):
    (copied,) = written(tmp_path, chain(1, 2, 3))
    files = opened(tmp_path)
    path, tokens = files.longest(chain(1, 2, 9))
    assert tokens == 2
    read_chain, read = files.read(path)
    assert read_chain == chain(1, 2, 3)
    for layer in range(2):
        for own, expected in zip(read.states(layer), copied.states(layer), strict=True):
            assert torch.equal(own, expected)
    assert files.longest(chain(2, 2)) == (None, 0)
    assert path.stat().st_mode & 0o777 == 0o600


def test_files_of_8_bits_are_not_those_of_other_copies(tmp_path):
    plain = states(3)
    copied = HostCopy("int8")
    for layer in range(2):
        copied.add_layer(*plain.states(layer))
    for dtype, each in ((None, plain), ("int8", copied)):
        files = PrefixFiles(tmp_path, 10**6, models.model("llava"), dtype)
        assert files.longest(chain(1, 2, 3)) == (None, 0)
        files.write(chain(1, 2, 3), each, {})
        files.close()
        files = PrefixFiles(tmp_path, 10**6, models.model("llava"), dtype)
        read = files.read(files.longest(chain(1, 2, 3))[0])[1]
        assert [len(stored) for stored in read.layers] == [2 if dtype is None else 4] * 2
        for stored, expected in zip(read.layers, each.layers, strict=True):
            assert all(torch.equal(*pair) for pair in zip(stored, expected, strict=True))
    assert len(list(tmp_path.iterdir())) == 2


def test_files_stay_within_the_bound_and_the_oldest_go_first(tmp_path):
    prompts = [chain(number, 1, 2, 3) for number in range(4)]
    written(tmp_path, prompts[0])
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    written(tmp_path, *prompts[1:], max_bytes=int(2.5 * size))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2.5 * size
    files = opened(tmp_path)
    assert [files.longest(prompt)[1] for prompt in prompts] == [0, 0, 4, 4]


def test_a_prompt_that_continues_another_takes_its_place(tmp_path):
    written(tmp_path, chain(1, 2, 3), chain(1, 2, 3, 4, 5))
    assert len(names(tmp_path)) == 1
    assert opened(tmp_path).longest(chain(1, 2, 3, 4, 5))[1] == 5


@pytest.mark.parametrize("damage", ["cut", "keys", "header", "empty"])
def test_a_damaged_file_is_a_miss_with_a_warning(tmp_path, damage):
    written(tmp_path, chain(1, 2, 3))
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "keys":
        content[-1] ^= 1
    elif damage == "header":
        content[10] ^= 255
    path.write_bytes({"cut": content[:-9], "empty": b""}.get(damage, content))
    with pytest.warns(UserWarning, match="is damaged and not used"):
        found = PrefixMemory(10**6, opened(tmp_path)).find(chain(1, 2, 3))
    assert found is None
    assert names(tmp_path) == []


def test_a_file_that_disappears_is_a_miss(tmp_path):
    written(tmp_path, chain(1, 2, 3))
    memory = PrefixMemory(10**6, opened(tmp_path))
    for path in tmp_path.iterdir():
        path.unlink()
    assert memory.find(chain(1, 2, 3)) is None


def test_another_model_does_not_use_the_files(tmp_path):
    written(tmp_path, chain(1, 2, 3))
    assert opened(tmp_path, family="llava_next").longest(chain(1, 2, 3)) == (None, 0)
    model = models.fresh_model("llava")
    before = fingerprint(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    assert fingerprint(model) != before


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be used"):
        engine(host_memory=10, prefix_dir=tmp_path / "file" / "folder")
    with pytest.raises(ValueError, match="prefix_dir needs host_memory"):
        engine(prefix_dir=tmp_path)


def test_a_process_that_is_killed_while_it_writes_leaves_nothing_that_is_used(tmp_path):
    code = """
        import sys, os, signal
        from pathlib import Path
        from sparsight.engine import prefix_files
        from tests.engine.test_prefix_files import chain, opened, states

        save = prefix_files.save_file

        def killed(tensors, path, metadata):
            save(tensors, path, metadata)
            with open(path, "rb+") as file:
                file.truncate(os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        files = opened(Path(sys.argv[1]))
        files.write(chain(1, 2, 3), states(3), {})
        files._writing[-1].result()
        prefix_files.save_file = killed
        files.write(chain(4, 5, 6), states(3), {})
        files.close()
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], cwd=Path(__file__).parents[2])
    assert ended.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    files = opened(tmp_path)
    assert files.longest(chain(1, 2, 3))[1] == 3
    assert files.longest(chain(4, 5, 6)) == (None, 0)
    # What it left is removed when the next prompt is written.
    files.write(chain(7, 8), states(2), {})
    files.close()
    assert not list(tmp_path.glob("*.partial"))
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_disk_that_is_full_is_a_warning(tmp_path, monkeypatch, kind):
    def full(*_):
        raise kind("No space left on device")

    monkeypatch.setattr("sparsight.engine.prefix_files.save_file", full)
    files = opened(tmp_path)
    with pytest.warns(UserWarning, match="could not be written to .*: No space left on device"):
        files._write(tmp_path / "prompt.safetensors", chain(1), states(1), {})
    assert names(tmp_path) == []


def test_one_image_that_an_earlier_run_saw_is_found_beside_another(tmp_path):
    first, more = models.inputs("llava", ONE_IMAGE), models.inputs("llava", THREE_IMAGES, seed=1)
    both = {"input_ids": torch.cat([first["input_ids"], more["input_ids"]], dim=1)}
    both["attention_mask"] = torch.ones_like(both["input_ids"])
    both["pixel_values"] = torch.cat([first["pixel_values"], more["pixel_values"]])
    with engine(host_memory=2**24, prefix_dir=tmp_path) as running:
        asked(running, "llava", first)
    with engine(host_memory=2**24, prefix_dir=tmp_path) as later:
        assert asked(later, "llava", both).reused_tokens == first["input_ids"].shape[1]
