"""Which runtimes load what we write, and whether they get faster from it: a dated table, without wishes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..base.errors import BarberError, shown
from ..base.files import read_json_object
from .names import SPARSITY_NAME
from .record import read_record

CHECKED = "2026-11-30"
KINDS = {
    "dense": "dense tensors",
    "unstructured": "dense tensors with unstructured zeros",
    "2:4": "dense tensors with 2:4 zeros",
    "N:M": "dense tensors with zeros of another N:M",
    "quantized": "int2, int4 or int8 weights, packed by compressed-tensors",
}


class Verdict(NamedTuple):
    """One runtime on one kind of checkpoint."""

    loads: str  # yes, converted (by a tool or call of the runtime), or no
    faster: str  # than the dense model in its 16-bit dtype: yes, no, maybe, or - where it does not load or is it
    why: str
    tested: bool = False  # by the suite, `make exports` or `make llama-cpp`; others by source and maintainers


NO_KERNEL = "its kernels multiply zeros like any other weight"
GGUF = "by its convert_hf_to_gguf.py; equal logits, zeros kept by Q8_0 and Q4_0, not by types with a minimum"
ONNX = "by optimum-cli export onnx; equal logits, all zeros kept; sparse initializers are made dense on loading"
OPENVINO = "by optimum-cli export openvino; equal logits, all zeros kept; times in benchmarks/RESULTS.md, Exports"
COLUMNS = ("runtime", "loads", "faster", "tested here", "why")
RUNTIMES: dict[str, dict[str, Verdict]] = {  # by name, by kind out of `KINDS`
    "transformers": {
        "dense": Verdict("yes", "-", "what the others are compared with", tested=True),
        "unstructured": Verdict("yes", "no", NO_KERNEL, tested=True),
        "2:4": Verdict("yes", "no", f"{NO_KERNEL}; on CUDA see torch semi-structured", tested=True),
        "N:M": Verdict("yes", "no", NO_KERNEL, tested=True),
        "quantized": Verdict(
            "yes", "no", "needs compressed-tensors; smaller on disk, unpacked before it computes", tested=True
        ),
    },
    "vLLM": {
        "dense": Verdict("yes", "-", "an ordinary checkpoint"),
        "unstructured": Verdict("yes", "no", "an ordinary checkpoint; no sparse kernels"),
        "2:4": Verdict("yes", "no", "an ordinary checkpoint; its 2:4 kernels were removed in 2026 (PR 36799)"),
        "N:M": Verdict("yes", "no", "an ordinary checkpoint; no sparse kernels"),
        "quantized": Verdict(
            "yes", "yes", "weight-only kernels for 4 and 8 bits, not 2, read fewer bytes a token; zeros add nothing"
        ),
    },
    "torch semi-structured, CUDA": {
        "dense": Verdict("no", "-", "its format holds 2 of every 4 weights"),
        "unstructured": Verdict("no", "-", "its format holds 2 of every 4 weights"),
        "2:4": Verdict(
            "converted",
            "maybe",
            "torch.sparse.to_sparse_semi_structured by Linear, in 16 bits, compute capability 8.0 or later; "
            "for large batches, not for single tokens",
        ),
        "N:M": Verdict("no", "-", "its format holds 2 of every 4 weights (1:4 fits into it, others do not)"),
        "quantized": Verdict("no", "-", "no format for packed integer groups"),
    },
    "llama.cpp": {
        "dense": Verdict("converted", "-", "by its convert_hf_to_gguf.py", tested=True),
        "unstructured": Verdict("converted", "no", GGUF, tested=True),
        "2:4": Verdict("converted", "no", GGUF, tested=True),
        "N:M": Verdict("converted", "no", GGUF),
        "quantized": Verdict("converted", "no", "its converter unpacks groups, not whole rows; quantize again in GGUF"),
    },
    "ONNX Runtime": {
        "dense": Verdict("converted", "-", "by optimum-cli export onnx", tested=True),
        "unstructured": Verdict("converted", "no", ONNX, tested=True),
        "2:4": Verdict("converted", "no", ONNX, tested=True),
        "N:M": Verdict("converted", "no", ONNX),
        "quantized": Verdict("no", "-", "no export of packed weights is known; quantize the ONNX model"),
    },
    "OpenVINO": {
        "dense": Verdict("converted", "-", "by optimum-cli export openvino", tested=True),
        "unstructured": Verdict("converted", "no", OPENVINO, tested=True),
        "2:4": Verdict("converted", "no", OPENVINO, tested=True),
        "N:M": Verdict("converted", "no", "by optimum-cli export openvino; not measured"),
        "quantized": Verdict("no", "-", "no export of packed weights is known; export with --weight-format int8"),
    },
}


def kind_of(directory: str | Path) -> str:
    """The kind of a checkpoint, out of `KINDS`; raises BarberError if it has no config, or an unknown quantization."""
    directory = Path(directory)
    config = read_json_object(directory / "config.json", "configuration")
    if config.get("quantization_config"):
        return _quantized(directory, config["quantization_config"])
    if not (directory / SPARSITY_NAME).is_file():
        return "dense"
    pattern = read_record(directory).pattern
    return pattern if pattern in KINDS else "N:M"


def _quantized(directory: Path, config: Mapping[str, Any]) -> str:
    kinds = set()
    try:
        method, form = config.get("quant_method"), config.get("format")
        for group in config.get("config_groups", {}).values():
            weights = group.get("weights") or {}
            kinds.add((weights.get("type", "int"), weights.get("num_bits")))
    except (AttributeError, TypeError):
        raise BarberError(f"{directory}: quantization_config {shown(config)} is no description of one") from None
    if method != "compressed-tensors" or not kinds or not kinds <= {("int", 2), ("int", 4), ("int", 8)}:
        raise BarberError(
            f"{directory} is quantized by {method} ({form}): known is compressed-tensors, int2, int4 or int8"
        )
    return "quantized"


def _rows(kind: str) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for name, verdicts in RUNTIMES.items():
        verdict = verdicts[kind]
        tested = "yes" if verdict.tested else "no"
        lines.append((name, verdict.loads, verdict.faster, tested, verdict.why))
    return lines


def report(directory: str | Path) -> str:
    """What a checkpoint is, and a line a runtime."""
    kind = kind_of(directory)
    table = [COLUMNS, *_rows(kind)]
    *columns, _ = zip(*table, strict=True)
    widths = [max(map(len, column)) for column in columns]
    text = f"{KINDS[kind]}, as of {CHECKED}\n"
    for row in table:
        text += "  ".join([*map(str.ljust, row, widths), row[-1]]) + "\n"
    return text


def markdown() -> str:
    """All kinds as tables, for docs/runtimes.md."""
    parts = []
    for kind, description in KINDS.items():
        parts += [f"## {description[0].upper()}{description[1:]}", ""]
        lines = [COLUMNS, ["---"] * len(COLUMNS), *_rows(kind)]
        parts += [f"| {' | '.join(line)} |" for line in lines]
        parts.append("")
    return "\n".join(parts)
