"""Charts of a run from the blocks of its `report.json`, and pictures that hold several runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...checkpoints.record import SparsityConfig
from .charts import save
from .page import Bars, Heat, Lines, Rows, Section, Series, Table, grouped

Block = Mapping[str, Any]
MEBIBYTE = 2**20
LAYER = "decoder layer"
PANELS = ("attention alone", "MLP alone", "layer's output, earlier cuts included")  # of a shrunk model
FIGURES = (
    "error_before", "error_rebuilt", "error_after", "pairs", "swaps", "rows", "rows_without_swap",
    "forward_passes", "gradient_passes", "seconds", "peak_memory",
)  # fmt: skip


def block_sections(blocks: Sequence[Block]) -> list[Section]:
    """Error, pair values, ratio, swaps and cost of every block; a line says what was not recorded."""
    blocks = list(map(_with_ratios, blocks))
    error_fall = _by_layer(blocks, "Relative error", "error_fall", "error after / before")
    seconds = _by_layer(blocks, "Seconds by block", "seconds", "seconds")
    memory = _by_layer(blocks, "Peak memory so far", "mebibytes", "MiB")
    ratios: list[Any] = [_search_chart(blocks)]
    if any(map(_first_round, blocks)):
        ratios.append(_by_layer(blocks, "Ratio of the first round", "ratio", "ratio α, log scale", log=True))
    return [
        Section("Error by block", [errors(blocks), error_fall]),
        Section("Pair values", _pair_values(blocks)),
        Section("Error over the ratio", ratios),
        Section("Swaps", _swaps(blocks)),
        Section("Time and memory", [seconds, memory]),
        Section("All blocks", [_every_block(blocks)]),
    ]


def _with_ratios(block: Block) -> Block:
    """The block with figures that follow from its own."""
    return {
        **block,
        "error_fall": block["error_after"] / block["error_before"] if block["error_before"] else None,
        "share_without_swap": block["rows_without_swap"] / max(block["rows"], 1),
        "mebibytes": block["peak_memory"] / MEBIBYTE,
        "ratio": _first_round(block).get("ratio") or None,
    }


def layer_of(block: Block) -> int:
    """The layer's number in a name such as "model.layers.0.attention"."""
    return int(str(block["block"]).split(".")[-2])


def _kind_of(block: Block) -> str:
    return str(block["block"]).split(".")[-1]


def _short_name(block: Block) -> str:
    return f"{_kind_of(block)} {layer_of(block)}"


def _by_layer(blocks: Sequence[Block], title: str, figure: str, axis: str, log: bool = False) -> Lines:
    """One figure of every block over the layers, a line for each kind of block."""
    series = []
    for kind, members in grouped(blocks, _kind_of).items():
        series.append(Series(kind, list(map(layer_of, members)), [block[figure] for block in members]))
    return Lines(title, "", LAYER, axis, series, log_y=log)


def errors(blocks: Sequence[Block]) -> Lines:
    """The block error before and after, by layer."""
    states = ["before", "after"]
    note = "At the producer's masks, and at the masks that were kept."
    if any(block.get("reconstructions") for block in blocks):
        states.insert(1, "rebuilt")
        note = "At the producer's masks, at the rebuilt masks, and with the new values of the kept weights."
    series = []
    for kind, members in grouped(blocks, _kind_of).items():
        layers = list(map(layer_of, members))
        for state in states:
            series.append(Series(f"{kind}, {state}", layers, [block.get(f"error_{state}") for block in members]))
    return Lines("Block error before and after", note, LAYER, "block error E, log scale", series, log_y=True)


def _first_round(block: Block) -> Mapping[str, Any]:
    """The record of the first round that took a ratio; empty where none did."""
    for record in block.get("rounds") or ():
        if "ratio" in record:
            return record
    return {}


