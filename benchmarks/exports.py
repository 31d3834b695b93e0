"""Checkpoints in OpenVINO, ONNX Runtime and llama.cpp: equal logits, zeros that are kept, times beside the dense model.

Runs without this package, in an environment of its own, since the exporters ask for other versions of transformers:

    python -m venv EXPORTS && EXPORTS/bin/pip install "optimum-intel[openvino]"   # or "optimum-onnx[onnxruntime]"
    EXPORTS/bin/python -P benchmarks/exports.py openvino DENSE OUT ...               # or onnx

    python -m venv GGUF
    CMAKE_ARGS=-DGGML_NATIVE=OFF GGUF/bin/pip install llama-cpp-python gguf torch transformers sentencepiece protobuf
    GGUF/bin/pip download --no-deps --no-binary llama-cpp-python llama-cpp-python   # unpacked: vendor/llama.cpp
    GGUF/bin/python -P benchmarks/exports.py llama.cpp DENSE OUT ... --source vendor/llama.cpp

The first checkpoint is the one that the others are compared with. `--smaller` adds each in the smaller formats of the
runtime. `--check` ends with status 1 where float32 logits differ or a zero is lost: `make exports`, `make llama-cpp`.
"""

import argparse
import ctypes
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch

COUNTS = (1, 16)  # tokens of the timed inputs
PROBE = 40  # tokens of the compared logits
REPEATS = 15
ROUNDING = 1e-2  # of logits that reach 30
COLUMNS = ("checkpoint", "weights", "largest logit difference", "zeros kept", "1 token", "16 tokens")
Zeros = Counter[tuple[int, int, int]]  # matrices by their smaller side, their larger side, and their number of zeros


class Exported(ABC):
    """A checkpoint that another runtime has opened.

    Attributes:
        FORMATS: in which weights can be stored, float32 first.
        place: a folder for all formats of the checkpoint.
    """

    FORMATS: ClassVar[tuple[str, ...]] = ("float32",)

    def __init__(self, checkpoint: Path, place: Path, weights: str) -> None:
        self.checkpoint, self.place, self.weights = checkpoint, place, weights

    @abstractmethod
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Compute the logits of a text, (tokens, vocabulary), without a cache before it."""

    @abstractmethod
    def constants(self) -> Iterator[Any]:
        """Yield the stored tensors as arrays."""

    def kept(self, own: Zeros) -> int | None:
        """Return how many zeros of the checkpoint are left; None where they cannot be told from small codes.

        A matrix keeps its zeros if there is one of its shape, or of its transpose's, with exactly as many.
        """
        return total(own & zeros_of(self.constants())) if self.weights == "float32" else None


def optimum_cli(runtime: str, checkpoint: Path, place: Path, *flags: str) -> None:
    """Export a checkpoint by optimum-cli."""
    command = [Path(sys.executable).with_name("optimum-cli"), "export", runtime, "--model", checkpoint]
    command += ["--task", "text-generation-with-past", *flags, place]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


def inputs_of(tokens: list[int]) -> dict[str, torch.Tensor]:
    """Return token ids and their mask, (1, tokens)."""
    return {"input_ids": torch.tensor([tokens]), "attention_mask": torch.ones(1, len(tokens), dtype=torch.long)}


class ByOptimum(Exported):
    """A model that optimum-cli exported and optimum opened."""

    model: Any

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """See `Exported.logits`."""
        return torch.as_tensor(self.model(**inputs_of(tokens)).logits)[0]


class OpenVino(ByOptimum):
    """A model in OpenVINO on the CPU, its products in float32."""

    FORMATS = ("float32", "int8")

    def __init__(self, checkpoint: Path, place: Path, weights: str) -> None:
        super().__init__(checkpoint, place, weights)
        from optimum.intel import OVModelForCausalLM

        output = place / weights
        optimum_cli("openvino", checkpoint, output, "--weight-format", "int8" if weights == "int8" else "fp32")
        self.model = OVModelForCausalLM.from_pretrained(output, ov_config={"INFERENCE_PRECISION_HINT": "f32"})

    def constants(self) -> Iterator[Any]:
        """See `Exported.constants`."""
        for node in self.model.model.get_ops():
            if node.get_type_name() == "Constant":
                yield node.get_data()


class Onnx(ByOptimum):
    """A model in ONNX Runtime on the CPU."""

    def __init__(self, checkpoint: Path, place: Path, weights: str) -> None:
        super().__init__(checkpoint, place, weights)
        from optimum.onnxruntime import ORTModelForCausalLM

        optimum_cli("onnx", checkpoint, place)
        self.model = ORTModelForCausalLM.from_pretrained(place)

    def constants(self) -> Iterator[Any]:
        """See `Exported.constants`."""
        import onnx
        from onnx import numpy_helper

        for tensor in onnx.load(str(self.place / "model.onnx")).graph.initializer:
            yield numpy_helper.to_array(tensor)


class LlamaCpp(Exported):
    """A model in llama.cpp on the CPU, its cache in float32.

    Attributes:
        source: folder of llama.cpp's source, which holds the converter.
    """

    FORMATS = ("float32", "Q8_0", "Q4_0")
    source: ClassVar[Path]

    def __init__(self, checkpoint: Path, place: Path, weights: str) -> None:
        super().__init__(checkpoint, place, weights)
        import llama_cpp

        place.mkdir(exist_ok=True)
        self.float32 = self.file = place / "float32.gguf"
        if not self.float32.exists():  # the other formats are made of it
            converter = self.source / "convert_hf_to_gguf.py"
            command = [sys.executable, converter, checkpoint, "--outtype", "f32", "--outfile", self.float32]
            subprocess.run(list(map(str, command)), check=True, capture_output=True)
        if weights != "float32":
            self.file = place / f"{weights}.gguf"
            how = llama_cpp.llama_model_quantize_default_params()
            how.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{weights}")
            names = str(self.float32).encode(), str(self.file).encode()
            if llama_cpp.llama_model_quantize(*names, ctypes.byref(how)):
                raise RuntimeError(f"llama.cpp cannot quantize {checkpoint} to {weights}")
        cache = dict.fromkeys(("type_k", "type_v"), llama_cpp.GGML_TYPE_F32)
        threads = dict.fromkeys(("n_threads", "n_threads_batch"), torch.get_num_threads())
        self.model = llama_cpp.Llama(
            str(self.file), n_ctx=2 * PROBE, logits_all=True, verbose=False, **cache, **threads
        )

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """See `Exported.logits`."""
        self.model.reset()
        self.model.eval(tokens)
        return torch.from_numpy(self.model.scores[: len(tokens)].copy())

    def constants(self) -> Iterator[Any]:
        """See `Exported.constants`; in float32, whatever the format."""
        return tensors_in(self.file)

    def kept(self, own: Zeros) -> int | None:
        """See `Exported.kept`; in smaller formats the zeros that the float32 file has, and this one at their places."""
        kept = total(own & zeros_of(tensors_in(self.float32)))
        for before, after in zip(tensors_in(self.float32), self.constants(), strict=True):
            kept -= int(((before == 0) & (after != 0)).sum())
        return kept


def tensors_in(path: Path) -> Iterator[Any]:
    """Yield the tensors of a GGUF file in float32, in the order of their names."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name in sorted(tensors):
        yield gguf.dequantize(tensors[name].data, tensors[name].tensor_type)


