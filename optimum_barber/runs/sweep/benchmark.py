"""The dense model of a sweep: loaded once, scored in one pass for all cells on the same windows, cut for each cell."""

from collections.abc import Mapping

import torch

from ...models.device import summing_device
from ...models.loading import ModelReference, load_config
from ...models.measure import latency, macs_per_token, size_of
from ...models.source import working_copy
from ...shrink.cut import cut_model
from ...shrink.figures import describe_cut, prompt_of, report_of
from ...shrink.plan import Cut, plan_cut
from ...shrink.scan import choose_units
from ...shrink.settings import ShrinkConfig
from ...shrink.shrinker import BarberShrinker
from ...shrink.units import Kept
from ...text.perplexity import perplexity
from ...text.windows import TokenWindows, sequence_length, windows_for
from ..cells import DENSE, Record
from ..evaluate import evaluation_windows
from .settings import SweepConfig


class CutBenchmark:
    """The dense model and what is measured on it and on what the cells in `configs` cut out of it.

    Raises:
        BarberError: a text, a length, a scorer or a share that does not fit.
    """

    def __init__(
        self, reference: ModelReference, config: SweepConfig, configs: dict[str, ShrinkConfig], quiet: bool
    ) -> None:
        self.config, self.configs, self.quiet = config, configs, quiet
        self.device, calibration = summing_device(config.device), config.calibration
        sequence_length(load_config(reference), calibration.sequence_length)
        self.shrinker = BarberShrinker.from_pretrained(reference.name, config.dtype)
        model = self.shrinker.model
        self.evaluation = evaluation_windows(
            config.evaluation, self.shrinker.tokenizer, model, calibration, config.windows
        )
        self.dtype = torch.float32 if self.device.type == "cpu" else next(model.parameters()).dtype
        self.cuts = {name: plan_cut(model, own) for name, own in configs.items()}
        self.choices: dict[int, tuple[TokenWindows, dict[str, Kept]]] = {}  # by number of samples

    def measure(self, name: str, results: Mapping[str, Record]) -> Record:
        """Return size, cost, errors and perplexity of a cell; no cut or shape among `results` is measured again."""
        if name == DENSE:
            return self._dense()
        config, cut = self.configs[name], self.cuts[name]
        windows, kept = self._choice(name)
        fingerprint = describe_cut(config, cut, kept, windows, self.shrinker.name).fingerprint
        same = [result for result in results.values() if result.get("structure_fingerprint") == fingerprint]
        result = same[0] if same else self._cut(config, cut, kept, windows, results)
        axes = {"scorer": config.scorer, "samples": config.calibration.samples, "asked": config.remove}
        return {**result, **axes, "structure_fingerprint": fingerprint}

    def _dense(self) -> Record:
        model = self.shrinker.model
        prompt = prompt_of(model.config)
        sizes: Record = {**size_of(model), "macs_per_token": macs_per_token(model.config, prompt)}
        with working_copy(model, self.device, self.dtype):
            if self.config.latency:
                sizes["latency"] = latency(model, prompt)
            return {"after": sizes, "perplexity": perplexity(model, self.evaluation, self.quiet).as_dict()}

    def _choice(self, name: str) -> tuple[TokenWindows, Kept]:
        """Return the calibration windows of a cell and the units that stay, chosen for all cells with these windows."""
        samples = self.configs[name].calibration.samples
        if samples not in self.choices:
            names = [other for other, config in self.configs.items() if config.calibration.samples == samples]
            config = self.configs[name]
            windows = windows_for(self.shrinker.model, self.shrinker.tokenizer, config.calibration, config.seed)
            cuts = [self.cuts[other] for other in names]
            units = choose_units(self.cuts[name].source, windows.tokens, cuts)
            self.choices[samples] = windows, dict(zip(names, units, strict=True))
        windows, kept = self.choices[samples]
        return windows, kept[name]

    def _cut(
        self, config: ShrinkConfig, cut: Cut, kept: Kept, windows: TokenWindows, results: Mapping[str, Record]
    ) -> Record:
        """Cut the model and measure what is left; its latency is that of an earlier cell of the same shape."""
        small = cut_model(self.shrinker.model, cut.config, kept, cut.units)
        alike = [result for result in results.values() if _has_shape(result, cut)]
        result = report_of(config, cut, kept, small, windows, {}, self.config.latency and not alike)
        if self.config.latency and alike:
            for state in ("before", "after"):
                result[state]["latency"] = alike[0][state]["latency"]
        with working_copy(small, self.device, self.dtype):
            result["perplexity"] = perplexity(small, self.evaluation, self.quiet).as_dict()
        return result


def _has_shape(result: Record, cut: Cut) -> bool:
    """True if a cell's model has the heads and channels that a cut leaves."""
    for kind, units in cut.units.items():
        if result.get(kind, {}).get("after") != cut.budget.kept[kind] * units.heads:
            return False
    return True
