"""MLflow in a worker: when it comes, what it makes nests, and nothing is recorded twice."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import mlflow.openai
import pytest
from mlflow.utils.autologging_utils import AUTOLOGGING_INTEGRATIONS
from workload import StoredTrace, stored_trace

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint

SUPPORT = Path(__file__).parents[1] / "support"

Run = Callable[..., tuple[StoredTrace, str]]

# A process that knows nothing of the driver's, and runs one function as a task of Spark's.
PROGRAM = """
import sys
sys.path.insert(0, {support!r})
from submitted import arrived

def ask(**more):
    from openai import OpenAI

    client = OpenAI(base_url={url!r}, api_key="not-a-key", max_retries=0)
    messages = [{{"role": "user", "content": "hi"}}]
    return client.chat.completions.create(model="gpt-test", messages=messages, **more)

{before}

def function(rows):
{body}
    yield 1

assert "mlflow" not in sys.modules or {before!r}
list(arrived(function, {carrier!r}, required=True, name="work")(iter([1])))
print(sorted(name for name in ("mlflow", "opentelemetry.sdk") if name in sys.modules))
"""


@pytest.fixture
def run(experiment_id: str, endpoint: OpenAIEndpoint) -> Run:
    """Runs the body of a function in a process of its own; returns the trace, and what it said."""

    def run(body: str, before: str = "", **settings: object) -> tuple[StoredTrace, str]:
        with ctx_autolog.enable(**settings), mlflow.start_span("driver") as span:
            document = json.loads(ctx_autolog.capture().to_json())
        program = PROGRAM.format(
            support=str(SUPPORT),
            url=endpoint.base_url,
            before=before,
            body=textwrap.indent(textwrap.dedent(body), "    "),
            carrier=json.dumps({**document, "process_id": "another"}),
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return stored_trace(span.trace_id), done.stdout.strip()

    return run


def paths(trace: StoredTrace) -> set[tuple[str, ...]]:
    """Return the names of the spans on the way to each call."""
    return {tuple(trace.path_to(call)) for call in trace.calls}


PLAIN = {("driver", "work", "Completions")}
NESTED = {("driver", "work", "mine", "Completions")}
IN_SPAN = """
    import mlflow

    with mlflow.start_span("mine"):
        ask()
"""


def test_nothing_of_mlflow_is_loaded_by_itself(run: Run) -> None:
    """Neither by a task, nor by a call, nor when all is stored."""
    trace, modules = run("ask()")
    assert paths(trace) == PLAIN
    assert modules == "[]"


@pytest.mark.parametrize(
    ("body", "before"),
    [
        pytest.param(IN_SPAN, "import mlflow", id="before the task"),
        pytest.param(IN_SPAN, "", id="in the task"),
        pytest.param("ask()\n" + textwrap.dedent(IN_SPAN), "", id="after a call"),
        pytest.param(
            f"""
import threading

def in_thread():
{IN_SPAN}

thread = threading.Thread(target=in_thread)
thread.start()
thread.join()
""",
            "",
            id="in a thread",
        ),
        pytest.param(
            """
            import mlflow

            @mlflow.trace(name="mine")
            def traced():
                return ask()

            traced()
            """,
            "",
            id="by a decorator",
        ),
        pytest.param(
            """
            import mlflow
            from concurrent.futures import ThreadPoolExecutor

            with mlflow.start_span("mine"), ThreadPoolExecutor(1) as pool:
                pool.submit(ask).result()
            """,
            "",
            id="around a pool",
        ),
    ],
)
def test_the_users_own_spans_nest(run: Run, body: str, before: str) -> None:
    """Between the task and the call, whenever MLflow came."""
    trace, modules = run(body, before)
    assert NESTED <= paths(trace) <= NESTED | PLAIN
    assert "mlflow" in modules
    assert ctx_autolog.receipt(trace.trace.info.trace_id).complete


def test_an_autolog_of_the_users_own_makes_no_second_span(run: Run) -> None:
    """As in jobs that turn MLflow's on in the function, as one had to."""
    trace, _ = run(
        """
        import mlflow

        mlflow.openai.autolog()
        for _ in ask(stream=True):
            pass
        """
    )
    assert paths(trace) == PLAIN
    assert len(trace.spans) == 3


