"""The sections of a model card, in Markdown."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...base.files import markdown_table
from ...base.flag_names import shortened
from ..record import SparsityConfig
from .metadata import is_hub_id
from .records import Records

HIDDEN = ("calibration", "name", "dense_model", "adapter_sha256")  # of a step: said elsewhere, or of one machine
PROTOCOL = ("text", "part", "windows", "dtype")  # columns that tell what was measured


def title(records: Records, base_name: str | None) -> str:
    """Name the model and what was done to it."""
    parts = [plain(base_name)]
    if records.structure is not None:
        parts.append(f"{records.structure.removed:.0%} smaller")
    if records.experts is not None:
        parts.append("{after} of {before} experts".format_map(records.experts.counts))
    if records.sparsity is not None:
        sparsity = records.sparsity
        dense_pattern = sparsity.pattern == "unstructured"
        parts.append(f"{sparsity.sparsity:.0%} sparse" if dense_pattern else f"{sparsity.pattern} sparse")
    if records.quantized:
        parts.append("quantized")
    if len(parts) == 1 and records.order is not None:
        parts.append(f"channels ordered for {records.order.pattern}")
    return ", ".join(parts)


def plain(name: str | None) -> str:
    """Return the name of a model as a reader elsewhere knows it: without the folders of this machine."""
    return escaped(shortened(name).removeprefix("installed:")) if name else "A model in memory"


def escaped(value: Any) -> str:
    """Return text that stays within its cell and starts no markup, whoever wrote it."""
    return re.sub(r"([|`<>\[\]*_\\])", r"\\\1", " ".join(str(value).split()))


def summary(records: Records, base_name: str | None) -> list[str]:
    """Say in a list what was done to the model, from the base to the last step."""
    lines = [f"- **Base model:** {base_link(base_name)}"]
    if records.structure is not None:
        lines += _cut(records)
    if records.experts is not None:
        counts = records.experts.counts
        scorer = escaped(records.experts.scorer)
        lines.append(f"- **Experts:** {counts['after']} of {counts['before']} in every sparse MLP, by {scorer}")
    if records.order is not None and records.sparsity is None:
        order = f"for {escaped(records.order.pattern)} masks; the model computes what the base does"
        lines.append(f"- **Order of channels:** {order}")
    if records.sparsity is not None:
        lines += _masks(records.sparsity, records.report)
    for step in records.steps:
        lines.append(f"- **Then {escaped(step.get('name'))}:** {settings_text(step)}")
    return lines


def base_link(name: str | None) -> str:
    """Return the base model, as a link to its card where it lies on the Hub."""
    from huggingface_hub.constants import ENDPOINT

    return f"[{plain(name)}]({ENDPOINT}/{name})" if is_hub_id(name) else plain(name)


def _cut(records: Records) -> list[str]:
    assert records.structure is not None
    structure = records.structure
    layer = next(iter(structure.layers.values()))
    heads, channels = layer.heads, layer.channels
    kept = f"{len(heads.kept)} of {heads.of} {structure.head_unit}s and {len(channels.kept)} of {channels.of} channels"
    lines = [
        f"- **Removed:** {structure.removed:.2%} of the parameters of attention and FFN; each layer keeps {kept}",
        f"- **Chosen by:** {escaped(structure.scorer.get('name'))}",
    ]
    if structure.calibration is not None:
        lines.append(f"- **Calibration of the cut:** {calibration_text(structure.calibration)}")
    return lines


def _masks(record: SparsityConfig, report: Mapping[str, Any]) -> list[str]:
    rebuild = str(record.rebuild.get("method")) if record.rebuild else "not rebuilt"
    errors = [report.get("error_before"), report.get("error_after")]
    if record.rebuild and all(isinstance(error, int | float) for error in errors):
        rebuild += f" (block error, summed: {errors[0]:.4g} before, {errors[1]:.4g} after)"
    lines = [
        f"- **Sparsity:** {record.sparsity:.2%} of the weights of {len(record.modules)} Linears are exactly zero, "
        f"{escaped(record.pattern)}",
        f"- **First masks:** {escaped(record.producer.get('name'))}",
        f"- **Masks rebuilt by:** {escaped(rebuild)}",
    ]
    if record.reconstruct is not None:
        lines.append(f"- **Kept weights given new values by:** {escaped(record.reconstruct.get('method'))}")
    if record.allocation is not None:
        lines.append(f"- **Shared out over the blocks by:** {escaped(record.allocation.get('name'))}")
    return [*lines, f"- **Calibration:** {calibration_text(record.calibration)}"]


def calibration_text(calibration: Mapping[str, Any]) -> str:
    """Say in one line what the windows were."""
    names = [shortened(name) for name in str(calibration.get("source")).split(", ")]
    seed = f", seed {calibration['seed']}" if "seed" in calibration else ""
    windows = f"{calibration.get('samples')} windows of {calibration.get('sequence_length')} tokens"
    return f"{windows} out of {escaped(', '.join(names))}{seed}"


def settings_text(step: Mapping[str, Any]) -> str:
    """Say in one line what the settings of a step were."""
    parts = []
    for name, value in step.items():
        if name not in HIDDEN and value is not None and value != [] and value != {}:
            parts.append(f"{name.replace('_', ' ')} {value:g}" if isinstance(value, float) else f"{name} {value}")
    if isinstance(step.get("calibration"), Mapping):
        return "; ".join([escaped(", ".join(parts)), calibration_text(step["calibration"])])
    return escaped(", ".join(parts)) or "no settings"


def part_of(name: str) -> str:
    """Return what a Linear is called in every layer: its name with a star for each number."""
    return re.sub(r"\b\d+\b", "*", name)


def sparsity_table(record: SparsityConfig) -> list[str]:
    """Return a row for each kind of Linear: how many there are, weights, zeros by the masks, and their share."""
    sums: dict[str, list[int]] = {}
    for name, module in record.modules.items():
        row = sums.setdefault(part_of(name), [0, 0, 0])
        for index, amount in enumerate((1, module.shape[0] * module.shape[1], module.pruned)):
            row[index] += amount
    rows = []
    for name, (count, weights, zeros) in sums.items():
        figures = {"count": count, "weights": f"{weights:,}", "zeros": f"{zeros:,}", "share": f"{zeros / weights:.2%}"}
        rows.append({"Linears": code(name), **figures})
    lines = [markdown_table(rows, ["Linears", "count", "weights", "zeros", "share"])]
    if record.ignored:
        left = sorted(dict.fromkeys(map(part_of, record.ignored)))
        lines += ["", f"Left dense: {', '.join(map(code, left))}."]
    return lines


def code(name: str) -> str:
    """Return a name as code."""
    return f"`{name.replace('`', '')}`"


def evaluation_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a row for each text: perplexity of the dense model and of this one."""
    if not rows:
        return ["Not measured yet. `optimum-barber eval OUT --perplexity TEXT` enters its figures here."]
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        protocol = (escaped(shortened(row["text"])), escaped(row["split"]), windows_text(row), escaped(row["dtype"]))
        line = lines.setdefault(protocol, dict(zip(PROTOCOL, protocol, strict=True)))
        if row["dense_baseline"]:
            line["made of"] = f"{row['perplexity']:.3f} ({plain(str(row['model']))})"
        else:
            line["this model"] = f"{row['perplexity']:.3f}"
    table = markdown_table(lines.values(), [*PROTOCOL, "made of", "this model"])
    return ["Perplexity, lower is better:", "", table]


