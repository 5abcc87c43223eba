"""The recorder in a process that has nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mlflow_ctx_autolog.testing import OpenAIEndpoint

SUPPORT = Path(__file__).parents[1] / "support"

PROGRAM = """
import sys
sys.path.insert(0, {support!r})
from recording import Keeper
from mlflow_ctx_autolog.recorder.openai_calls import OpenAIRecorder
from mlflow_ctx_autolog.spans.otlp import encode

keeper = Keeper()
OpenAIRecorder(lambda: keeper).install()
assert not any(name.partition(".")[0] == "openai" for name in sys.modules)

from openai import OpenAI

client = OpenAI(base_url={url!r}, api_key="not-a-key")
for stream in (False, True):
    reply = client.chat.completions.create(
        model="m", messages=[{{"role": "user", "content": "hi"}}], stream=stream
    )
    stream and list(reply)
assert [len(encode(span)) > 200 for span in keeper.spans] == [True, True]
print(sorted(
    name for name in sys.modules
    if name.partition(".")[0] in ("mlflow", "pandas", "pyarrow", "requests")
    or name.startswith(("opentelemetry.sdk", "openai.resources.responses.responses"))
))
"""


def test_a_call_is_recorded_without_mlflow() -> None:
    """Neither MLflow, nor OpenTelemetry's SDK, nor a part of the client that nobody uses."""
    with OpenAIEndpoint(lambda _: "yes") as endpoint:
        program = PROGRAM.format(support=str(SUPPORT), url=endpoint.base_url)
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False
        )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
