"""The distributions against enumeration of all sets and float64 autograd."""

from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from hf_maskpro.subset import log_prob, marginals, marginals_backward, mode, sample, score


PATTERNS = [(1, 4), (2, 4), (4, 8)]
DISTRIBUTIONS = ["plackett_luce", "conditional_poisson"]


def all_masks(n: int, m: int) -> torch.Tensor:
    """Every mask as a group of its own, bool [m, sets]."""
    masks = torch.zeros(m, len(list(combinations(range(m), n))), dtype=torch.bool)
    for column, members in enumerate(combinations(range(m), n)):
        masks[list(members), column] = True
    return masks


def enumerated_log_prob(logits: torch.Tensor, members: tuple[int, ...], distribution: str) -> torch.Tensor:
    """log P of one set in float64, straight from the definition; logits of shape [m]."""
    if distribution == "conditional_poisson":
        n, m = len(members), len(logits)
        total = torch.stack([logits[list(s)].sum() for s in combinations(range(m), n)]).logsumexp(0)
        return logits[list(members)].sum() - total
    orders = []
    for order in permutations(members):
        left = list(range(len(logits)))
        value = torch.zeros((), dtype=torch.float64)
        for member in order:
            value = value + logits[member] - logits[left].logsumexp(0)
            left.remove(member)
        orders.append(value)
    return torch.stack(orders).logsumexp(0)


def random_logits(m: int, scale: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (3, 5), (2, 2 + 1)])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_probabilities_and_scores_over_all_sets(n, m, scale, distribution):
    masks = all_masks(n, m)
    logits = random_logits(m, scale).unsqueeze(1).expand(m, masks.shape[1])
    probability = log_prob(logits, masks, distribution).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-12)
    scores = score(logits, masks, distribution).double()
    assert scores.sum(0).abs().max() < 3e-6
    assert (scores * probability).sum(1).abs().max() < 3e-6


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (2, 5)])
@pytest.mark.parametrize("scale", [0.5, 5.0])
def test_log_prob_and_score_equal_float64_autograd(n, m, scale, distribution):
    masks = all_masks(n, m)
    logits = random_logits(m, scale, seed=1)
    batched = logits.unsqueeze(1).expand(m, masks.shape[1])
    values, scores = log_prob(batched, masks, distribution), score(batched, masks, distribution)
    for column, members in enumerate(combinations(range(m), n)):
        leaf = logits.double().requires_grad_()
        expected = enumerated_log_prob(leaf, members, distribution)
        (gradient,) = torch.autograd.grad(expected, leaf)
        assert values[column].item() == pytest.approx(expected.item(), abs=1e-5)
        torch.testing.assert_close(scores[:, column].double(), gradient, atol=2e-6, rtol=1e-5)


def test_score_of_the_likeliest_mask_at_a_wide_spread():
    """The case that breaks an epsilon in the denominator: exact is (~0, 9e-5, -4.5e-5, -4.5e-5)."""
    logits = torch.tensor([20.0, 10.0, 0.0, 0.0]).unsqueeze(1)
    scores = score(logits, torch.tensor([True, True, False, False]).unsqueeze(1))[:, 0]
    torch.testing.assert_close(scores, torch.tensor([0.0, 9.08e-5, -4.54e-5, -4.54e-5]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_lead_beyond_float32_gives_finite_values(n, distribution):
    logits = torch.tensor([400.0, -400.0, 0.0, 0.0]).unsqueeze(1)
    for column in all_masks(n, 4).T:
        assert score(logits, column.unsqueeze(1), distribution).isfinite().all()
    assert marginals(logits, n).isfinite().all()
    drawn = sample(logits, n, seed=1, distribution=distribution)
    assert drawn.sum() == n
    assert drawn[0, 0]
    assert not drawn[1, 0] or n == 4


@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (3, 4), (8, 16)])
@pytest.mark.parametrize("scale", [0.5, 5.0])
def test_marginals_equal_enumeration(n, m, scale):
    logits = random_logits(m, scale)
    weights = torch.stack([logits.double()[list(s)].sum() for s in combinations(range(m), n)])
    probability = (weights - weights.logsumexp(0)).exp()
    expected = (all_masks(n, m).double() * probability).sum(1)
    torch.testing.assert_close(marginals(logits.unsqueeze(1), n)[:, 0].double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (3, 4)])
