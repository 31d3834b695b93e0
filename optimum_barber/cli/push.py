"""`optimum-barber push`: a checkpoint, with its masks, records and model card, onto the Hub."""

import argparse
import sys
from pathlib import Path

HELP = "Upload a checkpoint or an adapter to the Hub, after a check of every zero."
EPILOG = """\
The repository is created if need be. Its page is OUT/README.md, the model card, which may be edited before; run
optimum-barber eval first to have perplexities in it.

examples:
  optimum-barber push OUT me/SmolLM2-135M-2of4 --dry-run        # what would be uploaded
  optimum-barber push OUT me/SmolLM2-135M-2of4 --private
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags."""
    parser.add_argument("directory", metavar="OUT", help="a checkpoint that this program wrote, or an adapter")
    parser.add_argument("repository", metavar="REPO", help="name on the Hub: owner/name, or a name of your own")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: the main one)")
    parser.add_argument("--message", metavar="TEXT", help="commit message")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--dry-run", action="store_true", help="check everything, list the files, upload nothing")
    parser.add_argument("--quiet", action="store_true", help="print no progress bars, warnings or results")


def run(args: argparse.Namespace) -> int:
    """Check, then upload or list."""
    from ..base.errors import BarberError, FailedCheckError
    from ..checkpoints.base_model import has_records
    from ..checkpoints.card.metadata import is_hub_id
    from ..checkpoints.names import ADAPTER_CONFIG_NAME
    from ..checkpoints.push import MESSAGE, files_of, upload
    from ..runs.verify import verify_product

    if not is_hub_id(args.repository):
        raise BarberError(f"repository {args.repository!r} is not legal: owner/name, as on the Hub")
    files = files_of(args.directory)
    directory = Path(args.directory)
    recorded = has_records(directory) or (directory / ADAPTER_CONFIG_NAME).is_file()
    faults = verify_product(args.directory, weights=False).faults if recorded else []
    for fault in faults:
        raise FailedCheckError(f"{args.directory} is not what its record says: {fault}; nothing was uploaded")
    if args.dry_run:
        _list_files(args.repository, Path(args.directory), files)
        return 0
    commit = upload(
        args.directory, args.repository, private=args.private or None, revision=args.revision,
        commit_message=args.message or MESSAGE, create_pr=args.create_pr,
    )  # fmt: skip
    if not args.quiet:
        sys.stdout.write(f"{len(files)} files: {commit.pr_url or commit.commit_url}\n")
    return 0


def _list_files(repository: str, directory: Path, files: list[Path]) -> None:
    for path in files:
        sys.stdout.write(f"{path.stat().st_size:>16,}  {path.relative_to(directory)}\n")
    total = sum(path.stat().st_size for path in files)
    sys.stdout.write(f"{total:>16,}  bytes in {len(files)} files would go to {repository}; nothing was uploaded\n")
