"""`optimum-barber shrink`: every setting is a field of `ShrinkConfig`, and so is its help."""

import argparse
import sys
from typing import Any

from ..base.calibration import CalibrationConfig
from ..shrink.settings import ShrinkConfig
from .flags import add_fields, add_run, flag_values
from .terminal import hush_loading_bars

HELP = "Remove whole attention heads and FFN channels: a smaller, faster checkpoint that loads everywhere."
EPILOG = """\
scorers:     bip (LLM-BIP's bound, one forward pass), barber (block-aware |W x gradient|, exact), taylor (LLM-Pruner,
             one backward pass of the whole model), wanda, magnitude, importance-propagation, random; all of them with
             what they take: optimum-barber plugins
families:    llama, mistral, qwen2, qwen3, gemma, gemma2, phi3; opt loses FFN channels only (--remove-heads 0).
             A LLaMA whose head count LlamaConfig refuses is written as the Mistral that computes the same.

DIR holds the smaller checkpoint, pruned_structure.json (which heads and channels stayed) and report.json (parameters,
MACs a token, latency before and after, the error of every block). Every layer has the same width, so that transformers
loads it as it is.

examples:
  optimum-barber shrink MODEL --remove 0.2 --calibration pydoc --samples 16 --sequence-length 512 -o OUT
  optimum-barber shrink MODEL --scorer barber --remove 0.5 --round-to 64 --calibration text.txt -o OUT
  optimum-barber shrink MODEL --remove-heads 0 --remove-channels 0.3 --calibration pydoc -o OUT
  optimum-barber shrink MODEL --head-unit query --remove 0.2 --scorer-arg norm_gain=true --calibration c4 -o OUT
  optimum-barber shrink MODEL --structure OTHER_OUT/pruned_structure.json -o OUT
"""
PICTURE_NAME = "errors.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `shrink`."""
    add_run(parser, "where the checkpoint goes")
    parser.add_argument("--no-latency", action="store_true", help="measure no latency for the report")
    parser.add_argument(
        "--picture", action="store_true", help="draw the error of every block, errors.png in DIR (extra report)"
    )
    add_fields(parser, CalibrationConfig)
    add_fields(parser, ShrinkConfig)


def config_from(args: argparse.Namespace) -> ShrinkConfig:
    """The configuration that the flags mean."""
    settings = {"calibration": flag_values(args, CalibrationConfig), **flag_values(args, ShrinkConfig)}
    return ShrinkConfig(**settings)


def run(args: argparse.Namespace) -> int:
    """Shrink; the summary goes to standard output."""
    config = config_from(args)
    from ..base.output import check_output
    from ..models.loading import load_model, load_tokenizer, resolve_model
    from ..runs.report.block_charts import error_picture
    from ..shrink.shrinker import BarberShrinker

    hush_loading_bars(args.quiet)
    reference = resolve_model(args.model)
    output = check_output(args.output, args.overwrite, [reference.path])
    if args.picture:
        check_picture(config)
    shrinker = BarberShrinker(load_model(reference, config.dtype), load_tokenizer(reference), reference)
    result = shrinker.shrink(
        config, save_dir=args.output, overwrite=args.overwrite, latency=not args.no_latency, quiet=args.quiet
    )
    if args.picture:
        name = result.structure.scorer["name"]
        error_picture(output / PICTURE_NAME, {name: result.report}, f"scorer {name}")
    if not args.quiet:
        sys.stdout.write(summary(result.report, args.output, result.structure.base_model, result.structure.model_type))
    return 0


def check_picture(config: ShrinkConfig) -> None:
    """Refuse a picture that could not be drawn, before any work.

    Raises:
        MissingExtraError: matplotlib is not installed.
        BarberError: no calibration text is read, on which errors could be measured.
    """
    from ..base.errors import BarberError
    from ..runs.report.charts import check_drawing
    from ..shrink.plan import reads_text

    check_drawing("a picture")
    if not reads_text(config):
        raise BarberError(
            f"picture shows errors on calibration text: scorer {config.scorer!r}, or the structure, reads none"
        )


def summary(report: dict[str, Any], output: str, base: dict[str, Any], model_type: str) -> str:
    """What a run did, in a few lines."""
    before, after = report["before"], report["after"]
    asked = f", asked {report['asked']:g}" if report["asked"] is not None else ""
    lines = [("removed", f"{report['removed']:.4f} of attention and MLP{asked}")]
    for label, old, new in (
        ("heads a layer", report["heads"]["before"], report["heads"]["after"]),
        ("FFN channels a layer", report["channels"]["before"], report["channels"]["after"]),
        ("parameters", before["parameters"], after["parameters"]),
        ("bytes", before["weight_bytes"], after["weight_bytes"]),
        ("MACs a token", round(before["macs_per_token"]), round(after["macs_per_token"])),
    ):
        lines.append((label, f"{old:,} -> {new:,} ({new / old:.3f})"))
    if "latency" in after:
        lines += speeds(before["latency"], after["latency"])
    if model_type != base["model_type"]:
        refusal = f"{base['model_type']}'s configuration refuses {report['heads']['after']} heads"
        lines.append(("written as", f"{model_type}, which computes the same: {refusal}"))
    lines.append(("written to", output))
    return "".join(f"{label:<20} {text}\n" for label, text in lines)


def speeds(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, str]]:
    """Latency before and after, a line each for prefill and decode."""
    prompt = (
        f"{old['prompt']} tokens, batch {old['batch']}, {old['dtype']} on {old['device']}, {old['threads']} threads"
    )
    lines = []
    for name, note in (("prefill", prompt), ("decode", "one token after them")):
        before, after = old[name]["median"], new[name]["median"]
        lines.append((f"{name} seconds", f"{before:.4f} -> {after:.4f} ({after / before:.3f}); {note}"))
    return lines
