"""Other autologs of MLflow: those that are on at the driver are on in the workers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import anthropic_endpoint
import mlflow
import pytest
from coverage_table import FLAVORS, case
from pyspark import cloudpickle
from pyspark.sql import SparkSession
from workload import StoredTrace, stored_trace, stored_traces

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint

cloudpickle.register_pickle_by_value(sys.modules[__name__])

COLUMN = "below the task"
CALLS = 2


def by_litellm(url: str) -> str:
    import litellm

    message = {"role": "user", "content": "What of document 1?"}
    reply = litellm.completion(
        model="openai/gpt-test", messages=[message], api_base=url, api_key="not-a-key"
    )
    return str(reply.choices[0].message.content)


def by_langchain(url: str) -> str:
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model="gpt-test", base_url=url, api_key="not-a-key", max_retries=0)
    chain = ChatPromptTemplate.from_template("What of document {number}?") | model
    return str(chain.invoke({"number": 1}).content)


def by_agents(url: str) -> str:
    from agents import Agent, OpenAIChatCompletionsModel, Runner
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=url, api_key="not-a-key", max_retries=0)
    model = OpenAIChatCompletionsModel(model="gpt-test", openai_client=client)
    agent = Agent(name="reader", instructions="Read.", model=model)
    return str(Runner.run_sync(agent, "What of document 1?").final_output)


def by_anthropic(url: str) -> str:
    import anthropic

    client = anthropic.Anthropic(base_url=url, api_key="not-a-key", max_retries=0)
    reply = client.messages.create(
        model="claude-test", max_tokens=9, messages=[{"role": "user", "content": "Document 1?"}]
    )
    return str(reply.content[0].text)


class Way(NamedTuple):
    """A library, MLflow's flavour for it, a call by it, and its span's name."""

    library: str
    flavor: str | None
    call: Callable[[str], str]
    name: str


def visitor(call: Callable[[str], str], url: str) -> Callable[[Iterable[int]], Iterator[str]]:
    def extract(rows: Iterable[int]) -> Iterator[str]:
        for _ in rows:
            yield call(url)

    return extract


@pytest.fixture
def autolog() -> Iterator[Callable[[str], None]]:
    """Turns a flavour's autolog on at the driver, until the test is over."""
    on = []

    def turn_on(flavor: str) -> None:
        on.append(importlib.import_module(f"mlflow.{flavor}"))
        on[-1].autolog()

    yield turn_on
    for module in on:
        module.autolog(disable=True)


def run(spark: SparkSession, call: Callable[[str], str], url: str) -> StoredTrace:
    numbers = spark.sparkContext.parallelize(range(CALLS), 1)
    with ctx_autolog.enable(), mlflow.start_span("job") as span:
        assert len(numbers.mapPartitions(visitor(call, url)).collect()) == CALLS
    ctx_autolog.flush()
    return stored_trace(span.trace_id)


WAYS = {
    "LiteLLM": Way("litellm", "litellm", by_litellm, "litellm-completion"),
    "LangChain": Way("langchain_openai", "langchain", by_langchain, "ChatOpenAI"),
    "OpenAI Agents SDK": Way("agents", None, by_agents, "AgentRunner.run"),
}


@pytest.mark.parametrize("way", [case(WAYS[name], FLAVORS, name, COLUMN) for name in WAYS])
def test_what_mlflow_traces_on_the_driver_is_traced_in_the_workers(
    spark: SparkSession,
    endpoint: OpenAIEndpoint,
    experiment_id: str,
    autolog: Callable[[str], None],
    way: Way,
) -> None:
    """Its spans are below the task, the trace's tokens are those billed, and there is one trace."""
    pytest.importorskip(way.library)
    if way.flavor is not None:
        autolog(way.flavor)
    trace = run(spark, way.call, endpoint.base_url)

    (task,) = trace.tasks
    named = [span for span in trace.spans if span.name == way.name]
    assert len(named) == len(endpoint.requests) == CALLS
    assert all(trace.path_to(span)[:2] == ["job", task.name] for span in named)
    assert all(trace.is_nested(each) for each in trace.calls)
    assert trace.total_tokens == endpoint.total_tokens
    assert len(stored_traces(experiment_id)) == 1


@pytest.mark.covers(FLAVORS, "Anthropic", COLUMN)
def test_anthropics_calls_are_traced(
    spark: SparkSession, experiment_id: str, autolog: Callable[[str], None]
) -> None:
    """They are below the task while its autolog is on at the driver, and untraced afterwards."""
    pytest.importorskip("anthropic")
    autolog("anthropic")
    with anthropic_endpoint.anthropic_endpoint() as url:
        trace = run(spark, by_anthropic, url)
        mlflow.anthropic.autolog(disable=True)
        without = run(spark, by_anthropic, url)

    (task,) = trace.tasks
    calls = trace.children_of(task)
    assert [call.name for call in calls] == ["Messages.create"] * CALLS
    tokens = anthropic_endpoint.INPUT_TOKENS + anthropic_endpoint.OUTPUT_TOKENS
    assert trace.total_tokens == CALLS * tokens
    assert without.calls == []


def test_a_library_that_workers_lack_breaks_nothing(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str, monkeypatch: Any
) -> None:
    """An autolog that cannot be turned on in a worker costs its spans and nothing else."""
    monkeypatch.setattr(
        "mlflow_ctx_autolog.driver.handover.autologs_in_force",
        lambda: {"smolagents": {}, "of a later release": {"log_traces": True}},
    )

    def call(url: str) -> str:
        from openai import OpenAI

        client = OpenAI(base_url=url, api_key="not-a-key")
        message = {"role": "user", "content": "What of document 1?"}
        reply = client.chat.completions.create(model="gpt-test", messages=[message])
        return str(reply.choices[0].message.content)

    trace = run(spark, call, endpoint.base_url)
    trace.assert_nested(calls=CALLS)
