"""MLflow's own tracing in a worker: loaded only where somebody there wants it."""

# Before any module here: whoever waits for MLflow's arrival may import them.
import mlflow  # noqa: F401
