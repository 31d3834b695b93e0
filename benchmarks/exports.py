"""Checkpoints in OpenVINO and ONNX Runtime: equal logits, zeros that are kept, and times beside the dense model.

Runs without this package, in an environment of its own, since the exporters ask for other versions of transformers:

    python -m venv EXPORTS && EXPORTS/bin/pip install "optimum-intel[openvino]"   # or "optimum-onnx[onnxruntime]"
    EXPORTS/bin/python -P benchmarks/exports.py openvino DENSE OUT ...               # or onnx

The first checkpoint is the one that the others are compared with. `--int8` adds each with int8 weights (OpenVINO).
`--check` ends with status 1 where float32 logits differ or a zero is lost; `make exports` does that.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

COUNTS = (1, 16)  # tokens of the timed inputs
PROBE = 40  # tokens of the compared logits
REPEATS = 15
ROUNDING = 1e-2  # of logits that reach 30


def main() -> int:
    """Export, compare and time every checkpoint; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtime", choices=("openvino", "onnx"))
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--int8", action="store_true", help="each with int8 weights too (openvino)")
    parser.add_argument("--check", action="store_true", help="fail where logits differ or a zero is lost")
    arguments = parser.parse_args()
    kinds = [False, True] if arguments.int8 else [False]
    print("| checkpoint | weights | largest logit difference | zeros kept | 1 token | 16 tokens |")
    print("| --- | --- | --- | --- | --- | --- |")
    dense: list[float] = []
    faults = 0
    with TemporaryDirectory() as folder:
        models: list[tuple[Path, bool, Any, Path]] = []
        for checkpoint in arguments.checkpoints:
            for int8 in kinds:
                place = Path(folder) / f"{len(models)}"
                export(arguments.runtime, checkpoint, place, int8)
                models.append((checkpoint, int8, opened(arguments.runtime, place), place))
        for checkpoint, int8, model, place in models:
            times = [median_time(model, count) for count in COUNTS]
            dense = dense or times
            ratios = [f"{1000 * took:.1f} ms ({took / whole:.2f})" for took, whole in zip(times, dense, strict=True)]
            difference, own, there = compared(checkpoint, model, arguments.runtime, place)
            faults += not int8 and not (difference <= ROUNDING and there >= own)  # NaN is a fault
            kept = "not counted" if int8 else f"{min(own, there):,} of {own:,}"  # int8: codes of a row's zero point
            weights = "int8" if int8 else "float32"
            print(f"| {checkpoint.name} | {weights} | {difference:.1e} | {kept} | {' | '.join(ratios)} |", flush=True)
    return 1 if arguments.check and faults else 0


def export(runtime: str, checkpoint: Path, place: Path, int8: bool) -> None:
    """Export a checkpoint by optimum-cli."""
    command = [Path(sys.executable).with_name("optimum-cli"), "export", runtime, "--model", checkpoint]
    command += ["--task", "text-generation-with-past", place]
    if runtime == "openvino":
        command += ["--weight-format", "int8" if int8 else "fp32"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


def opened(runtime: str, place: Path) -> Any:
    """Open an exported model on the CPU, its products in float32."""
    if runtime == "onnx":
        from optimum.onnxruntime import ORTModelForCausalLM

        return ORTModelForCausalLM.from_pretrained(place)
    from optimum.intel import OVModelForCausalLM

    return OVModelForCausalLM.from_pretrained(place, ov_config={"INFERENCE_PRECISION_HINT": "f32"})


def inputs_of(count: int) -> dict[str, torch.Tensor]:
    """Return token ids and their mask, (1, count)."""
    return {"input_ids": torch.arange(100, 100 + count)[None], "attention_mask": torch.ones(1, count, dtype=torch.long)}


def median_time(model: Any, count: int) -> float:
    """Return the median seconds of a forward pass over so many tokens, without a cache before it."""
    inputs, times = inputs_of(count), []
    for _ in range(REPEATS):
        started = time.perf_counter()
        model(**inputs)
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


def compared(checkpoint: Path, model: Any, runtime: str, place: Path) -> tuple[float, int, int]:
    """Return the largest difference of logits from transformers', and the zeros of the checkpoint and of the export."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = plain(**inputs_of(PROBE)).logits
    difference = float((torch.as_tensor(model(**inputs_of(PROBE)).logits) - expected).abs().max())
    own = sum(int((weight == 0).sum()) for weight in plain.parameters() if weight.ndim == 2)
    return difference, own, zeros_in(model, runtime, place)


def zeros_in(model: Any, runtime: str, place: Path) -> int:
    """Return how many zeros the matrices of an exported model hold."""
    if runtime == "onnx":
        import onnx
        from onnx import numpy_helper

        graph = onnx.load(str(place / "model.onnx")).graph
        return sum(int((numpy_helper.to_array(t) == 0).sum()) for t in graph.initializer if len(t.dims) == 2)
    zeros = 0
    for node in model.model.get_ops():
        if node.get_type_name() == "Constant" and len(node.shape) == 2:
            zeros += int((node.get_data() == 0).sum())
    return zeros


if __name__ == "__main__":
    sys.exit(main())
