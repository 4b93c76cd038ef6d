"""
Merge a mask adapter into a checkpoint that any runtime serves, and answer from it.
Without options it takes what `hf-maskpro quickstart` wrote.
"""

import argparse

import torch
from transformers import pipeline

from hf_maskpro.deploy import merge, to_semi_structured


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "--model", default="quickstart/base", help="base model: a local folder or a Hub id"
)
parser.add_argument(
    "--adapter",
    default="quickstart/simple",
    help="mask adapter: a local folder or a Hub id",
)
parser.add_argument(
    "--output", default="sparse", help="folder for the sparse checkpoint"
)
parser.add_argument("--question", default="What is Python?")
options = parser.parse_args()

# From file to file, tensor by tensor; raises if a layer on disk had not the pattern.
report = merge(options.model, options.adapter, options.output)
print(f"{len(report)} layers are sparse; serve them with: vllm serve {options.output}")

generate = pipeline("text-generation", options.output, dtype="auto", device_map="auto")
if torch.cuda.is_available():
    for name, reason in to_semi_structured(generate.model).items():
        print(f"{name} stays dense: {reason}")
answer = generate(
    [{"role": "user", "content": options.question}], max_new_tokens=64, do_sample=False
)
print(answer[0]["generated_text"][-1]["content"])
