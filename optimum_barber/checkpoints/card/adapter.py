"""The model card of a LoRA adapter: which model it belongs on, under which masks, and how it was trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...models.loading import ModelReference
from .body import base_link, calibration_text, escaped, plain, settings_text, terms
from .metadata import OWN_TAG, card_metadata, card_text, carried_over, is_hub_id
from .write import COMMANDS, Step, input_name, making, marked, one_line, own_lines, page, write_or_warn

SHOWN = ("rank", "alpha", "dropout", "use_rslora", "loss", "learning_rate", "scheduler", "steps", "batch_size", "seed")


def write_adapter_card(directory: Path, source: ModelReference, report: Mapping[str, Any]) -> None:
    """Write the model card of an adapter whose files are all in place.

    Args:
        directory: holds the adapter.
        source: the model that it was trained on.
        report: what is recorded of the training: settings, windows, mask fingerprint and perplexities.
    """
    write_or_warn(directory, lambda: _card(source, report))


def _card(source: ModelReference, report: Mapping[str, Any]) -> str:
    before, base = card_text(source.directory), source.full_name
    metadata = adapter_metadata(base, card_metadata(before), report["mask_fingerprint"] is not None)
    commands = own_lines(marked(before, COMMANDS))
    step = Step("lora", {name: report["settings"][name] for name in SHOWN if name in report["settings"]})
    commands.append(one_line(step.line(input_name(source, base, len(commands)), "ADAPTER")))
    sections = [f"# {plain(base)}, LoRA adapter", "\n".join(_summary(base, report))]
    sections += ["## How to load it", "\n".join(_loading(report))]
    sections += [*making(commands), "## Licence", terms(base, metadata)]
    return page(metadata, sections)


def adapter_metadata(base: str, source: Mapping[str, Any], masked: bool) -> dict[str, Any]:
    """Return the front matter of an adapter's card.

    Args:
        base: name of the model that it was trained on.
        source: front matter of that model's card.
        masked: whether that model is pruned.
    """
    content = carried_over(source)
    content.setdefault("pipeline_tag", "text-generation")
    if is_hub_id(base):
        content |= {"base_model": base, "base_model_relation": "adapter"}
    tags = [OWN_TAG, "lora", "sparsity"] if masked else [OWN_TAG, "lora"]
    return {**content, "library_name": "peft", "tags": tags}


def _summary(base: str, report: Mapping[str, Any]) -> list[str]:
    settings = report["settings"]
    lines = [
        f"- **Base model:** {base_link(base)}",
        f"- **Training:** {settings_text({name: settings.get(name) for name in SHOWN})}",
        f"- **Text:** {calibration_text(report['windows'])}",
    ]
    if report["mask_fingerprint"] is not None:
        fingerprint = escaped(report["mask_fingerprint"])
        lines.insert(1, f"- **Masks:** fingerprint {fingerprint}; merging keeps every zero")
    if report.get("dense_model"):
        lines.append(f"- **Learned from:** {plain(str(report['dense_model']))}, by the divergence from it")
    if report.get("perplexity_before") and report.get("perplexity_after"):
        before, after = (report[f"perplexity_{when}"]["perplexity"] for when in ("before", "after"))
        lines.append(f"- **Perplexity of held-out text:** {before:.3f} before, {after:.3f} after")
    return lines


def _loading(report: Mapping[str, Any]) -> list[str]:
    lines = [
        "```python", "from optimum_barber.integrations.lora.checkpoint import load_adapter", "",
        'model = load_adapter("ADAPTER")  # if the base lies elsewhere, give its path as second argument', "```",
    ]  # fmt: skip
    if report["mask_fingerprint"] is not None:
        lines += [
            "",
            "A model with other masks is refused. Plain peft would fill pruned weights, so it does not open it.",
        ]
    return lines
