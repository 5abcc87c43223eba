"""MLflow's own tracing in a worker: loaded only where somebody there wants it."""