@pytest.mark.parametrize("scale", [0.5, 5.0, 12.0])
def test_simple_gradient_is_the_exact_gradient_of_a_linear_loss(n, m, scale):
    logits = random_logits(m, scale).double().requires_grad_()
    value = random_logits(m, 1.0, seed=7)
    weights = torch.stack([logits[list(s)].sum() for s in combinations(range(m), n)])
    losses = torch.stack([value.double()[list(s)].sum() for s in combinations(range(m), n)])
    expected_loss = ((weights - weights.logsumexp(0)).exp() * losses).sum()
    (expected,) = torch.autograd.grad(expected_loss, logits)
    got = marginals_backward(logits.detach().float().unsqueeze(1), n, value.unsqueeze(1))[:, 0]
    torch.testing.assert_close(got.double(), expected, atol=2e-7, rtol=2e-5)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (3, 5), (1, 2)])
@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_sampling_frequencies_match_the_probabilities(n, m, scale, distribution):
    groups = 200_000
    logits = random_logits(m, scale, seed=3)
    drawn = sample(logits.unsqueeze(1).expand(m, groups), n, seed=11, layer=2, distribution=distribution)
    assert (drawn.sum(0) == n).all()
    code = (drawn.long() << torch.arange(m).unsqueeze(1)).sum(0)
    sets = list(combinations(range(m), n))
    expected = torch.stack([enumerated_log_prob(logits.double(), s, distribution).exp() for s in sets]) * groups
    observed = torch.stack([(code == sum(1 << i for i in s)).sum() for s in sets])
    frequent = expected >= 5
    observed_bins = [*observed[frequent].tolist(), observed[~frequent].sum().item()]
    expected_bins = [*expected[frequent].tolist(), expected[~frequent].sum().item()]
    if expected_bins[-1] == 0:
        observed_bins, expected_bins = observed_bins[:-1], expected_bins[:-1]
    assert chisquare(observed_bins, expected_bins, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("lead", [6.0, 10.0, 12.0])
@pytest.mark.parametrize("members", [(0, 1), (0, 3), (2, 3)])
def test_rare_flips_are_as_frequent_as_they_should_be(lead, distribution, members):
    """The share of groups that leave the mode, down to exp(-12), within five standard deviations."""
    groups = 1 << 24
    keep = torch.tensor([[i in members] for i in range(4)])
    logits = (keep * lead).float()
    probability = 1 - log_prob(logits, keep, distribution).exp().item()
    drawn = sample(logits.expand(4, groups), 2, seed=5, distribution=distribution)
    flipped = (drawn != keep).any(0).sum().item()
    assert abs(flipped - groups * probability) < 5 * (groups * probability) ** 0.5


@given(
    values=st.lists(st.floats(-50, 50, width=32), min_size=16, max_size=16),
    n=st.integers(1, 15),
    m=st.integers(2, 16),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=200, deadline=None)
def test_every_draw_and_mode_keeps_exactly_n(values, n, m, seed):
    if n >= m:
        n = m - 1
    logits = torch.tensor(values[:m]).unsqueeze(1)
    for distribution in DISTRIBUTIONS:
        assert sample(logits, n, seed, distribution=distribution).sum() == n
    assert mode(logits, n).sum() == n


def test_mode_breaks_ties_towards_the_lower_index():
    logits = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 3.0], [1.0, 2.0]])
    assert mode(logits, 2).T.tolist() == [[True, True, False, False], [True, False, True, False]]


def test_leading_dimensions_are_kept_and_layers_differ():
    logits = torch.zeros(3, 4, 50)
    first, second = (sample(logits, 2, seed=9, layer=layer) for layer in (0, 1))
    assert first.shape == (3, 4, 50)
    assert (first != second).any()
    assert torch.equal(first, sample(logits, 2, seed=9, layer=0))
