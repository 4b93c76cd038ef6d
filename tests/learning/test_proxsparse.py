"""ProxSparse: its operator against brute force, its pull against autograd, its start."""

import pytest
import torch
from peft import get_peft_model

from hf_maskpro import MaskProConfig, MaskProTrainer
from hf_maskpro.learning.proxsparse import proximal_step, pull_gradient
from hf_maskpro.subset import compiling
from hf_maskpro.tuner import masked_layers

from ..conftest import tiny_llama
from .test_trainer import arguments, rows


def cost(w, v, strength):
    a, b, c, d = w.abs().unbind(-1)
    return 0.5 * (w - v).square().sum(-1) + strength * (a * b * (c + d) + c * d * (a + b))


def brute_force(v, strength):
    """The least cost over a grid of each group, refined by coordinate descent, which is exact in each coordinate."""
    best = []
    for group in v:
        axes = [torch.linspace(0, 1, 9, dtype=v.dtype) * member for member in group]
        grid = torch.cartesian_prod(*axes)
        points = grid[cost(grid, group, strength).topk(40, largest=False).indices].clone()
        for _ in range(200):
            for i in range(4):
                a, b, c = (points[:, j].abs() for j in range(4) if j != i)
                size = (group[i].abs() - strength * (a * b + b * c + c * a)).clamp(min=0)
                points[:, i] = group[i].sign() * size
        best.append(cost(points, group, strength).min())
    return torch.stack(best)


@pytest.mark.parametrize("strength", [0.02, 0.3, 1.0, 4.0])
def test_the_operator_finds_the_minimum(strength):
    v = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = proximal_step(v, torch.tensor(strength, dtype=v.dtype))
    # A hundred sweeps leave a part in ten thousand where two candidates are about to change places.
    assert (cost(w, v, strength) <= brute_force(v, strength) * (1 + 1e-4) + 1e-9).all()
    assert ((w == 0) | (w.sign() == v.sign())).all()
    shares = ((w != 0).sum(1) <= 2).double().mean()
    assert shares == 1 if strength == 4.0 else 0 <= shares < 1


def test_two_of_four_are_at_rest():
    v = torch.tensor([[0.0, -3.0, 0.0, 0.5], [2.0, 1e-6, -1.0, 0.0]])
    w = proximal_step(v, torch.tensor(0.5))
    assert torch.equal(w[0], v[0])
    assert torch.equal(w[1], torch.tensor([2.0, 0.0, -1.0, 0.0]))


def test_the_compiled_operator_is_the_eager_one(monkeypatch):
    v = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    compiled = proximal_step(v, torch.tensor(0.1))
    monkeypatch.setattr(compiling, "SMALLEST_COMPILED", 1 << 62)
    torch.testing.assert_close(compiled, proximal_step(v, torch.tensor(0.1)), atol=1e-6, rtol=1e-5)


def test_the_gradient_of_the_pull_is_that_of_autograd():
    generator = torch.Generator().manual_seed(0)
    weight, value = torch.randn(2, 6, 8, generator=generator, dtype=torch.float64)
    weight[0, 0] = 0
    value.requires_grad_()
    sign = torch.where(weight < 0, -1.0, 1.0)
    ((value / (weight + 0.1 * sign)) * (value - weight)).square().sum().backward()
    torch.testing.assert_close(pull_gradient(value.detach(), weight), value.grad)


@pytest.mark.parametrize("init_mask", ["magnitude", "random"])
def test_it_starts_at_the_starting_mask(tmp_path, llama, init_mask):
    model = get_peft_model(llama, MaskProConfig(init_mask=init_mask))
    trainer = MaskProTrainer(model, arguments(tmp_path, "proxsparse", max_steps=1), train_dataset=rows())
    trainer.create_optimizer()
    for value, layer in zip(trainer.estimator.values, masked_layers(model).values(), strict=True):
        weight = layer.get_base_layer().weight
        kept = layer.masked(weight, "default") != 0
        assert torch.equal(value[kept], weight[kept])
        assert torch.equal(value, weight) == (init_mask == "magnitude")
    assert trainer.changed_groups() == 0


def test_the_pull_keeps_the_relaxed_weights_near_the_pretrained_ones(tmp_path):
    distances = []
    for pull in (0.0, 100.0):
        model = get_peft_model(tiny_llama(), MaskProConfig())
        args = arguments(tmp_path, "proxsparse", max_steps=8, learning_rate=0.01, prox_pull=pull, prox_lambda=0.0)
        trainer = MaskProTrainer(model, args, train_dataset=rows())
        trainer.train()
        weights = [layer.get_base_layer().weight for layer in masked_layers(model).values()]
        pairs = zip(trainer.estimator.values, weights, strict=True)
        distances.append(sum((value - weight).square().sum().item() for value, weight in pairs))
    assert distances[1] < 0.8 * distances[0]


def test_refusals(tmp_path, llama):
    with pytest.raises(ValueError, match="prox_lambda is -1"):
        arguments(tmp_path, "proxsparse", prox_lambda=-1)
    with pytest.raises(ValueError, match="learns 2:4 alone"):
        MaskProTrainer(
            get_peft_model(llama, MaskProConfig(n=1)), arguments(tmp_path, "proxsparse"), train_dataset=rows()
        )
