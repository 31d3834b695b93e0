"""Train a small language model from scratch on local text: a mixture of experts, or a hybrid with convolutions.

    python -m benchmarks.small_models {mixture,hybrid} OUT --text FILE [FILE ...] [--steps 600] [--seed 0]

The mixture is a Qwen3-MoE of 8 experts, of which a token takes 2; the hybrid is an LFM2. Both have about 6M parameters
and a byte-level BPE of 4,096 tokens of the same text. Products run in bfloat16, weights and sums in float32.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimum_barber.text.sources import read_texts

from .table import emit

VOCABULARY, LENGTH, BATCH = 4096, 256, 8
RATE, WARM_UP, ROUTER_LOSS = 2e-3, 0.1, 0.02  # warm-up: share of the steps
END = "</s>"
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip


def mixture() -> Any:
    """Return the configuration of the mixture of experts."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        **SIZES, num_hidden_layers=4, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=192,
        norm_topk_prob=True, output_router_logits=True, router_aux_loss_coef=ROUTER_LOSS,
    )  # fmt: skip


def hybrid() -> Any:
    """Return the configuration of the hybrid."""
    from transformers import Lfm2Config

    kinds = ["conv", "conv", "full_attention"] * 2
    return Lfm2Config(
        **SIZES, num_hidden_layers=len(kinds), layer_types=kinds, intermediate_size=768, block_auto_adjust_ff_dim=False
    )


MODELS = {"mixture": mixture, "hybrid": hybrid}


def tokenizer_of(texts: Sequence[str]) -> Any:
    """Train a byte-level BPE."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, VOCABULARY, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, bos_token=END, pad_token=END)


def train(model: Any, tokens: Tensor, steps: int, seed: int) -> None:
    """Train on random windows of `tokens`, (n,) int64, by AdamW with a linear warm-up and a cosine decay."""
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=WARM_UP)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(1, steps + 1):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH, 1), generator=generator)
        windows = tokens[starts + torch.arange(LENGTH)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=windows, labels=windows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            emit(f"step {step:>5}: loss {loss.item():.3f}")
    model.eval()


def main() -> int:
    """Train and save one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=MODELS)
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    texts: list[str] = []
    for source in args.text:
        texts += read_texts(source, "text")
    tokenizer = tokenizer_of(texts)
    tokens = tokenizer("\n\n".join(texts), return_tensors="pt", verbose=False)["input_ids"][0]
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(MODELS[args.kind]())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    emit(f"{args.kind}: {parameters / 1e6:.1f}M parameters, {len(tokens):,} tokens of text")
    train(model, tokens, args.steps, args.seed)
    model.config.output_router_logits = False
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
