"""Masks from elsewhere: each kind of source gives the mask that went into it, and a bad one is named."""

import pickle
from itertools import product
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file

from hf_maskpro import MaskProConfig, initialize_masks
from hf_maskpro.deploy import merge
from hf_maskpro.subset import mask_of
from hf_maskpro.tuner import masked_layers

from ..conftest import tiny_gpt2, tiny_gpt_oss, tiny_llama, tiny_mixtral


MODELS = [tiny_llama, tiny_gpt2, tiny_mixtral, tiny_gpt_oss]


def random_adapter(make, n=2, m=4):
    model = get_peft_model(make(), MaskProConfig(n=n, m=m, init_mask="random"))
    return model, masks_of(model)


def masks_of(model):
    return {
        name: mask_of(layer.initial_codes("default"), layer.maskpro_config["default"].m)
        for name, layer in masked_layers(model).items()
    }


def by_parameter(model, masks):
    """bool, in the shape of each weight."""
    layers = masked_layers(model)
    return {
        f"{name}{layers[name].parameter_suffix}": layers[name].out_in(mask.transpose(1, 2).flatten(1)).contiguous()
        for name, mask in masks.items()
    }


def imported(make, source, n=2, m=4):
    model = get_peft_model(make(), MaskProConfig(n=n, m=m, init_mask=str(source)))
    initialize_masks(model)
    return model


def same(masks, others):
    return masks.keys() == others.keys() and all(torch.equal(masks[name], others[name]) for name in masks)


def maskllm(path, masks):
    """By its recipe: the packed bits of every mask, under the parameter's name and `.mask`."""
    np.savez_compressed(path, **{f"{name}.mask": np.packbits(mask.numpy()) for name, mask in masks.items()})
    return path


@pytest.mark.parametrize(
    ("make", "n", "m"),
    [*product(MODELS, [2], [4]), *product(MODELS[:2], [1], [4]), *product(MODELS[:2], [4], [8])],
)
def test_every_source_gives_the_mask_that_went_into_it(make, n, m, tmp_path):
    model, masks = random_adapter(make, n, m)
    flat = by_parameter(model, masks)
    sources = [maskllm(tmp_path / "mask_compressed.npz", flat)]
    save_file(flat, tmp_path / "bool.safetensors")
    save_file({f"{name}.mask": mask.to(torch.bfloat16) for name, mask in flat.items()}, tmp_path / "ones.safetensors")
    sources += [tmp_path / "bool.safetensors", tmp_path / "ones.safetensors"]
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "pruned")
    sources += [tmp_path / "adapter", tmp_path / "pruned"]
    for source in sources:
        assert same(masks_of(imported(make, source, n, m)), masks), source
    (tmp_path / "repository").mkdir()
    sources[0].rename(tmp_path / "repository" / "mask_compressed.npz")
    assert same(masks_of(imported(make, tmp_path / "repository", n, m)), masks)


