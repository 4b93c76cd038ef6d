"""Every rule against a slow second way, element by element or with explicit inverses."""

import pytest
import torch

from hf_maskpro import MaskProConfig
from hf_maskpro.starts import _mask_by_rule, gblm, magnitude, pruner_zero, ria, sparsegpt, wanda
from hf_maskpro.starts.walk import Calibration, Inputs
from hf_maskpro.subset import group_members, mode


def random_layer(out_features=6, in_features=16, sequences=3, tokens=20):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    # Features that differ in size and go together, as they do in a model.
    mix = torch.randn(in_features, in_features, generator=generator)
    inputs = torch.randn(sequences, tokens, in_features, generator=generator) @ mix
    gathered = Inputs(in_features, torch.device("cpu"), with_gram=True)
    for sequence in inputs:
        gathered.update(sequence, 1)
    gradient = torch.rand(out_features, in_features, generator=generator)
    return weight, inputs.flatten(0, 1), Calibration(gathered, gradient)


def by_element(formula, weight):
    return torch.tensor([[formula(i, j) for j in range(weight.shape[1])] for i in range(weight.shape[0])])


@pytest.mark.parametrize("constant", [0.0, 0.5])
def test_gradients_that_tell_nothing_leave_the_weights_to_decide(constant):
    """As of an expert that no token was sent to, of which Pruner-Zero would keep the first members everywhere."""
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    calibration = Calibration(None, torch.full_like(weight, constant))
    mask = _mask_by_rule("pruner-zero", weight, calibration, MaskProConfig(), "layer")
    assert torch.equal(mask, _mask_by_rule("magnitude", weight, Calibration(), MaskProConfig(), "layer"))


@pytest.mark.parametrize("rule", ["wanda", "ria", "gblm", "pruner-zero", "sparsegpt"])
def test_in_groups_that_have_seen_nothing_the_weights_decide(rule):
    """Features that are always zero, within a layer that has seen others: no rule tells their members apart."""
    weight, inputs, _ = random_layer()
    inputs[:, 4:8] = inputs[:, 13:16] = 0
    gathered = Inputs(16, torch.device("cpu"), with_gram=True)
    gathered.update(inputs, 1)
    # A gradient of the weight is a sum of what enters it times what comes back.
    calibration = Calibration(gathered, torch.rand(6, 1) * gathered.squares.sqrt())
    mask = _mask_by_rule(rule, weight, calibration, MaskProConfig(), "layer")
    size = group_members(weight.abs(), 4)
    assert torch.equal(mask[:, :, 1], mode(size, 2)[:, :, 1])
    if rule != "sparsegpt":
        # Of the last group one member was seen, and is kept before all others.
        size[:, 0, 3] = torch.inf
        assert torch.equal(mask[:, :, 3], mode(size, 2)[:, :, 3])


def test_inputs_add_up_over_batches():
    _, inputs, calibration = random_layer()
    plain = Inputs(16, torch.device("cpu"), with_gram=False)
    plain.update(inputs, 3)
    assert plain.sequences == calibration.inputs.sequences == 3
    torch.testing.assert_close(plain.squares, calibration.inputs.squares)
    torch.testing.assert_close(
        calibration.inputs.gram.double(), inputs.double().T @ inputs.double(), rtol=1e-5, atol=1e-3
    )


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_scores_and_masks(n, m):
    weight, inputs, calibration = random_layer()
    w, x, g = weight.double(), inputs.double(), calibration.gradient.double()
    norm = [sum(row[j] ** 2 for row in x) ** 0.5 for j in range(16)]
    low, high = min(g.flatten().tolist()), max(g.flatten().tolist())
    formulas = {
        magnitude: lambda i, j: abs(w[i, j]),
        wanda: lambda i, j: abs(w[i, j]) * norm[j],
        ria: lambda i, j: (
            (abs(w[i, j]) / sum(abs(v) for v in w[i]) + abs(w[i, j]) / sum(abs(v) for v in w[:, j])) * norm[j] ** 0.5
        ),
        gblm: lambda i, j: abs(w[i, j]) * (norm[j] / 3**0.5 + 100 * g[i, j]),
        pruner_zero: lambda i, j: w[i, j] ** 2 * (g[i, j] - low) / (high - low),
    }
    for rule, formula in formulas.items():
        expected = by_element(formula, weight)
        scores = rule.scores(weight, calibration)
        torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-8)
        by_group = expected.view(6, -1, m)
        keep = torch.zeros_like(by_group, dtype=torch.bool).scatter(2, by_group.topk(n, dim=2).indices, True)
        assert torch.equal(mode(group_members(scores, m), n), keep.transpose(1, 2))


