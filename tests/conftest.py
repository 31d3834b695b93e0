"""Tiny models from configurations, a tokenizer trained on the spot: no downloads."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line: two tests at once share two cores
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")  # float32 products on every CPU: oracles compare with them
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import settings

settings.register_profile("suite", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("suite")

torch.set_num_threads(1)  # tiny models gain nothing from more; real ones ask for them

SHARED = Path(__file__).resolve().parents[2] / "shared"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama-eager": ("Llama", {"attn_implementation": "eager"}),
    "llama-bias-untied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-sliding": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": 8}),
    "phi3": ("Phi3", {}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt-post-norm": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
}


def pytest_collection_modifyitems(items):
    """Begin with the tests on real models, which take longest: at the end they would keep one core idle."""
    items.sort(key=lambda item: item.get_closest_marker("real") is None)


@pytest.fixture(scope="module", autouse=True)
def imported_for_good():
    """Leave what is imported by now out of garbage collections, which every layer of a run from disk to disk makes."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def tiny_model(family="llama", seed=0, **changes):
    """A tiny causal LM with seeded random weights, large enough to matter."""
    name, own = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **own, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def tiny_windows(samples=4, length=16, seed=0):
    """Random calibration tokens."""
    return torch.randint(3, 300, (samples, length), generator=torch.Generator().manual_seed(seed))


def trained_tokenizer():
    """A byte-level BPE of 300 tokens, trained on CPython's documentation."""
    from pydoc_data.topics import topics

    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(list(topics.values())[:5], vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer of `trained_tokenizer`, made once."""
    return trained_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer):
    """A tiny LLaMA checkpoint with its tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A small calibration text."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(list(topics.values())[:3])[:6000], encoding="utf-8")
    return path


@pytest.fixture
def no_charts(monkeypatch):
    """Pages without drawings, as where matplotlib is not installed: drawing takes longer than a tiny run."""
    monkeypatch.setattr("optimum_barber.runs.report.html.can_draw", lambda: False)