def test_maskllm_imports_evaluates_and_saves_identically(ids, tmp_path):
    model, masks = random_adapter(tiny_llama)
    source = maskllm(tmp_path / "mask_compressed.npz", by_parameter(model, masks))
    other = imported(tiny_llama, source)
    with torch.no_grad():
        assert torch.equal(other.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    for name, m in (("known", model), ("imported", other)):
        m.save_pretrained(tmp_path / name)
    known, theirs = (tmp_path / name / "adapter_model.safetensors" for name in ("known", "imported"))
    assert known.read_bytes() == theirs.read_bytes()


def test_a_learned_mask_of_an_adapter_with_logits(tmp_path):
    model, _ = random_adapter(tiny_llama)
    config = model.peft_config["default"]
    config.save_logits = True
    for layer in masked_layers(model).values():
        layer.maskpro_theta["default"].data.normal_(std=10)
    learned = {name: mask_of(layer.mode_codes("default"), 4) for name, layer in masked_layers(model).items()}
    model.save_pretrained(tmp_path / "adapter")
    assert same(masks_of(imported(tiny_llama, tmp_path / "adapter")), learned)


def test_of_a_pruned_checkpoint_only_what_transformers_loads_is_read(tmp_path):
    model, masks = random_adapter(tiny_llama)
    model.merge_and_unload().save_pretrained(tmp_path)
    other, _ = random_adapter(tiny_llama)
    save_file({k: v.clone() for k, v in other.merge_and_unload().state_dict().items()}, tmp_path / "z.safetensors")
    assert same(masks_of(imported(tiny_llama, tmp_path)), masks)


def test_a_pruned_checkpoint_whose_names_lack_a_prefix(tmp_path):
    """As GPT-2 is on the Hub, and what is merged into it."""
    tiny_gpt2().transformer.save_pretrained(tmp_path / "base")
    model, masks = random_adapter(tiny_gpt2)
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    model.merge_and_unload().transformer.save_pretrained(tmp_path / "saved")
    for source in ("saved", "merged"):
        assert same(masks_of(imported(tiny_gpt2, tmp_path / source)), masks)


def test_a_pruned_checkpoint_may_hold_fewer_weights(tmp_path):
    model, masks = random_adapter(tiny_llama, 1, 4)
    model.merge_and_unload().save_pretrained(tmp_path / "pruned")
    wider = masks_of(imported(tiny_llama, tmp_path / "pruned", 2, 4))
    layers = masked_layers(random_adapter(tiny_llama)[0])
    for name, mask in masks.items():
        # Beside the one that is left the largest of the others.
        size = (
            layers[name]
            .get_base_layer()
            .weight.detach()
            .abs()
            .unflatten(1, (-1, 4))
            .transpose(1, 2)
            .masked_fill(mask, 0)
        )
        assert torch.equal(wider[name], mask | (size == size.amax(1, keepdim=True)))


def test_a_kept_zero_stays_kept(tmp_path):
    base = tiny_llama()
    model = get_peft_model(base, MaskProConfig())
    layer = next(iter(masked_layers(model).values()))
    # The last two of every group, one of them zero by itself: ties would go to the first.
    layer.get_base_layer().weight.data[:, 3::4] = 0
    mask = torch.zeros(16, 4, 4, dtype=torch.bool)
    mask[:, 2:] = True
    layer.set_initial_mask("default", mask)
    pruned = {name: tensor.clone() for name, tensor in model.merge_and_unload().state_dict().items()}
    save_file(pruned, tmp_path / "model.safetensors")
    again = tiny_llama()
    again.model.layers[0].self_attn.q_proj.weight.data[:, 3::4] = 0
    other = get_peft_model(again, MaskProConfig(init_mask=f"{tmp_path}/"))
    initialize_masks(other)
    assert torch.equal(next(iter(masks_of(other).values())), mask)


def test_a_path_is_not_published_and_may_end_like_a_refinement(tmp_path):
    model, masks = random_adapter(tiny_llama)
    model.save_pretrained(tmp_path / "wanda+swaps")
    other = imported(tiny_llama, tmp_path / "wanda+swaps")
    assert same(masks_of(other), masks)
    other.save_pretrained(tmp_path / "saved")
    assert str(tmp_path) not in (tmp_path / "saved" / "adapter_config.json").read_text()
    assert MaskProConfig.from_pretrained(tmp_path / "saved").lineage[0]["init_mask"] == "./wanda+swaps"


def test_the_pattern_is_that_of_the_adapter_to_fill(tmp_path):
    wide, masks = random_adapter(tiny_llama, 4, 8)
    wide.save_pretrained(tmp_path / "wide")
    model = get_peft_model(tiny_llama(), MaskProConfig())
    model.add_adapter("wide", MaskProConfig(n=4, m=8, init_mask=f"{tmp_path}/wide"))
    model.set_adapter("wide")
    initialize_masks(model)
    for name, layer in masked_layers(model, "wide").items():
        assert torch.equal(mask_of(layer.initial_codes("wide"), 8), masks[name])


def test_a_source_is_refined(ids, tmp_path):
    model, masks = random_adapter(tiny_llama)
    model.save_pretrained(tmp_path / "adapter")
    refined = get_peft_model(tiny_llama(), MaskProConfig(init_mask=f"{tmp_path}/adapter+swaps"))
    with pytest.raises(ValueError, match="needs calibration text"):
        initialize_masks(refined)
    initialize_masks(refined, [{"input_ids": ids}])
    assert not same(masks_of(refined), masks)


FIRST = "model.layers.0.self_attn.q_proj.weight"


def test_bad_masks_are_refused_by_name(tmp_path):
    model, masks = random_adapter(tiny_llama)
    flat = by_parameter(model, masks)
    last = list(flat)[-1]

    def refused(changed, match, n=2, m=4):
        save_file(changed, tmp_path / "bad.safetensors")
        with pytest.raises(ValueError, match=match):
            imported(tiny_llama, tmp_path / "bad.safetensors", n, m)

    refused({name: mask for name, mask in flat.items() if name != last}, f"no mask for {last}")
    refused(flat | {last: flat[last][:-1]}, rf"{last}: the source has shape \[15, 32\], the model \[16, 32\]")
    refused(flat | {last: torch.ones_like(flat[last])}, f"{last}: 128 of 128 groups do not keep 2 of 4")
    refused(flat | {last: torch.zeros_like(flat[last])}, f"{last}: 128 of 128 groups do not keep 2 of 4")
    refused(flat | {last: flat[last] * 2.0}, f"{last}: a mask is bool or holds nothing but 0 and 1")
    refused(flat, f"{FIRST}: .* groups do not keep 1 of 4", 1, 4)

    target = get_peft_model(tiny_llama(), MaskProConfig(init_mask=str(tmp_path / "bad.safetensors")))
    save_file({name: mask for name, mask in flat.items() if name != last}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="no mask for"):
        initialize_masks(target)
    with pytest.raises(ValueError, match="is not there yet"):
        masks_of(target)


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (6, 99, "not a whole .npz file: zip file version"),
        (8, 1, "cannot be read: .*encrypted"),
        (10, 77, "cannot be read"),
    ],
)
def test_damaged_entries_of_an_archive_are_refused(tmp_path, at, value, reason):
    model, masks = random_adapter(tiny_llama)
    source = maskllm(tmp_path / "mask.npz", by_parameter(model, masks))
    content = bytearray(source.read_bytes())
    # The first entry of the list at the end: the version it needs, its flags, its compression.
    content[content.index(b"PK\x01\x02") + at] = value
    source.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        imported(tiny_llama, source)
    assert "\n" not in str(error.value)


