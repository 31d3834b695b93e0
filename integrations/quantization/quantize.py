"""Quantize a model block by block under its masks, into a checkpoint of compressed-tensors."""

import importlib.util
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from optimum_barber.base.errors import BarberError, MissingExtraError
from optimum_barber.base.output import check_output, staged
from optimum_barber.checkpoints.card import Step, write_card
from optimum_barber.checkpoints.pruned import PrunedModel, carry_masks
from optimum_barber.integrations.quantization.attention import (
    attention_statistics,
    fused_units,
    mean_bits,
    mixed_bits,
    sensitivities,
    structure_of,
)
from optimum_barber.integrations.quantization.pack import (
    check_packable,
    check_readable,
    pack,
    quantization_config,
    save_packed,
)
from optimum_barber.integrations.quantization.settings import QuantizeSettings
from optimum_barber.models.device import summing_device
from optimum_barber.models.file_names import tensors_of_files
from optimum_barber.models.linears import check_globs, check_weights, linear_shapes, target_names
from optimum_barber.models.loading import resolve_model
from optimum_barber.models.source import ModelSource
from optimum_barber.prune.pipeline import BlockReport, Plan, prune
from optimum_barber.prune.producers import LinearInput, Produced, Producer
from optimum_barber.prune.producers.sparsegpt import inverse_factor
from optimum_barber.tensors.gptq import descend, gptq
from optimum_barber.tensors.patterns import SparsityPattern
from optimum_barber.tensors.quantize import IntegerFormat, Quantized, round_to_nearest
from optimum_barber.text.windows import TokenWindows

ANY_PATTERN = SparsityPattern(0.5)  # unstructured, and its ratio is not looked at: the masks are as they are


@dataclass
class MaskedQuantizer:
    """A producer for `prune`: returns the checkpoint's keep masks and dequantized weights, and records the scales.

    Attributes:
        bits: by Linear.
        scales: (out, groups) by Linear, on the CPU, in the model's dtype.
    """

    opened: PrunedModel
    settings: QuantizeSettings
    bits: dict[str, int]
    scales: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, linear: LinearInput) -> Produced:
        """Return mask and dequantized weights of one Linear."""
        record = self.opened.record
        keep = linear.weight != 0  # without a record: another tool's zeros stay
        if record is not None and linear.name in record.modules:
            keep = self.opened.keep(linear.name).to(keep.device)
        quantized = self._quantize(linear, keep)
        self.scales[linear.name] = quantized.scale.cpu()
        return Produced(keep, quantized.dequantize().to(linear.weight.dtype))

    def _quantize(self, linear: LinearInput, keep: Tensor) -> Quantized:
        settings = self.settings
        form = IntegerFormat(self.bits[linear.name], settings.group_size, self.opened.model.dtype)
        if linear.statistics.gram is None:
            return round_to_nearest(linear.weight, keep, form)
        gram = linear.statistics.gram.clone()
        fill_dead(gram)
        factor = inverse_factor(gram, settings.damping, linear.name)
        first = gptq(linear.weight, keep, factor, form, settings.block_size)
        gram.diagonal().add_(settings.damping * gram.diagonal().mean())
        return descend(linear.weight, keep, first, gram, form, settings.sweeps, settings.block_size)


def fill_dead(gram: Tensor) -> None:
    """Give inputs that are always zero the mean diagonal entry of the others: their weights cause no error."""
    diagonal = gram.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1 if dead.all() else diagonal[~dead].mean()