def zeros_of(arrays: Iterable[Any]) -> Zeros:
    """Count the matrices among arrays by their sides and their zeros."""
    counts: Zeros = Counter()
    for array in arrays:
        if array.ndim == 2:
            counts[min(array.shape), max(array.shape), int((array == 0).sum())] += 1
    return counts


def total(counts: Zeros) -> int:
    """Return the zeros of all matrices that were counted."""
    return sum(zeros * count for (_, _, zeros), count in counts.items())


RUNTIMES: dict[str, type[Exported]] = {"openvino": OpenVino, "onnx": Onnx, "llama.cpp": LlamaCpp}


def median_time(model: Exported, count: int) -> float:
    """Return the median seconds of a forward pass over so many tokens."""
    tokens, times = text(count), []
    for _ in range(REPEATS):
        started = time.perf_counter()
        model.logits(tokens)
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


def text(count: int) -> list[int]:
    """Return as many token ids."""
    return list(range(100, 100 + count))


def compared(model: Exported) -> tuple[float, int | None, int]:
    """Return the largest difference of logits from transformers', the zeros that were kept, and all there were."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model.checkpoint, dtype=torch.float32)
    tokens = text(PROBE)
    with torch.no_grad():
        expected = plain(**inputs_of(tokens)).logits[0]
    own = zeros_of(weight.detach().numpy() for weight in plain.parameters())
    return float((model.logits(tokens) - expected).abs().max()), model.kept(own), total(own)


def main() -> int:
    """Export, compare and time every checkpoint; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--smaller", action="store_true", help="each in the smaller formats of the runtime too")
    parser.add_argument("--check", action="store_true", help="fail where logits differ or a zero is lost")
    parser.add_argument("--source", type=Path, help="folder of llama.cpp's source, for llama.cpp")
    arguments = parser.parse_args()
    if arguments.runtime == "llama.cpp":
        if arguments.source is None:
            parser.error("llama.cpp needs --source, the folder of its source")
        LlamaCpp.source = arguments.source
    runtime = RUNTIMES[arguments.runtime]
    formats = runtime.FORMATS if arguments.smaller else runtime.FORMATS[:1]
    print(f"| {' | '.join(COLUMNS)} |\n" + "| --- " * len(COLUMNS) + "|")
    with TemporaryDirectory() as folder:
        models: list[Exported] = []
        for index, checkpoint in enumerate(arguments.checkpoints):
            for weights in formats:
                models.append(runtime(checkpoint, Path(folder) / f"{index}", weights))
        faults = table(models)
    return 1 if arguments.check and faults else 0


def table(models: list[Exported]) -> int:
    """Print a row for each model, its times beside those of the first; return the number of faults."""
    dense: list[float] = []
    faults = 0
    for model in models:
        times = [median_time(model, count) for count in COUNTS]
        dense = dense or times
        ratios = [f"{1000 * took:.1f} ms ({took / whole:.2f})" for took, whole in zip(times, dense, strict=True)]
        difference, kept, own = compared(model)
        exact = model.weights != "float32" or difference <= ROUNDING  # NaN is a fault
        faults += not exact or kept not in (own, None)
        zeros = "not counted" if kept is None else f"{kept:,} of {own:,}"
        cells = [model.checkpoint.name, model.weights, f"{difference:.1e}", zeros, *ratios]
        print(f"| {' | '.join(cells)} |", flush=True)
    return faults


if __name__ == "__main__":
    sys.exit(main())
