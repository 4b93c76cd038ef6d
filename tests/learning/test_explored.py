"""Sampling and learning some groups of a layer, as `residual` does: all others keep the mode."""

import copy

import pytest
import torch
from peft import get_peft_model

from hf_maskpro import MaskProConfig, MaskProTrainer
from hf_maskpro.subset import mask_of, score
from hf_maskpro.tuner import masked_layers

from .test_trainer import arguments, rows


def layer_of(llama, **options):
    """One layer with logits of its own, and three of its groups."""
    model = get_peft_model(copy.deepcopy(llama), MaskProConfig(logit_scale=2.0, **options))
    layer = next(iter(masked_layers(model).values()))
    theta = layer.maskpro_theta["default"].data
    theta.copy_(torch.randn(theta.shape, generator=torch.Generator().manual_seed(0)))
    return layer, layer.groups_at("default", torch.tensor([0, 2, 2]), torch.tensor([1, 0, 3]))


@pytest.mark.parametrize("distribution", ["plackett_luce", "conditional_poisson"])
def test_other_groups_keep_the_mode(llama, distribution):
    layer, groups = layer_of(llama)
    mode = layer.mode_codes("default")
    at = (groups.rows, groups.places)
    seen = set()
    for seed in range(50):
        codes = layer.sampled_codes("default", seed, 0, distribution, groups)
        seen.add(tuple(codes[at].tolist()))
        codes[at] = mode[at]
        assert codes.equal(mode)
    assert len(seen) > 5


def test_the_weight_is_that_of_the_codes(llama):
    layer, groups = layer_of(llama)
    weight = layer.base_weight.detach()
    kept = mask_of(layer.sampled_codes("default", 3, 0, "plackett_luce", groups), 4)
    masked = layer.masked(weight, "default", 3, 0, "plackett_luce", groups)
    assert masked.equal(weight.where(kept.transpose(1, 2).flatten(1), 0))


def test_logits_move_by_the_scores_of_all_masks_and_nowhere_else(llama):
    layer, groups = layer_of(llama)
    theta = layer.maskpro_theta["default"].data
    before = theta.clone()
    moves = [(5, 0.5), (6, -0.25)]
    expected = before.clone()
    for seed, step in moves:
        kept = mask_of(layer.sampled_codes("default", seed, 0, "plackett_luce", groups), 4)
        initial = layer.initial_mask("default")
        scores = score(before + 2.0 * initial.float(), kept, "plackett_luce")
        expected[groups.rows, :, groups.places] += step * scores[groups.rows, :, groups.places]
    layer.move_logits("default", moves, 0, "plackett_luce", groups)
    torch.testing.assert_close(theta, expected)
    assert (theta != before).any(1).sum() == 3


def test_half_precision_is_rounded_right_on_average(llama):
    layer, groups = layer_of(llama, logits_dtype="bfloat16")
    theta = layer.maskpro_theta["default"].data
    before, at = theta.clone(), (groups.rows, slice(None), groups.places)
    logits = before.float() + 2.0 * layer.initial_mask("default").float()
    errors, draws = torch.zeros(3, 4), 2000
    for index in range(draws):
        theta.copy_(before)
        kept = mask_of(layer.sampled_codes("default", 0, index, "plackett_luce", groups), 4)
        # Less than rounding to nearest would see.
        layer.move_logits("default", [(0, 1e-3)], index, "plackett_luce", groups)
        errors += (theta - before).float()[at] - 1e-3 * score(logits, kept, "plackett_luce")[at]
    spacing = 2.0**-7 * before.float()[at].abs().clamp(min=1e-3)
    assert ((errors / draws).abs() < 4 * spacing / draws**0.5).all()


def places_of(explored):
    return {
        (index, *at)
        for index, groups in explored.items()
        for at in zip(groups.rows.tolist(), groups.places.tolist(), strict=True)
    }


def test_the_groups_with_most_at_stake_are_explored(tmp_path, llama):
    model = get_peft_model(copy.deepcopy(llama), MaskProConfig(logit_scale=1.0))
    layers = list(masked_layers(model).values())
    # One has no weights, so the next has no inputs.
    layers[2].base_weight.data.zero_()
    args = arguments(tmp_path, "residual", max_steps=8, explored_groups=5, learning_rate=1.0)
    trainer = MaskProTrainer(model, args, train_dataset=rows())
    estimator, batch = trainer.estimator, torch.stack([row["input_ids"] for row in rows(4)])
    seen = {}
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda _, args, index=index: seen.update({index: args[0]}))
    with torch.no_grad(), estimator._gathering() as squares:
        model(input_ids=batch)
    stakes = {}
    for index, layer in enumerate(layers):
        # No part of it is looked for by sums: group by group, weight by weight.
        inputs, weight = seen[index].double().flatten(0, 1), layer.base_weight.detach().double()
        torch.testing.assert_close(squares[index], (inputs**2).sum(0).float())
        members = (weight**2 * (inputs**2).sum(0)).unflatten(1, (-1, 4))
        for row, place in torch.cartesian_prod(*map(torch.arange, members.shape[:2])).tolist():
            stakes[index, row, place] = float(members[row, place].sum() / members.sum()) if members.any() else 0.0
    assert places_of(estimator._with_most_at_stake(squares)) == set(sorted(stakes, key=stakes.get)[-5:])
    trainer.train()
    explored = places_of(trainer.estimator._explored)
    assert len(explored) == 5
    thetas = enumerate(trainer.adapter.thetas())
    moved = {(i, *at) for i, theta in thetas for at in theta.detach().ne(0).any(1).nonzero().tolist()}
    assert moved
    assert moved <= explored


def test_as_many_groups_as_there_are_is_all(tmp_path, llama):
    for options in ({"explored_groups": 10**9}, {"advantage": "raw"}):
        model = get_peft_model(copy.deepcopy(llama), MaskProConfig(logit_scale=1.0))
        trainer = MaskProTrainer(model, arguments(tmp_path, "residual", max_steps=2, **options), train_dataset=rows())
        trainer.train()
        assert not trainer.estimator._explored
        assert all(bool(theta.ne(0).any(1).all()) for theta in trainer.adapter.thetas())


def test_no_groups_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^explored_groups is 0, not a positive number; 128 is usual\.$"):
        arguments(tmp_path, "residual", explored_groups=0)
