"""Calls of the OpenAI client as spans, without MLflow."""