def quantize_model(
    model: str | Path,
    output: str | Path,
    settings: QuantizeSettings,
    windows: TokenWindows,
    quiet: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Quantize all Linears of the decoder blocks and write a compressed-tensors checkpoint, masks and record with it.

    Args:
        model: a pruned checkpoint, or any dense model: hub id, directory, GGUF file or `installed:PACKAGE`.
        output: the directory to write, which appears when all is done.
        settings: method and format.
        windows: calibration tokens.
        quiet: no progress bar.
        device: where blocks are worked on.
        dtype: of scales and of all that is not quantized; `auto`: as stored.
        overwrite: whether what `output` holds may be replaced.

    Returns:
        `error`, the sum of the blocks' output errors E; `seconds`; `bytes_before` and `bytes_after` of all weights;
        `modules`, how many were quantized; `bits`, of a weight in the mean; `blocks`, name, error and seconds of each.

    Raises:
        BarberError: no compressed-tensors, a group size that does not divide a width, an unknown glob, sick weights, or
            an output that is not empty or is the input.
    """
    started = time.perf_counter()
    output = check_output(output, overwrite, [resolve_model(model).path])
    opened = PrunedModel.load(model, dtype)
    quantizer, reports = quantize_blocks(opened, settings, windows, quiet, device)
    source, tensors = ModelSource(opened.model), tensors_of_files(opened.model)
    before = sum(tensor.nbytes for tensor in tensors.values())
    pack(tensors, quantizer.scales, settings, quantizer.bits)
    after = sum(tensor.nbytes for tensor in tensors.values())
    bits = mean_bits(quantizer.bits, sizes_of(source, quantizer.bits))
    step = {"name": "quantize", **settings.as_dict(), "mean_bits": bits, "calibration": windows.as_dict()}
    with staged(output) as stage:
        save_packed(stage, opened, tensors, quantization_config(source, settings, quantizer.bits))
        carry_masks(opened.reference.directory, stage, step)
        write_card(stage, opened.reference, Step("quantize", settings.model_dump(exclude_unset=True)))
    return {
        "error": sum(report.error_after for report in reports), "seconds": time.perf_counter() - started,
        "bytes_before": before, "bytes_after": after, "modules": len(quantizer.scales),
        "bits": bits,
        "blocks": [{"block": r.block, "error": r.error_after, "seconds": r.seconds} for r in reports],
    }  # fmt: skip


def quantize_blocks(
    opened: PrunedModel, settings: QuantizeSettings, windows: TokenWindows, quiet: bool = False, device: str = "auto"
) -> tuple[MaskedQuantizer, list[BlockReport]]:
    """Quantize the model in memory: its Linears take their dequantized values, in the model's dtype.

    Returns:
        The scales and bits by Linear, and a report a block; its errors are against the block before quantization.
    """
    source = ModelSource(opened.model, summing_device(device))
    check_quantizable(source, settings)
    check_weights(source, [])
    bits = bits_of(source, settings, windows, quiet)
    quantizer, reports = MaskedQuantizer(opened, settings, bits), list[BlockReport]()
    producer = Producer(quantizer, frozenset([] if settings.method == "round-to-nearest" else ["gram"]))
    own = partial(attention_statistics, structure_of(source)) if settings.method == "aptq" else None
    plan = Plan(producer, ANY_PATTERN, ignore=settings.ignore, exact=False, own_statistics=own)
    with tqdm(total=2 * len(source), unit="block", desc=settings.method, disable=quiet or None) as bar:

        def finished(report: BlockReport) -> None:
            reports.append(report)
            bar.set_postfix_str(f"{report.block} E {report.error_after:.4g}")
            bar.update()

        prune(source, windows.tokens, plan, finished)
    return quantizer, reports


def bits_of(source: ModelSource, settings: QuantizeSettings, windows: TokenWindows, quiet: bool) -> dict[str, int]:
    """Return the bits of every Linear that is quantized; under `average_bits` by a pass over the windows."""
    names = target_names(linear_shapes(source), settings.ignore)
    if settings.average_bits is None:
        return settings.bits_by_name(names)
    sensitivity = sensitivities(source, windows.tokens, quiet)
    units = fused_units(structure_of(source), names)
    return mixed_bits(units, sensitivity, sizes_of(source, names), settings.average_bits, settings.widths)


def sizes_of(source: ModelSource, names: Iterable[str]) -> dict[str, int]:
    """Return the number of weights of each Linear."""
    shapes = linear_shapes(source)
    return {name: math.prod(shapes[name]) for name in names}


def check_quantizable(source: ModelSource, settings: QuantizeSettings) -> None:
    """Refuse, before any work, all that does not fit the model, which may be without weights.

    Raises:
        BarberError: no compressed-tensors, an unknown glob, a matrix that cannot be packed, a group size that does not
            divide a width, or a model that transformers could not read back.
    """
    if importlib.util.find_spec("compressed_tensors") is None:
        raise MissingExtraError("quantization", "quantize")
    shapes = linear_shapes(source)
    targets = target_names(shapes, settings.ignore)
    check_globs("bits_of", list(settings.bits_of), targets)
    deciding = {settings.glob_of(name) for name in targets}
    for glob in settings.bits_of:
        if glob not in deciding:
            raise BarberError(f"bits_of {glob!r} decides nothing: globs before it match all its Linears")
    if settings.method == "aptq":
        structure_of(source)
    check_packable(source, targets)
    settings.check_widths({name: shapes[name][1] for name in targets})
    check_readable(source, {name: shapes[name] for name in targets}, settings)
