"""Trace an LLM extraction job on Spark: a published pattern next to one line of code.

The documents are the licence texts of the installed packages, or the .txt, .md and .pdf files of
FOLDER. With OPENAI_API_KEY set, the calls go to a real model (OPENAI_BASE_URL, OPENAI_MODEL);
otherwise a local endpoint answers them by rules.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import signals
from documents import Collection, DocumentError, folder_documents, installed_licences

DATA = Path(".demo")
LICENCES = 24


def main() -> int:
    """Run the demonstration and return the exit status."""
    signals.handle()
    arguments = parse_arguments()
    # MLflow reads these when it is imported, here and in the workers.
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ.pop("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", None)
    try:
        collection = read_documents(arguments.folder, arguments.documents)
        # Imported late: it takes seconds, and errors above should show at once.
        from demonstration import demonstrate

        demonstrate(collection, DATA)
    except DocumentError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; all processes were ended.", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"The demonstration failed: {error}", file=sys.stderr)
        print(f"Its logs are in {DATA}/.", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line; wrong usage exits with status 2."""
    parser = argparse.ArgumentParser(prog="demo/run.py", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER")
    parser.add_argument("--documents", type=_count, metavar="N", help="read at most N documents")
    return parser.parse_args()


def read_documents(folder: Path | None, limit: int | None) -> Collection:
    """Read the documents of ``folder``, by default the licences of the installed packages."""
    if folder is None:
        return installed_licences(limit or LICENCES)
    return folder_documents(folder, limit)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a number from 1 on")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