@pytest.mark.parametrize("rule", [ria, gblm, pruner_zero])
def test_zeros_do_not_become_nan(rule):
    weight, _, calibration = random_layer()
    weight[0], weight[:, 0] = 0, 0
    calibration.inputs.squares = torch.zeros(16)
    calibration.gradient.zero_()
    assert rule.scores(weight, calibration).isfinite().all()


@pytest.fixture(params=["compiled", "in torch"])
def sparsegpt_way(request, monkeypatch):
    if request.param == "in torch":
        monkeypatch.setattr(sparsegpt, "_library", lambda: None)
    elif sparsegpt._library() is None:
        pytest.skip("no compiler")


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_sparsegpt_is_the_optimal_brain_surgeon(sparsegpt_way, n, m):
    """Column by column with the inverse of what is left of H, in float64, as its derivation says."""
    weight, _, calibration = random_layer(in_features=24)
    hessian = calibration.inputs.gram.double()
    hessian = hessian + torch.eye(24) * 0.01 * hessian.diagonal().mean()
    w, keep = weight.double(), torch.zeros(6, 24, dtype=torch.bool)
    for j in range(24):
        # With the columns before j settled, the problem is that of the columns from j on.
        if j % m == 0:
            variances = [torch.linalg.inv(hessian[k:, k:])[0, 0] for k in range(j, j + m)]
            scores = w[:, j : j + m] ** 2 / torch.stack(variances)
            keep[:, j : j + m].scatter_(1, scores.topk(n, dim=1).indices, True)
        inverse = torch.linalg.inv(hessian[j:, j:])
        error = torch.where(keep[:, j], 0, w[:, j]) / inverse[0, 0]
        w[:, j:] -= error.unsqueeze(1) * inverse[0]
    mine = sparsegpt.mask(weight, calibration, n, m)
    assert torch.equal(mine, keep.view(6, -1, m).transpose(1, 2))


def test_sparsegpt_over_several_blocks_and_with_unused_features(sparsegpt_way, monkeypatch):
    weight, _, calibration = random_layer(in_features=24)
    calibration.inputs.gram[5], calibration.inputs.gram[:, 5] = 0, 0
    before = weight.clone()
    whole = sparsegpt.mask(weight, calibration, 2, 4)
    monkeypatch.setattr(sparsegpt, "BLOCK", 8)
    assert torch.equal(sparsegpt.mask(weight, calibration, 2, 4), whole)
    assert torch.equal(weight, before)
    assert not whole[:, 1, 1].any()


def test_sparsegpt_compiled_chooses_what_torch_does(compiler, monkeypatch):
    weight, _, calibration = random_layer(out_features=150, in_features=600, tokens=300)
    weight[:, 3] = weight[:, 0]
    chosen = {m: sparsegpt.mask(weight, calibration, m // 2, m) for m in (4, 8, 12)}
    monkeypatch.setattr(sparsegpt, "_library", lambda: None)
    for m, mask in chosen.items():
        assert (mask.sum(1) == m // 2).all()
        assert (mask == sparsegpt.mask(weight, calibration, m // 2, m)).float().mean() > 0.999


def test_sparsegpt_leaves_a_transposed_weight_alone():
    weight, _, calibration = random_layer()
    transposed = weight.T.contiguous().T
    assert torch.equal(sparsegpt.mask(transposed, calibration, 2, 4), sparsegpt.mask(weight, calibration, 2, 4))
    assert torch.equal(transposed, weight)
