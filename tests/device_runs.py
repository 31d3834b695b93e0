"""Small runs of everything that works on a device, each on the CPU and on a second device.

`python -m tests.device_runs FILE` writes a line of JSON a run to FILE: its name, the digest of its results on either,
the syncs and copies by line of the package, or the error.
"""

import csv
import hashlib
import json
import os
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file

from optimum_barber import BarberConfig, BarberRefiner, BarberShrinker, BarberSparsifier, RefineConfig, ShrinkConfig
from optimum_barber.cli import main
from optimum_barber.integrations.lora.masked_lora import masked_lora
from optimum_barber.models.loading import load_model, resolve_model
from optimum_barber.models.measure import latency
from optimum_barber.prune.refine import whole
from optimum_barber.runs.report import html

from .conftest import SIZES, tiny_model, tiny_windows
from .second_device import NAME, SecondDevice
from .test_experts import mixtral
from .test_masked_lora import prune_in_place

CALIBRATION = ["--calibration", "text.txt", "--samples", "4", "--sequence-length", "16", "--quiet"]
EVALUATION = ["--evaluation", "text.txt", "--windows", "2"]
RUNS, ACTIVE = {}, []


def run(name, **settings):
    """Register a run: a function of a device's name that gives what must be equal on both, JSON or tensors."""

    def register(function):
        RUNS[name] = partial(function, **settings)
        return function

    return register


