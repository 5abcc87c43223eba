"""What a program of the differential test runs in, and notes its facts with."""

from __future__ import annotations

import contextlib
import io
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from functions import asker

from mlflow_ctx_autolog.testing import OpenAIEndpoint

__all__ = ["CLASSIC", "CONNECT", "PROGRAMS", "Job", "Program", "normal", "program"]

CLASSIC, CONNECT = "classic", "connect"


@dataclass(frozen=True)
class Program:
    """A small program that runs with and without the library.

    Args:
        name: Its name.
        run: What it does, and notes.
        engines: Where it can run.
        fast: Whether ``make test`` runs it.
        has_span: Whether a span of the driver's is active while it runs; else it opens its own.
        is_traced: Whether all its model calls are to be in the traces of its spans.
    """

    name: str
    run: Callable[[Job], None]
    engines: tuple[str, ...]
    fast: bool
    has_span: bool
    is_traced: bool


PROGRAMS: dict[str, Program] = {}


def program(
    *,
    name: str | None = None,
    engines: tuple[str, ...] = (CLASSIC, CONNECT),
    fast: bool = False,
    has_span: bool = True,
    is_traced: bool = True,
) -> Callable[[Callable[[Job], None]], Callable[[Job], None]]:
    """Add a function to the programs."""

    def add(run: Callable[[Job], None]) -> Callable[[Job], None]:
        known_as = name or run.__name__
        assert known_as not in PROGRAMS, known_as
        PROGRAMS[known_as] = Program(known_as, run, engines, fast, has_span, is_traced)
        return run

    return add


