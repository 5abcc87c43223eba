"""Each way to hand a function to Spark: those of the table in docs/coverage.md."""

from __future__ import annotations

from functions import ON_FRAMES, ON_RDDS, is_there
from job import CLASSIC, CONNECT, Job, program

_FAST = ("`DataFrame.mapInPandas`", "`udf`", "`groupBy().applyInPandas`", "`RDD.map`")


def _add(way: str, engines: tuple[str, ...]) -> None:
    @program(name=f"way: {way}", engines=engines, fast=way in _FAST)
    def run(job: Job) -> None:
        ways = {**ON_FRAMES, **ON_RDDS}
        rows = job.calls("way", lambda: ways[way](job.documents(), job.ask()))
        job.note("rows", sorted(map(repr, rows)))


for _way in (*ON_FRAMES, *ON_RDDS):
    if is_there(_way):
        _on_connect = _way in ON_FRAMES and is_there(_way, on_connect=True)
        _add(_way, (CLASSIC, CONNECT) if _on_connect else (CLASSIC,))
