"""Print the JAVA_HOME that Spark is to use; nothing where the java on PATH will do.

Spark 4 needs Java 17 or newer. Without one, a Java 17 is fetched into .venv.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST = 17
FETCHED = Path(".venv/java")


def version_of(java: Path) -> int | None:
    """Return the major version of a java executable; None where it does not run."""
    try:
        result = subprocess.run(
            [java, "-version"], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r'version "(\d+)', result.stderr)
    return int(found[1]) if found else None


def is_usable(java: Path) -> bool:
    """Whether a java executable is new enough."""
    return (version_of(java) or 0) >= OLDEST


def fetch() -> Path:
    """Fetch a Java into .venv and return its home."""
    import jdk

    print(f"No Java {OLDEST} or newer found; fetching one into {FETCHED}", file=sys.stderr)
    return Path(jdk.install(str(OLDEST), jre=True, path=str(FETCHED.absolute())))


def main() -> int:
    """Find a Java, or fetch one."""
    home = os.environ.get("JAVA_HOME")
    if home and is_usable(Path(home, "bin", "java")):
        return 0
    on_path = shutil.which("java")
    if not home and on_path and is_usable(Path(on_path)):
        return 0
    for java in sorted(FETCHED.glob("*/bin/java")):
        if is_usable(java):
            print(java.absolute().parents[1])
            return 0
    try:
        print(fetch())
    except Exception as error:
        print(
            f"No Java {OLDEST} or newer was found, and none could be fetched ({error}). Install "
            "one, for example with 'apt-get install openjdk-17-jre-headless' or 'brew install "
            "openjdk@17', and set JAVA_HOME to it if it is not on PATH.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
