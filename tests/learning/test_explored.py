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


def test_the_groups_with_the_largest_weights_are_explored(tmp_path, llama):
    model = get_peft_model(copy.deepcopy(llama), MaskProConfig())
    layers = list(masked_layers(model).values())
    layers[1].base_weight.data[3, 6] = 50.0
    layers[2].base_weight.data.zero_()
    args = arguments(tmp_path, "residual", max_steps=3, explored_groups=2, learning_rate=20.0)
    trainer = MaskProTrainer(model, args, train_dataset=rows())
    trainer.train()
    explored = trainer.estimator._explored
    assert sum(len(groups.rows) for groups in explored.values()) == 2
    assert [(r, p) for r, p in zip(explored[1].rows.tolist(), explored[1].places.tolist(), strict=True)] == [(3, 1)]
    moved = sum(int(layer.maskpro_theta["default"].ne(0).any(1).sum()) for layer in layers)
    assert moved <= 2
    assert not len(explored[2].rows)


def test_as_many_groups_as_there_are_is_all(tmp_path, llama):
    for options in ({"explored_groups": 10**9}, {"advantage": "raw"}):
        model = get_peft_model(copy.deepcopy(llama), MaskProConfig(logit_scale=1.0))
        trainer = MaskProTrainer(model, arguments(tmp_path, "residual", max_steps=2, **options), train_dataset=rows())
        trainer.train()
        assert not trainer.estimator._explored
        assert all(bool(theta.ne(0).any(1).all()) for theta in trainer.adapter.thetas())


def test_no_groups_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^explored_groups is 0, not a positive number; 256 is usual\.$"):
        arguments(tmp_path, "residual", explored_groups=0)
