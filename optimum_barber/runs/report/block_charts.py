"""Charts of a pruning run, out of the blocks of its `report.json`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .page import Heat, Lines, Section, Series, Table

Block = Mapping[str, Any]
MEBIBYTE = 2**20
LAYER = "decoder layer"
FIGURES = (
    "error_before", "error_rebuilt", "error_after", "pairs", "swaps", "rows", "rows_without_swap",
    "forward_passes", "gradient_passes", "seconds", "peak_memory",
)  # fmt: skip


def block_sections(blocks: Sequence[Block]) -> list[Section]:
    """Error, pair values, ratio, swaps and cost of every block; each lack has its line."""
    return [
        Section("Error by block", [errors(blocks), by_layer(blocks, "relative error", _fall, "error after / before")]),
        Section("Pair values", pair_values(blocks)),
        Section("Error over the ratio", ratios(blocks)),
        Section("Swaps", swaps(blocks)),
        Section("Time and memory", [
            by_layer(blocks, "Seconds by block", lambda b: b["seconds"], "seconds"),
            by_layer(blocks, "Peak memory so far", lambda b: b["peak_memory"] / MEBIBYTE, "MiB"),
        ]),
        Section("All blocks", [every_block(blocks)]),
    ]  # fmt: skip


def layer_of(block: Block) -> int:
    """The layer's number out of a name such as "model.layers.0.attention"."""
    return int(str(block["block"]).split(".")[-2])


def kinds(blocks: Iterable[Block]) -> dict[str, list[Block]]:
    """The blocks by what ends their name, attention and mlp, in order."""
    found: dict[str, list[Block]] = {}
    for block in blocks:
        found.setdefault(str(block["block"]).split(".")[-1], []).append(block)
    return found


def by_layer(
    blocks: Sequence[Block], title: str, value: Callable[[Block], float | None], axis: str, log: bool = False
) -> Lines:
    """One figure of every block, a line a kind."""
    series = [Series(kind, list(map(layer_of, of)), list(map(value, of))) for kind, of in kinds(blocks).items()]
    return Lines(title[0].upper() + title[1:], "", LAYER, axis, series, log_y=log)


def errors(blocks: Sequence[Block]) -> Lines:
    """The block error before and after, by layer."""
    reconstructed = any(block.get("reconstructions") for block in blocks)
    states = ("before", "rebuilt", "after") if reconstructed else ("before", "after")
    series = [
        Series(f"{kind}, {state}", list(map(layer_of, of)), [block.get(f"error_{state}") for block in of])
        for kind, of in kinds(blocks).items()
        for state in states
    ]
    note = "At the producer's masks, and at the masks that were kept."
    if reconstructed:
        note = "At the producer's masks, at the rebuilt masks, and with the new values of the kept weights."
    return Lines("Block error before and after", note, LAYER, "block error E, log scale", series, log_y=True)


def _fall(block: Block) -> float | None:
    return block["error_after"] / block["error_before"] if block["error_before"] else None


