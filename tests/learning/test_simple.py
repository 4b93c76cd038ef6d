"""`simple`'s pull towards large weights, and its account of curvature."""

import math

import pytest
import torch
from peft import get_peft_model

from hf_maskpro import MaskProConfig, MaskProTrainer
from hf_maskpro.learning import simple
from hf_maskpro.learning.adapter import TrainedAdapter
from hf_maskpro.subset import candidates, group_members, marginals_backward, mode
from hf_maskpro.tuner import layer as tuner_layer
from hf_maskpro.tuner import masked_layers
from hf_maskpro.tuner.linear import MaskProLinear

from ..conftest import tiny_llama, tiny_mixtral
from .test_trainer import arguments, rows


def large_weights(model) -> float:
    """In how many groups the learned mask keeps the largest weights, as a share of all."""
    same = [
        (layer.learned_mask("default") == mode(group_members(layer.base_weight.abs(), 4), 2)).all(1).float()
        for layer in masked_layers(model).values()
    ]
    return torch.cat([found.flatten() for found in same]).mean().item()


def trained(folder, lean=False, **options):
    torch.manual_seed(7)
    model = get_peft_model(tiny_llama(), MaskProConfig(init_mask="random", logit_scale=2.0))
    args = arguments(folder, "simple", max_steps=30, optimizer_in_backward=lean, **options)
    trainer = MaskProTrainer(model, args, train_dataset=rows())
    before = large_weights(model)
    trainer.train()
    return trainer, before


@pytest.mark.parametrize("lean", [False, True])
def test_a_strong_pull_learns_the_magnitude_mask(tmp_path, lean):
    trainer, before = trained(tmp_path, lean, weight_pull=1000.0)
    assert before < 0.25
    assert large_weights(trainer.model) > 0.9
    assert trainer.config.start["training"]["weight_pull"] == 1000.0


def test_a_weak_one_leaves_the_loss_its_say(tmp_path):
    losses, shares = {}, {}
    for pull in (0.0, 0.1):
        trainer, _ = trained(tmp_path, weight_pull=pull)
        losses[pull], shares[pull] = trainer.evaluate(rows())["eval_loss"], large_weights(trainer.model)
    assert shares[0.0] < shares[0.1] < 0.6
    assert losses[0.1] < losses[0.0] + 0.05


def test_within_the_backward_pass_it_is_the_same(tmp_path, monkeypatch):
    """Of the first step, which either has from the same logits and masks."""
    given = {}
    for lean in (False, True):
        seen = given[lean] = {}
        preferring = TrainedAdapter.prefer_large_weights

        def note(self, index, gradient, strength, seen=seen, preferring=preferring):
            preferring(self, index, gradient, strength)
            seen.setdefault(index, gradient.clone())

        with monkeypatch.context() as patch:
            patch.setattr(TrainedAdapter, "prefer_large_weights", note)
            trained(tmp_path, lean, gradient_checkpointing=False)
    assert given[False].keys() == given[True].keys() == set(range(14))
    assert all(torch.equal(given[True][index], gradient) for index, gradient in given[False].items())


def test_an_expert_that_no_token_has_reached_stays_as_it_is(tmp_path):
    model = tiny_mixtral(layers=1)
    # The router sends all tokens to the first two.
    model.model.layers[0].mlp.gate.weight.data.zero_()
    model = get_peft_model(model, MaskProConfig(init_mask="random", logit_scale=2.0))
    trainer = MaskProTrainer(model, arguments(tmp_path, "simple", max_steps=3), train_dataset=rows())
    trainer.train()
    moved = [
        theta.unflatten(0, (layer.experts, -1)).abs().amax((1, 2, 3)) > 0
        for layer, theta in zip(trainer.adapter.layers, trainer.adapter.thetas(), strict=True)
        if layer.experts > 1
    ]
    assert moved
    assert all(experts.sum() == 2 for experts in moved)


