"""Quantize a model block by block under its masks, into compressed-tensors' `pack-quantized`, which vLLM reads."""

import importlib.util
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from optimum_barber.base.errors import BarberError, MissingExtraError
from optimum_barber.checkpoints.carry import save_tokenizer
from optimum_barber.checkpoints.pruned import PrunedModel, carry_masks
from optimum_barber.checkpoints.write import save_model
from optimum_barber.integrations.quantization.settings import QuantizeSettings
from optimum_barber.models.device import summing_device
from optimum_barber.models.linears import check_weights, linear_shapes, matrices_of_model, module_names, target_names
from optimum_barber.models.matrices import MatrixView
from optimum_barber.models.source import ModelSource
from optimum_barber.prune.pipeline import BlockReport, Plan, prune
from optimum_barber.prune.producers import LinearInput, Produced, Producer
from optimum_barber.prune.producers.sparsegpt import inverse_factor
from optimum_barber.tensors.gptq import descend, gptq
from optimum_barber.tensors.patterns import SparsityPattern
from optimum_barber.tensors.quantize import IntegerFormat, Quantized, round_to_nearest
from optimum_barber.text.windows import TokenWindows

FORMAT = "pack-quantized"
ANY_PATTERN = SparsityPattern(0.5)  # unstructured, and its ratio is not looked at: the masks are as they are


@dataclass
class MaskedQuantizer:
    """A producer for `prune`: returns the checkpoint's keep masks and dequantized weights, and records the scales.

    Attributes:
        scales: (out, groups) by Linear, on the CPU, in the model's dtype.
    """

    opened: PrunedModel
    settings: QuantizeSettings
    scales: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, linear: LinearInput) -> Produced:
        """Return mask and dequantized weights of one Linear."""
        record = self.opened.record
        keep = torch.ones_like(linear.weight, dtype=torch.bool)
        if record is not None and linear.name in record.modules:
            keep = self.opened.keep(linear.name).to(keep.device)
        quantized = self._quantize(linear, keep)
        self.scales[linear.name] = quantized.scale.cpu()
        return Produced(keep, quantized.dequantize().to(linear.weight.dtype))

    def _quantize(self, linear: LinearInput, keep: Tensor) -> Quantized:
        settings = self.settings
        form = IntegerFormat(settings.bits, settings.group_size, self.opened.model.dtype)
        if linear.statistics.gram is None:
            return round_to_nearest(linear.weight, keep, form)
        gram = linear.statistics.gram.clone()
        gram.diagonal()[gram.diagonal() == 0] = 1  # inputs that are always zero: their weights cause no error
        factor = inverse_factor(gram, settings.damping, linear.name)
        first = gptq(linear.weight, keep, factor, form, settings.block_size)
        gram.diagonal().add_(settings.damping * gram.diagonal().mean())
        return descend(linear.weight, keep, first, gram, form, settings.sweeps, settings.block_size)


def quantize_model(
    model: str | Path,
    output: Path,
    settings: QuantizeSettings,
    windows: TokenWindows,
    quiet: bool = False,
    device: str = "auto",
) -> dict[str, Any]:
    """Quantize all Linears of the decoder blocks and write a compressed-tensors checkpoint, masks and record with it.

    Args:
        model: a pruned checkpoint, or any dense model: hub id, directory, GGUF file or `installed:PACKAGE`.
        output: the directory to write into, made if need be.
        settings: method and format.
        windows: calibration tokens.
        quiet: no progress bar.
        device: where blocks are worked on.

    Returns:
        `error`, the sum of the blocks' output errors E; `seconds`; `bytes_before` and `bytes_after` of all weights;
        `modules`, how many were quantized; `blocks`, name, error and seconds of each.

    Raises:
        BarberError: no compressed-tensors, a group size that does not divide a width, an unknown glob, sick weights.
    """
    if importlib.util.find_spec("compressed_tensors") is None:
        raise MissingExtraError("quantization", "quantize")
    started = time.perf_counter()
    opened = PrunedModel.load(model)
    before = _weight_bytes(opened.model)
    scales, reports = quantize_blocks(opened, settings, windows, quiet, device)
    modules = module_names(ModelSource(opened.model))
    in_memory = {modules[name]: scale for name, scale in scales.items()}
    compressor = compress(opened.model, in_memory, settings.bits, settings.group_size)
    save_compressed(output, opened, compressor)
    step = {"name": "quantize", **settings.model_dump(), "calibration": windows.as_dict()}
    carry_masks(opened.reference.directory, output, step)
    return {
        "error": sum(report.error_after for report in reports), "seconds": time.perf_counter() - started,
        "bytes_before": before, "bytes_after": _weight_bytes(opened.model), "modules": len(scales),
        "blocks": [{"block": r.block, "error": r.error_after, "seconds": r.seconds} for r in reports],
    }  # fmt: skip


