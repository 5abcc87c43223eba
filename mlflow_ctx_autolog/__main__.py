"""``python -m mlflow_ctx_autolog``, where the command is not on the path."""

import sys

from mlflow_ctx_autolog.cli import main

if __name__ == "__main__":
    sys.exit(main())
