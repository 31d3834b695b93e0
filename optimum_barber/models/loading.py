"""MODEL on the command line: a hub id, a directory, a GGUF file or `installed:PACKAGE`."""

import copy
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base.errors import BarberError, MissingExtraError, shown
from ..base.files import read_json_object
from .bounds import check_experts, check_gguf, check_numbers
from .dtypes import check_dtype, extremes
from .packed import dequantizing_options

SMALL_FILES = (  # that go with a model, by pattern
    "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.bpe", "*.spm", "*.vocab",
    "LICEN[CS]E*", "NOTICE*", "COPYING*", "USE_POLICY*",
)  # fmt: skip


@dataclass(frozen=True)
class ModelReference:
    """Where a model lies: its name as the user gave it, and a directory; `gguf_file` is None for safetensors."""

    name: str
    directory: Path
    gguf_file: str | None = None

    @property
    def path(self) -> Path:
        """What must not be overwritten: the directory, or the GGUF file."""
        return self.directory / self.gguf_file if self.gguf_file else self.directory

    @property
    def full_name(self) -> str:
        """The name as it is found from any working directory."""
        return str(self.path.absolute()) if Path(self.name).expanduser().exists() else self.name

    @property
    def shard_bytes(self) -> int | None:
        """Size of the largest safetensors shard, None where the model is one file or no safetensors."""
        if self.gguf_file:
            return None
        sizes = [shard.stat().st_size for shard in self.directory.glob("*.safetensors") if shard.is_file()]
        return max(sizes) if len(sizes) > 1 else None


def resolve_model(model: str | Path | ModelReference) -> ModelReference:
    """Find a model's files, from the hub where its name is neither a path nor `installed:PACKAGE`."""
    if isinstance(model, ModelReference):
        return model
    name = str(model)
    if name.startswith("installed:"):
        return _in_directory(name, _package_directory(name.removeprefix("installed:")))
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise BarberError(f"model {name!r} is a file but no GGUF file: give its directory")
        return ModelReference(name, path.parent, path.name)
    return _in_directory(name, path if path.is_dir() else _from_hub(name))


def _in_directory(name: str, directory: Path) -> ModelReference:
    if (directory / "config.json").is_file():
        return ModelReference(name, directory)
    files = sorted(directory.glob("*.gguf"))
    if len(files) != 1:
        raise BarberError(
            f"model {name!r} does not exist there: {directory} holds neither config.json nor one GGUF file"
        )
    return ModelReference(name, directory, files[0].name)


def _package_directory(package: str) -> Path:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise BarberError(f"model 'installed:{package}' does not exist: no package {package!r} is installed")
    return Path(spec.submodule_search_locations[0])


def _from_hub(name: str, local: bool = False) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    files = ["*.safetensors", "README.md", *SMALL_FILES]
    try:
        return Path(snapshot_download(name, allow_patterns=files, local_files_only=local))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BarberError(f"model {name!r} is no directory or file and cannot be had from the hub: {reason}") from None


def local_model(name: str) -> ModelReference | None:
    """Return a model whose files are on this machine; None where they would have to be fetched, or are missing."""
    try:
        if name.startswith("installed:") or Path(name).expanduser().exists():
            return resolve_model(name)
        return _in_directory(name, _from_hub(name, local=True))
    except BarberError:
        return None


def load_config(reference: ModelReference, quantized: bool = False) -> Any:
    """Read the transformers configuration of a causal LM; code that comes with the model is never run.

    Raises:
        BarberError: it cannot be read, it is not a causal LM's, it is quantized without `quantized`, or transformers
            would take other weights than those beside it.
    """
    from transformers import AutoConfig

    name = reference.name
    options = _options(reference)
    try:
        config = AutoConfig.from_pretrained(reference.directory, **options)
    except Exception as error:  # whatever transformers raises on a bad file
        reason = _reason(reference, "config.json", "AutoConfig", error)
        raise BarberError(f"model {name!r} cannot be read: {reason}") from None
    check_numbers(name, config.to_dict())
    check_experts(name, config)
    if reference.gguf_file is None:
        _check_weights_of(reference, config, quantized)
    kind = auto_class(config)
    own = kind._model_mapping[type(config)].__name__ if kind is not None else None
    stated = getattr(config, "architectures", None) or [own]
    stated = stated if isinstance(stated, list) else [stated]
    if own is None or not any(_is_causal(other, own) for other in stated):
        raise BarberError(f"model {name!r} is not a causal LM but {', '.join(map(str, stated))}")
    return config


def auto_class(config: Any) -> Any:
    """Return the Auto class that loads a configuration's model: a causal LM, or one inside a model of images and text.

    Of both, it is the one whose class the configuration names (Qwen3.5, Llama 4); of neither, None.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kinds: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText)
    fitting = [kind for kind in kinds if type(config) in kind._model_mapping]
    stated = getattr(config, "architectures", None) or []
    for kind in fitting:
        if kind._model_mapping[type(config)].__name__ in stated:
            return kind
    return fitting[0] if fitting else None


def _is_causal(stated: object, own: str) -> bool:
    """Whether a config's architecture is the causal LM of its model type, perhaps by an old name or a twin's."""
    return stated == own or str(stated).lower().endswith(("forcausallm", "lmheadmodel"))


def _check_weights_of(reference: ModelReference, config: Any, quantized: bool) -> None:
    """Refuse what has transformers take other tensors than those of the model's own files."""
    name = reference.name
    for key in ("quantization_config", "quantization"):  # the latter of MLX
        if not quantized and getattr(config, key, None):
            raise BarberError(f"model {name!r} is quantized and cannot be pruned: give the unquantized one")
    if getattr(config, "transformers_weights", None):
        raise BarberError(f"model {name!r} names its weights by transformers_weights in config.json: leave that out")
    if (reference.directory / "adapter_config.json").is_file():
        raise BarberError(f"model {name!r} holds an adapter beside its weights (adapter_config.json): merge it first")