def quantize_blocks(
    opened: PrunedModel, settings: QuantizeSettings, windows: TokenWindows, quiet: bool = False, device: str = "auto"
) -> tuple[dict[str, Tensor], list[BlockReport]]:
    """Quantize the model in memory: its Linears take their dequantized values, in the model's dtype.

    Returns:
        The scales by Linear, and a report a block; its errors are against the block before quantization.
    """
    source = ModelSource(opened.model, summing_device(device))
    shapes = linear_shapes(source)
    targets = target_names(shapes, settings.ignore)
    check_packable(source, targets)
    settings.check_widths({name: shapes[name][1] for name in targets})
    check_weights(source, [])
    quantizer, reports = MaskedQuantizer(opened, settings), list[BlockReport]()
    producer = Producer(quantizer, frozenset(["gram"] if settings.method == "gptq" else []))
    plan = Plan(producer, ANY_PATTERN, ignore=settings.ignore, exact=False)
    with tqdm(total=2 * len(source), unit="block", desc=settings.method, disable=quiet or None) as bar:

        def finished(report: BlockReport) -> None:
            reports.append(report)
            bar.set_postfix_str(f"{report.block} E {report.error_after:.4g}")
            bar.update()

        prune(source, windows.tokens, plan, finished)
    return quantizer.scales, reports


def check_packable(source: ModelSource, targets: Sequence[str]) -> None:
    """Refuse what compressed-tensors cannot pack, and a model that transformers could not read back."""
    for name, pieces in source.names.pieces.items():
        if len({piece.tensor for piece in pieces}) > 1:
            raise BarberError(
                f"quantization is not supported for {source.model_type}: transformers puts {name} together from "
                f"{pieces[0].tensor} and others, which it does in unquantized models only"
            )
    linears = matrices_of_model(source)
    for name in targets:
        if isinstance(linears[name], MatrixView):
            kind = "an expert in a tensor of all" if linears[name].expert is not None else "a transposed Linear"
            raise BarberError(
                f"quantization cannot pack {name}, {kind}: legal are Linears; leave the others as they are by ignore"
            )


def compress(model: nn.Module, scales: Mapping[str, Tensor], bits: int, group_size: int | None) -> Any:
    """Pack the Linears named in `scales`, which hold dequantized weights, in place.

    Args:
        model: a causal LM; Linears that are not named stay as they are.
        scales: (out, groups) by Linear, in the weights' dtype.
        bits: of a code, 4 or 8.
        group_size: weights along the input dimension that share a scale; None for a whole row.

    Returns:
        The library's `ModelCompressor`, which writes the configuration.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.compressors.base import compress_module
    from compressed_tensors.quantization import QuantizationStatus, apply_quantization_config

    apply_quantization_config(model, _quantization_config(model, scales, bits, group_size), show_progress=False)
    compressor = ModelCompressor.from_pretrained_model(model, FORMAT)
    for name, scale in scales.items():
        linear = model.get_submodule(name)
        linear.weight_scale.data.copy_(scale)  # type: ignore[union-attr,operator]
        linear.weight.data = linear.weight.data.float()  # in bfloat16 weight / scale can round to a code's neighbour
        compress_module(linear)
    compressor.quantization_config.quantization_status = QuantizationStatus.COMPRESSED
    return compressor


def _quantization_config(model: nn.Module, names: Mapping[str, Any], bits: int, group_size: int | None) -> Any:
    """Weights only, symmetric, one scheme; all other Linears by name under `ignore`."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    strategy = "channel" if group_size is None else "group"
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy=strategy, group_size=group_size)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    others = [name for name in linears if name not in names]
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=FORMAT)
    return QuantizationConfig(config_groups={"group_0": scheme}, ignore=others, format=FORMAT)


def save_compressed(output: Path, opened: PrunedModel, compressor: Any) -> None:
    """Write weights, configurations and tokenizer of a packed model into `output`, in shards as its source has them."""
    save_model(output, opened.model, opened.reference)
    compressor.update_config(str(output))
    save_tokenizer(output, opened.tokenizer, opened.reference)


def _weight_bytes(model: nn.Module) -> int:
    """Count the bytes of all parameters and persistent buffers, tied ones once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())
