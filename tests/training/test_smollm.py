"""Teaching a pretrained language model pages as vectors, on a tiny random one."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsight.models.reader_30 import assemble, spelling_tokenizer
from sparsight.reader.page import GLYPHS
from sparsight.reader.skills import look_up
from training.align import pixels
from training.smollm import read
from training.smollm.export import weights
from training.smollm.eyes import Eyes
from training.smollm.low_rank import LowRank
from training.smollm.prompts import IMAGE, batch_of
from training.smollm.read import blank, exact_features, judge, learn_to_read, student
from training.smollm.vectors import SHARE, initial_vectors
from training.targets import FEATURES, FIRST_GLYPH, glyph_feature
from training.words import tokenizer

WORDS = tokenizer()


@pytest.fixture
def pupil(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=288,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "base")
    return lambda: student(tmp_path / "base", WORDS, rank=4, seed=1)


def test_low_rank_update_is_zero_at_first_and_then_added():
    torch.manual_seed(0)
    linear, inputs = nn.Linear(6, 5, bias=False), torch.randn(2, 3, 6)
    updated = LowRank(linear, 2)
    torch.testing.assert_close(updated(inputs), linear(inputs))
    nn.init.normal_(updated.up)
    torch.testing.assert_close(updated(inputs), inputs @ (linear.weight + updated.up @ updated.down).T)


def test_characters_start_near_their_embedding_and_differ_between_slots():
    embeddings = torch.randn(len(WORDS), 64, generator=torch.Generator().manual_seed(0))
    table = initial_vectors(embeddings, WORDS)
    assert table.shape == (FEATURES, 64)
    cosines = nn.functional.cosine_similarity
    for char in GLYPHS:
        slots = table[[glyph_feature(char, slot) for slot in range(3)]]
        own = embeddings[WORDS.convert_tokens_to_ids(char)]
        assert cosines(slots, own[None]).min() > SHARE - 0.4
        assert cosines(slots[0], slots[1], dim=0) < 0.9


def test_answers_alone_are_labelled_and_patches_marked():
    example = look_up(np.random.default_rng(0), "train", records=3, questions=2, height=56)
    batch = batch_of(WORDS, [example])
    assert (batch.ids == IMAGE).sum() == 4 * 24
    labels = batch.labels[batch.labels >= 0].tolist()
    assert WORDS.decode(labels) == "".join(f"{answer}<|im_end|>" for _, answer in example.turns)


def test_capitals_are_spelled(tmp_path):
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    engine.decoder = decoders.ByteLevel()
    engine.train_from_iterator(["Find AB here. What is AB? Plan A, plan B."] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=engine).save_pretrained(tmp_path)
    assert " AB" in [engine.decode([token]) for token in engine.encode("Find AB").ids]
    split = spelling_tokenizer(tmp_path)
    assert [split.decode([token]) for token in split("Find AB?")["input_ids"]] == ["Find", " A", "B", "?"]


def test_training_changes_what_is_trained_alone_and_resumes_where_it_stopped(pupil, tmp_path):
    straight, stopped = pupil(), pupil()
    before = {name: value.clone() for name, value in straight.model.state_dict().items()}
    learn_to_read(straight, tmp_path / "straight.pt", 4, 150, 1e-2, seed=3)
    learn_to_read(stopped, tmp_path / "stopped.pt", 2, 150, 1e-2, seed=3)
    resumed = pupil()
    learn_to_read(resumed, tmp_path / "stopped.pt", 4, 150, 1e-2, seed=3)
    for once, twice, fresh in zip(straight.trained, resumed.trained, pupil().trained, strict=True):
        torch.testing.assert_close(once, twice, rtol=0, atol=0)
        assert not torch.equal(once, fresh)
    changed = {name for name, value in straight.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.endswith((".up", ".down"))}


def test_blank_patches_alone_are_left_out(pupil):
    model, rng = pupil(), np.random.default_rng(5)
    examples = [look_up(rng, "train", records, 2, 56) for records in (2, 5)]
    shown = exact_features(examples)
    mask = blank(rng, shown)
    assert 0 < mask.sum() < len(mask)
    assert shown[mask][:, FIRST_GLYPH:].max() < 0.15
    nothing = torch.zeros(len(mask), dtype=torch.bool)
    complete, wanted = model.answers(examples, shown)
    same, _ = model.answers(examples, shown, nothing)
    torch.testing.assert_close(same, complete)
    thin, still_wanted = model.answers(examples, shown, mask)
    assert torch.equal(still_wanted, wanted)
    assert not torch.equal(thin, complete)


def test_judge_counts_answers_without_a_wrong_token(pupil, monkeypatch):
    monkeypatch.setattr(read, "JUDGED", {"look-up": lambda rng: look_up(rng, "heldout", 4, 4, 56)})
    untrained = pupil()
    assert judge(untrained, exact_features, 1) == {"heldout look-up": 0.0}
    answers = read.Student.answers

    def perfect(self, examples, shown):
        logits, wanted = answers(self, examples, shown)
        return nn.functional.one_hot(wanted, logits.shape[1]).float(), wanted

    monkeypatch.setattr(read.Student, "answers", perfect)
    assert judge(untrained, exact_features, 1) == {"heldout look-up": 1.0}


def test_the_assembled_checkpoint_computes_what_was_trained(pupil, tmp_path):
    trained = pupil()
    for parameter in trained.trained:
        nn.init.normal_(parameter, std=0.1)
    example = look_up(np.random.default_rng(2), "heldout", 6, 2)
    batch = batch_of(WORDS, [example])
    with torch.inference_mode():
        trained.model.float()
        wanted, _ = trained.answers([example], Eyes().features([example]))
        model = assemble(tmp_path / "base", WORDS, weights(list(trained.trained)))
        ids = batch.ids.where(batch.ids != IMAGE, model.config.image_token_id)
        made = model(input_ids=ids, pixel_values=pixels(example.pictures())).logits[batch.labels >= 0]
    torch.testing.assert_close(made, wanted, rtol=1e-3, atol=1e-3)