def digest(content):
    """Hash nested content, tensors by their bytes on the CPU."""
    state = hashlib.sha256()

    def add(part):
        if isinstance(part, torch.Tensor):
            assert part.device.type == "cpu", f"a result lies on {part.device}"
            state.update(str((part.dtype, part.shape)).encode())
            state.update(part.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(part, dict):
            for key in sorted(part):
                state.update(str(key).encode())
                add(part[key])
        elif isinstance(part, list | tuple):
            for each in part:
                add(each)
        else:
            state.update(repr(part).encode())

    add(content)
    return state.hexdigest()


def hybrid():
    """Attention, SSM mixers and convolutions in one model."""
    torch.manual_seed(0)
    config = transformers.BambaConfig(
        **SIZES, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1,
        mamba_chunk_size=8,
    )  # fmt: skip
    return transformers.BambaForCausalLM(config).eval()


BLOCKS = 2  # of the models of one layer
MODELS = {
    "llama": partial(tiny_model, num_hidden_layers=1),
    "wide": partial(tiny_model, num_hidden_layers=1, hidden_size=64, intermediate_size=112),
    "biased": partial(tiny_model, num_hidden_layers=1, attention_bias=True, mlp_bias=True),
    "mixtral": partial(mixtral, num_hidden_layers=1),
    "hybrid": hybrid,
}
HALF = {"sparsity": 0.5}
QUICK = {"method": "barber", "rounds": 1}
NEWTON = {"method": "barber+swaps+gauss-newton", "rounds": 1, "newton_rounds": 1}


@run("prune: the default", **HALF)
@run("syncs: more rows and columns", **HALF, model="wide")
@run("syncs: more samples", **HALF, samples=9)
@run("prune: magnitude, swaps", **HALF, producer="magnitude", rebuild={"method": "swaps"})
@run("prune: sparsegpt, least-squares", **HALF, producer="sparsegpt", rebuild=QUICK, reconstruct="least-squares")
@run("prune: random, dsnot", **HALF, producer="random", rebuild={"method": "dsnot"})
@run("prune: 2:4", pattern="2:4", rebuild=NEWTON)
@run("prune: 2:4, sparsegpt, no rebuild", pattern="2:4", producer="sparsegpt", rebuild={"method": "none"})
@run("prune: barber+swaps+gauss-newton", **HALF, rebuild=NEWTON)
@run("prune: output rows, gradient", **HALF, rebuild={**QUICK, "granularity": "output"}, reconstruct="gradient")
@run("prune: samples in host memory", **HALF, rebuild={"method": "barber+swaps", "rounds": 1}, batch_size=1)
@run("prune: allocation owl", **HALF, allocation="owl", rebuild=QUICK)
@run("prune: allocation measured", **HALF, allocation="measured", rebuild={"method": "none"})
@run("prune: a mixture of experts", model="mixtral", **HALF, rebuild={"method": "barber+swaps", "rounds": 1})
@run("prune: a hybrid", model="hybrid", **HALF, rebuild=QUICK, allow_dense_rest=True)
def pruned(device, model="llama", samples=4, **settings):
    model, config = MODELS[model](), BarberConfig(device=device, **settings)
    result = BarberSparsifier(model).sparsify(config, tiny_windows(samples), quiet=True)
    return told(result), model.state_dict()


def told(result):
    """Masks and reports."""
    errors = [(report.error_before, report.error_after, report.swaps) for report in result.reports]
    return {name: mask.unpack() for name, mask in result.masks.items()}, errors


@run("prune: disk to disk, samples in memory", model="model", activations="memory")
@run("prune: disk to disk, samples on the disk", model="small", activations="disk")
def streamed(device, model, activations):
    sparsifier = BarberSparsifier(None, None, resolve_model(model), stream="always")
    config = BarberConfig(device=device, sparsity=0.5, rebuild={"method": "barber+swaps", "rounds": 1})
    result = sparsifier.sparsify(config, tiny_windows(), "out", overwrite=True, quiet=True, activations=activations)
    return told(result), files("out")


def files(folder):
    """All tensors of a folder."""
    return {str(path): load_file(path) for path in sorted(Path(folder).rglob("*.safetensors"))}


@run("refine", on_host=False)
@run("refine: gradients in host memory", on_host=True)
def refined(device, on_host):
    refiner = BarberRefiner(load_model(resolve_model("model")))
    config = RefineConfig(device=device, steps=2, exchanges=2)
    with pytest.MonkeyPatch.context() as patch:
        if on_host:
            patch.setattr(whole, "place_of_sums", lambda *_: torch.device("cpu"))
        result = refiner.refine("sparse", config, tiny_windows(), quiet=True)
    return {name: mask.unpack() for name, mask in result.masks.items()}, result.looks


@run("shrink: bip", scorer="bip", compensate=True)
@run("shrink: barber", scorer="barber")
@run("shrink: taylor", scorer="taylor")
@run("shrink: wanda", scorer="wanda", head_unit="query")
@run("shrink: magnitude", scorer="magnitude")
@run("shrink: importance-propagation", scorer="importance-propagation")
@run("shrink: random", scorer="random")
@run("shrink: experts by reap", model="mixtral", scorer="reap", remove=None, remove_experts=0.25)
@run("shrink: experts by bip", model="mixtral", scorer="bip", remove=None, remove_experts=0.25)
def shrunk(device, model="biased", remove=0.3, **settings):
    config = ShrinkConfig(device=device, remove=remove, **settings)
    result = BarberShrinker(MODELS[model]()).shrink(config, tiny_windows(), latency=False, quiet=True)
    return result.structure.model_dump(), result.model.state_dict(), result.report.get("blocks")


@run("LoRA under masks")
@torch.no_grad()
def tuned(device):
    model = MODELS["llama"]()
    masks, windows = prune_in_place(model), tiny_windows().to(device)
    torch.manual_seed(0)
    adapter = masked_lora(model, masks, LoraConfig(r=3, task_type="CAUSAL_LM", init_lora_weights=False)).to(device)
    logits = adapter(windows).logits.cpu()
    with torch.enable_grad():
        adapter(windows, labels=windows).loss.backward()
    gradients = [parameter.grad.cpu() for parameter in adapter.parameters() if parameter.grad is not None]
    return logits, gradients, adapter.merge_and_unload(safe_merge=True).cpu().state_dict()


def command(*arguments):
    """Run a command that must succeed."""
    status = main([str(argument) for argument in arguments])
    assert status == 0, f"exit status {status}"


def table(path):
    """Rows of a CSV file without what differs from run to run."""
    with open(path) as file:
        rows = list(csv.DictReader(file))
    return [{key: row[key] for key in row if "seconds" not in key and "memory" not in key} for row in rows]


@run("eval")
def evaluated(device):
    arguments = ["--perplexity", "text.txt", "--sequence-length", "16", "--windows", "2", "--quiet"]
    command("eval", "sparse", *arguments, "--json", "eval.json", "--device", device)
    return [row["perplexity"] for row in json.loads(Path("eval.json").read_text())]


@run("compare")
def compared(device):
    axes = ["--producers", "wanda", "--rebuilds", "none", "barber,rounds=1", "--sparsities", "0.5"]
    command(
        "compare", "small", *axes, *CALIBRATION, *EVALUATION, "--keep-masks", "--device", device, "-o", f"c-{device}"
    )
    return table(f"c-{device}/compare.csv"), list(files(f"c-{device}").values())


@run("sweep")
def swept(device):
    axes = ["--scorers", "bip", "magnitude", "--remove", "0.3", "--no-latency"]
    command("sweep", "small", *axes, *CALIBRATION, *EVALUATION, "--device", device, "-o", f"s-{device}")
    return table(f"s-{device}/table.csv")


@run("own-text")
def own_text(device):
    size = ["--tokens", "64", "--length", "16", "--batch", "2", "--quiet"]
    command("own-text", "model", *size, "--overwrite", "--device", device, "-o", "own.jsonl")
    return Path("own.jsonl").read_text()


@run("a recipe")
def recipe(device):
    Path("recipe.yaml").write_text(
        f"model: small\noutput: r-{device}\ndevice: {device}\n"
        "calibration: {texts: [text.txt], samples: 4, sequence_length: 16}\nstages:\n"
        "  - prune: {producer: magnitude, sparsity: 0.5}\n"
        "  - quantize: {method: gptq, bits: 4, group_size: 16}\n  - evaluate: {perplexity: [text.txt], windows: 2}\n"
    )
    command("run", "recipe.yaml", "--quiet")
    return list(files(f"r-{device}").values())


@run("the device itself")
def simulated(device):
    if device == "cpu":
        return None
    here, there = torch.ones(3), torch.arange(3.0, device=device)
    assert str(there.device) == str(torch.ones(2, 2).to(device).device) == "fake:0"
    assert {there.cpu().device.type, torch.zeros_like(there, device="cpu").device.type} == {"cpu"}
    for part in (there * 2, there.double(), here.to(there), there[1:], there.clone(), there.new_ones(2)):
        assert part.device.type == NAME
    mixing = [
        lambda: here + there, lambda: torch.cat([there, here]), lambda: there.add_(here), lambda: there.numpy(),
        lambda: torch.multinomial(there, 1, generator=torch.Generator()), lambda: here[there.long()],
    ]  # fmt: skip
    for mix in mixing:
        with pytest.raises((RuntimeError, TypeError), match="device"):
            mix()
    assert (there + 1.5)[torch.tensor([0, 2])].tolist() == [1.5, 3.5]  # numbers and indices may come from the CPU
    before = sum(ACTIVE[-1].syncs.values())
    waits = [there.sum().item, there.any().__bool__, there.tolist, there.cpu, there.nonzero, lambda: there[there > 1]]
    for wait in waits:
        wait()
    assert sum(ACTIVE[-1].syncs.values()) == before + len(waits)
    return None


@run("latency")
def timed(device):
    measured = latency(tiny_model().to(device), 8, repeats=1, warmup=0)
    assert measured["device"].startswith(device)
    return measured["prompt"]


def outcome(function):
    """One run on the CPU and one on the second device."""
    expected = digest(function("cpu"))
    with SecondDevice() as device:
        ACTIVE.append(device)
        result = function(NAME)
    return {"cpu": expected, "device": digest(result), "syncs": device.syncs, "copies": device.copies}


def inputs():
    """A model, a pruned one and a text, in the working folder."""
    from pydoc_data.topics import topics

    from .conftest import trained_tokenizer

    Path("text.txt").write_text("\n\n".join(list(topics.values())[:3])[:6000], encoding="utf-8")
    for name, layers in (("model", 2), ("small", 1)):
        tiny_model(num_hidden_layers=layers).save_pretrained(name, max_shard_size="30KB")
        trained_tokenizer().save_pretrained(name)
    pruning = BarberConfig(producer="magnitude", sparsity=0.5, rebuild={"method": "none"}, device="cpu")
    BarberSparsifier.from_pretrained("model").sparsify(pruning, tiny_windows(), "sparse", quiet=True)


def write_outcomes(output, names):
    """Run and write, in the working folder."""
    inputs()
    with open(output, "w") as lines:
        for name in names:
            try:
                result = outcome(RUNS[name])
            except Exception:
                result = {"error": traceback.format_exc()}
            lines.write(json.dumps({"name": name, **result}) + "\n")
            lines.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    output = Path(sys.argv[1]).absolute()
    html.can_draw = lambda: False  # drawing takes longer than a tiny run
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_outcomes(output, sys.argv[2:] or RUNS)
        os.chdir("/")
