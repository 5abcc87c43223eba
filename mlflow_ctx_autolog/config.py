"""Settings: one frozen object, from keywords, from the environment, and inside the carrier."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from mlflow_ctx_autolog.answers_settings import (
    Answers,
    AnswersKeySetting,
    AnswersSetting,
)
from mlflow_ctx_autolog.exceptions import shortened
from mlflow_ctx_autolog.prices import Price, Pricing
from mlflow_ctx_autolog.setting_kinds import (
    AbsolutePath,
    Choice,
    Flag,
    Function,
    Kind,
    Name,
    Names,
    Number,
)

__all__ = [
    "CAPTURE_CONTENT_VARIABLE",
    "ENV_PREFIX",
    "PROPAGATIONS",
    "TRANSPORTS",
    "UNCHANGED",
    "Config",
    "Propagation",
    "Sampling",
    "Transport",
    "checked_prices",
    "kinds",
]

Transport = Literal["auto", "direct", "driver", "otlp"]
Propagation = Literal["auto", "broadcast"]

ENV_PREFIX = "MLFLOW_CTX_AUTOLOG_"
CAPTURE_CONTENT_VARIABLE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
TRANSPORTS: tuple[str, ...] = get_args(Transport)
PROPAGATIONS: tuple[str, ...] = get_args(Propagation)
_KIND = "kind"


class _Unchanged:
    """What a keyword of ``enable()`` is that is not given."""

    def __repr__(self) -> str:
        return "<unchanged>"


UNCHANGED: Any = _Unchanged()


@dataclass(frozen=True)
class Sampling:
    """Which calls of a task are stored, once it is known how they ended.

    Args:
        errors: All that failed.
        slow: The slowest.
        share: Of the others, from 0 to 1.
    """

    errors: bool = False
    slow: bool = False
    share: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Sampling:
        """Parse terms joined by ``+``: ``errors``, ``slow`` and a percentage, as ``5%``.

        Raises:
            ValueError: It has other terms, or one of them twice.
        """
        terms = [term.strip() for term in text.split("+")]
        shares = [term for term in terms if term.endswith("%")]
        try:
            share = float(shares[0][:-1]) / 100 if shares else 0.0
            is_known = {*terms} <= {"errors", "slow", *shares} and len({*terms}) == len(terms)
            if not is_known or len(shares) > 1 or not 0 <= share <= 1:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"sampling={text!r} cannot be read; it must be one or more of errors, slow and a "
                'percentage from 0% to 100%, joined by +, as "errors+slow+5%"'
            ) from None
        return cls("errors" in terms, "slow" in terms, share)


@dataclass(frozen=True)
class _SamplingTerms:
    """Which calls are stored, as :class:`Sampling` reads it; None for all."""

    in_variable = "a text"

    def check(self, name: str, value: Any) -> Any:
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name}={value!r} is not a text")
        if value is not None:
            Sampling.parse(value)
        return value

    def read(self, text: str) -> Any:
        return text

    def __str__(self) -> str:
        return "`errors`, `slow` and a percentage, joined by `+`"


@dataclass(frozen=True)
class _Prices:
    """Prices by model."""

    in_variable = "JSON"

    def check(self, name: str, value: Any) -> Any:  # noqa: ARG002
        return checked_prices(value)

    def read(self, text: str) -> Any:
        return json.loads(text)

    def __str__(self) -> str:
        return "two numbers, at least 0, for each model; in a variable, as JSON"


def _setting(default: Any, kind: Kind) -> Any:
    return field(default=default, metadata={_KIND: kind})


@dataclass(frozen=True)
class Config:
    """How spans travel from a worker to the store.

    Every field can be given to :func:`~mlflow_ctx_autolog.enable` as a keyword, or set by an
    environment variable of the driver: ``MLFLOW_CTX_AUTOLOG_`` and the field's name in capitals.

    Args:
        flush_timeout: Seconds that the end of a task waits at most for its spans to be stored.
            More than 0, at most 3600.
        batch_size: Spans sent in one request at most. 1 to 10,000.
        send_interval: Seconds that a finished span waits at most for company before it is sent
            while its task still runs. More than 0, at most 3600.
        spool_directory: Where a process keeps, on its own disk, finished spans that are not stored
            yet; by default a private one among the host's temporary files.
        spool_max_bytes: Size at most of the file that one process keeps there; 0 for none.
        max_waiting_bytes: Finished spans that one process keeps in memory at most, where the
            spool has no room; beyond it, new ones are counted as lost. At least 1,000,000.
        strict: Raise on the driver, from :func:`~mlflow_ctx_autolog.receipt`,
            :func:`~mlflow_ctx_autolog.disable` and on leaving ``with enable():``, when the store
            does not have all spans that were made, and from :func:`~mlflow_ctx_autolog.enable`,
            when something on the driver is wrong; otherwise this is one warning.
        transport: How spans reach the store: ``"direct"`` from the workers; ``"driver"``: they
            come home with the task, and the driver stores them; ``"otlp"``: from the workers to the
            endpoint that ``OTEL_EXPORTER_OTLP_ENDPOINT`` names; ``"auto"``: as MLflow on the driver
            does it, directly where the store takes spans from other processes at an address that
            they can reach, else by way of the driver.
        propagation: How tasks learn which span their calls belong to: ``"auto"``: by a local
            property of Spark's (on Spark Connect, a tag of the operation) that names the span
            active where the action runs, so that plans are the same under each span;
            ``"broadcast"``: by the broadcast that each function takes along, one for each span,
            for platforms that hide properties and tags from tasks. ``"auto"`` does so, too, once
            :func:`~mlflow_ctx_autolog.doctor`, or on classic Spark a task, has found that out.
        capture_content: Whether spans hold prompts, answers and other texts, or only what happened:
            model, tokens, cost, times, outcome. Where neither this nor its variable is set, that of
            OpenTelemetry, ``OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT``, is heeded.
        max_content_chars: Characters at most of each text in them; None for no limit. At least 1.
        redact: Returns what may be sent of some content, called with each span's inputs, outputs,
            and other texts, as dictionaries, lists and texts; None withholds it. Where it raises,
            the content is withheld. It travels to the workers as Spark pickles functions.
        propagate_headers: Whether MLflow may send a ``traceparent`` header along with model calls,
            so that the endpoint can trace them as well.
        join_trace: Make the span that the variable ``TRACEPARENT`` names, as an orchestrator sets
            it for what it starts, the parent of what this process traces: of what is traced in the
            execution context in which :func:`~mlflow_ctx_autolog.enable` is called.
        databricks_token: Returns a token for the workspace whose Unity Catalog table takes the
            spans. It travels to the workers as Spark pickles functions, is called there, and again
            when the workspace refuses its token. See ``docs/databricks.md``.
        forward_env: Names of environment variables of the driver that tasks get as well, with
            their values at the time a function is handed to Spark, in its broadcast. By default
            none, since whoever listens to Spark's network can read it. In a variable, separated
            by commas.
        max_calls: Requests to models that one job, which is one trace of the driver, may make.
            Beyond it the next call raises :class:`~mlflow_ctx_autolog.BudgetExceeded` in the
            worker, and no request is sent. None for no limit. At least 1.
        max_cost: The same in US dollars, of the answers that have come. More than 0.
        max_repeats: The same for requests that were made before in the same job. At least 0.
        prices: US dollars for a million input and a million output tokens, by model: of those
            that MLflow does not know, or that cost you something else. In a variable, as JSON.
        cost_header: The response header by which a gateway says what an answer has cost, in US
            dollars, as LiteLLM's ``x-litellm-response-cost``. It goes before ``prices``; of
            streams, whose cost is not known when their headers are sent, it is not read.
        max_spans_per_trace: Spans below its tasks that the driver's trace takes, shared out among
            the hosts of Spark's executors. Calls beyond them go to one linked trace for each task;
            but those that fail, and the slowest, stay in the driver's as long as each are no more
            than another eighth. None for no limit. At least 10. See ``docs/large-jobs.md``.
        sampling: Which calls are stored, decided as they end: ``errors``, ``slow`` (the slowest of
            the job on their host so far) and a percentage of the others, joined by ``+``, as
            ``"errors+slow+5%"``. All are counted, with their tokens and cost. None for all.
        name_calls_by: A key of :func:`~mlflow_ctx_autolog.annotate` whose value stands behind the
            name of a call's span, as in ``Completions (doc-17)``, where MLflow lists a trace's
            spans. None for the name alone.
        progress: Whether the driver shows, while a job runs, how many calls its tasks have made,
            with what tokens, cost, errors and repeats.
        quiet: Whether the driver shows nothing when a job is over. Else it is one line, in a
            terminal or a notebook: calls, tokens, cost where it is known, whether all is stored,
            and where to look at it; elsewhere the log has that line, at INFO.

        reuse_answers: Where calls that Spark has made again get the answers that were paid for:
            True among the workers of each host, or in a directory that all workers see, by its
            absolute path. ``"same request"`` gives one answer to all equal requests, also of other
            rows. An :class:`~mlflow_ctx_autolog.Answers` says more. See ``docs/pay-once.md``.
        answers_key: With what these answers are encrypted on the disk. A key, as
            ``cryptography.fernet.Fernet.generate_key()`` returns it, travels in Spark's broadcast;
            ``"$NAME"`` names one that workers have in an environment variable, as they must have
            one that is given in a variable itself. Needs cryptography.
        max_answer_bytes: Size of all answers at most, in bytes, the oldest making room.

    Raises:
        ValueError: A value is outside its range; the message names it and the range.
        TypeError: A value is of the wrong type.
    """

    flush_timeout: float = _setting(10.0, Number(above=0, at_most=3600))
    batch_size: int = _setting(200, Number(at_least=1, at_most=10_000, whole=True))
    send_interval: float = _setting(1.0, Number(above=0, at_most=3600))
    spool_directory: str | None = _setting(None, AbsolutePath())
    spool_max_bytes: int = _setting(256 * 1024 * 1024, Number(at_least=0, whole=True))
    max_waiting_bytes: int = _setting(16 * 1024 * 1024, Number(at_least=1_000_000, whole=True))
    strict: bool = _setting(False, Flag())
    transport: Transport = _setting("auto", Choice(TRANSPORTS))  # noqa: RUF009
    propagation: Propagation = _setting("auto", Choice(PROPAGATIONS))  # noqa: RUF009
    capture_content: bool = _setting(True, Flag())
    max_content_chars: int | None = _setting(None, Number(at_least=1, whole=True, optional=True))
    redact: Callable[[Any], Any] | None = _setting(None, Function())  # noqa: RUF009
    propagate_headers: bool = _setting(True, Flag())
    join_trace: bool = _setting(False, Flag())
    databricks_token: Callable[[], str] | None = _setting(None, Function())  # noqa: RUF009
    forward_env: Sequence[str] = _setting((), Names())
    max_calls: int | None = _setting(None, Number(at_least=1, whole=True, optional=True))
    max_cost: float | None = _setting(None, Number(above=0, at_most=1_000_000_000, optional=True))
    max_repeats: int | None = _setting(None, Number(at_least=0, whole=True, optional=True))
    prices: Mapping[str, Price] = field(
        default_factory=dict, hash=False, metadata={_KIND: _Prices()}
    )
    cost_header: str | None = _setting(None, Name("a header's name"))
    max_spans_per_trace: int | None = _setting(2000, Number(at_least=10, whole=True, optional=True))
    sampling: str | None = _setting(None, _SamplingTerms())
    name_calls_by: str | None = _setting(None, Name("a key of `annotate()`"))
    progress: bool = _setting(False, Flag())
    quiet: bool = _setting(False, Flag())
    reuse_answers: Answers | str | bool | None = _setting(None, AnswersSetting())  # noqa: RUF009
    answers_key: str | None = _setting(None, AnswersKeySetting())
    max_answer_bytes: int = _setting(1024 * 1024 * 1024, Number(at_least=1, whole=True))

    def __post_init__(self) -> None:
        for name, kind in kinds().items():
            object.__setattr__(self, name, kind.check(name, getattr(self, name)))

    @property
    def has_budget(self) -> bool:
        """Whether there is a limit to what calls may spend."""
        return (self.max_calls, self.max_cost, self.max_repeats) != (None, None, None)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ, **settings: Any) -> Config:
        """Read ``MLFLOW_CTX_AUTOLOG_*``; fields without a variable keep their default.

        Of OpenTelemetry's variables, the one on ``capture_content`` is read as well.

        Args:
            environ: The environment variables.
            **settings: Fields that win over their variables.

        Raises:
            ValueError: A variable or setting is unknown, cannot be read, or is out of range.
            TypeError: A setting is of the wrong type.
        """
        heeded = {**_opentelemetrys(environ), **_settings_from_env(environ)}
        return cls().updated({**heeded, **settings})

    @property
    def pricing(self) -> Pricing:
        """What the user says of prices."""
        return Pricing(self.prices, self.cost_header)

    def updated(self, settings: Mapping[str, Any]) -> Config:
        """Return a copy with ``settings`` in place.

        Raises:
            ValueError: A name is unknown or a value out of range.
            TypeError: A value is of the wrong type.
        """
        for name in settings:
            _check_known(name, f"setting {name!r}")
        return replace(self, **settings)

    def differences(self, other: Config) -> dict[str, tuple[str, str]]:
        """Return what it and another object have, by the names of fields in which they differ."""
        return {
            name: (_shown(getattr(self, name)), _shown(getattr(other, name)))
            for name in kinds()
            if getattr(self, name) != getattr(other, name)
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that JSON can hold as a dictionary: all but functions."""
        names = [name for name, kind in kinds().items() if not isinstance(kind, Function)]
        document = {name: getattr(self, name) for name in names}
        if isinstance(self.reuse_answers, Answers):
            document["reuse_answers"] = self.reuse_answers.to_dict()
        return document


