from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from tests.eval import toys

from kronsae.eval import Skipped, SplicedModel, spliced_models
from kronsae.eval import hooked as hooked_module
from kronsae.eval.hooked import hidden_states, read_windows
from kronsae.support.errors import UserError


def measured(found: object) -> SplicedModel:
    assert isinstance(found, SplicedModel)
    return found


def entropy_terms(logits: list[float]) -> list[float]:
    total = math.log(sum(map(math.exp, logits)))
    return [logit - total for logit in logits]


def test_by_hand() -> None:
    """Tokens 2 and 3 embed as 1 and -1; the head gives token 2 the logit h, token 3 the logit -h.

    Window ``<bos> 2 3``: <bos> embeds as 5 and is never replaced, so the first prediction stays what it is.
    """
    embedding = torch.tensor([[0.0], [5.0], [1.0], [-1.0]])
    head = torch.tensor([[0.0], [0.0], [1.0], [-1.0]])
    model = toys.ToyModel(embedding, head)
    hook = toys.ToyHook("block", model.block)
    sae = toys.perfect_sae(1)
    with torch.no_grad():
        sae.decoder.W_dec.mul_(0.5)  # everything comes back at half its size
    windows = toys.batches([[toys.BOS, 2, 3]], 1)
    found = measured(spliced_models({"half": sae}, toys.ToyLanguageModel(model), hook, windows, tokens=9)["half"])

    first = entropy_terms([0, 0, 5, -5])  # after <bos>, always; token 2 comes
    after = {h: entropy_terms([0, 0, h, -h]) for h in (1.0, 0.5, 0.0)}  # after token 2, token 3 comes
    assert found.tokens == 2
    assert found.ce_clean == pytest.approx((-first[2] - after[1.0][3]) / 2)
    assert found.ce_spliced == pytest.approx((-first[2] - after[0.5][3]) / 2)
    assert found.ce_zero == pytest.approx((-first[2] - after[0.0][3]) / 2)
    assert found.ce_mean == pytest.approx(found.ce_zero)  # the mean of 1 and -1
    divergence = {
        h: sum(math.exp(p) * (p - q) for p, q in zip(after[1.0], after[h], strict=True)) / 2 for h in (0.5, 0.0)
    }
    assert found.kl_spliced == pytest.approx(divergence[0.5], rel=1e-5)
    assert found.kl_zero == pytest.approx(divergence[0.0], rel=1e-5)
    recovered = (found.ce_zero - found.ce_spliced) / (found.ce_zero - found.ce_clean)
    assert found.ce_recovered == pytest.approx(recovered)
    assert found.ce_recovered_from_mean == pytest.approx(recovered)
    assert found.kl_recovered == pytest.approx(1 - divergence[0.5] / divergence[0.0], rel=1e-5)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_a_perfect_sae_recovers_all_and_a_zero_sae_nothing(as_tuple: bool) -> None:
    model, hook = toys.language_model(20, 6, as_tuple=as_tuple)
    windows = toys.batches(toys.random_windows(12, 10, 20), 4)
    saes = {"perfect": toys.perfect_sae(6), "zero": toys.zero_sae(6)}
    found = spliced_models(saes, model, hook, windows, tokens=10_000)
    perfect, zero = measured(found["perfect"]), measured(found["zero"])
    assert perfect.ce_recovered == pytest.approx(1, abs=1e-6)
    assert perfect.kl_recovered == pytest.approx(1, abs=1e-6)
    assert zero.ce_recovered == pytest.approx(0, abs=1e-6)
    assert zero.kl_recovered == pytest.approx(0, abs=1e-6)
    assert zero.kl_zero > 0.1
    assert perfect.ce_clean == zero.ce_clean
    assert perfect.ce_zero == zero.ce_zero


def test_the_mean_is_what_mean_ablation_puts_in() -> None:
    """An SAE that gives nothing but the mean activation is the mean ablation."""
    model, hook = toys.language_model(12, 4)
    windows = toys.batches(toys.random_windows(9, 8, 12), 3)
    kept = [hidden_states(model, hook, part)[part.keep_ST] for part in read_windows(windows, 10_000)]
    sae = toys.zero_sae(4)
    with torch.no_grad():
        sae.decoder.b_dec.copy_(torch.cat(kept).mean(0))
    found = measured(spliced_models({"mean": sae}, model, hook, windows, tokens=10_000)["mean"])
    assert found.ce_spliced == pytest.approx(found.ce_mean, rel=1e-6)
    assert found.ce_recovered_from_mean == pytest.approx(0, abs=1e-5)