def test_a_layer_that_no_batch_has_reached_stays_as_it_is(tmp_path):
    model = get_peft_model(tiny_llama(), MaskProConfig(init_mask="random"))
    trainer = MaskProTrainer(model, arguments(tmp_path, "simple", max_steps=1), train_dataset=rows())
    trainer.adapter.thetas()[0].register_post_accumulate_grad_hook(lambda theta: setattr(theta, "grad", None))
    trainer.train()
    assert [bool(theta.any()) for theta in trainer.adapter.thetas()] == [False] + [True] * 13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_as_long_as_said_and_points_to_large_weights(dtype):
    torch.manual_seed(0)
    config = MaskProConfig(init_mask="random", logit_scale=2.0, logits_dtype=str(dtype).removeprefix("torch."))
    model = get_peft_model(tiny_llama(), config)
    adapter = TrainedAdapter.of(model)
    theta, layer = adapter.thetas()[0], adapter.layers[0]
    with torch.no_grad():
        theta.copy_(torch.randn(theta.shape))
    leaf = theta.detach().double().requires_grad_(True)
    logits = leaf + 2 * layer.initial_mask("default")
    squares = group_members(layer.base_weight.detach(), 4).double().square()
    sets = candidates(2, 4, torch.device("cpu")).double()
    chances = torch.einsum("cm,rmg->rcg", sets, logits).softmax(1)
    reward = torch.einsum("rcg,cm,rmg->", chances, sets, squares)
    (expected,) = torch.autograd.grad(reward, leaf)
    gradient = torch.randn(theta.shape, dtype=dtype)
    moved = gradient.clone()
    adapter.prefer_large_weights(0, moved, 0.3)
    added = -0.3 * gradient.double().norm() / expected.norm() * expected
    exact = dtype == torch.float32
    torch.testing.assert_close(
        moved.double(), gradient.double() + added, atol=1e-6 if exact else 1e-2, rtol=1e-5 if exact else 1e-2
    )


def test_of_weights_that_are_zero_none_is_preferred():
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.data.zero_()
    adapter = TrainedAdapter.of(get_peft_model(model, MaskProConfig(init_mask="random")))
    gradient = torch.randn(adapter.thetas()[0].shape)
    moved = gradient.clone()
    adapter.prefer_large_weights(0, moved, 0.3)
    assert torch.equal(moved, gradient)


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_a_pull_that_is_none_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match=f"weight_pull is {value}"):
        arguments(tmp_path, "simple", weight_pull=value)


def test_second_derivatives_are_exact_where_rows_and_columns_multiply():
    rows, columns = torch.randn(6, 1), torch.randn(8)
    found, by_column = tuner_layer.second_derivatives(rows * columns, 3.0)
    torch.testing.assert_close(found * by_column, 3 * (rows * columns).square())


def test_of_no_gradient_there_is_no_curvature():
    found, by_column = tuner_layer.second_derivatives(torch.zeros(6, 8), 3.0)
    assert torch.equal(found * by_column, torch.zeros(6, 8))


def test_second_derivatives_are_the_fisher_information():
    """Of a softmax over four classes, linear in independent features, by 4,096 rows of labels that it drew itself."""
    torch.manual_seed(0)
    inputs = torch.randn(4096, 8, dtype=torch.float64) * torch.linspace(0.5, 2, 8, dtype=torch.float64)
    weight = (torch.randn(4, 8, dtype=torch.float64) / 4).requires_grad_(True)
    chances = (inputs @ weight.T).softmax(1).detach()
    exact = torch.einsum("tc,ti->ci", chances * (1 - chances), inputs.square()) / len(inputs)
    estimates = []
    for _ in range(400):
        labels = chances.multinomial(1).flatten()
        (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(inputs @ weight.T, labels), weight)
        rows, columns = tuner_layer.second_derivatives(gradient, len(inputs))
        estimates.append(rows * columns)
    mean = torch.stack(estimates).mean(0)
    assert (mean - exact).norm() < 0.15 * exact.norm()