def _shown(value: object) -> str:
    return shortened(repr(value))


def _settings_from_env(environ: Mapping[str, str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(ENV_PREFIX):
            continue
        name = variable[len(ENV_PREFIX) :].lower()
        _check_known(name, f"environment variable {variable}")
        kind = kinds()[name]
        try:
            settings[name] = kind.read(text)
        except ValueError:
            raise ValueError(f"{variable}={text!r} is not {kind.in_variable}") from None
    return settings


def checked_prices(prices: object) -> dict[str, Price]:
    """Return prices by model, each two numbers.

    Raises:
        TypeError: It is no mapping.
        ValueError: One is no price.
    """
    if not isinstance(prices, Mapping):
        raise TypeError(f"prices={shortened(repr(prices))} is not a mapping of models to prices")
    checked: dict[str, Price] = {}
    for model, price in prices.items():
        try:
            first, second = price
            if not (0 <= first < math.inf and 0 <= second < math.inf):
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(
                f"the price of {model!r} is {shortened(repr(price))}; it must be two numbers, at "
                "least 0: US dollars for a million input and a million output tokens"
            ) from None
        checked[str(model)] = (first, second)
    return checked


def _opentelemetrys(environ: Mapping[str, str]) -> dict[str, Any]:
    text = environ.get(CAPTURE_CONTENT_VARIABLE)
    if not text:
        return {}
    # Older conventions say true and false. Our content is in spans, never in log events.
    wanted = {"true": True, "span_only": True, "span_and_event": True}
    unwanted = {"false": False, "no_content": False, "event_only": False}
    known = {**wanted, **unwanted}
    if text.lower() not in known:
        raise ValueError(f"{CAPTURE_CONTENT_VARIABLE}={text!r} is none of {', '.join(known)}")
    return {"capture_content": known[text.lower()]}


def _check_known(name: str, shown: str) -> None:
    if name not in kinds():
        raise ValueError(f"unknown {shown}; the settings are: {', '.join(kinds())}")


@functools.cache
def kinds() -> Mapping[str, Kind]:
    """Return what each setting takes, by its name."""
    return {each.name: each.metadata[_KIND] for each in fields(Config)}