def windows_text(row: Mapping[str, Any]) -> str:
    """Say which windows of a text were measured."""
    begin = ", each after BOS" if row.get("bos") else ""
    return f"{row['windows']} of {row['available']} windows of {row['sequence_length']} tokens{begin}"


def loading(records: Records) -> list[str]:
    """Say how the checkpoint is loaded, and how its masks are."""
    auto = "AutoModelForImageTextToText" if records.image_text else "AutoModelForCausalLM"
    lines = ["```python", f"from transformers import {auto}, AutoTokenizer", ""]
    lines += [f'model = {auto}.from_pretrained("OUT")', 'tokenizer = AutoTokenizer.from_pretrained("OUT")', "```"]
    if records.quantized:
        lines += ["", "The weights are packed: transformers needs the package `compressed-tensors` to read them."]
    if records.sparsity is not None:
        lines += [
            "", "The masks lie in `sparsity_masks.safetensors`, and `sparsity_config.json` records them.",
            "`optimum-barber verify OUT` checks every zero.",
        ]  # fmt: skip
    if records.sparsity is not None and not records.quantized:
        lines += [
            "`optimum_barber.PrunedModel.load` opens model and masks, and `optimum_barber.KeepMasks` keeps the zeros",
            "in any transformers Trainer.",
        ]  # fmt: skip
    return lines


def terms(base_name: str | None, metadata: Mapping[str, Any]) -> str:
    """Say under which licence the model stands, as far as the card of its source tells."""
    base, licence = base_link(base_name), metadata.get("license")
    if licence == "other":
        licence = metadata.get("license_name")
    if licence:
        return f"{escaped(licence)}, the licence of the base model, {base}; what its own card says applies here too."
    return f"The terms of the base model, {base}, apply; no card that names its licence lay beside it."


def limits(records: Records) -> list[str]:
    """Say what a user must not expect."""
    lines = []
    if records.sparsity is not None and not records.quantized:
        lines += ["- Zeros are stored like any other weight: they make the files no smaller.", _speed(records.sparsity)]
    if records.is_cut:
        lines.append("- Whole units are gone: what only they knew is lost, unless later training brought it back.")
    lines.append(
        "- What was chosen by calibration text holds for such text; other languages and tasks can lose more. "
        "Perplexity does not show that: measure the task."
    )
    lines.append("- Bias, safety and intended use are the base model's at best; none of them was measured here.")
    return lines


def _speed(record: SparsityConfig) -> str:
    if record.pattern == "2:4":
        return "- Speed: the zeros help where a runtime has 2:4 kernels (`optimum-barber inspect OUT --targets`)."
    return "- Speed: common runtimes multiply zeros like any other weight (`optimum-barber inspect OUT --targets`)."
