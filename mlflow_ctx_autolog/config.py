"""Settings: one frozen object, from keywords, from the environment, and inside the carrier."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from mlflow_ctx_autolog.exceptions import shortened

__all__ = [
    "CAPTURE_CONTENT_VARIABLE",
    "ENV_PREFIX",
    "PROPAGATIONS",
    "TRANSPORTS",
    "Config",
    "Price",
    "Sampling",
    "checked_prices",
]

# US dollars for a million input and a million output tokens.
Price = tuple[float, float]

ENV_PREFIX = "MLFLOW_CTX_AUTOLOG_"
CAPTURE_CONTENT_VARIABLE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
_VARIABLE = re.compile("[A-Za-z_][A-Za-z0-9_]*")
TRANSPORTS = ("auto", "direct", "driver", "otlp")
PROPAGATIONS = ("auto", "broadcast")
# Whole numbers that may be None, and how small each may be.
_LEAST = {"max_content_chars": 1, "max_calls": 1, "max_repeats": 0, "max_spans_per_trace": 10}


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
            for platforms that hide properties and tags from tasks.
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
        forward_env: Names of environment variables of the driver that tasks get as well, with
            their values at the time a function is handed to Spark, in its broadcast. By default
            none, since whoever listens to Spark's network can read it. In a variable, separated
            by commas.
        max_calls: Requests to models that one job, which is one trace of the driver, may make.
            Beyond it the next call raises :class:`~mlflow_ctx_autolog.BudgetExceeded` in the
            worker, and no request is sent. None for no limit. At least 1.
        max_cost: The same in US dollars, of the answers that have come. More than 0.
        max_repeats: The same for requests that were made before in the same job. At least 0.
        prices: US dollars for a million input and a million output tokens, by model, where MLflow
            does not know them. In a variable, as JSON.
        max_spans_per_trace: Spans below its tasks that the driver's trace takes, shared out among
            the hosts of Spark's executors. Calls beyond them go to one linked trace for each task;
            but those that fail, and the slowest, stay in the driver's as long as each are no more
            than another eighth. None for no limit. At least 10. See ``docs/large-jobs.md``.
        sampling: Which calls are stored, decided as they end: ``errors``, ``slow`` (the slowest of
            the job on their host so far) and a percentage of the others, joined by ``+``, as
            ``"errors+slow+5%"``. All are counted, with their tokens and cost. None for all.
        progress: Whether the driver shows, while a job runs, how many calls its tasks have made,
            with what tokens, cost, errors and repeats. Needs tqdm.

    Raises:
        ValueError: A value is outside its range; the message names it and the range.
        TypeError: A value is of the wrong type.
    """

    flush_timeout: float = 10.0
    batch_size: int = 200
    send_interval: float = 1.0
    spool_directory: str | None = None
    spool_max_bytes: int = 256 * 1024 * 1024
    max_waiting_bytes: int = 16 * 1024 * 1024
    strict: bool = False
    transport: str = "auto"
    propagation: str = "auto"
    capture_content: bool = True
    max_content_chars: int | None = None
    redact: Callable[[Any], Any] | None = None
    propagate_headers: bool = True
    join_trace: bool = False
    forward_env: Sequence[str] = ()
    max_calls: int | None = None
    max_cost: float | None = None
    max_repeats: int | None = None
    prices: Mapping[str, Price] = field(default_factory=dict, hash=False)
    max_spans_per_trace: int | None = 2000
    sampling: str | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        _check("flush_timeout", self.flush_timeout, above=0, at_most=3600)
        _check("batch_size", self.batch_size, at_least=1, at_most=10_000, whole=True)
        _check("send_interval", self.send_interval, above=0, at_most=3600)
        _check("spool_max_bytes", self.spool_max_bytes, at_least=0, whole=True)
        _check("max_waiting_bytes", self.max_waiting_bytes, at_least=1_000_000, whole=True)
        if self.spool_directory is not None and not isinstance(self.spool_directory, str):
            raise TypeError(f"spool_directory={self.spool_directory!r} is not a text")
        if self.spool_directory is not None and not os.path.isabs(self.spool_directory):
            raise ValueError(
                f"spool_directory={self.spool_directory!r} is not an absolute path, and a worker "
                "has another working directory"
            )
        flags = ("strict", "capture_content", "propagate_headers", "join_trace", "progress")
        for name in flags:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r} is not True or False")
        for name, least in _LEAST.items():
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), at_least=least, whole=True)
        if self.max_cost is not None:
            _check("max_cost", self.max_cost, above=0, at_most=1e9)
        if self.sampling is not None:
            if not isinstance(self.sampling, str):
                raise TypeError(f"sampling={self.sampling!r} is not a text")
            Sampling.parse(self.sampling)
        object.__setattr__(self, "prices", checked_prices(self.prices))
        if self.redact is not None and not callable(self.redact):
            raise TypeError(f"redact={self.redact!r} is not a function")
        # So that two settings objects with the same names are equal, whatever held them.
        object.__setattr__(self, "forward_env", _names("forward_env", self.forward_env))
        for name, choices in (("transport", TRANSPORTS), ("propagation", PROPAGATIONS)):
            if (value := getattr(self, name)) not in choices:
                known = ", ".join(choices)
                raise ValueError(f"{name}={value!r} is unknown; it must be one of {known}")

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

    def updated(self, settings: Mapping[str, Any]) -> Config:
        """Return a copy with ``settings`` in place.

        Raises:
            ValueError: A name is unknown or a value out of range.
            TypeError: A value is of the wrong type.
        """
        for name in settings:
            _check_known(name, f"setting {name!r}")
        return replace(self, **settings)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that JSON can hold as a dictionary: all but ``redact``."""
        names = [field.name for field in fields(self) if field.name != "redact"]
        return {name: getattr(self, name) for name in names}


def _settings_from_env(environ: Mapping[str, str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(ENV_PREFIX):
            continue
        name = variable[len(ENV_PREFIX) :].lower()
        _check_known(name, f"environment variable {variable}")
        read, kind = _reader(name)
        try:
            settings[name] = read(text)
        except ValueError:
            raise ValueError(f"{variable}={text!r} is not {kind}") from None
    return settings


def _reader(name: str) -> tuple[Callable[[str], Any], str]:
    """Return what reads a field's variable, and what it expects."""
    default = getattr(Config, name, None)
    if isinstance(default, bool):
        return _flag, "true or false"
    if name == "max_spans_per_trace":
        return _whole_or_none, "a number, or none"
    if name in _LEAST:
        return int, "a number"
    if name == "max_cost":
        return float, "a number"
    if name == "prices":
        return json.loads, "JSON"
    if name == "forward_env":
        return _listed, "a list"
    if name == "redact":
        return _no_function, "a function: give it to enable()"
    return type(default or ""), "a number"


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


