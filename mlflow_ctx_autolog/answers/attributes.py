"""What the spans of calls say of answers that were given again."""

__all__ = ["REUSED_CALLS", "REUSED_FROM", "SAVED_USAGE"]

# Of a call that was given an answer: the call that has paid for it, "trace_id/span_id".
REUSED_FROM = "llm.reused_from"
# The tokens that it would have cost, by MLflow's names.
SAVED_USAGE = "llm.reused.usage"
# Of a task: how many of its calls were given one, which "llm.calls" does not count.
REUSED_CALLS = "llm.calls.reused"
