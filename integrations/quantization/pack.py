"""The packed weights of a quantized checkpoint in compressed-tensors' `pack-quantized`, which vLLM reads."""

import copy
import io
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optimum_barber.base.errors import BarberError
from optimum_barber.checkpoints.carry import save_tokenizer
from optimum_barber.checkpoints.pruned import PrunedModel
from optimum_barber.checkpoints.write import save_model
from optimum_barber.integrations.quantization.settings import QuantizeSettings
from optimum_barber.models.file_names import tensors_of_files
from optimum_barber.models.linears import matrices_of_model, module_names
from optimum_barber.models.loading import brief
from optimum_barber.models.matrices import ROUTERS, is_transposed
from optimum_barber.models.source import ModelSource

FORMAT = "pack-quantized"
EXPERTS = "re:.*\\.experts\\..*"  # by such a target transformers knows the scheme of experts


def check_packable(source: ModelSource, targets: Sequence[str]) -> None:
    """Refuse matrices that have no packed form."""
    tensors = tensors_of_files(source.model, values=False)
    linears = matrices_of_model(source)
    for name in targets:
        kind = _obstacle(name, linears[name], tensors)
        if kind:
            raise BarberError(
                f"quantization cannot pack {name}, {kind}: legal are Linears; leave the others as they are by ignore"
            )


