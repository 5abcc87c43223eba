"""Answers that were paid for, and are given again where Spark has the same work done again."""