def noted(monkeypatch) -> set[float]:
    """What second derivatives are scaled by."""
    seen, estimate = set(), tuner_layer.second_derivatives

    def note(gradient, scale):
        seen.add(scale)
        return estimate(gradient, scale)

    monkeypatch.setattr(tuner_layer, "second_derivatives", note)
    return seen


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_curvature_is_by_the_labels_of_a_step(tmp_path, monkeypatch, accumulation):
    seen = noted(monkeypatch)
    data = rows(length=12)
    for row in data:
        row["labels"][:4] = -100
    model = get_peft_model(tiny_llama(), MaskProConfig(init_mask="random"))
    args = arguments(
        tmp_path,
        "simple",
        max_steps=2,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=8 // accumulation,
        curvature=0.5,
    )
    trainer = MaskProTrainer(model, args, train_dataset=data)
    trainer.train()
    assert seen == {0.5 * 8 * 8}
    assert trainer.config.start["training"]["curvature"] == 0.5
    # A loop of somebody else's has the slope alone.
    assert {layer.curvature for layer in masked_layers(trainer.model).values()} == {0.0}


def test_the_curvature_is_by_no_more_labels_than_tell_it(tmp_path, monkeypatch):
    monkeypatch.setattr(simple, "MOST_TERMS", 50)
    seen = noted(monkeypatch)
    trained(tmp_path)
    assert seen == {50}


@pytest.mark.parametrize(
    ("objective", "scale"),
    [
        ({"language-modeling": 1.0, "distillation": 1.0}, 8 * 12 / 2),
        # The square of the gradient is a hundred times as large, and the curvature ten.
        ({"language-modeling": 10.0, "distillation": 10.0}, 8 * 12 / 20),
        ("distillation", None),
    ],
)
def test_the_curvature_is_that_of_the_objective(tmp_path, monkeypatch, objective, scale):
    seen = noted(monkeypatch)
    trained(tmp_path, objective=objective)
    assert seen == ({scale} if scale else set())


@pytest.mark.parametrize("labels", [None, [{"boxes": 1}]])
def test_without_labels_the_slope_alone_counts(tmp_path, labels):
    model = get_peft_model(tiny_llama(), MaskProConfig(init_mask="random"))
    trainer = MaskProTrainer(model, arguments(tmp_path, "simple", max_steps=1), train_dataset=rows())
    seen = []

    def step(*_):
        seen.extend(layer.curvature for layer in trainer.adapter.layers)

    trainer.estimator.training_step(step, model, {"labels": labels}, None)
    assert set(seen) == {0.0}


def test_after_a_step_that_fails_the_slope_alone_counts(tmp_path):
    model = get_peft_model(tiny_llama(), MaskProConfig(init_mask="random"))
    trainer = MaskProTrainer(model, arguments(tmp_path, "simple", max_steps=1), train_dataset=rows())
    trainer.current_gradient_accumulation_steps = 1

    def step(*_):
        assert {layer.curvature for layer in trainer.adapter.layers} == {3.0}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.estimator.training_step(step, model, {"labels": torch.tensor([[1, 2, 3, -100]])}, None)
    assert {layer.curvature for layer in trainer.adapter.layers} == {0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_layer_goes_by_the_mask_that_it_has_sampled(dtype):
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 8, bias=False, dtype=dtype)
    layer = MaskProLinear(linear, "default", MaskProConfig(init_mask="random", logit_scale=1.0))
    layer.train()
    theta = layer.maskpro_theta["default"]
    theta.requires_grad_(True)
    layer.curvature = 3.0
    inputs = torch.randn(5, 16, dtype=dtype)
    seed = 7
    layer._seed = lambda: seed
    outputs = layer(inputs)
    outputs.square().sum().backward()
    masked = layer.masked(linear.weight, "default", seed).detach()
    assert not torch.equal(masked, layer.masked(linear.weight, "default").detach())
    gradient = (2 * outputs.detach()).T @ inputs
    squares = gradient.float().square()
    second = 3 * squares.mean(1, keepdim=True) * squares.mean(0) / squares.mean()
    slope = gradient.float() - second * (masked.float() - linear.weight.detach().float() / 2)
    worth = group_members(slope * linear.weight.detach().float(), 4)
    logits = theta.detach() + layer.initial_mask("default")
    expected = marginals_backward(logits, 2, worth)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(theta.grad, expected, atol=tolerance * expected.abs().max().item(), rtol=tolerance)


def test_without_it_nothing_is_estimated(tmp_path, monkeypatch):
    monkeypatch.delattr(tuner_layer, "second_derivatives")
    trained(tmp_path, curvature=0.0)


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_a_curvature_that_is_none_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match=f"curvature is {value}"):
        arguments(tmp_path, "simple", curvature=value)
