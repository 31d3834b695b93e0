"""The public verb of permutations: a causal LM whose channels change places, so that N:M masks drop less of it.

The result computes the same function and is an ordinary checkpoint: it is the dense model of every run that follows.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..base.errors import BarberError, FailedCheckError
from ..base.files import write_json
from ..base.notebook import notebook_table
from ..base.output import check_output, staged
from ..checkpoints.card import Step, write_card
from ..checkpoints.carry import save_tokenizer
from ..checkpoints.channel_order import ChannelOrder, OrderedChannels
from ..checkpoints.names import ORDER_NAME
from ..checkpoints.pruned import carry_structure
from ..checkpoints.push import Published
from ..checkpoints.write import check_settings, save_model, software
from ..models.device import summing_device
from ..models.dtypes import cast_parameters
from ..models.linears import check_weights, matrices_of_model
from ..models.source import ModelSource
from ..models.tool import PretrainedTool
from ..models.wrappers import keep_modes
from ..tensors.channel_order import channel_order, dropped_scores
from ..tensors.patterns import SparsityPattern
from ..text.sources import text_files
from ..text.windows import Calibration, TokenWindows, windows_for
from .permutation import Site, permute, sites_of
from .permute_settings import PermuteConfig, PermuteSettings
from .scan import dense_pass

NORM = frozenset({"input_norm"})
ROWS = 2**17  # of scores that are looked at in the search for one order
ROUNDING = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}  # of logits: sums run in another order


@dataclass
class PermuteResult(Published):
    """The permuted model, its record, `channel_order.json`, and where both were written, if they were."""

    model: Any
    record: ChannelOrder
    directory: Path | None = None

    def _repr_html_(self) -> str:
        rows = []
        for kind, (before, after) in self.record.dropped().items():
            rows.append({"channels": kind, "before": before, "after": after})
        title = f"Share of the scores that a {self.record.pattern} mask drops"
        return notebook_table(title, rows, ["channels", "before", "after"])


class BarberPermuter(PretrainedTool):
    """Reorders the channels of a causal LM's FFN, of its attention's values and of its residual stream for N:M masks.

    Args:
        model: a transformers causal LM, changed in place.
        tokenizer: needed for calibration text, and saved with the model; None where tokens are given.
        reference: where the model was loaded from, if it was.
    """

    @keep_modes
    def permute(
        self,
        config: PermuteConfig,
        calibration: Calibration = None,
        save_dir: str | Path | None = None,
        overwrite: bool = False,
        quiet: bool = False,
    ) -> PermuteResult:
        """Permute the model and, with `save_dir`, write its checkpoint.

        Args:
            config: everything that decides the order.
            calibration: texts, token windows (samples, length) int64, or None for `config.calibration`.
            save_dir: where the checkpoint goes; written beside and renamed at the end.
            overwrite: whether `save_dir` may hold something already; it stays until the end.
            quiet: no progress bar.

        Raises:
            BarberError: bad input; nothing was written, and no weight has changed.
            FailedCheckError: the permuted model computes something else; nothing was written, but it is permuted.
        """
        output = check_output(save_dir, overwrite, self.inputs(config)) if save_dir is not None else None
        if output is not None:
            check_settings(self.model)
        source = ModelSource(self.model, summing_device(config.device))
        sites = checked_sites(source, config)
        check_weights(source, ())
        windows = windows_for(self.model, self.tokenizer, config.calibration, config.seed, calibration)
        cast_parameters(self.model, config.dtype)
        with staged(output) if output is not None else nullcontext() as partial:
            record = self._permuted(config, source, sites, windows, quiet)
            if partial is not None:
                save_model(partial, self.model, self.reference)
                save_tokenizer(partial, self.tokenizer, self.reference)
                write_json(partial / ORDER_NAME, record.model_dump())
                if self.reference:
                    carry_structure(self.reference.directory, partial, {"name": "permute"})
                write_card(partial, self.reference, Step("permute", config, record.calibration["source"]))
        return PermuteResult(self.model, record, output)

    def inputs(self, config: PermuteConfig) -> list[Path]:
        """Files and directories that a run reads, and so must not write."""
        paths = text_files(config.calibration.texts)
        if self.reference:
            paths.append(self.reference.path)
        return paths

    def _permuted(
        self, config: PermuteConfig, source: ModelSource, sites: Sequence[Site], windows: TokenWindows, quiet: bool
    ) -> ChannelOrder:
        """Change the order of all channels, and check that the model computes what it did."""
        pattern = SparsityPattern.parse(config.pattern, None)
        norms = input_norms(source, windows.tokens, config.batch_size)
        weights = {name: linear.weight.detach() for name, linear in matrices_of_model(source).items()}
        ordered: dict[str, OrderedChannels] = {}
        for site in tqdm(sites, unit="site", desc="order of channels", disable=quiet or None):
            ordered[site.name] = ordered_channels(site, weights, norms, pattern)
        before = logits_of(self.model, windows.tokens[:1])
        orders = {name: torch.tensor(channels.order) for name, channels in ordered.items()}
        permute(dict(source.model.named_parameters()), sites, orders)
        dtype = next(self.model.parameters()).dtype
        check_same(before, logits_of(self.model, windows.tokens[:1]), dtype)
        return ChannelOrder(
            pattern=str(pattern),
            sites=ordered,
            calibration=windows.as_record(config.seed),
            base_model={"name": self.name, "model_type": source.model_type, "dtype": str(dtype).removeprefix("torch.")},
            software=software(),
        )


def checked_sites(source: ModelSource, config: PermuteSettings) -> list[Site]:
    """Return what changes places in a model.

    Raises:
        BarberError: an unknown family, a pattern that does not fit, or masks.
    """
    if getattr(source.model.config, "sparsity_config", None):
        raise BarberError("model is pruned already: its masks would not follow; permute the dense model")
    sites, pattern = sites_of(source, config.kinds), SparsityPattern.parse(config.pattern, None)
    for site in sites:
        pattern.check_width(site.name, site.size)
    return sites


@torch.no_grad()
def input_norms(source: ModelSource, windows: Tensor, batch_size: int | None = None) -> dict[str, Tensor]:
    """Return ||X_j||_2 of every input channel of every Linear on the dense stream, (in,) float32 by Linear."""
    norms = {}
    for _, _, trial in dense_pass(source, windows, NORM, batch_size):
        for name, statistics in trial.statistics.items():
            assert statistics.input_norm is not None
            norms[name] = statistics.input_norm
    return norms


@torch.no_grad()
def ordered_channels(
    site: Site, weights: Mapping[str, Tensor], norms: Mapping[str, Tensor], pattern: SparsityPattern
) -> OrderedChannels:
    """Look for the order of a site's channels under which an N:M mask drops least of the scores of its readers.

    Args:
        weights: of the Linears, (out, in), by name.
        norms: ||X_j||_2 of their inputs, (in,) float32, by name.
    """
    scores = site_scores(site, weights, norms)
    order = channel_order(scores, pattern.keep, pattern.group)
    total = max(float(scores.sum(dtype=torch.float64)), torch.finfo(torch.float64).tiny)
    dropped = []
    for candidate in (torch.arange(site.size), order):
        dropped.append(dropped_scores(scores, candidate, pattern.keep, pattern.group) / total)
    return OrderedChannels(kind=site.kind, order=order.tolist(), dropped_before=dropped[0], dropped_after=dropped[1])


def site_scores(site: Site, weights: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> Tensor:
    """Return |W_ij| ||X_j|| of all that reads a site's channels, one Linear below another, (rows, channels) float32.

    The scores of each whole Linear sum up to 1. Where there are more than `ROWS` rows, every so many are taken.
    """
    rows = sum(len(weights[span.linear]) for span in site.read)
    stride = -(-rows // ROWS)
    parts = []
    for span in site.read:
        norm = norms[span.linear]
        scores = weights[span.linear].to(norm.device, norm.dtype).abs() * norm
        total = scores.sum(dtype=torch.float64).clamp(min=torch.finfo(torch.float32).tiny)
        parts.append(span.part(scores, site.size)[::stride] / total.float())
    return torch.cat(parts)


@torch.no_grad()
def logits_of(model: Any, window: Tensor) -> Tensor:
    """Return the logits of a model for one window, (1, length, vocabulary), in float32 on the CPU."""
    logits = model(window.to(next(model.parameters()).device), use_cache=False).logits
    return logits.float().cpu()


def check_same(before: Tensor, after: Tensor, dtype: torch.dtype) -> None:
    """Refuse a permutation that changes logits by more than rounding in the model's dtype does."""
    difference = float(torch.linalg.vector_norm((after - before).double()))
    norm = float(torch.linalg.vector_norm(before.double()))
    if not difference <= ROUNDING[dtype] * norm:
        raise FailedCheckError(f"permuted model computes something else: its logits differ by {difference / norm:.2g}")
