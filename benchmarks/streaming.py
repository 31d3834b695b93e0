"""Measure the peak anonymous memory of a run from disk to disk, for a number of layers and for twice as many.

    python -m benchmarks.streaming [--layers 24] [--hidden-size 2304] [--rebuild barber+swaps] [--gguf] [--experts N]
        [--write DIR]

Writes a LLaMA of random bf16 parameters to the disk, one layer at a time (24 layers of the default width are about
1.5B parameters), one GGUF file of Q8_0 blocks, or a Qwen3-MoE whose experts have files of their own. Then prunes it by
Wanda and the rebuild over 4 x 256 tokens, in a process of its own whose RssAnon is sampled. The bound is the embedding
and 4 decoder layers in float32, the activations, and 600 MB for Python and torch themselves. `--write` only writes the
checkpoint, with a tokenizer.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optimum_barber.base.fields import parts_of
from optimum_barber.base.files import write_json
from optimum_barber.checkpoints.shards import Entry, TensorFile
from optimum_barber.models.file_names import FileNames
from optimum_barber.models.loading import empty_model
from optimum_barber.models.source import ModelSource
from optimum_barber.prune.cost.needs import ACTIVATION_COPIES, needs_of
from optimum_barber.prune.rebuild_settings import EXCHANGING
from optimum_barber.text.sources import read_texts

from .small_models import tokenizer_of

MB = 10**6
VOCABULARY = 32000
RUN = """
import sys, torch
from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.models.loading import resolve_model
model, output, rebuild, samples, length, place = sys.argv[1:]
windows = torch.randint(0, 32000, (int(samples), int(length)), generator=torch.Generator().manual_seed(0))
config = BarberConfig(sparsity=0.5, rebuild=rebuild)
streaming = BarberSparsifier(None, None, resolve_model(model), stream="always")
streaming.sparsify(config, windows, save_dir=output, quiet=True, activations=place)
"""


def write_model(
    directory: Path,
    layers: int,
    hidden: int,
    intermediate: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    repeated: bool = False,
) -> Any:
    """A LLaMA-shaped checkpoint of random bf16 parameters; its configuration. See `write_checkpoint`."""
    return write_checkpoint(directory, llama(layers, hidden, intermediate, heads, kv_heads), repeated)


def write_checkpoint(directory: Path, config: Any, repeated: bool = False) -> Any:
    """A checkpoint of random bf16 parameters in the names of files, a shard a layer; its configuration.

    `repeated` gives every layer the values of the first, which takes less time.
    """
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    model = empty_model(config)
    names = FileNames.of(model)
    homes: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        home = name.split(".")[2] if ".layers." in name else "rest"
        homes.setdefault(home, []).append(name)
    generator = torch.Generator().manual_seed(0)
    where, parts = {}, dict[str, torch.Tensor]()
    for home, parameters in homes.items():
        tensors: dict[str, torch.Tensor] = {}
        for name in parameters:
            part = name.partition(f".{home}.")[2] if repeated else ""
            if part not in parts:
                parts[part] = random_parameter(tuple(model.get_parameter(name).shape), generator)
            tensors |= names.tensors_of(name, parts[part] if part else parts.pop(part))
        file = f"model-{home}.safetensors"
        entries = {name: Entry(torch.bfloat16, tuple(tensor.shape)) for name, tensor in tensors.items()}
        shard = TensorFile(directory / file, entries, {"format": "pt"})
        for name, tensor in tensors.items():
            shard.write(name, tensor)
            where[name] = file
        shard.close()
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    return config


def random_parameter(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Ones for a norm, else normal values; bf16."""
    return torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else drawn(shape, generator)


def mixture(layers: int, hidden: int, experts: int) -> Any:
    """The configuration of a Qwen3-MoE of that depth and width, of whose experts a token takes two."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=hidden * 7 // 8, num_hidden_layers=layers, num_experts=experts,
        num_experts_per_tok=2, num_attention_heads=hidden // 64, num_key_value_heads=max(hidden // 256, 1),
        vocab_size=VOCABULARY, max_position_embeddings=4096, dtype=torch.bfloat16, tie_word_embeddings=False,
        architectures=["Qwen3MoeForCausalLM"], norm_topk_prob=True,
    )  # fmt: skip


def llama(
    layers: int, hidden: int, intermediate: int | None = None, heads: int | None = None, kv_heads: int | None = None
) -> Any:
    """The configuration of a LLaMA of that depth and width."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate or hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=heads or hidden // 64, num_key_value_heads=kv_heads or max(hidden // 256, 1),
        vocab_size=VOCABULARY, max_position_embeddings=4096, dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"], tie_word_embeddings=False,
    )  # fmt: skip


