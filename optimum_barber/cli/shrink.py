"""`optimum-barber shrink`: every setting is a field of `ShrinkConfig`, and so is its help."""

import argparse
import sys
from typing import Any

from ..base.calibration import FLAT, nested
from ..shrink.settings import ShrinkConfig
from .options import add_calibration, pairs, whole
from .prune import field_help, field_kind

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
HAND_MADE = {"scorer_args", "calibration"}
SHARES = ("remove", "remove_heads", "remove_channels")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `shrink`."""
    parser.add_argument("model", metavar="MODEL", help="hub id, directory, GGUF file, or installed:PACKAGE")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="where the checkpoint goes")
    parser.add_argument("--overwrite", action="store_true", help="replace what DIR holds, at the very end")
    parser.add_argument("--no-latency", action="store_true", help="measure no latency for the report")
    parser.add_argument(
        "--picture", action="store_true", help="draw the error of every block, errors.png in DIR (extra report)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no warnings")
    parser.add_argument("--scorer-arg", action="append", default=[], metavar="K=V", help="an argument of the scorer")
    add_calibration(parser)
    for name, field in ShrinkConfig.model_fields.items():
        if field.annotation is bool:
            parser.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=field.description)
        elif name not in HAND_MADE:
            parser.add_argument(
                "--" + name.replace("_", "-"),
                default=argparse.SUPPRESS,
                metavar="S" if name in SHARES else "N" if field_kind(field) is whole else "X",
                type=str if name in SHARES else field_kind(field),
                help=field_help(field),
            )


def config_from(args: argparse.Namespace) -> ShrinkConfig:
    """The configuration that the flags mean."""
    given = vars(args)
    names = {*ShrinkConfig.model_fields, *FLAT} - {"scorer_args"}
    settings = nested({name: given[name] for name in names if name in given})
    arguments = pairs("scorer-arg", args.scorer_arg, "norm_gain=true")
    return ShrinkConfig(scorer_args=arguments, **settings)


def run(args: argparse.Namespace) -> int:
    """Shrink; the summary goes to standard output."""
    config = config_from(args)
    from ..base.output import check_output
    from ..models.loading import load_model, load_tokenizer, resolve_model
    from ..runs.report.cuts import error_picture
    from ..shrink.shrinker import BarberShrinker
    from . import hush_loading_bars

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
    lines = [f"{'removed':<20} {report['removed']:.4f} of attention and MLP{asked}"]
    for label, old, new in (
        ("heads a layer", report["heads"]["before"], report["heads"]["after"]),
        ("FFN channels a layer", report["channels"]["before"], report["channels"]["after"]),
        ("parameters", before["parameters"], after["parameters"]),
        ("bytes", before["weight_bytes"], after["weight_bytes"]),
        ("MACs a token", round(before["macs_per_token"]), round(after["macs_per_token"])),
    ):
        lines.append(f"{label:<20} {old:,} -> {new:,} ({new / old:.3f})")
    lines += speeds(before, after)
    if model_type != base["model_type"]:
        lines.append(
            f"{'written as':<20} {model_type}, which computes the same: {base['model_type']}'s configuration refuses "
            f"{report['heads']['after']} heads"
        )
    return "\n".join([*lines, f"{'written to':<20} {output}"]) + "\n"


def speeds(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Latency before and after, a line each for prefill and decode."""
    if "latency" not in after:
        return []
    old, new = before["latency"], after["latency"]
    how = f"{old['prompt']} tokens, batch {old['batch']}, {old['dtype']} on {old['device']}, {old['threads']} threads"
    return [
        f"{name + ' seconds':<20} {old[name]['median']:.4f} -> {new[name]['median']:.4f} "
        f"({new[name]['median'] / old[name]['median']:.3f}); {how if name == 'prefill' else 'one token after them'}"
        for name in ("prefill", "decode")
    ]
