"""MaskLLM: its soft mask against its definition, its gradient against autograd, its start."""

import pytest
import torch
from peft import get_peft_model

from hf_maskpro import MaskProConfig, MaskProTrainer
from hf_maskpro.learning.maskllm import PRIOR, _SoftMask, soft_choice
from hf_maskpro.subset import candidates, gumbel, random_keys
from hf_maskpro.tuner import masked_layers

from .test_trainer import arguments, rows


CPU = torch.device("cpu")


def test_the_noise_is_gumbels():
    draws = torch.stack(gumbel(torch.empty(1000, 200), *random_keys(3, 1, CPU), 2))
    assert draws.isfinite().all()
    assert draws.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert draws.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.02)
    assert torch.corrcoef(draws.flatten(1))[0, 1].abs() < 0.01


@pytest.mark.parametrize(("n", "count"), [(2, 6), (1, 4)])
@pytest.mark.parametrize("large", [False, True])
def test_soft_mask_and_gradient_are_those_of_autograd(n, count, large):
    """Large enough to be compiled, and not."""
    generator = torch.Generator().manual_seed(0)
    size = (128, 512) if large else (6, 16)
    gates = (0.01 * torch.randn(size[0], count, size[1] // 4, generator=generator)).requires_grad_()
    weight, grad = torch.randn(2, *size, generator=generator)
    scale, temperature, bonus = 150.0, 2.0, 1e-2
    masked = _SoftMask.apply(gates, weight, 5, 1, n, scale, temperature, bonus)
    masked.backward(grad)

    plain = gates.detach().double().requires_grad_()
    noise = torch.stack(gumbel(gates[:, 0], *random_keys(5, 1, CPU), count), dim=1).double()
    chances = ((scale * plain + noise) / temperature).softmax(1)
    mask = torch.einsum("rcg,cm->rgm", chances, candidates(n, 4, CPU).double()).flatten(1)
    expected = mask * weight.double()
    torch.testing.assert_close(masked.double(), expected, atol=1e-5, rtol=1e-5)
    loss = (expected * grad).sum() - bonus * expected.square().sum()
    loss.backward()
    torch.testing.assert_close(gates.grad.double(), plain.grad, atol=1e-4, rtol=1e-4)


def test_cold_it_chooses_one_mask():
    gates = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    chances = torch.stack(soft_choice(gates, *random_keys(0, 0, CPU), torch.tensor(1e4), torch.tensor(0.05)), dim=1)
    assert torch.equal(chances.argmax(1), gates.argmax(1))
    assert chances.amax(1).min() > 0.99


def test_it_starts_with_the_starting_mask_as_its_prior(tmp_path, llama):
    model = get_peft_model(llama, MaskProConfig(init_mask="random"))
    trainer = MaskProTrainer(model, arguments(tmp_path, "maskllm", max_steps=1), train_dataset=rows())
    trainer.create_optimizer()
    # Six standard deviations lie between the start's mask and its opposite, three between it and its neighbours.
    assert trainer.changed_groups() < 0.15
    for gates, layer in zip(trainer.estimator.values, masked_layers(model).values(), strict=True):
        overlap = torch.einsum("cm,rmg->rcg", candidates(2, 4, CPU), layer.initial_mask("default").float())
        means = [gates[overlap == shared].mean().item() for shared in (0, 1, 2)]
        assert means == pytest.approx([-PRIOR * 0.01, 0, PRIOR * 0.01], abs=0.005)


def test_the_run_is_annealed(tmp_path, llama):
    model = get_peft_model(llama, MaskProConfig())
    args = arguments(tmp_path, "maskllm", max_steps=4, logging_steps=1)
    trainer = MaskProTrainer(model, args, train_dataset=rows())
    trainer.train()
    temperatures = [entry["temperature"] for entry in trainer.state.log_history if "temperature" in entry]
    assert temperatures == pytest.approx([3.0125, 2.025, 1.0375, 0.05])


def test_refusals(tmp_path, llama):
    with pytest.raises(ValueError, match="weight_bonus is -1"):
        arguments(tmp_path, "maskllm", weight_bonus=-1)
    with pytest.raises(ValueError, match="learns 2:4 and 1:4"):
        MaskProTrainer(
            get_peft_model(llama, MaskProConfig(n=4, m=8)), arguments(tmp_path, "maskllm"), train_dataset=rows()
        )
