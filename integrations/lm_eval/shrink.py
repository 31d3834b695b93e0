"""Model arguments of `--model barber` that remove heads and channels, and the cached checkpoint that they mean."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from optimum_barber.base.calibration import FLAT, nested
from optimum_barber.base.errors import unknown_name
from optimum_barber.base.fields import one_line
from optimum_barber.checkpoints.names import STRUCTURE_NAME
from optimum_barber.checkpoints.structure import PrunedStructure
from optimum_barber.integrations.lm_eval.cache import cache_key, cached, device_at_hand, items
from optimum_barber.models.loading import ModelReference, load_model, load_tokenizer
from optimum_barber.shrink.scorers import as_scorer
from optimum_barber.shrink.settings import ShrinkConfig
from optimum_barber.shrink.shrinker import BarberShrinker

CUTTING = {"scorer", "remove", "remove_heads", "remove_channels", "structure"}  # any of them means a shrunk model
SETTINGS = (set(ShrinkConfig.model_fields) - {"device", "dtype", "batch_size", "scorer_args"}) | set(FLAT)


def shrink_config(settings: Mapping[str, Any], device: Any = None, evaluation: Collection[str] = ()) -> ShrinkConfig:
    """The configuration that flat arguments mean, as on the command line, the scorer's own among them.

    Raises:
        BarberError: an argument that nobody takes, or a value that is not legal.
    """
    own = as_scorer(str(settings.get("scorer", "bip"))).arguments
    for name in settings:
        if name not in SETTINGS | set(own):
            raise unknown_name("model argument", name, {*SETTINGS, *own, *evaluation, "pretrained"})
    given = {name: value for name, value in settings.items() if name in SETTINGS}
    if "calibration" in given:
        given["calibration"] = items(given["calibration"])
    arguments = {name: settings[name] for name in own if name in settings and name not in SETTINGS}
    try:
        return ShrinkConfig(**nested(given), scorer_args=arguments, device=device_at_hand(device))
    except ValidationError as error:
        raise one_line(error) from None


def shrunk_checkpoint(reference: ModelReference, config: ShrinkConfig) -> Path:
    """The checkpoint cut by `config`, from the cache where exactly this was done before."""
    read = [path / STRUCTURE_NAME if path.is_dir() else path for path in BarberShrinker(None).inputs(config)]
    key = cache_key(reference, config, config.device, read, [as_scorer(config.scorer).function])

    def make(directory: Path) -> None:
        shrinker = BarberShrinker(load_model(reference, config.dtype), load_tokenizer(reference), reference)
        shrinker.shrink(config, save_dir=directory, latency=False)

    return cached(key, STRUCTURE_NAME, make)


def structure_summary(record: PrunedStructure) -> dict[str, Any]:
    """What a table of results must say of a model whose heads and channels were cut."""
    first = next(iter(record.layers.values()))
    return {
        "base_model": record.base_model["name"],
        "scorer": record.scorer,
        "removed": record.removed,
        "head_unit": record.head_unit,
        **{kind: {"before": units.of, "after": len(units.kept)} for kind, units in first},
        "structure_fingerprint": record.fingerprint,
    }
