"""`optimum-barber prune`: every setting is a field of `BarberConfig`, and so is its help."""

import argparse
import sys
from typing import Any

from ..base.calibration import CalibrationConfig
from ..base.errors import BarberError
from ..base.flag_names import PREFIXES
from ..prune.rebuild_settings import RebuildConfig
from ..prune.settings import BarberConfig, ReconstructConfig
from .flags import add_fields, add_run, flag_values, shorten_help
from .terminal import write_summary

HELP = "Prune a model, rebuild its masks and write a checkpoint that loads everywhere."
EPILOG = """\
`optimum-barber plugins` lists all producers, rebuilders and allocations with their arguments.

examples:
  optimum-barber prune MODEL --sparsity 0.5 --calibration pydoc --samples 16 --sequence-length 512 -o OUT
  optimum-barber prune MODEL --producer sparsegpt --pattern 2:4 --calibration text.txt -o OUT
  torchrun --nproc-per-node 4 -m optimum_barber prune MODEL --sparsity 0.5 --calibration c4 -o OUT
"""
DAILY = (
    "model", "output", "overwrite", "dry_run", "resume", "producer", "sparsity", "pattern", "effort", "method", "texts",
    "samples", "sequence_length", "device",
)  # fmt: skip
MASKS = (
    "producer",
    "producer_args",
    "sparsity",
    "pattern",
    "ignore",
    "allow_dense_rest",
    "calibrate_all_experts",
    "allocation",
    "allocation_args",
)
REBUILD = ("method", "preset", "error", "accept")
BARBER = ("granularity", "rebuild_ratio", "rounds", "metric", "expansion", "reduction", "pairing")
EXCHANGES = ("swaps", "newton_rounds", "shrinkage")
MACHINE = ("device", "dtype", "precision", "batch_size")
READERS = {"sparse_model": "existing", "masks": "masks"}  # flag -> producer whose argument it is


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags; the short help has those of daily use."""
    add_run(parser, "directory of the pruned checkpoint")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and estimate the cost, without pruning"
    )
    masks = parser.add_argument_group("first masks")
    add_fields(masks, BarberConfig, MASKS)
    masks.add_argument("--sparse-model", metavar="DIR", help="checkpoint whose zeros the producer 'existing' reads")
    masks.add_argument("--masks", metavar="FILE", help="mask file that the producer 'masks' reads")
    rebuild = parser.add_argument_group(
        "rebuild", "The defaults gave the lowest error on held-out calibration text; some depend on the pattern."
    )
    add_fields(rebuild, BarberConfig, ("effort",))
    add_fields(rebuild, RebuildConfig, REBUILD)
    add_fields(parser.add_argument_group("rebuilder barber"), RebuildConfig, BARBER)
    add_fields(parser.add_argument_group("rebuilders swaps and gauss-newton"), RebuildConfig, EXCHANGES)
    add_shared(parser)
    disk = parser.add_argument_group("from disk to disk")
    disk.add_argument("--resume", action="store_true", help="resume the stopped run for DIR, or start one")
    disk.add_argument(
        "--stream",
        choices=("auto", "always", "never"),
        default="auto",
        help="hold one decoder layer in memory at a time; auto: if the files allow it (default: auto)",
    )
    disk.add_argument(
        "--activations",
        choices=("auto", "memory", "disk"),
        default="auto",
        help="where calibration activations are kept while streaming; auto: in memory if they fit (default: auto)",
    )
    shorten_help(parser, DAILY)


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Add the flags of all commands that prune: reconstruction, calibration windows and machine."""
    reconstruct = parser.add_argument_group(
        "reconstruction", "Give the kept weights new values once the masks are fixed."
    )
    add_fields(reconstruct, ReconstructConfig, prefix=PREFIXES["reconstruct"])
    text = parser.add_argument_group("calibration")
    add_fields(text, CalibrationConfig)
    add_fields(text, BarberConfig, ("seed",))
    add_fields(parser.add_argument_group("machine"), BarberConfig, MACHINE)


def config_from(args: argparse.Namespace) -> BarberConfig:
    """Return the configuration that the flags stand for."""
    settings = flag_values(args, BarberConfig)
    _add_masks(args, settings)
    return BarberConfig(**settings)


def _add_masks(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Give a producer that reads masks the argument that the flag for it holds."""
    producer, arguments = settings.get("producer", "wanda"), settings.setdefault("producer_args", {})
    for name, reader in READERS.items():
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        if value is not None and producer != reader:
            raise BarberError(f"{flag} goes with --producer {reader}, not {producer!r}")
        if value is not None:
            arguments[name] = value
        elif producer == reader and name not in arguments:
            raise BarberError(f"producer {producer!r} needs {flag}")


def run(args: argparse.Namespace) -> int:
    """Prune; the summary goes to standard output."""
    config = config_from(args)
    from ..base.output import check_output
    from ..models.loading import resolve_model
    from ..prune.sparsifier import BarberSparsifier

    reference = resolve_model(args.model)
    check_output(args.output, args.overwrite, [reference.path], args.resume)
    sparsifier = BarberSparsifier.from_pretrained(reference, config.dtype, args.stream)
    if args.dry_run:
        sys.stdout.write(sparsifier.preview(config, args.output, args.activations))
        return 0
    result = sparsifier.sparsify(
        config,
        save_dir=args.output,
        overwrite=args.overwrite,
        quiet=args.quiet,
        resume=args.resume,
        activations=args.activations,
    )
    if not args.quiet:
        report = result.as_report()
        write_summary(
            {
                "sparsity": f"{report['sparsity']:.4f}",
                "block error, summed": f"{report['error_before']:.5g} -> {report['error_after']:.5g}",
                "weights swapped": f"{report['swaps']:,}",
                "seconds": f"{report['seconds']:.1f}",
                "written to": args.output,
            }
        )
    return 0
