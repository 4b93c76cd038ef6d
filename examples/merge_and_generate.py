"""
Merge a mask adapter into its base model, check the pattern, save the sparse checkpoint
and generate from it.
"""

import argparse

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_maskpro import check_sparsity


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "--model", required=True, help="base model: a local folder or a Hub id"
)
parser.add_argument(
    "--adapter", required=True, help="mask adapter: a local folder or a Hub id"
)
parser.add_argument("--output", required=True, help="folder for the sparse checkpoint")
parser.add_argument("--prompt", default="The")
parser.add_argument("--max-new-tokens", type=int, default=32)
options = parser.parse_args()

base = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(options.model)
adapted = PeftModel.from_pretrained(base, options.adapter)
config = adapted.peft_config["default"]
names = [f"{name}.weight" for name in adapted.base_model.targeted_module_names]

model = adapted.merge_and_unload(safe_merge=True)
report = check_sparsity(model, config.n, config.m, names)
print(f"{len(report)} layers are {config.pattern} sparse")
model.save_pretrained(options.output)
tokenizer.save_pretrained(options.output)

inputs = tokenizer(options.prompt, return_tensors="pt")
tokens = model.generate(inputs.input_ids, max_new_tokens=options.max_new_tokens)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
