import pytest
from peft import PeftConfig, PeftType, get_peft_model

from hf_maskpro import MaskProConfig


def test_defaults():
    config = MaskProConfig()
    assert (config.n, config.m, config.init_mask, config.peft_type) == (2, 4, "magnitude", PeftType.MASKPRO)
    assert config.distribution == "plackett_luce"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 4, "m": 4}, "n is 4, outside 1 to m - 1 = 3"),
        ({"n": 0}, "n is 0"),
        ({"n": 2, "m": 17}, "m is 17, outside 2 to 16"),
        ({"n": 2.5}, "n is 2.5"),
        ({"init_mask": "best"}, "init_mask is 'best'; use one of"),
        ({"distribution": "gumbel"}, "distribution"),
        ({"logits_dtype": "float16"}, "logits_dtype"),
        ({"logit_scale": -1.0}, "logit_scale is -1.0"),
        ({"format_version": 2}, "format_version is 2"),
        ({"init_mask": None}, "init_mask is 'None', which is not str"),
        ({"save_logits": None}, "save_logits is 'None', which is not bool"),
        ({"inference_mode": None}, "inference_mode is 'None', which is not bool"),
        ({"target_modules": [None]}, "target_modules holds 'None', which is no name"),
        ({"target_modules": [["q_proj"]]}, r"target_modules holds .* which is no name"),
        ({"target_modules": "q_proj\n"}, r"target_modules holds '\\n', which is no name"),
        ({"exclude_modules": [{"a": 1}]}, r"exclude_modules holds .* which is no name"),
        ({"modules_to_save": [1]}, "modules_to_save holds '1', which is no name"),
        ({"modules_to_save": ["(\\w+)+!"]}, r"modules_to_save holds .* which is not the name of a module"),
        ({"base_fingerprint": {"a": []}}, r"base_fingerprint holds .* which is no name"),
        ({"target_weights": 0}, "target_weights is 0"),
        ({"on_indivisible": "pad"}, "on_indivisible is 'pad'; use one of"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform holds '0', which is no number"),
        ({"layers_to_transform": [0], "target_modules": ".*q"}, "layers_to_transform goes with ends of names"),
        ({"init_mask": f"{'x' * 300}+swaps"}, "init_mask is 'xxx"),
    ],
)
def test_bad_values_are_named_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        MaskProConfig(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"n": 9, "task_type": None}, {"task_type": "a\nb"}])
def test_errors_of_a_configuration_that_was_read_name_the_file(options):
    with pytest.raises(ValueError, match=r"^adapter_config\.json: ") as error:
        PeftConfig.from_peft_type(peft_type="MASKPRO", **options)
    assert "\n" not in str(error.value)


def test_round_trip_through_a_folder(tmp_path):
    config = MaskProConfig(n=4, m=8, target_modules=["q_proj", "v_proj"], logit_scale=3.0)
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, MaskProConfig)
    assert loaded.to_dict() == config.to_dict()
    assert not loaded.awaits_file


def test_a_configuration_alone_makes_a_new_mask(tmp_path, llama, ids):
    MaskProConfig(n=1, m=4).save_pretrained(tmp_path)
    model = get_peft_model(llama, PeftConfig.from_pretrained(str(tmp_path)))
    model(input_ids=ids)


def test_unknown_keys_are_ignored_with_a_warning():
    with pytest.warns(UserWarning, match="colour"):
        config = PeftConfig.from_peft_type(peft_type="MASKPRO", task_type=None, n=1, colour="blue")
    assert config.n == 1