def shown(blocks: Sequence[Block], key: str) -> list[tuple[Block, Mapping[str, Any]]]:
    """First, middle and last block of each kind of those whose first round recorded `key`, with that round."""
    found = []
    for of in kinds(blocks).values():
        held = [(block, first_round(block)) for block in of if first_round(block).get(key)]
        places = sorted({0, len(held) // 2, len(held) - 1}) if held else []
        found += [held[place] for place in places]
    return found


def first_round(block: Block) -> Mapping[str, Any]:
    """The record of the first round that took a ratio; empty where none did."""
    return next((record for record in block.get("rounds") or () if "ratio" in record), {})


def short(block: Block) -> str:
    """A name such as "mlp 3"."""
    return f"{str(block['block']).split('.')[-1]} {layer_of(block)}"


def pair_values(blocks: Sequence[Block]) -> list[Any]:
    """The distribution of the pair values in the first round, the swapped share marked (the paper's Fig. 3)."""
    found: list[Any] = [pair_chart(block, record) for block, record in shown(blocks, "values")]
    if not found:
        return ["Not recorded: no block ranked pairs of pruned and kept weights, or the run is of an older version."]
    return ["First round of the first, middle and last block of each kind. What lies right of the mark was swapped.",
            *found]  # fmt: skip


def pair_chart(block: Block, record: Mapping[str, Any]) -> Lines:
    """One block's distribution as a histogram on a log axis."""
    values, ratio = record["values"], record["ratio"]
    low, high, counts = values["lowest"], values["highest"], values["counts"]
    edges = [low * (high / low) ** (place / len(counts)) for place in range(len(counts) + 1)]
    marks = [] if values["cut"] is None else [(values["cut"], f"α = {ratio:.3g}")]
    note = f"{sum(counts):,} of {record['pairs']:,} worthwhile pairs were ranked, {record['swaps']:,} swapped."
    return Lines(
        f"Pair values, {short(block)}", note, "S_grow − S_prune, log scale", "pairs",
        [Series("pairs", edges, counts)], log_x=high > low, marks=marks, stepped=True,
    )  # fmt: skip


def ratios(blocks: Sequence[Block]) -> list[Any]:
    """What the search for the ratio measured, and the ratio that each block took."""
    found: list[Any] = []
    searched = [(b, [c for c in r["candidates"] if c[0] > 0], _standing(r)) for b, r in shown(blocks, "candidates")]
    series = [
        Series(short(block), [ratio for ratio, _ in candidates], [error / standing for _, error in candidates])
        for block, candidates, standing in searched
        if standing
    ]
    if series:
        note = "Measured on a share of the samples in the first round; below 1 the swap helps. The lowest was taken."
        found.append(Lines("Error over the ratio", note, "ratio α, log scale", "E(α) / E(0)", series, log_x=True,
                           log_y=True))  # fmt: skip
    else:
        found.append("Not measured: no search for the ratio was made, or the run is of an older version.")
    if any("ratio" in first_round(block) for block in blocks):
        chosen = by_layer(blocks, "Ratio of the first round", lambda b: first_round(b).get("ratio") or None,
                          "ratio α, log scale", log=True)  # fmt: skip
        found.append(chosen)
    return found


def _standing(record: Mapping[str, Any]) -> float:
    """The error of a search's masks as they stood."""
    return next((error for ratio, error in record["candidates"] if ratio == 0), 0.0)


def swaps(blocks: Sequence[Block]) -> list[Any]:
    """Swaps by block, and rows that kept the producer's mask."""
    if not any(block["swaps"] for block in blocks):
        return ["Not swapped: every weight is as the producer's masks have it."]
    unchanged = by_layer(blocks, "Rows without a swap", lambda b: b["rows_without_swap"] / max(b["rows"], 1), "share")
    return [by_layer(blocks, "Weights swapped", lambda b: b["swaps"], "weights"), unchanged]


def every_block(blocks: Sequence[Block]) -> Table:
    """All figures of every block."""
    columns = ["block", *(name.replace("_", " ") for name in FIGURES), "rounds accepted"]
    rows = [
        [block["block"], *(block.get(name) for name in FIGURES), _accepted(block.get("rounds") or [])]
        for block in blocks
    ]
    return Table("Every block", columns, rows, folded=True)


def _accepted(rounds: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(bool(r.get('accepted')) for r in rounds)} of {len(rounds)}"


def sparsity_map(modules: Mapping[str, Mapping[str, Any]]) -> Heat:
    """Sparsity by decoder layer and Linear, from the record of the masks."""
    found: dict[str, dict[str, float]] = {}
    columns: dict[str, str] = {}
    for name, module in modules.items():
        parts = name.split(".")
        layer = next((part for part in parts if part.isdigit()), name)
        columns[parts[-1]] = parts[-1].removesuffix("_proj")
        found.setdefault(layer, {})[parts[-1]] = module["sparsity"]
    values = [[row.get(column) for column in columns] for row in found.values()]
    note = "Pruned weights in per cent, by decoder layer and Linear; darker is sparser."
    return Heat("Sparsity by Linear", note, list(found), list(columns.values()), values)