def check_readable(source: ModelSource, shapes: Mapping[str, tuple[int, int]], settings: QuantizeSettings) -> None:
    """Refuse a model that transformers could not read back, by loading what would be written without any values.

    Args:
        source: the model before it is quantized.
        shapes: (out, in) of the matrices to quantize.
        settings: bits, and a group size that divides every width.
    """
    size = settings.group_size or 1  # without values the library takes the width from the scales, so not a whole row
    trial = settings.model_copy(update={"group_size": size})
    tensors = tensors_of_files(source.model, values=False)
    scales = {name: torch.empty(rows, width // size, device="meta") for name, (rows, width) in shapes.items()}
    bits = trial.bits_by_name(shapes)
    check_experts(source, bits)
    if trial.average_bits is not None:  # any bits that differ
        bits = {name: trial.widths[index % 2] for index, name in enumerate(shapes)}
    pack(tensors, scales, trial, bits)
    reason = _load(source.model, tensors, quantization_config(source, trial, bits))
    if reason:
        raise BarberError(f"quantization is not supported for {source.model_type}: {_cause(source, shapes) or reason}")


def check_experts(source: ModelSource, bits: Mapping[str, int]) -> None:
    """Refuse experts of different bits: transformers decodes all of them by one scheme."""
    first: dict[int, str] = {}
    for name in sorted(routed_experts(source, bits)):
        first.setdefault(bits[name], name)
    if len(first) > 1:
        told = " and ".join(f"{width} of {name}" for width, name in sorted(first.items()))
        raise BarberError(f"bits of experts are {told}: transformers decodes all by one scheme, give all the same")


def routed_experts(source: ModelSource, names: Iterable[str]) -> set[str]:
    """Return those matrices that belong to experts to which a router sends tokens."""
    linears = matrices_of_model(source)
    return {name for name in names if getattr(linears[name], "expert", None) is not None}


def _obstacle(name: str, linear: nn.Linear, tensors: Mapping[str, Tensor]) -> str | None:
    """What a matrix is that cannot be packed."""
    whole = f"{name}.weight" in tensors
    if getattr(linear, "expert", None) is not None:
        return None if whole else "an expert in a tensor of all"
    if is_transposed(linear):
        return "a transposed Linear"
    return None if whole else "which shares its weight"


def _cause(source: ModelSource, targets: Collection[str]) -> str | None:
    """Name a parameter that transformers would put together from weights that are not packed."""
    for name, pieces in source.names.pieces.items():
        dense = [piece.tensor for piece in pieces if piece.matrix not in targets]
        if dense and len({piece.tensor for piece in pieces}) > 1:
            return f"transformers puts {name} together from packed weights alone, and {dense[0]} stays dense"
    return None


def _load(model: Any, tensors: dict[str, Tensor], config: Any) -> str | None:
    """Load tensors without values as transformers would load their files; return why it cannot."""
    from transformers import GenerationConfig

    settings = copy.deepcopy(model.config)
    settings.quantization_config = {**config.model_dump(), "quant_method": "compressed-tensors"}
    try:
        with _hushed():
            _, info = type(model).from_pretrained(
                None, config=settings, state_dict=tensors, device_map="meta", output_loading_info=True,
                generation_config=GenerationConfig(),
            )  # fmt: skip
    except Exception as error:  # whatever transformers raises
        return f"transformers does not read its packed weights back ({brief(error)})"
    lost = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    return f"transformers has other names for its packed weights, such as {lost[0]}" if lost else None


@contextmanager
def _hushed() -> Iterator[None]:
    """Inside, transformers reports nothing."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def pack(
    tensors: dict[str, Tensor], scales: Mapping[str, Tensor], settings: QuantizeSettings, bits: Mapping[str, int]
) -> None:
    """Pack the matrices named in `scales`, which hold dequantized weights.

    Args:
        tensors: all tensors of the files by name; packed ones take the place of weights.
        scales: (out, groups) by matrix, in the weights' dtype.
        settings: group size.
        bits: by matrix.
    """
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(FORMAT)
    for name, scale in scales.items():
        scheme = _scheme(settings, bits[name], ["Linear"])
        weight = tensors.pop(f"{name}.weight").float()  # in bfloat16 weight / scale can round to a code's neighbour
        for part, tensor in compressor.compress({"weight": weight, "weight_scale": scale}, scheme).items():
            tensors[f"{name}.{part}"] = tensor


def quantization_config(source: ModelSource, settings: QuantizeSettings, bits: Mapping[str, int]) -> Any:
    """Return the library's configuration: weights only, symmetric, one scheme for all matrices of as many bits.

    All other Linears, and routers, which vLLM has as Linears, are ignored by their names in the files and in memory.
    """
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    modules = module_names(source)
    packed = {modules[name] for name in bits if name in modules}
    ignored: dict[str, None] = {}
    for name, module in source.model.named_modules():
        router = name.rpartition(".")[2] in ROUTERS and "weight" in module._parameters
        if (router or isinstance(module, nn.Linear)) and name not in packed:
            pieces = source.names.of_parameter(f"{name}.weight", module.get_parameter("weight"))
            ignored |= dict.fromkeys([pieces[0].matrix, name])
    groups = _groups(settings, bits, modules, routed_experts(source, bits))
    return QuantizationConfig(
        config_groups=groups, ignore=list(ignored), format=FORMAT,
        quantization_status=QuantizationStatus.COMPRESSED,
    )  # fmt: skip


def _groups(
    settings: QuantizeSettings, bits: Mapping[str, int], modules: Mapping[str, str], experts: Collection[str]
) -> dict[str, Any]:
    """Return a scheme for each number of bits; where there are several, with its matrices by name.

    That of the experts comes first, with a pattern: transformers decodes experts by the first scheme that has one.
    """
    widths = sorted(set(bits.values()))
    if len(widths) == 1:
        return {"group_0": _scheme(settings, widths[0], ["Linear"])}
    of_experts = {bits[name] for name in experts}
    widths.sort(key=lambda width: width not in of_experts)
    groups = {}
    for index, width in enumerate(widths):
        targets: dict[str, None] = {EXPERTS: None} if width in of_experts else {}
        for name in bits:
            if bits[name] == width and name not in experts:
                targets |= dict.fromkeys([modules.get(name, name), name])
        groups[f"group_{index}"] = _scheme(settings, width, list(targets))
    return groups


def _scheme(settings: QuantizeSettings, bits: int, targets: list[str]) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    size = settings.group_size
    strategy = "channel" if size is None else "group"
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy=strategy, group_size=size)
    return QuantizationScheme(targets=targets, weights=weights, format=FORMAT)


def save_packed(output: Path, opened: PrunedModel, tensors: dict[str, Tensor], config: Any) -> None:
    """Write packed tensors, configurations and tokenizer into `output`, in shards as the model's source has them."""
    from compressed_tensors.compressors import ModelCompressor

    save_model(output, opened.model, opened.reference, tensors)
    ModelCompressor(quantization_config=config).update_config(str(output))
    save_tokenizer(output, opened.tokenizer, opened.reference)