def shapes_of(config: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a model."""
    return {name: tuple(p.shape) for name, p in empty_model(config).named_parameters()}


def write_gguf(directory: Path, layers: int, hidden: int) -> Any:
    """A LLaMA-shaped GGUF file of random Q8_0 blocks, norms in float32; its configuration."""
    import gguf

    config, generator = llama(layers, hidden), np.random.default_rng(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    directory.mkdir(parents=True)
    writer = gguf.GGUFWriter(directory / "model.gguf", "llama")
    for key, value in (
        ("block_count", layers), ("context_length", 4096), ("embedding_length", hidden),
        ("feed_forward_length", config.intermediate_size), ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads), ("vocab_size", VOCABULARY),
    ):  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    kinds = {1: gguf.GGMLQuantizationType.F32, 2: gguf.GGMLQuantizationType.Q8_0}
    known: dict[Any, tuple[int, ...]] = {}
    for name, shape in shapes_of(config).items():
        known[names.get_name(name, (".weight",))] = shape
    for name, shape in known.items():
        stored = shape if len(shape) == 1 else (shape[0], shape[1] // 32 * 34)
        kind = np.dtype(np.float32 if len(shape) == 1 else np.uint8)
        writer.add_tensor_info(name, stored, kind, int(np.prod(stored)) * kind.itemsize, raw_dtype=kinds[len(shape)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for shape in known.values():
        writer.write_tensor_data(np.ones(shape, np.float32) if len(shape) == 1 else blocks(shape, generator))
    writer.close()
    return config


def blocks(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Rows of Q8_0 blocks, a float16 scale and 32 uniform bytes each; values with standard deviation 0.02."""
    result = np.empty((*shape[:-1], shape[-1] // 32, 34), np.uint8)
    result[..., :2] = np.frombuffer(np.float16(0.02 / 74).tobytes(), np.uint8)
    result[..., 2:] = generator.integers(0, 256, (*result.shape[:-1], 32), np.uint8)
    return result.reshape(*shape[:-1], -1)


def drawn(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Normal bf16 values with standard deviation 0.02."""
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def peak_of(command: list[str]) -> tuple[int, float]:
    """The largest RssAnon of a process in bytes, sampled every 5 ms, and its seconds."""
    started, highest = time.perf_counter(), 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").splitlines()
            highest = max(highest, next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0))
        except OSError:
            pass
        time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"the run failed with status {process.returncode}")
    return 1024 * highest, time.perf_counter() - started


def written(directory: Path, layers: int, args: argparse.Namespace) -> Any:
    """The checkpoint that the arguments ask for; its configuration."""
    if args.gguf:
        return write_gguf(directory, layers, args.hidden_size)
    if args.experts:
        return write_checkpoint(directory, mixture(layers, args.hidden_size, args.experts))
    return write_model(directory, layers, args.hidden_size)


def measure(work: Path, layers: int, args: argparse.Namespace) -> int:
    """One depth, one line; the peak in bytes."""
    config = written(work / "model", layers, args)
    model = empty_model(config)
    parameters = sum(p.numel() for p in model.parameters())
    grams = 1 - EXCHANGING.isdisjoint(parts_of(args.rebuild))
    source = ModelSource(model)
    needs = needs_of(source, args.hidden_size, args.samples, args.sequence_length, 2 * parameters, grams)
    embedding = 4 * VOCABULARY * args.hidden_size
    activations = ACTIVATION_COPIES * args.samples * needs.window
    bound = embedding + 4 * needs.layer + activations + 600 * MB
    shape = [str(args.samples), str(args.sequence_length), args.activations]
    command = [sys.executable, "-c", RUN, str(work / "model"), str(work / "out"), args.rebuild, *shape]
    peak, seconds = peak_of(command)
    sys.stdout.write(
        f"{layers:>3} layers, {parameters / 1e9:.2f}B parameters: peak RssAnon {peak / MB:,.0f} MB; bound "
        f"{bound / MB:,.0f} MB = embedding {embedding / MB:,.0f} + 4 layers {4 * needs.layer / MB:,.0f} + activations "
        f"{activations / MB:,.0f} + 600; predicted {needs.memory / MB:,.0f} MB; {seconds:.1f} s\n"
    )
    sys.stdout.flush()
    shutil.rmtree(work)
    return peak


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden-size", type=int, default=2304)
    parser.add_argument("--rebuild", default="barber+swaps")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--activations", choices=("memory", "disk"), default="memory")
    parser.add_argument("--gguf", action="store_true", help="one GGUF file instead of safetensors")
    parser.add_argument("--experts", type=int, help="a mixture of so many experts instead of a LLaMA")
    parser.add_argument("--write", type=Path, metavar="DIR", help="only write the checkpoint, with a tokenizer")
    parser.add_argument("--work", type=Path, help="where models are written (default: a temporary directory)")
    args = parser.parse_args()
    if args.write is not None:
        written(args.write, args.layers, args)
        tokenizer_of(read_texts("pydoc", "text")).save_pretrained(args.write)
        return 0
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        peaks = [measure(Path(folder) / str(depth), depth, args) for depth in (args.layers, 2 * args.layers)]
    sys.stdout.write(f"twice the depth: {100 * (peaks[1] / peaks[0] - 1):+.1f} %\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
