"""Tiny random models, for unit tests only."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)


VOCABULARY = [f"w{i}" for i in range(32)]


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 34,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }
    config = LlamaConfig(**sizes | options)
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=34, n_embd=16, n_layer=2, n_head=2, n_positions=64)).eval()


_EXPERTS = {
    "vocab_size": 34,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def tiny_mixtral(layers: int = 2) -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**_EXPERTS, num_hidden_layers=layers)).eval()


def tiny_gpt_oss(layers: int = 2) -> GptOssForCausalLM:
    """Its experts are stored transposed, with biases, gates and others in turn."""
    torch.manual_seed(0)
    tokens = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    sizes = {"head_dim": 8, "max_position_embeddings": 64}
    config = GptOssConfig(**_EXPERTS, **tokens, **sizes, num_hidden_layers=layers, rope_parameters=rope)
    return GptOssForCausalLM(config).eval()


def save_tiny_model(folder: Path, processor: processors.PostProcessor | None = None, **options) -> None:
    tiny_llama(tie_word_embeddings=True, **options).save_pretrained(folder)
    words = {"<unk>": 0, "<pad>": 1} | {word: i + 2 for i, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if processor is not None:
        tokenizer.post_processor = processor
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<pad>"
    ).save_pretrained(folder)


def headers(folder: Path) -> dict[str, bytes]:
    """The header of each weight file of a checkpoint: names, shapes, dtypes, order and metadata."""
    files = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    return {name: data[8 : 8 + int.from_bytes(data[:8], "little")] for name, data in files.items()}


@pytest.fixture(scope="session")
def compiler() -> None:
    """Of C++, which torch.compile calls on a CPU; the library does without."""
    command = os.environ.get("CXX", "g++")
    if shutil.which(shlex.split(command)[0]) is None:
        pytest.skip(f"no C++ compiler: {command} is not there")


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_llama()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(2, 34, (4, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A folder with a tiny model and a tokenizer of 32 words, which has a start token and adds it to no text."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def starting_checkpoint(tmp_path_factory) -> Path:
    """The same model, with a tokenizer that adds its start token to every text."""
    folder = tmp_path_factory.mktemp("starting")
    save_tiny_model(folder, processors.TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 1)]))
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A text with structure that a model can learn: words follow each other in a fixed order."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(VOCABULARY[(3 * i + i // 7) % 32] for i in range(2000)))
    return path


@pytest.fixture(scope="session")
def task(tmp_path_factory) -> Path:
    """A task file of lm-evaluation-harness, and its questions beside it: which of two words follows two others."""
    folder = tmp_path_factory.mktemp("task")
    rows = [
        {"question": f"w{i} w{3 * i % 32}", "choices": [f"w{5 * i % 32}", f"w{(7 * i + 1) % 32}"], "answer": i % 2}
        for i in range(1, 31)
    ]
    (folder / "order.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "order.yaml").write_text(f"""
task: order
dataset_path: json
dataset_kwargs: {{data_files: {folder / "order.jsonl"}}}
test_split: train
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    return folder / "order.yaml"
