"""
Measure a model, the model under a mask adapter, and the merged model: perplexity by
both usual protocols on a text file, and accuracy on a task of lm-evaluation-harness
that is made from it.
"""

import argparse
import json
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_maskpro import perplexity
from hf_maskpro.evaluation import protocol, task_scores


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "--model", required=True, help="base model: a local folder or a Hub id"
)
parser.add_argument(
    "--adapter", required=True, help="mask adapter: a local folder or a Hub id"
)
parser.add_argument(
    "--text", required=True, help="text file that neither was trained on"
)
parser.add_argument("--seq-len", type=int, default=512)
parser.add_argument("--max-tokens", type=int, default=8192)
parser.add_argument("--questions", type=int, default=100)
options = parser.parse_args()

text = Path(options.text).read_text(encoding="utf-8")
tokenizer = AutoTokenizer.from_pretrained(options.model)
strides = (None, options.seq_len // 2)

# Which of two continuations is a passage's own? The other is the next passage's.
words = text.split()
starts = range(0, len(words) - 39, 40)[: options.questions + 1]
passages = [words[start : start + 40] for start in starts]
questions = []
for right, wrong in pairwise(passages):
    choices = [" ".join(right[32:]), " ".join(wrong[32:])]
    answer = len(questions) % 2
    choices = choices[:: -1 if answer else 1]
    question = {"start": " ".join(right[:32]), "choices": choices, "answer": answer}
    questions.append(question)
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
(folder / "questions.jsonl").write_text(
    "\n".join(json.dumps(question) for question in questions)
)
(folder / "own_words.yaml").write_text(f"""
task: own_words
dataset_path: json
dataset_kwargs:
  data_files: {folder / "questions.jsonl"}
test_split: train
output_type: multiple_choice
doc_to_text: start
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""")


def measure(name: str, model: torch.nn.Module) -> None:
    for stride in strides:
        how = protocol(tokenizer, text, options.seq_len, options.max_tokens, stride)
        value = perplexity(
            model,
            tokenizer,
            text,
            options.seq_len,
            options.max_tokens,
            stride=stride,
            batch_size=4,
        )
        print(f"{name}: perplexity {value:.4g} ({how})")
    scores = task_scores(model, tokenizer, [str(folder / "own_words.yaml")])
    accuracy = scores["own_words"]["acc"]
    print(f"{name}: accuracy {accuracy:.4f} ({len(questions)} questions)")


model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
model.to("cuda" if torch.cuda.is_available() else "cpu")
measure("dense", model)
masked = PeftModel.from_pretrained(model, options.adapter)
measure("masked", masked)
measure("merged", masked.merge_and_unload(safe_merge=True))
