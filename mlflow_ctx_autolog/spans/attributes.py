"""The names of the attributes of spans: MLflow's, OpenTelemetry's, and this library's own."""

from __future__ import annotations

# MLflow's: mlflow.tracing.constant.SpanAttributeKey.
TRACE_ID = "mlflow.traceRequestId"
SPAN_TYPE = "mlflow.spanType"
INPUTS = "mlflow.spanInputs"
OUTPUTS = "mlflow.spanOutputs"
LOG_LEVEL = "mlflow.spanLogLevel"
MESSAGE_FORMAT = "mlflow.message.format"
TOOLS = "mlflow.chat.tools"
USAGE = "mlflow.chat.tokenUsage"
COST = "mlflow.llm.cost"
MODEL = "mlflow.llm.model"

# Of events: a stream's chunk, and an exception by OpenTelemetry's conventions.
CHUNK_EVENT = "mlflow.chunk.item."
CHUNK_VALUE = "mlflow.chunk.value"
EXCEPTION_EVENT = "exception"
EXCEPTION_MESSAGE = "exception.message"
EXCEPTION_TYPE = "exception.type"
EXCEPTION_STACKTRACE = "exception.stacktrace"

# OpenTelemetry's conventions on HTTP and on generative AI.
RESEND_COUNT = "http.request.resend_count"
TIME_TO_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
FINISH_REASONS = "gen_ai.response.finish_reasons"

# This library's own.
ANNOTATION = "annotation."
FINGERPRINT = "llm.request.fingerprint"
NOT_SENT = "llm.request.not_sent"
STREAM_OUTCOME = "llm.stream.outcome"
USAGE_UNKNOWN = "llm.usage.unknown"
REJECTED = "llm.answer.rejected"
# Of a call that was given an answer again: the call that has paid for it, "trace_id/span_id", and
# the tokens that it would have cost.
REUSED_FROM = "llm.reused_from"
REUSED_USAGE = "llm.reused.usage"
# Of a task: how many of its calls were, which "llm.calls" does not count.
REUSED_CALLS = "llm.calls.reused"
# Of a task: its function's name, which that of its span begins with.
FUNCTION = "spark.function.name"
PARTITION = "spark.partition.id"

# Of a task: what became of it, which is this until it has ended.
OUTCOME, RUNNING = "spark.task.outcome", "running"
# Of a task: what it has said of its trace, as JSON.
TRACE_UPDATE = "mlflow_ctx_autolog.trace_update"

# Log levels of spans as MLflow has them: what users see, and what went wrong.
DEBUG, INFO, ERROR = 10, 20, 40