def test_an_entry_that_is_larger_than_any_mask_is_not_read(tmp_path):
    model, masks = random_adapter(tiny_llama)
    np.savez_compressed(tmp_path / "mask.npz", **by_parameter(model, masks) | {FIRST: np.zeros(10**7, dtype=np.uint8)})
    with pytest.raises(ValueError, match=rf"{FIRST}: the source's entry has 10,000,\d+ bytes, and no mask"):
        imported(tiny_llama, tmp_path / "mask.npz")


def test_bad_files_are_refused(tmp_path):
    model, masks = random_adapter(tiny_llama)
    flat = by_parameter(model, masks)
    np.savez_compressed(tmp_path / "short.npz", **{f"{FIRST}.mask": np.zeros(3, dtype=np.uint8)})
    with pytest.raises(ValueError, match=f"{FIRST}: .* 256 weights need 32 packed bytes"):
        imported(tiny_llama, tmp_path / "short.npz")
    np.savez(tmp_path / "pickled.npz", **{f"{FIRST}.mask": np.array([Unpickled()], dtype=object)})
    with pytest.raises(ValueError, match="allow_pickle"):
        imported(tiny_llama, tmp_path / "pickled.npz")
    with ZipFile(tmp_path / "twice.npz", "w") as archive:
        for name in ("x", "x.npy"):
            archive.writestr(name, b"")
    with pytest.raises(ValueError, match="several entries of one name"):
        imported(tiny_llama, tmp_path / "twice.npz")
    torch.save(flat, tmp_path / "mask.pt")
    with pytest.raises(ValueError, match="pickled files are not read"):
        imported(tiny_llama, tmp_path / "mask.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no safetensors checkpoint"):
        imported(tiny_llama, tmp_path / "empty")
    with pytest.raises(ValueError, match="does not exist"):
        imported(tiny_llama, tmp_path / "nowhere" / "mask.npz")
    random_adapter(tiny_llama, 4, 8)[0].save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="the source is 4:8 and the adapter 2:4"):
        imported(tiny_llama, tmp_path / "wide")
    random_adapter(tiny_gpt2)[0].save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=f"no mask for {FIRST}"):
        imported(tiny_llama, tmp_path / "other")


class Unpickled:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_the_pickle_would_have_been_run():
    with pytest.raises(pytest.fail.Exception):
        pickle.loads(pickle.dumps(Unpickled()))
