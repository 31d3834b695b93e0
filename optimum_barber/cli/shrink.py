"""`optimum-barber shrink`: every setting is a field of `ShrinkConfig`, and so is its help."""

import argparse
from typing import Any

from ..base.calibration import CalibrationConfig
from ..base.errors import BarberError
from ..shrink.settings import ShrinkConfig
from .flags import add_fields, add_run, flag_values
from .terminal import write_summary

HELP = "Remove whole attention heads, FFN channels or experts; writes a smaller checkpoint that loads everywhere."
EPILOG = """\
`optimum-barber plugins` lists all scorers with their arguments. OPT loses FFN channels only (--remove-heads 0).
DIR holds the smaller checkpoint, pruned_structure.json (the kept heads and channels) and report.json.

examples:
  optimum-barber shrink MODEL --remove 0.2 --calibration pydoc --samples 16 --sequence-length 512 -o OUT
  optimum-barber shrink MODEL --scorer barber --remove-heads 0 --remove-channels 0.3 --calibration text.txt -o OUT
  optimum-barber shrink MODEL --scorer reap --remove-experts 0.25 --calibration text.txt -o OUT
  optimum-barber shrink MODEL --structure OTHER_OUT/pruned_structure.json -o OUT
"""
PICTURE_NAME = "errors.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags."""
    add_run(parser, "directory of the smaller checkpoint")
    parser.add_argument("--no-latency", action="store_true", help="do not measure latency for the report")
    parser.add_argument(
        "--picture", action="store_true", help="draw the error of every block to DIR/errors.png (needs extra report)"
    )
    parser.add_argument("--skip-layers", help=argparse.SUPPRESS)
    add_fields(parser, CalibrationConfig)
    add_fields(parser, ShrinkConfig)


def config_from(args: argparse.Namespace) -> ShrinkConfig:
    """Return the configuration that the flags stand for."""
    if args.skip_layers is not None:
        raise BarberError("--skip-layers was removed in 0.2.0: all layers are cut to the same width")
    return ShrinkConfig(**flag_values(args, ShrinkConfig))


def run(args: argparse.Namespace) -> int:
    """Shrink; the summary goes to standard output."""
    config = config_from(args)
    from ..base.output import check_output
    from ..checkpoints.experts import PrunedExperts
    from ..models.loading import load_model, load_tokenizer, resolve_model
    from ..runs.report.block_charts import error_picture
    from ..shrink.shrinker import BarberShrinker

    reference = resolve_model(args.model)
    output = check_output(args.output, args.overwrite, [reference.path])
    if args.picture:
        _check_picture(config)
    shrinker = BarberShrinker(load_model(reference, config.dtype), load_tokenizer(reference), reference)
    result = shrinker.shrink(
        config, save_dir=args.output, overwrite=args.overwrite, latency=not args.no_latency, quiet=args.quiet
    )
    if isinstance(result.structure, PrunedExperts):
        if not args.quiet:
            write_summary({**_expert_summary(result.report), "written to": args.output}, width=20)
        return 0
    if args.picture:
        name = result.structure.scorer["name"]
        error_picture(output / PICTURE_NAME, {name: result.report}, f"scorer {name}")
    if not args.quiet:
        texts = _summary(result.report, result.structure.base_model["model_type"], result.structure.model_type)
        write_summary({**texts, "written to": args.output}, width=20)
    return 0


def _check_picture(config: ShrinkConfig) -> None:
    """Refuse a picture that could not be drawn, before any work."""
    from ..runs.report.charts import check_drawing
    from ..shrink.plan import reads_text

    check_drawing("a picture")
    if config.remove_experts is not None:
        raise BarberError("picture shows errors of heads and channels: experts have none")
    if not reads_text(config):
        raise BarberError(
            f"picture shows errors on calibration text: scorer {config.scorer!r}, or the structure, reads none"
        )


def _expert_summary(report: dict[str, Any]) -> dict[str, str]:
    before, after, experts = report["before"], report["after"], report["experts"]
    texts = {}
    for label, old, new in (
        ("experts a layer", experts["before"], experts["after"]),
        ("parameters", before["parameters"], after["parameters"]),
        ("bytes", before["weight_bytes"], after["weight_bytes"]),
    ):
        texts[label] = f"{old:,} -> {new:,} ({new / old:.3f})"
    return texts


def _summary(report: dict[str, Any], base_type: str, model_type: str) -> dict[str, str]:
    before, after = report["before"], report["after"]
    heads, channels = report["heads"], report["channels"]
    texts = {"removed": f"{report['removed']:.4f} of attention and MLP"}
    if report["asked"] is not None:
        texts["removed"] += f", asked {report['asked']:g}"
    for label, old, new in (
        ("heads a layer", heads["before"], heads["after"]),
        ("FFN channels a layer", channels["before"], channels["after"]),
        ("parameters", before["parameters"], after["parameters"]),
        ("bytes", before["weight_bytes"], after["weight_bytes"]),
        ("MACs a token", round(before["macs_per_token"]), round(after["macs_per_token"])),
    ):
        texts[label] = f"{old:,} -> {new:,} ({new / old:.3f})"
    if "latency" in after:
        old, new = before["latency"], after["latency"]
        machine = f"{old['dtype']} on {old['device']}, {old['threads']} threads"
        prompt = f"{old['prompt']} tokens, batch {old['batch']}, {machine}"
        for name, note in (("prefill", prompt), ("decode", "one token after them")):
            slow, fast = old[name]["median"], new[name]["median"]
            texts[f"{name} seconds"] = f"{slow:.4f} -> {fast:.4f} ({fast / slow:.3f}); {note}"
    if model_type != base_type:
        refusal = f"{base_type}'s configuration refuses {heads['after']} heads"
        texts["written as"] = f"{model_type}, which computes the same: {refusal}"
    return texts
