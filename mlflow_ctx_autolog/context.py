"""What travels from the driver to the workers: a small, versioned JSON text."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.exceptions import CarrierError, shortened

__all__ = ["CARRIER_VERSION", "DriverContext"]

CARRIER_VERSION = 1

# https://www.w3.org/TR/trace-context/#traceparent-header
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)


@dataclass(frozen=True)
class DriverContext:
    """The driver's trace context and its destination, as captured at one moment.

    Args:
        experiment_id: The experiment of the driver's trace.
        tracking_uri: Where workers store spans; None where the spans come home with the task and
            the driver stores them, as for an address with a user name or password in it.
        traceparent: W3C ``traceparent`` of the span active on the driver; None if there was none.
        tracestate: W3C ``tracestate`` of that span, if any.
        session_id: Groups the traces of one job where there is no ``traceparent`` to join them.
        application_id: Spark's application id, if known.
        process_id: Names the driver's process, so that it can recognise its own context.
        config: The settings in force on the driver.
    """

    experiment_id: str
    tracking_uri: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    session_id: str | None = None
    application_id: str | None = None
    process_id: str | None = None
    config: Config = field(default_factory=Config)

    def to_json(self) -> str:
        """Serialise to one JSON object, with the format's version in ``version``."""
        return json.dumps({"version": CARRIER_VERSION, **asdict(self)}, separators=(",", ":"))

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
        return cls(config=_parse_config(document.pop("config", {})), **_parse_fields(document))


_REQUIRED = ("experiment_id",)
_OPTIONAL = (
    "tracking_uri",
    "traceparent",
    "tracestate",
    "session_id",
    "application_id",
    "process_id",
)


def _parse_fields(document: dict[str, Any]) -> dict[str, Any]:
    # Unknown fields are ignored: a later release may add some without a new version.
    parsed = {name: document.get(name) for name in (*_REQUIRED, *_OPTIONAL)}
    for name, value in parsed.items():
        if not isinstance(value, str) and not (value is None and name in _OPTIONAL):
            raise CarrierError(f"the carrier's {name} is {_excerpt(value)}, not a text")
    traceparent = parsed["traceparent"]
    if traceparent is not None and not _TRACEPARENT.fullmatch(traceparent):
        raise CarrierError(
            f"the carrier's traceparent {_excerpt(traceparent)} is not a W3C traceparent"
        )
    return parsed


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
