"""Each kind of callable, which Spark pickles by its own rules and asks for what it is."""

from __future__ import annotations

import copyreg
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
from job import CLASSIC, Job, program
from pyspark.sql import functions as f

SCHEMA = "id long, answer string"


class Enricher:
    """Keeps a client and a lock that do not travel; they are made anew on the worker."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.clients: list[Any] = []
        self.lock = threading.RLock()
        self.called = 0

    def ask(self, number: int) -> str:
        from openai import OpenAI

        with self.lock:
            if not self.clients:
                self.clients.append(OpenAI(base_url=self.url, api_key="none", max_retries=0))
        reply = self.clients[0].chat.completions.create(
            model="gpt-test", messages=[{"role": "user", "content": f"What of {number}?"}]
        )
        return str(reply.choices[0].message.content)

    def __call__(self, number: int) -> str:
        self.called += 1
        return self.ask(number)


class WithState(Enricher):
    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Enricher.__init__(self, state["url"])


class WithReduce(Enricher):
    def __reduce__(self) -> Any:
        return WithReduce, (self.url,)


class Registered(Enricher):
    pass


class Batches(WithState):
    def __call__(self, batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            yield batch.assign(answer=[self.ask(number) for number in batch["id"]])

    @staticmethod
    def same(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        return batches

    @classmethod
    def named(cls, batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            yield batch.assign(answer=cls.__name__)


def _facts_of(function: Any) -> list[str]:
    def told(ask: Callable[[], object]) -> str:
        try:
            return repr(ask())
        except Exception as error:
            return type(error).__name__

    return [
        told(lambda: inspect.signature(function)),
        told(lambda: function.__name__),
        told(lambda: function.__doc__),
        told(lambda: sorted(vars(function))),
        told(lambda: type(function).__qualname__),
    ]


def _as_udf(job: Job, name: str, function: Any) -> None:
    before = _facts_of(function)
    job.rows(name, job.documents(rows=2).select(f.udf(function, "string")("id")))
    job.note(f"{name}: facts", before)
    job.note(f"{name}: unchanged", before == _facts_of(function))


@program(fast=True)
def objects_that_pickle_in_their_own_way(job: Job) -> None:
    copyreg.pickle(Registered, lambda each: (Registered, (each.url,)))  # type: ignore[arg-type]
    for kind in (WithState, WithReduce, Registered):
        function = kind(job.url)
        _as_udf(job, kind.__name__, function)
        job.note(f"{kind.__name__}: called here", function.called)


@program(fast=True)
def methods_and_objects_over_batches(job: Job) -> None:
    object_ = Batches(job.url)
    for name, function in (
        ("object", object_),
        ("bound call", object_.__call__),
        ("static", Batches.same),
        ("class", Batches.named),
    ):
        schema = "id long" if name == "static" else SCHEMA
        job.rows(name, job.documents(rows=2).mapInPandas(function, schema))
    _as_udf(job, "bound", object_.ask)


@program()
def partials(job: Job) -> None:
    ask = job.ask()
    _as_udf(job, "partial", functools.partial(lambda more, number: ask(number + more), 1))
    _as_udf(job, "partial of an object", functools.partial(WithState(job.url)))
    _as_udf(job, "partial of a method", functools.partial(WithState(job.url).ask))
    _as_udf(job, "keyword", functools.partial(lambda number, mark: ask(number) + mark, mark="!"))


def _decorated(function: Callable[[int], str]) -> Callable[[int], str]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> str:
        return function(*args, **kwargs).upper()

    return wrapper


@program()
def decorated_functions(job: Job) -> None:
    ask = job.ask()

    def plain(number: int) -> str:
        """Ask about a number."""
        return ask(number)

    _as_udf(job, "wrapped", _decorated(plain))
    _as_udf(job, "wrapped twice", _decorated(_decorated(plain)))
    plain.version = 3  # type: ignore[attr-defined]
    _as_udf(job, "with attributes", plain)

    def counting(number: int) -> str:
        counting.calls = getattr(counting, "calls", 0) + 1  # type: ignore[attr-defined]
        return f"{counting.calls} {ask(number)}"  # type: ignore[attr-defined]

    _as_udf(job, "its own attributes", counting)


@program()
def remembering_functions(job: Job) -> None:
    ask = job.ask()

    @functools.cache
    def remembered(number: int) -> str:
        return ask(number)

    @functools.singledispatch
    def dispatched(number: Any) -> str:
        return ask(number)

    # Spark cannot pickle the first from everywhere, with us or without.
    for name, function in (("lru_cache", remembered), ("singledispatch", dispatched)):
        job.error(
            name,
            lambda name=name, function=function: job.rows(
                name, job.documents(rows=2).select(f.udf(function, "string")("id"))
            ),
        )


@program()
def builtins_and_functions_of_modules(job: Job) -> None:
    import json
    import operator

    for name, function in (("builtin", len), ("json", json.dumps), ("operator", operator.neg)):
        frame = job.documents(rows=2).selectExpr("id", "cast(id as string) as text")
        column = "text" if name != "operator" else "id"
        job.error(
            name,
            lambda name=name, function=function, column=column, frame=frame: job.rows(
                name, frame.select(f.udf(function, "string")(column))
            ),
        )


@program(engines=(CLASSIC,))
def generators(job: Job) -> None:
    ask = job.ask()

    def partition(rows: Iterator[Any]) -> Iterator[str]:
        for row in rows:
            yield ask(row)

    numbers = job.spark.sparkContext.parallelize([1, 2, 3], 2)
    job.calls("all", lambda: job.note("all", numbers.mapPartitions(partition).collect()))
    job.calls("some", lambda: job.note("some", numbers.mapPartitions(partition).take(1)))
    lazily = numbers.mapPartitions(lambda rows: map(ask, rows))
    job.calls("map", lambda: job.note("map", lazily.collect()))
    listed = numbers.mapPartitions(lambda rows: [ask(row) for row in rows])
    job.calls("list", lambda: job.note("list", listed.collect()))


def _unmarked(function: Any) -> Any:
    return function


@program(fast=True)
def kinds_told_by_type_hints(job: Job) -> None:
    import mlflow_ctx_autolog as ctx_autolog

    ask = job.ask()

    def series(numbers: pd.Series) -> pd.Series:
        return numbers.map(ask)

    def iterator(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        for numbers in batches:
            yield numbers.map(ask)

    def several(batches: Any) -> Any:
        for numbers, more in batches:
            yield (numbers + more).map(ask)

    def aggregate(numbers: pd.Series) -> str:
        return ask(int(numbers.sum()))

    # As texts, they would not say so to Spark.
    series.__annotations__ = {"numbers": pd.Series, "return": pd.Series}
    iterator.__annotations__ = {"batches": Iterator[pd.Series], "return": Iterator[pd.Series]}
    pairs = Iterator[tuple[pd.Series, pd.Series]]
    several.__annotations__ = {"batches": pairs, "return": Iterator[pd.Series]}
    aggregate.__annotations__ = {"numbers": pd.Series, "return": str}
    # Without the library, the function that marks is not called.
    marks = (_unmarked, ctx_autolog.traced if job.is_traced else _unmarked)
    for turn, mark in zip(("", "marked"), marks, strict=True):
        for function in (series, iterator, aggregate):
            name = f"{function.__name__} {turn}"
            column = f.pandas_udf(mark(function), "string")
            job.note(f"{name}: kind", column.evalType)
            job.rows(name, job.documents(rows=2).select(column("id")))
        column = f.pandas_udf(mark(several), "string")
        name = f"several {turn}"
        job.rows(name, job.documents(rows=2).select(column("id", "id")))


@program()
def named_and_default_arguments(job: Job) -> None:
    ask = job.ask()

    @f.udf("string")
    def marked(number: int, mark: str = "?") -> str:
        return ask(number) + mark

    job.rows("default", job.documents(rows=2).select(marked("id")))
    job.error(
        "named",
        lambda: job.rows(
            "named", job.documents(rows=2).select(marked(number="id", mark=f.lit("!")))
        ),
    )


@program()
def a_udf_as_an_object(job: Job) -> None:
    ask = job.ask()

    def asked(number: int) -> str:
        """Ask about a number."""
        return ask(number)

    column = f.udf(asked, "string")
    job.note("facts", _facts_of(column))
    job.note("holds the function", column.func is asked)
    job.note("still", column.func is asked)
    frame = job.documents(rows=2)
    job.rows("used", frame.select(column("id"), column("id").alias("again")))
    job.note("nondeterministic", column.asNondeterministic().deterministic)
    job.rows("changed", frame.select(column("id"), column("id").alias("again")))


@program(engines=(CLASSIC,))
def the_udf_transpiler(job: Job) -> None:
    key = "spark.sql.experimental.optimizer.transpilePyUDFs"
    ask = job.ask()
    job.spark.conf.set(key, "true")
    try:
        plus = f.udf(lambda number: number + 1, "long")
        job.rows("transpiled", job.documents(rows=2).select(plus("id"), plus("id").alias("b")))
        asks = f.udf(lambda number: ask(number), "string")
        job.rows("not transpiled", job.documents(rows=2).select(asks("id")))
        job.same("transpiled", lambda: job.documents().select(plus("id")))
    finally:
        job.spark.conf.unset(key)
