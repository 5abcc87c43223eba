"""What travels from the driver to the workers: a small, versioned JSON text."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote, unquote

from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.exceptions import CarrierError, shortened
from mlflow_ctx_autolog.spans.amounts import parse_amounts

__all__ = [
    "BY_BROADCAST",
    "BY_PROPERTY",
    "CARRIER_VERSION",
    "ActionContext",
    "DriverContext",
    "is_traceparent",
]

CARRIER_VERSION = 1

# How a task learns which span its calls belong to: by what the driver says of each action, or by
# the carrier itself.
BY_PROPERTY, BY_BROADCAST = "property", "broadcast"

# https://www.w3.org/TR/trace-context/#traceparent-header
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)


def is_traceparent(text: str) -> bool:
    """Whether a text is a W3C ``traceparent``."""
    return _TRACEPARENT.fullmatch(text) is not None


@dataclass(frozen=True)
class ActionContext:
    """What is so at the moment of an action, and travels beside the plan: ids and numbers only.

    Args:
        traceparent: W3C ``traceparent`` of the span active where the action runs; None if there
            was none.
        session_id: That of its trace, if it has one.
        action: Number and name of the action, as ``7.collect``, where there was no span.
        run_id: MLflow's run that was active then, where there was no span.
        spent: What the calls of its trace have spent so far, as far as the driver knows:
            ``calls`` and ``cost``; empty where no budget asks.
        acknowledged: Which spans the driver has of those that tasks gave to Spark for it: by the
            name of a worker's outbox, all up to that number.
    """

    traceparent: str | None = None
    session_id: str | None = None
    action: str | None = None
    run_id: str | None = None
    spent: Mapping[str, float] = field(default_factory=dict, hash=False)
    acknowledged: Mapping[str, int] = field(default_factory=dict, hash=False)

    def to_text(self) -> str:
        """Serialise to one line of ASCII without commas, blanks or quotes."""
        fields = [self.traceparent or _NO_SPAN]
        if self.session_id is not None and len(self.session_id) <= _LONGEST_SESSION:
            fields.append(f"session={quote(self.session_id, safe='')}")
        if self.action is not None:
            fields.append(f"action={self.action}")
        if self.run_id is not None:
            fields.append(f"run={self.run_id}")
        fields += [f"{name}={amount:.12g}" for name, amount in self.spent.items()]
        if self.acknowledged:
            told = (f"{name}.{number}" for name, number in self.acknowledged.items())
            fields.append(f"acknowledged={'+'.join(told)}")
        return ";".join(fields)

    @classmethod
    def from_text(cls, text: str) -> ActionContext:
        """Parse what :meth:`to_text` wrote; what a later release may have added is ignored.

        Raises:
            CarrierError: The text is damaged.
        """
        traceparent, *fields = text.split(";")
        if traceparent != _NO_SPAN and not is_traceparent(traceparent):
            raise CarrierError(f"what the driver said of the action is damaged: {_excerpt(text)}")
        named = dict(each.partition("=")[::2] for each in fields)
        session = named.get("session")
        spent: dict[str, float] = {}
        acknowledged: dict[str, int] = {}
        try:
            for each in filter(None, named.get("acknowledged", "").split("+")):
                name, _, number = each.partition(".")
                acknowledged[name] = int(number)
            for name in ("calls", "cost"):
                if name in named:
                    spent[name] = float(named[name])
        except ValueError:
            raise CarrierError(
                f"what the driver said of the action is damaged: {_excerpt(text)}"
            ) from None
        return cls(
            None if traceparent == _NO_SPAN else traceparent,
            None if session is None else unquote(session),
            named.get("action"),
            named.get("run"),
            spent,
            acknowledged,
        )


_NO_SPAN = "none"
# By MLflow's names, among the metadata of a trace.
_SESSION, _USER, _RUN = "mlflow.trace.session", "mlflow.trace.user", "mlflow.sourceRun"
# Characters; a longer one stays behind.
_LONGEST_SESSION = 200


@dataclass(frozen=True)
class DriverContext:
    """The driver's trace context and its destination, as captured at one moment.

    All functions of a Spark application share one, as long as the settings and the destination
    stay. Which span an action's calls belong to is then said beside it, by an
    :class:`ActionContext`.

    Args:
        experiment_id: The experiment of the driver's trace.
        tracking_uri: Where workers store spans; None where the spans come home with the task and
            the driver stores them, as for an address with a user name or password in it.
        traceparent: W3C ``traceparent`` of the span active on the driver; None if there was none.
        tracestate: W3C ``tracestate`` of that span, if any.
        workspace: The server's workspace that the experiment is in; None for the default one.
        session_id: That of the driver's trace, if it has one; where there is no ``traceparent`` to
            join the traces of one job, it groups them.
        user: Who the traces of the job are of, if MLflow knows.
        tags: Tags of traces of tasks that have no parent on the driver.
        metadata: Other metadata of these traces.
        application_id: Spark's application id, if known.
        process_id: Names the driver's process, so that it can recognise its own context.
        redacts: Whether content may be sent only through the user's ``redact``, which travels
            apart from this, as Spark pickles functions.
        has_span_processors: The same of the functions that MLflow's spans go through.
        environment: Environment variables that tasks have: those that ``forward_env`` names, and
            flags of MLflow's tracing.
        autologs: MLflow's autologs that are on at the driver, besides OpenAI's: their names, and
            of each its switches.
        records_no_calls: Whether MLflow's OpenAI autolog is switched off at the driver, or told to
            make no traces, so that calls leave no spans in tasks either.
        fingerprint_key: Random key of the fingerprints of requests; it is stored nowhere.
        action: What the action is called whose trace this is, where no span was active on the
            driver and ``traceparent`` names a root that is nobody's span; None where there was one.
        propagation: How a task learns what its calls belong to: by what is said of its action
            (``property``), or by this carrier alone (``broadcast``).
        speculation: What Spark's setting ``spark.speculation`` says, if known.
        spans_per_host: Spans below tasks that the trace takes on each host, before further ones go
            to linked traces; None where it takes all.
        max_result_bytes: Bytes that Spark's setting ``spark.driver.maxResultSize`` allows the
            results of a stage, 0 for no limit; None where it is not told.
        spent: What the calls of the trace have spent so far, as far as the driver knows:
            ``calls`` and ``cost``.
        config: The settings in force on the driver.
    """

    experiment_id: str
    tracking_uri: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    workspace: str | None = None
    session_id: str | None = None
    user: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict, hash=False)
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)
    application_id: str | None = None
    process_id: str | None = None
    redacts: bool = False
    has_span_processors: bool = False
    # Not in the text of a log or an error.
    environment: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)
    autologs: Mapping[str, Mapping[str, bool]] = field(default_factory=dict, hash=False)
    records_no_calls: bool = False
    fingerprint_key: str | None = None
    action: str | None = field(default=None, compare=False)
    propagation: str = field(default=BY_BROADCAST, compare=False)
    speculation: str | None = None
    spans_per_host: int | None = None
    max_result_bytes: int | None = None
    spent: Mapping[str, float] = field(default_factory=dict, hash=False, compare=False)
    config: Config = field(default_factory=Config)

    def is_of_span(self, other: DriverContext) -> bool:
        """Whether another one names the same span, in the same place."""

        def place(context: DriverContext) -> tuple[str | None, ...]:
            return context.traceparent, context.tracking_uri, context.experiment_id

        return place(self) == place(other)

    def under(self, action: ActionContext) -> DriverContext:
        """Return the context of a task whose action runs in ``action``."""
        if action.traceparent is None:
            metadata = dict(self.metadata)
            if action.run_id is not None:
                metadata[_RUN] = action.run_id
            return replace(
                self,
                traceparent=None,
                tracestate=None,
                session_id=metadata.pop(_SESSION, None),
                user=metadata.pop(_USER, None),
                metadata=metadata,
                spent=action.spent,
            )
        # What was declared of new traces is not that of a trace which is there.
        there = replace(self, tags={}, metadata={}, spent=action.spent)
        if action.traceparent == self.traceparent:
            return there
        return replace(
            there,
            traceparent=action.traceparent,
            tracestate=None,
            session_id=action.session_id,
            user=None,
        )

    def of_action(self, name: str, scope: str, ratio: float = 1.0) -> DriverContext:
        """Return the context of a task where the action is to be the trace: all its tasks get one.

        Args:
            name: What the trace is called.
            scope: Tells the action from all others of the Spark application.
            ratio: The share of traces that are recorded.
        """
        # The driver's process goes by a random name, since ids of applications recur.
        text = "\n".join((str(self.process_id), str(self.application_id), scope))
        digest = hashlib.sha256(text.encode()).digest()
        is_sampled = int.from_bytes(digest[24:32], "big") < ratio * 2.0**64
        traceparent = f"00-{digest[:16].hex()}-{digest[16:24].hex()}-{int(is_sampled):02x}"
        return replace(self, traceparent=traceparent, action=name)

    def to_json(self) -> str:
        """Serialise to one JSON object, with the format's version in ``version``."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        document = {"version": CARRIER_VERSION, **fields, "config": self.config.to_dict()}
        return json.dumps(document, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> DriverContext:
        """Parse what :meth:`to_json` wrote.

        Raises:
            CarrierError: The text is damaged, or written by a newer, incompatible version.
        """
        try:
            document = json.loads(text)
        except (RecursionError, TypeError, ValueError) as error:
            raise CarrierError(f"the carrier is not JSON ({error}): {_excerpt(text)}") from None
        if not isinstance(document, dict):
            raise CarrierError(f"the carrier is not a JSON object: {_excerpt(text)}")
        version = document.pop("version", None)
        if version != CARRIER_VERSION or isinstance(version, bool):
            raise CarrierError(
                f"the carrier has version {_excerpt(version)}, this worker reads version "
                f"{CARRIER_VERSION}; install the same mlflow-ctx-autolog on driver and workers"
            )
        return cls(
            autologs=_parse_autologs(document.pop("autologs", {})),
            config=_parse_config(document.pop("config", {})),
            spent=parse_amounts(document.pop("spent", {})),
            **_parse_fields(document),
        )


_REQUIRED = ("experiment_id",)
_OPTIONAL = (
    "tracking_uri",
    "traceparent",
    "tracestate",
    "workspace",
    "session_id",
    "user",
    "application_id",
    "process_id",
    "action",
    "fingerprint_key",
    "speculation",
)
_FLAGS = ("redacts", "has_span_processors", "records_no_calls")
_MAPPINGS = ("environment", "metadata", "tags")
_FIELDS = (
    *_REQUIRED,
    *_OPTIONAL,
    *_FLAGS,
    *_MAPPINGS,
    "autologs",
    "propagation",
    "spans_per_host",
    "max_result_bytes",
    "spent",
)


def _parse_fields(document: dict[str, Any]) -> dict[str, Any]:
    # Unknown fields are ignored: a later release may add some without a new version.
    parsed = {name: document.get(name) for name in (*_REQUIRED, *_OPTIONAL)}
    for name, value in parsed.items():
        if not isinstance(value, str) and not (value is None and name in _OPTIONAL):
            raise CarrierError(f"the carrier's {name} is {_excerpt(value)}, not a text")
    traceparent = parsed["traceparent"]
    if traceparent is not None and not is_traceparent(traceparent):
        raise CarrierError(
            f"the carrier's traceparent {_excerpt(traceparent)} is not a W3C traceparent"
        )
    for name in _FLAGS:
        parsed[name] = document.get(name, False)
        if not isinstance(parsed[name], bool):
            raise CarrierError(f"the carrier's {name} is {_excerpt(parsed[name])}, not a flag")
    for name, least in (("spans_per_host", 1), ("max_result_bytes", 0)):
        value = parsed[name] = document.get(name)
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (is_number and value >= least):
            raise CarrierError(f"the carrier's {name} is {_excerpt(value)}, not a number")
    propagation = parsed["propagation"] = document.get("propagation", BY_BROADCAST)
    if propagation not in (BY_PROPERTY, BY_BROADCAST):
        raise CarrierError(f"the carrier's propagation is {_excerpt(propagation)}, not known here")
    for name in _MAPPINGS:
        parsed[name] = document.get(name, {})
        if not _is_mapping_of_texts(parsed[name]):
            # Without its value, which may be secret.
            raise CarrierError(f"the carrier's {name} is not a mapping of texts")
    return parsed


def _is_mapping_of_texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


def _parse_autologs(autologs: Any) -> dict[str, dict[str, bool]]:
    # What they are called is for those to judge who turn them on.
    if not isinstance(autologs, dict) or not all(
        isinstance(settings, dict) and all(isinstance(each, bool) for each in settings.values())
        for settings in autologs.values()
    ):
        raise CarrierError(f"the carrier's autologs cannot be used: {_excerpt(autologs)}")
    return autologs


def _parse_config(settings: Any) -> Config:
    if not isinstance(settings, dict):
        raise CarrierError(f"the carrier's config cannot be used: {_excerpt(settings)}")
    known = Config().to_dict().keys()
    try:
        return Config().updated({name: settings[name] for name in settings if name in known})
    except (TypeError, ValueError) as error:
        raise CarrierError(
            f"the carrier's config cannot be used: {shortened(str(error))}"
        ) from None


def _excerpt(value: object) -> str:
    return shortened(repr(value))