class Job:
    """One run of a program: its session, its endpoint, and the facts that it notes.

    Args:
        spark: The session.
        endpoint: Counts the model calls.
        open_span: Opens a span of the driver's by its name; opens none in the run without.
        is_traced: Whether this is the run with the library.
    """

    def __init__(
        self,
        spark: Any,
        endpoint: OpenAIEndpoint,
        open_span: Callable[[str], contextlib.AbstractContextManager[Any]],
        is_traced: bool,
    ) -> None:
        self.spark = spark
        self.endpoint = endpoint
        self.span = open_span
        self.is_traced = is_traced
        self.facts: dict[str, Any] = {}
        self.is_connect = "connect" in type(spark).__module__

    @property
    def url(self) -> str:
        return self.endpoint.base_url

    def ask(self) -> Callable[[int], str]:
        """Return a function that makes a model call about a number."""
        return asker(self.url)

    def documents(self, rows: int = 4, partitions: int = 2) -> Any:
        return self.spark.range(0, rows, 1, partitions)

    def note(self, name: str, value: Any) -> None:
        assert name not in self.facts, f"{name} is noted already"
        self.facts[name] = _all_normal(value)

    def calls(self, name: str, action: Callable[[], Any]) -> Any:
        """Run something, and note how many model calls it made; return what it returned."""
        before = len(self.endpoint.requests)
        result = action()
        self.note(f"{name}: calls", len(self.endpoint.requests) - before)
        return result

    def rows(self, name: str, frame: Any) -> None:
        """Note the schema, plan and rows of a frame, and the calls that they cost."""
        self.plan(name, frame)
        rows = self.calls(name, frame.collect)
        self.note(f"{name}: rows", sorted(map(repr, rows)))

    def plan(self, name: str, frame: Any) -> None:
        self.note(f"{name}: schema", frame.schema.simpleString())
        text = printed(lambda: frame.explain(True))
        self.note(f"{name}: plan", text)
        optimised = text.partition("== Optimized Logical Plan ==")[2].partition("== Physical")[0]
        nodes = re.findall(r"^\W*(\w*(?:Python|Pandas|InArrow)\w*)", optimised, re.MULTILINE)
        self.note(f"{name}: Python nodes", nodes)

    def same(self, name: str, build: Callable[[], Any]) -> None:
        """Note whether two builds of a plan are the same to Spark."""
        one, other = build(), build()
        self.note(f"{name}: same semantics", one.sameSemantics(other))
        self.note(f"{name}: same hash", one.semanticHash() == other.semanticHash())

    def error(self, name: str, action: Callable[[], Any], but_frames_of: str = "nobody") -> None:
        """Note all that can be read of an error.

        Args:
            name: What it is the error of.
            action: Raises it.
            but_frames_of: A package whose frames may be in its traceback.
        """
        printed_errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(printed_errors):
                action()
        except BaseException as error:
            self.note(f"{name}: error", described(error, but_frames_of))
        else:
            self.note(f"{name}: error", None)
        self.note(f"{name}: stderr", printed_errors.getvalue())

    def warned(self, name: str, action: Callable[[], Any]) -> Any:
        """Run something, and note its warnings."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = action()
        said = [
            [each.category.__name__, normal(str(each.message)), Path(each.filename).name]
            for each in caught
            # What MLflow says of its own store, with which one run has to do and the other has not;
            # and what Spark 4.0 leaves to the collector, which comes at any moment.
            if "/mlflow/" not in each.filename and each.category is not ResourceWarning
        ]
        self.note(f"{name}: warnings", said)
        return result


def _all_normal(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_all_normal(each) for each in value]
    if isinstance(value, dict):
        return {key: _all_normal(each) for key, each in value.items()}
    return normal(value) if isinstance(value, str) else value


def printed(action: Callable[[], Any]) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        action()
    return output.getvalue()


def described(error: BaseException | None, but_frames_of: str) -> Any:
    if error is None:
        return None
    frames = [
        f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if but_frames_of not in Path(frame.filename).parts
    ]
    facts = {
        "type": f"{type(error).__module__}.{type(error).__qualname__}",
        "text": normal(str(error)),
        "arguments": normal(repr(error.args)),
        "notes": list(getattr(error, "__notes__", ())),
        "frames": frames,
        "cause": described(error.__cause__, but_frames_of),
        "context": None
        if error.__suppress_context__
        else described(error.__context__, but_frames_of),
    }
    for method in ("getCondition", "getSqlState", "getMessageParameters"):
        with contextlib.suppress(Exception):
            found = getattr(error, method)()
            # In no order.
            facts[method] = normal(repr(sorted(found.items()) if method.endswith("s") else found))
    return facts


# What is another in each run.
_CHANGING = [
    (re.compile(pattern, re.MULTILINE), replacement)
    for pattern, replacement in (
        (r"^\s+at [\w.$/]+\(.*\n?", ""),
        (r"^\s+at .*\$\$Lambda.*\n?", ""),
        (r"^\t\.\.\. \d+ more\n?", ""),
        (r"Lambda\$\d+|Lambda/", "Lambda"),
        (r"MethodAccessor\d+", "MethodAccessor"),
        (r"calling o\d+", "calling o"),
        (r"0x[0-9a-f]+", "0x"),
        (r"(?<=0x)@[0-9a-f]+", ""),
        (r"id=o\d+", "id=o"),
        (r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "UUID"),
        (r"\b[0-9a-f]{32}\b", "HEX"),
        (r"rows_[0-9a-f]{32}", "rows_HEX"),
        (r"(127\.0\.0\.1|localhost):\d+", "ADDRESS"),
        (r"(file:)?/tmp/[^\s,'\")\]}]+", "TEMPORARY"),
        (r"\b(TID|Job|job|pid|process|Thread-|SparkContext@) ?\d+", r"\1 N"),
        (r"\b(stage|task) \d+\.\d+", r"\1 N"),
        (r"(host|executor) [\w.-]+", r"\1 H"),
        (r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d[.,\d]*", "TIME"),
        (r"(plan_id|id|rddId|RDD|operatorId)( ?[=:] ?|\[| )\d+", r"\1\2N"),
        (r"\[\d+\] at ", "[N] at "),
        (r"SQL:\w+", "SQL"),
    )
]


def normal(text: str) -> str:
    """Return a text without what Spark, Python and the machine number and name anew each time."""
    for pattern, replacement in _CHANGING:
        text = pattern.sub(replacement, text)
    # By order, so that it still shows what is the same expression and what is another.
    numbers: dict[str, int] = {}
    return re.sub(r"#(\d+)", lambda found: f"#{numbers.setdefault(found[1], len(numbers))}", text)


@contextlib.contextmanager
def settings(spark: Any, **values: str) -> Iterator[None]:
    """Set some of Spark's settings for a block."""
    for key, value in values.items():
        spark.conf.set(key, value)
    try:
        yield
    finally:
        for key in values:
            spark.conf.unset(key)