def _whole_or_none(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def _no_function(text: str) -> None:
    raise ValueError(text)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _names(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name}={value!r} is not a list of names")
    for each in value:
        if not isinstance(each, str) or not _VARIABLE.fullmatch(each):
            raise ValueError(f"{name} holds {each!r}, which is not an environment variable's name")
    return tuple(value)


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


def _flag(text: str) -> bool:
    flags = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in flags:
        raise ValueError(text)
    return flags[text.lower()]


def _check_known(name: str, shown: str) -> None:
    known = [field.name for field in fields(Config)]
    if name not in known:
        raise ValueError(f"unknown {shown}; the settings are: {', '.join(known)}")


def _check(
    name: str,
    value: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    whole: bool = False,
) -> None:
    kind = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise TypeError(f"{name}={value!r} is not {kind}")
    limits = [
        f"{words} {limit:g}"
        for words, limit in (("more than", above), ("at least", at_least), ("at most", at_most))
        if limit is not None
    ]
    # Comparisons with nan are false, so nan is outside every range; inf is outside those with an
    # upper limit, and no field of floats lacks one.
    inside = (
        (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (at_most is None or value <= at_most)
    )
    if not inside:
        raise ValueError(f"{name}={value!r} is out of range; it must be {' and '.join(limits)}")
