"""Spans as OTLP messages, as MLflow's server and OpenTelemetry's collectors read them."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, TracesData

from mlflow_ctx_autolog.spans.attributes import TRACE_ID
from mlflow_ctx_autolog.spans.record import SpanEvent, SpanLink, SpanRecord
from mlflow_ctx_autolog.spans.values import dump
from mlflow_ctx_autolog.spans.values import storable as _text

__all__ = ["decode", "encode"]

_CODES = {"UNSET": 0, "OK": 1, "ERROR": 2}
_STATUSES = tuple(_CODES)
# How the text of a JSON list, number, truth value or null begins.
_NATIVE = frozenset("[-0123456789tfnNI")


def encode(span: SpanRecord, *, all_texts: bool = False, plain: bool = False) -> bytes:
    """Return a message with that one span.

    Messages one after the other are one message, with the spans of all. An object or a text goes
    as its JSON text, which MLflow's server takes for what it says, from 3.9 on: neither has to be
    taken apart here and put together there. Lists, which older servers would keep as texts,
    numbers and truth values go as what they are.

    Args:
        span: The span.
        all_texts: Send every value as its JSON text, as MLflow does to a collector.
        plain: Send every value as what it is, as OpenTelemetry's conventions have it.
    """
    # Made in its place, and field by field: protobuf copies what is handed to it, and takes twice
    # as long over keywords.
    found = TracesData()
    resource = found.resource_spans.add()
    resource.resource.attributes.extend(_resource())
    message = resource.scope_spans.add().spans.add()
    message.trace_id = bytes.fromhex(span.trace_id)
    message.span_id = bytes.fromhex(span.span_id)
    message.name = _text(span.name)
    message.start_time_unix_nano = span.start
    if span.kind:
        message.kind = span.kind
    if span.parent_id is not None:
        message.parent_span_id = bytes.fromhex(span.parent_id)
    if span.end is not None:
        message.end_time_unix_nano = span.end
    if span.status != "UNSET":
        message.status.code = _CODES[span.status]
    if span.message:
        message.status.message = _text(span.message)
    add = message.attributes.add
    attribute = add()
    attribute.key = TRACE_ID
    attribute.value.string_value = f'"{span.mlflow_trace_id}"'
    for name, value in span.attributes.items():
        if name != TRACE_ID:
            attribute = add()
            attribute.key = _key(name)
            if plain or (value[:1] in _NATIVE and not all_texts):
                _set(attribute.value, _loaded(value))
            else:
                attribute.value.string_value = _text(value)
    for event in span.events:
        added = message.events.add(name=_text(event.name), time_unix_nano=event.time)
        for name, each in event.attributes.items():
            _set(added.attributes.add(key=_text(name)).value, each)
    for link in span.links:
        message.links.add(
            trace_id=bytes.fromhex(link.trace_id), span_id=bytes.fromhex(link.span_id)
        )
    return bytes(found.SerializeToString())


def decode(payload: bytes) -> Iterator[SpanRecord]:
    """Yield the spans of messages that :func:`encode` has made.

    Raises:
        google.protobuf.message.DecodeError: It is no such message.
    """
    for resource in TracesData.FromString(payload).resource_spans:
        for scope in resource.scope_spans:
            yield from map(_decoded, scope.spans)


def _decoded(message: Span) -> SpanRecord:
    return SpanRecord(
        trace_id=message.trace_id.hex(),
        span_id=message.span_id.hex(),
        parent_id=message.parent_span_id.hex() or None,
        name=message.name,
        start=message.start_time_unix_nano,
        end=message.end_time_unix_nano or None,
        attributes={
            each.key: _json(each.value) for each in message.attributes if each.key != TRACE_ID
        },
        status=_STATUSES[message.status.code],
        message=message.status.message or None,
        events=tuple(
            SpanEvent(
                event.name,
                event.time_unix_nano,
                {each.key: _value(each.value) for each in event.attributes},
            )
            for event in message.events
        ),
        links=tuple(SpanLink(link.trace_id.hex(), link.span_id.hex()) for link in message.links),
    )


# The names of most attributes are the same few in all spans.
_key = functools.lru_cache(maxsize=1024)(_text)


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (RecursionError, ValueError):
        return text


def _set(target: AnyValue, value: Any) -> None:
    if isinstance(value, bool):
        target.bool_value = value
    elif isinstance(value, str):
        target.string_value = _text(value)
    elif isinstance(value, int) and -(1 << 63) <= value < 1 << 63:
        target.int_value = value
    elif isinstance(value, (int, float)):
        target.double_value = value
    elif isinstance(value, (list, tuple)):
        # Set even where it is empty.
        target.array_value.SetInParent()
        for each in value:
            _set(target.array_value.values.add(), each)
    elif isinstance(value, Mapping):
        target.kvlist_value.SetInParent()
        for name, each in value.items():
            _set(target.kvlist_value.values.add(key=_text(str(name))).value, each)
    elif value is not None:
        target.string_value = _text(str(value))


def _json(value: AnyValue) -> str:
    if value.WhichOneof("value") == "string_value":
        return str(value.string_value)
    return dump(_value(value))


def _value(value: AnyValue) -> Any:
    match value.WhichOneof("value"):
        case None:
            return None
        case "array_value":
            return [_value(each) for each in value.array_value.values]
        case "kvlist_value":
            return {each.key: _value(each.value) for each in value.kvlist_value.values}
        case kind:
            return getattr(value, kind)


@functools.lru_cache(maxsize=1)
def _resource() -> tuple[KeyValue, ...]:
    """Return what OpenTelemetry's variables and conventions say of this process.

    As its SDK does, which is not loaded here:
    https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
    """
    facts = {"telemetry.sdk.language": "python", "telemetry.sdk.name": "opentelemetry"}
    for pair in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(","):
        name, found, value = pair.partition("=")
        if found:
            facts[name.strip()] = unquote(value.strip())
    facts.setdefault("service.name", "unknown_service")
    if service := os.environ.get("OTEL_SERVICE_NAME"):
        facts["service.name"] = service
    return tuple(
        KeyValue(key=key, value=AnyValue(string_value=text)) for key, text in facts.items()
    )