def test_padding_and_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, hook = toys.language_model(15, 5)
    windows = toys.random_windows(11, 9, 15)
    saes = {"kron": toys.kron_sae(5)}
    one_by_one = measured(spliced_models(saes, model, hook, toys.batches(windows, 1), tokens=30)["kron"])
    together = measured(spliced_models(saes, model, hook, toys.batches(windows, 11), tokens=30)["kron"])
    assert asdict(one_by_one) == pytest.approx(asdict(together), rel=1e-5)
    monkeypatch.setattr(hooked_module, "MAX_LOGITS", 300)  # a window or two at a time
    small = measured(spliced_models(saes, model, hook, toys.batches(windows, 11), tokens=30)["kron"])
    assert asdict(small) == pytest.approx(asdict(together), rel=1e-5)


def test_passes_are_shared() -> None:
    """Of each window: one clean, one zeroed, one mean, and one per SAE."""
    model, hook = toys.language_model(10, 4)
    windows = toys.batches(toys.random_windows(6, 6, 10), 3)
    spliced_models({str(n): toys.zero_sae(4) for n in range(3)}, model, hook, windows, tokens=10_000)
    assert model.model.passes_to_the_end == 2 * (1 + 2 + 3)


def test_no_head_is_a_plain_reason() -> None:
    model, hook = toys.language_model(10, 4, reason="the checkpoint is a BertModel")
    found = spliced_models({"a": toys.zero_sae(4)}, model, hook, toys.batches([[1, 2]], 1), tokens=1)
    assert found == {"a": Skipped("the checkpoint is a BertModel")}
    assert found["a"].to_dict() == {"kind": "skipped", "reason": "the checkpoint is a BertModel"}
    assert model.model.passes_to_the_end == 0


def test_nothing_to_recover_is_none_and_not_a_division_by_zero() -> None:
    found = SplicedModel(
        tokens=1, ce_clean=2.0, ce_spliced=2.0, ce_zero=2.0, ce_mean=2.0, kl_spliced=0.0, kl_zero=0.0, kl_mean=0.0
    )
    assert found.ce_recovered is None
    assert found.kl_recovered is None
    assert found.ce_recovered_from_mean is None


def test_windows_of_one_token_are_skipped_with_a_reason() -> None:
    model, hook = toys.language_model(10, 4)
    found = spliced_models({"a": toys.zero_sae(4)}, model, hook, toys.batches([[2], [3]], 2), tokens=2)
    assert found["a"] == Skipped("no window of the text has a token and a next one")


def test_bad_input() -> None:
    model, hook = toys.language_model(10, 4)
    saes = {"a": toys.zero_sae(4)}
    with pytest.raises(UserError, match="neither padding nor special; found none"):
        spliced_models(saes, model, hook, toys.batches([[1], [1]], 2), tokens=2)
    unused = toys.ToyHook("unused", model.model.unused)
    with pytest.raises(UserError, match=r"'unused' is not\. Give a transformer block"):
        spliced_models(saes, model, unused, toys.batches([[1, 2]], 1), tokens=2)
    model.model.embedding.weight[4, 0] = torch.nan
    with pytest.raises(UserError, match="'block' gave NaN or infinity in window 2, token 3"):
        spliced_models(saes, model, hook, toys.batches([[1, 2], [1, 3], [1, 2, 3, 4]], 2), tokens=9)


def test_padding_may_be_anything() -> None:
    """NaN in padding has no effect."""
    model, hook = toys.language_model(10, 4)
    model.model.embedding.weight[toys.PADDING] = torch.nan
    found = spliced_models({"a": toys.perfect_sae(4)}, model, hook, toys.batches([[1, 2, 3], [1, 2]], 2), tokens=9)
    assert measured(found["a"]).ce_recovered == pytest.approx(1, abs=1e-6)