def test_what_the_function_says_of_its_active_span_is_on_the_tasks(run: Run) -> None:
    """To the user's code, the task's span is MLflow's active one."""
    trace, _ = run(
        """
        import mlflow

        mlflow.get_current_active_span().set_attribute("mine", {"a": 1})
        ask()
        """
    )
    (task,) = trace.tasks
    assert task.attributes["mine"] == {"a": 1}
    assert task.attributes["spark.task.outcome"] == "completed"
    assert len(trace.spans) == 3


@pytest.mark.parametrize(
    "switch",
    ["mlflow.tracing.disable()", "mlflow.openai.autolog(disable=True)"],
)
def test_what_the_user_switches_off_is_off(run: Run, switch: str) -> None:
    """No call is recorded, and the task says why."""
    trace, _ = run(f"import mlflow\nimport mlflow.openai\n{switch}\nask()")
    assert trace.calls == []
    (task,) = trace.tasks
    assert "1 calls were made, but" in task.attributes["llm.silence"]


@pytest.fixture
def _autolog_as_before() -> Iterator[None]:
    before = AUTOLOGGING_INTEGRATIONS.get("openai")
    yield
    AUTOLOGGING_INTEGRATIONS["openai"] = before or {}


@pytest.mark.usefixtures("_autolog_as_before")
def test_what_is_switched_off_at_the_driver_is_off(run: Run) -> None:
    """Calls leave no span there either, and there is no need to say why."""
    mlflow.openai.autolog(log_traces=False)
    trace, _ = run("ask()")
    assert trace.calls == []
    (task,) = trace.tasks
    assert task.attributes["llm.calls"] == 1
    assert "llm.silence" not in task.attributes


@pytest.mark.usefixtures("_autolog_as_before")
def test_what_is_switched_off_after_enable_is_off() -> None:
    """What enable() and disable() do themselves is nobody's wish."""
    for _ in range(2):
        with ctx_autolog.enable():
            assert not ctx_autolog.capture().records_no_calls
        assert not ctx_autolog.capture().records_no_calls
    with ctx_autolog.enable():
        mlflow.openai.autolog(disable=True)
        assert ctx_autolog.capture().records_no_calls


def remote_trace(name: str) -> str:
    """Return a trace as a service would answer with it: of two spans, as JSON."""
    with mlflow.start_span(name) as span, mlflow.start_span(f"step of {name}"):
        pass
    mlflow.flush_trace_async_logging()
    text: str = stored_trace(span.trace_id).trace.to_json()
    return text


def test_a_trace_that_is_added_is_stored_with_the_task(run: Run) -> None:
    """Below the span that is active, or the one that is named; and nothing of it stays behind."""
    trace, _ = run(
        """
        import json
        import mlflow
        from mlflow.tracing.trace_manager import InMemoryTraceManager

        mlflow.add_trace(json.loads(FIRST))
        with mlflow.start_span("mine") as mine:
            pass
        with mlflow.start_span("other") as other:
            mlflow.add_trace(json.loads(SECOND), target=other)
        ask()
        left = list(InMemoryTraceManager.get_instance()._traces.values())
        assert sum(len(each.span_dict) for each in left) == 1, left
        """,
        before=f"FIRST, SECOND = {remote_trace('first')!r}, {remote_trace('second')!r}",
    )
    assert {tuple(trace.path_to(span)) for span in trace.spans} == {
        ("driver",),
        ("driver", "work"),
        ("driver", "work", "first"),
        ("driver", "work", "first", "step of first"),
        ("driver", "work", "mine"),
        ("driver", "work", "other"),
        ("driver", "work", "other", "second"),
        ("driver", "work", "other", "second", "step of second"),
        ("driver", "work", "Completions"),
    }
