"""Flat model arguments of `--model barber` as settings of `prune` or `shrink`."""

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError

from optimum_barber.base.calibration import FLAT, nested
from optimum_barber.base.errors import BarberError, unknown_name
from optimum_barber.base.fields import keyword_only, one_line
from optimum_barber.prune.producers import as_producer
from optimum_barber.prune.rebuild_settings import RebuildConfig
from optimum_barber.prune.settings import BarberConfig
from optimum_barber.runs.tasks.lm import available_device
from optimum_barber.shrink.scorers import as_scorer
from optimum_barber.shrink.settings import ShrinkConfig

EVALUATION = {"device", "dtype", "batch_size"}  # lm-eval's own, which say how the checkpoint is evaluated
REBUILD = (set(RebuildConfig.model_fields) - {"method"}) | {"rebuild"}
PRUNING = (set(BarberConfig.model_fields) - EVALUATION) | REBUILD | set(FLAT)
SHRINKING = (set(ShrinkConfig.model_fields) - EVALUATION - {"scorer_args"}) | set(FLAT)
LISTS = ("calibration", "ignore")


def barber_config(settings: Mapping[str, Any], device: Any = None, evaluation: Collection[str] = ()) -> BarberConfig:
    """Return the configuration that flat arguments mean, as on the command line: `rebuild` is the method.

    `masks=FILE` without a producer stands for these masks as they are: producer `masks`, rebuild `none`.

    Args:
        settings: the arguments.
        device: of the evaluation; the pruning takes place there too.
        evaluation: names of the arguments that lm-eval takes, for the error.

    Raises:
        BarberError: an argument that nobody takes, or a value that is not legal.
    """
    if "masks" in settings and "producer" not in settings:
        settings = {"producer": "masks", "rebuild": "none", **settings}
    own = keyword_only(as_producer(str(settings.get("producer", "wanda"))).function)
    fields, arguments = _parted(settings, PRUNING, own, {*evaluation, "pretrained", "recipe"})
    rebuild = {name: fields.pop(name) for name in REBUILD & set(fields)}
    if "rebuild" in rebuild:
        rebuild["method"] = rebuild.pop("rebuild")
    shared = fields.pop("producer_args", {})
    if not isinstance(shared, Mapping):
        raise BarberError(f"producer_args {shared!r} is not legal: {{'NAME': VALUE}}")
    return _checked(BarberConfig, device, **fields, producer_args={**shared, **arguments}, rebuild=rebuild)


def shrink_config(settings: Mapping[str, Any], device: Any = None, evaluation: Collection[str] = ()) -> ShrinkConfig:
    """Return the configuration that flat arguments mean, as on the command line, the scorer's own among them.

    Args and errors are those of `barber_config`.
    """
    scorer = str(settings.get("scorer", "bip"))
    own = () if "remove_experts" in settings else keyword_only(as_scorer(scorer).function)
    fields, arguments = _parted(settings, SHRINKING, own, {*evaluation, "pretrained"})
    return _checked(ShrinkConfig, device, **fields, scorer_args=arguments)


def _parted(
    settings: Mapping[str, Any], fields: set[str], own: Collection[str], others: set[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split arguments into fields of a configuration and those of its producer or scorer; `others` are legal too."""
    taken: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    for name, value in settings.items():
        if name in fields:
            taken[name] = _items(value) if name in LISTS else value
        elif name in own:
            arguments[name] = value
        else:
            raise unknown_name("model argument", name, {*fields, *own, *others})
    return taken, arguments


def _items(value: Any) -> list[str]:
    """Return a list out of `[a,b]`, which lm-eval leaves a string, or of a single name."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        return [part.strip().strip("'\"") for part in value[1:-1].split(",")]
    if not isinstance(value, list | tuple):
        return [str(value)]
    return [str(item) for item in value]


def _checked(config: Any, device: Any, **fields: Any) -> Any:
    try:
        return config(**nested(fields), device=str(available_device(device)))
    except ValidationError as error:
        raise one_line(error) from None
