"""Metrics against cases computed by hand, and against the libraries' own results."""

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsight.eval import metrics
from sparsight.eval.metrics import anls, divergence, exact_match, rouge_l, same_tokens, surprisal

TEXT = st.text(alphabet="AB 12", max_size=12)


def test_exact_match_is_letter_for_letter() -> None:
    assert exact_match("482", "482") == exact_match(" 482\n", "482") == 1
    assert exact_match("483", "482") == exact_match("4 82", "482") == exact_match("", "482") == 0
    assert exact_match("Red", "red") == 0


@pytest.mark.parametrize(
    ("answer", "reference", "similarity"),
    [
        ("482", "482", 1),
        # One of three characters is wrong, then two: below one half nothing counts.
        ("483", "482", 2 / 3),
        ("499", "482", 0),
        ("4.82", "482", 3 / 4),
        ("", "482", 0),
        # Two of four are wrong: exactly one half still counts.
        ("ABXY", "ABCD", 1 / 2),
        ("RED", "red", 1),
    ],
)
def test_anls_by_hand(answer: str, reference: str, similarity: float) -> None:
    assert anls(answer, reference) == pytest.approx(similarity)


@given(TEXT, TEXT)
def test_anls_is_the_edit_distance_over_the_longer_text_cut_off_at_one_half(answer: str, reference: str) -> None:
    one, other = (" ".join(text.lower().split()) for text in (answer, reference))
    longest = max(len(one), len(other))
    similarity = 1 - edits(one, other) / longest if longest else 1.0
    assert anls(answer, reference) == pytest.approx(similarity if similarity >= 0.5 else 0)


def edits(one: str, other: str) -> int:
    """Levenshtein's distance, from its definition."""
    if not one or not other:
        return len(one) + len(other)
    table = [[i + j for j in range(len(other) + 1)] for i in range(len(one) + 1)]
    for i, left in enumerate(one, 1):
        for j, right in enumerate(other, 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (left != right))
    return table[-1][-1]


@pytest.mark.parametrize(
    ("answer", "reference", "f_measure"),
    [
        ("KQ 482\nAB 1", "KQ 482\nAB 1", 1),
        # KQ, 482 and AB in common: 3 of 4 words of each.
        ("KQ 482\nAB 9", "KQ 482\nAB 1", 3 / 4),
        # The longest common subsequence of the words is "c d": recall 2 / 4, precision 2 / 2.
        ("c d", "a c b d", 2 * 0.5 * 1 / 1.5),
        ("d c b a", "a b c d", 1 / 4),
        ("", "a", 0),
    ],
)
def test_rouge_l_by_hand(answer: str, reference: str, f_measure: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(f_measure)


def test_rouge_l_is_the_librarys() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    answer, reference = "RZ 355\nKQ 48.2\nZZ", "KQ 482\nRZ 355\nZZ 094"
    assert rouge_l(answer, reference) == RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure


def test_equal_tokens_are_counted_place_by_place() -> None:
    assert same_tokens([1, 2, 3], [1, 2, 3]) == 1
    assert same_tokens([1, 2, 3, 4], [1, 9, 3]) == 0.5
    assert same_tokens([], [7]) == 0
    assert same_tokens([], []) == 1


def test_surprisal_by_hand() -> None:
    # Probabilities 1/2, 1/4, 1/4 and 1/8, 7/8, 0.
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.875, 0.0]]).log()
    assert surprisal(logits, torch.tensor([0, 1])).item() == pytest.approx(-math.log(1 / 2) - math.log(7 / 8))
    assert surprisal(logits, torch.tensor([2, 2])).item() == math.inf
    assert surprisal(3 + logits, torch.tensor([0, 0])).item() == pytest.approx(math.log(2) + math.log(8))


def test_perplexity_is_the_exponential_of_the_loss_that_transformers_computes() -> None:
    logits, tokens = torch.randn(2, 5, 11), torch.randint(11, (2, 5))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert surprisal(logits, tokens).sum().item() / 10 == pytest.approx(loss.item(), rel=1e-5)


def test_divergence_by_hand() -> None:
    expected = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]]).log()
    found = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]]).log()
    by_hand = 0.5 * math.log(2) + 0.5 * math.log(2 / 3) + math.log(2)
    assert divergence(found, expected).tolist() == [pytest.approx(by_hand)]


def test_divergence_is_the_librarys_and_zero_of_itself() -> None:
    one, other = torch.randn(3, 4, 7), torch.randn(3, 4, 7)
    theirs = torch.nn.functional.kl_div(one.log_softmax(-1), other.log_softmax(-1), reduction="none", log_target=True)
    torch.testing.assert_close(divergence(one, other).float(), theirs.sum((1, 2)))
    assert divergence(one, one).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("measure", "package", "module"), [(anls, "anls-star", "anls_star"), (rouge_l, "rouge-score", "rouge_score")]
)
def test_a_missing_library_is_named(measure, package: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics._anls_score.cache_clear()
    metrics._rouge_scorer.cache_clear()
    for name in [module, *(name for name in sys.modules if name.startswith(module + "."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"needs the package {package}, .*pip install 'sparsight\[eval\]'"):
        measure("a", "b")