def _reason(reference: ModelReference, file: str, loader: str, error: Exception) -> str:
    """Why transformers could not open a model or tokenizer: the code that it would have to run, or its own error."""
    path = reference.directory / file
    if reference.gguf_file is None and path.is_file():
        classes = read_json_object(path, "configuration").get("auto_map")
        if isinstance(classes, dict) and loader in classes:
            return f"it needs code of its own, {shown(classes[loader])} of {file}, which is never run"
    return brief(error)


def empty_model(config: Any, **options: Any) -> Any:
    """Build the causal LM of a configuration without its weights: parameters on the meta device, buffers real.

    `options` are those of `from_config`, such as `dtype` and `attn_implementation`.
    """
    from accelerate import init_empty_weights

    kind = auto_class(config)
    with init_empty_weights(include_buffers=False):
        model: Any = kind.from_config(config, trust_remote_code=False, **options)
    model.tie_weights()
    return model.eval()


def load_model(reference: ModelReference, dtype: str = "auto", quantized: bool = False) -> nn.Module:
    """Load the causal LM onto the CPU; `auto` keeps the checkpoint's dtype, float16 for GGUF.

    Where `quantized` allows it, a compressed-tensors checkpoint becomes a plain model of its dequantized weights.

    Raises:
        BarberError: it is no causal LM, its weights are missing, or they are pickled.
    """
    config = load_config(reference, quantized)
    options: dict[str, Any] = {} if reference.gguf_file else {"use_safetensors": True}
    options |= dequantizing_options(reference.directory, config)
    if dtype != "auto":
        options["dtype"] = getattr(torch, dtype)
    else:
        options["dtype"] = torch.float16 if reference.gguf_file else "auto"
    model = _loaded(reference, auto_class(config), options)
    if model.dtype == torch.float16 and any(extremes(parameter).isinf().any() for parameter in model.parameters()):
        check_dtype(_loaded(reference, auto_class(config), {**options, "dtype": torch.float32}), "float16")
    return _plain_model(model) if reference.gguf_file else model


def _loaded(reference: ModelReference, kind: Any, options: Mapping[str, Any]) -> Any:
    """The model as the Auto class `kind` loads it, with all of its weights from the files, or from `state_dict`."""
    options = {**_options(reference), **options}
    place: Path | None = reference.directory
    if "state_dict" in options:
        kind, place = kind._model_mapping[type(options["config"])], None
        options["generation_config"] = load_generation_config(reference)
    try:
        loaded: Any = kind.from_pretrained(place, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except Exception as error:  # whatever transformers and safetensors raise on a bad file
        raise BarberError(f"model {reference.name!r} cannot be loaded: {brief(error)}") from None
    model, info = loaded
    if info["mismatched_keys"]:
        key, stored, expected = sorted(info["mismatched_keys"])[0]
        shapes = f"{tuple(stored)}, its config says {tuple(expected)}"
        raise BarberError(f"model {reference.name!r}: {key} has shape {shapes}")
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise BarberError(f"model {reference.name!r} lacks weights, which would be random: {missing}")
    return model


def load_generation_config(reference: ModelReference) -> Any:
    """Read the generation settings of a model as transformers does: without a file of their own, from config.json."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(reference.directory)
    except OSError:
        return GenerationConfig.from_pretrained(
            reference.directory, config_file_name="config.json", _from_model_config=True
        )


def load_tokenizer(reference: ModelReference) -> Any:
    """Load the model's tokenizer; a `BarberError` where there is none."""
    from transformers import AutoTokenizer

    options = _options(reference)
    try:
        return AutoTokenizer.from_pretrained(reference.directory, **options)
    except Exception as error:  # whatever transformers raises on missing or bad files
        reason = _reason(reference, "tokenizer_config.json", "AutoTokenizer", error)
        raise BarberError(f"model {reference.name!r} has no usable tokenizer: {reason}") from None


def brief(error: Exception) -> str:
    """Kind and beginning of another library's error, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _options(reference: ModelReference) -> dict[str, Any]:
    """What every call to transformers is given for this model."""
    options: dict[str, Any] = {"trust_remote_code": False}
    if reference.gguf_file is not None:
        needs_gguf()
        check_gguf(reference.path)
        options["gguf_file"] = reference.gguf_file
    return options


def needs_gguf() -> None:
    """Refuse to go on without the package that reads GGUF files."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("a GGUF model", "gguf")


def _plain_model(model: Any) -> nn.Module:
    """Return the same weights in a model that knows nothing of GGUF, so that transformers will save it."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = empty_model(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    result: nn.Module = plain
    return result
