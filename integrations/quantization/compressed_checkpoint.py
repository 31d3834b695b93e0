"""Quantized weights on disk: compressed-tensors `pack-quantized`, which transformers and vLLM read."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from optimum_barber.base.errors import MissingExtraError
from optimum_barber.checkpoints.pruned import PrunedModel
from optimum_barber.checkpoints.write import ONE_FILE

FORMAT = "pack-quantized"


def check_installed() -> None:
    """Check that compressed-tensors is installed.

    Raises:
        MissingExtraError: says how to install it.
    """
    if importlib.util.find_spec("compressed_tensors") is None:
        raise MissingExtraError("quantization", "quantize")


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

    apply_quantization_config(model, quantization_config(model, scales, bits, group_size), show_progress=False)
    compressor = ModelCompressor.from_pretrained_model(model, FORMAT)
    for name, scale in scales.items():
        linear = model.get_submodule(name)
        linear.weight_scale.data.copy_(scale)  # type: ignore[union-attr,operator]
        linear.weight.data = linear.weight.data.float()  # in bfloat16 weight / scale can round to a code's neighbour
        compress_module(linear)
    compressor.quantization_config.quantization_status = QuantizationStatus.COMPRESSED
    return compressor


def quantization_config(model: nn.Module, names: Mapping[str, Any], bits: int, group_size: int | None) -> Any:
    """The library's configuration: weights only, symmetric, one scheme; all other Linears by name under `ignore`."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=True,
        strategy="channel" if group_size is None else "group",
        group_size=group_size,
    )
    others = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in names:
            others.append(name)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=FORMAT)
    return QuantizationConfig(config_groups={"group_0": scheme}, ignore=others, format=FORMAT)


def save_compressed(output: Path, opened: PrunedModel, compressor: Any) -> None:
    """Write weights, configurations and tokenizer of a packed model into `output`, in shards as its source has them."""
    opened.model.save_pretrained(output, max_shard_size=opened.reference.shard_bytes or ONE_FILE)
    compressor.update_config(str(output))
    opened.tokenizer.save_pretrained(output)


def weight_bytes(model: nn.Module) -> int:
    """Count the bytes of all parameters and persistent buffers, tied ones once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())