def _examples(blocks: Sequence[Block], key: str) -> list[Block]:
    """First, middle and last block of each kind among those whose first round recorded `key`."""
    chosen = []
    for members in grouped(blocks, _kind_of).values():
        recorded = [block for block in members if _first_round(block).get(key)]
        if recorded:
            places = sorted({0, len(recorded) // 2, len(recorded) - 1})
            chosen += [recorded[place] for place in places]
    return chosen


def _pair_values(blocks: Sequence[Block]) -> list[Any]:
    """Histograms of the pair values in the first round, the swapped share marked (the paper's Fig. 3)."""
    charts = list(map(_pair_chart, _examples(blocks, "values")))
    if not charts:
        return ["Not recorded: no block ranked pairs of pruned and kept weights, or the run is of an older version."]
    note = "First round of the first, middle and last block of each kind. What lies right of the mark was swapped."
    return [note, *charts]


def _pair_chart(block: Block) -> Lines:
    record = _first_round(block)
    values = record["values"]
    low, high, counts = values["lowest"], values["highest"], values["counts"]
    edges = [low * (high / low) ** (place / len(counts)) for place in range(len(counts) + 1)]
    marks = []
    if values["cut"] is not None:
        marks.append((values["cut"], f"α = {record['ratio']:.3g}"))
    note = f"{sum(counts):,} of {record['pairs']:,} worthwhile pairs were ranked, {record['swaps']:,} swapped."
    return Lines(
        f"Pair values, {_short_name(block)}", note, "S_grow − S_prune, log scale", "pairs",
        [Series("pairs", edges, counts)], log_x=high > low, marks=marks, stepped=True,
    )  # fmt: skip


def _search_chart(blocks: Sequence[Block]) -> Lines | str:
    """E(α) / E(0) of some blocks; a line of text where no search was recorded."""
    series = []
    for block in _examples(blocks, "candidates"):
        candidates = dict(_first_round(block)["candidates"])
        standing = candidates.pop(0, 0.0)
        if standing:
            relative = [error / standing for error in candidates.values()]
            series.append(Series(_short_name(block), list(candidates), relative))
    if not series:
        return "Not measured: no search for the ratio was made, or the run is of an older version."
    note = "Measured on a share of the samples in the first round; below 1 the swap helps. The lowest was taken."
    return Lines(
        "Error over the ratio", note, "ratio α, log scale", "E(α) / E(0)", series, log_x=True, log_y=True
    )  # fmt: skip


def _swaps(blocks: Sequence[Block]) -> list[Any]:
    if not any(block["swaps"] for block in blocks):
        return ["Not swapped: every weight is as the producer's masks have it."]
    return [
        _by_layer(blocks, "Weights swapped", "swaps", "weights"),
        _by_layer(blocks, "Rows without a swap", "share_without_swap", "share"),
    ]


def _every_block(blocks: Sequence[Block]) -> Table:
    columns = ["block", *(name.replace("_", " ") for name in FIGURES), "rounds accepted"]
    rows: Rows = []
    for block in blocks:
        rounds = block.get("rounds") or []
        accepted = sum(bool(record.get("accepted")) for record in rounds)
        rows.append([block["block"], *map(block.get, FIGURES), f"{accepted} of {len(rounds)}"])
    return Table("Every block", columns, rows, folded=True)


def sparsity_map(record: SparsityConfig) -> Heat:
    """Sparsity by decoder layer and Linear."""
    layers: dict[str, dict[str, float]] = {}
    columns: dict[str, str] = {}
    for name, module in record.modules.items():
        parts = name.split(".")
        numbers = [part for part in parts if part.isdigit()]
        layer = numbers[0] if numbers else name
        columns[parts[-1]] = parts[-1].removesuffix("_proj")
        layers.setdefault(layer, {})[parts[-1]] = module.sparsity
    values = [list(map(row.get, columns)) for row in layers.values()]
    note = "Pruned weights in per cent, by decoder layer and Linear; darker is sparser."
    return Heat("Sparsity by Linear", note, list(layers), list(columns.values()), values)


def picture(
    path: Path, perplexities: Mapping[str, Mapping[str, float]], dense: float, blocks: Sequence[Block], title: str
) -> None:
    """Draw perplexity bars beside the dense line, and the block error before and after by layer.

    Args:
        path: of the picture; its suffix decides the format.
        perplexities: by producer, then by "without" and "with" rebuild.
        dense: perplexity of the dense model.
        blocks: of one run's `report.json`.
        title: above the picture.
    """
    values: dict[str, float | None] = {}
    for name, by_rebuild in perplexities.items():
        for key, value in by_rebuild.items():
            values[f"{name}, {key} rebuild"] = value
    save(path, [Bars("Perplexity", "", "perplexity", values, ("dense", dense), log=True), errors(blocks)], title)


def curve_picture(
    path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], dense: float, over: str, title: str = ""
) -> None:
    """Draw perplexity as curves of points (x, perplexity) beside the dense line; `over` says what x is."""
    series = [Series.through(label, points) for label, points in curves.items()]
    chart = Lines("Perplexity", "", over, "perplexity, log scale", series, log_y=True, reference=("dense", dense))
    save(path, [chart], title)


def error_picture(path: Path, reports: Mapping[str, Mapping[str, Any]], title: str = "") -> None:
    """Draw the error that cuts cause: of each attention and MLP block alone, and of each decoder layer's output.

    `reports` holds by label, such as the scorer, the `report.json` of a shrunk model.
    """
    panels: dict[str, list[Series]] = {name: [] for name in PANELS}
    for label, report in reports.items():
        curves = (_errors_of(report, "attention"), _errors_of(report, "mlp"), report["layer_errors"])
        for series, errors in zip(panels.values(), curves, strict=True):
            series.append(Series(label, list(range(len(errors))), errors))
    charts = []
    for name, series in panels.items():
        charts.append(Lines(name, "", LAYER, "relative squared error, log scale", series, log_y=True))
    save(path, charts, title)


def _errors_of(report: Mapping[str, Any], kind: str) -> list[float]:
    return [block["error"] for block in report["blocks"] if block["block"].endswith(kind)]
