"""What the checks of ``doctor()`` make of facts, where these cannot be had on one machine."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlflow_ctx_autolog.diagnosis.check import Facts, Finding
from mlflow_ctx_autolog.diagnosis.checks import CHECKS, examine

VERSIONS = {"mlflow": "3.9", "openai": "2.0", "pyspark": "4.0", "mlflow_ctx_autolog": "0.1"}


def process(**changed: Any) -> dict[str, Any]:
    """What a process says of itself where all is well."""
    return {
        "host": "a",
        "had_mlflow": False,
        "why_mlflow": None,
        "executable": "python",
        "packages": {name: {"version": version} for name, version in VERSIONS.items()},
        "variables": {},
        "credentials": [],
        "tracing": None,
        "no_store": None,
        "sampling_ratio": 1.0,
        "layers": [],
        "spool": None,
        "model": None,
        "store": {"reach": None, "login": None, "experiment": None, "write": None},
        "span_id": "1",
        "sees_action": True,
        **changed,
    }


def facts(**changed: Any) -> Facts:
    """Facts of a cluster where all is well."""
    well = Facts(
        driver=process(),
        workers=[process(), process(host="b")],
        spark={"spark.speculation": None, "spark.task.maxFailures": None},
        tracking_uri="http://server",
        transport="direct",
        spans_found=["1"],
        clock_difference=("a", 0.0),
        round_trip_skipped=None,
    )
    return replace(well, **changed)


def complaints(given: Facts) -> list[Finding]:
    return [finding for finding in examine(given) if finding.level in ("warn", "fail")]


def only(given: Facts) -> Finding:
    """Return the only finding that complains."""
    (finding,) = complaints(given)
    return finding


def test_nothing_is_found_where_all_is_well() -> None:
    """No check complains without a reason; what Spark does not tell is unknown, not guessed."""
    findings = examine(facts())

    assert {finding.level for finding in findings} == {"pass", "unknown"}
    unknown = {finding.check for finding in findings if finding.level == "unknown"}
    assert unknown == {"executors_say_goodbye", "workers_are_reused"}
    assert not any(finding.advice for finding in findings)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "they do not, but for functions that import it"),
        ({"mlflow_wanted": ["a", "b"]}, "they do, for a; b"),
        (
            {"workers": [process(had_mlflow=True, why_mlflow="c"), process(why_mlflow="d")]},
            "1 of 2 that were asked have it, for c",
        ),
        (
            {"workers": [process(had_mlflow=True)]},
            "1 of 1 that were asked have it, for a function, or a doctor(), that has run there",
        ),
        (
            {"workers": [process(had_mlflow=True, why_mlflow="a")], "mlflow_wanted": ["a"]},
            "they do, for a",
        ),
    ],
)
def test_whether_workers_load_mlflow(changed: dict[str, Any], said: str) -> None:
    """And who wants it; nothing is wrong with it."""
    (finding,) = [each for each in examine(facts(**changed)) if each.check == "mlflow_is_wanted"]
    assert (finding.level, finding.found) == ("pass", said)


def test_an_sqlite_file_on_two_hosts() -> None:
    """A file is no store for a cluster; the host that does not share it is named."""
    found = only(facts(tracking_uri="sqlite:////tmp/x.db"))

    assert (found.check, found.level) == ("file_has_one_host", "fail")
    assert found.found.startswith("b: ")


def test_workers_that_write_to_another_store() -> None:
    """Spans that were stored, but that the driver does not find, are in another store."""
    found = only(facts(workers=[process(), process(host="b", span_id="2")]))

    assert (found.check, found.level) == ("store_is_the_same", "fail")
    assert found.found.startswith("b: ")


def test_a_store_for_whole_traces_on_spark_connect() -> None:
    """Where spans can neither be sent nor come home, there is no way."""
    stores = {"takes_spans": False, "transport": "driver", "transport_reason": "it is a file store"}
    assert only(facts(**stores)).level == "warn"

    found = only(facts(**stores, has_accumulators=False))
    assert (found.check, found.level) == ("spans_can_travel", "fail")
    assert "it is a file store" in found.found


def test_an_unsupported_release_on_a_worker() -> None:
    """A release that the library does not know is named, with those that it knows."""
    packages = {**process()["packages"], "openai": {"version": "0.28"}}
    found = only(facts(workers=[process(packages=packages)]))

    assert (found.check, found.level) == ("versions_are_supported", "fail")
    assert "openai 0.28, not from 1.40" in found.found


def test_a_release_on_a_worker_that_is_not_the_drivers() -> None:
    """One that is supported, but not the driver's, is a warning."""
    packages = {**process()["packages"], "openai": {"version": "1.99"}}
    found = only(facts(workers=[process(packages=packages)]))

    assert (found.check, found.level) == ("versions_are_the_same", "warn")
    assert "openai 1.99 there, 2.0 on the driver" in found.found


def test_spark_settings_that_repeat_work() -> None:
    """Each setting that makes Spark run a task again, or anew, is one warning."""
    spark = {
        "spark.speculation": "TRUE",
        "spark.task.maxFailures": "8",
        "spark.dynamicAllocation.enabled": "true",
        "spark.decommission.enabled": None,
        "spark.python.worker.reuse": "false",
    }
    found = complaints(facts(spark=spark))

    assert {finding.level for finding in found} == {"warn"}
    assert [finding.check for finding in found] == [
        "no_speculation",
        "few_retries",
        "executors_say_goodbye",
        "workers_are_reused",
    ]


@pytest.mark.parametrize(
    ("layer", "name"),
    [("langfuse.openai", "Langfuse"), ("ddtrace", "ddtrace"), ("openinference.x", "OpenInference")],
)
def test_another_tracer_on_workers(layer: str, name: str) -> None:
    """Who else traces the calls is named; a wrapper that is no tracer is none of our business."""
    found = only(facts(workers=[process(layers=[layer])]))
    assert (found.check, found.level) == ("nobody_else_traces", "warn")
    assert name in found.found

    assert complaints(facts(workers=[process(layers=["company.retries"])])) == []


def test_what_a_worker_lacks_to_log_in() -> None:
    """Variables that log in on the driver, and that a worker lacks, are named."""
    token = "MLFLOW_TRACKING_TOKEN"
    refused = process(store={"reach": None, "login": "it answered 401"})
    found = only(facts(driver=process(credentials=[token]), workers=[refused]))

    assert (found.check, found.where) == ("log_in_is_accepted", "workers")
    assert f"set on the driver only: {token}" in found.found


def test_clocks_that_differ() -> None:
    """A clock that is off is a warning, with its host."""
    found = only(facts(clock_difference=("b", 3600.5)))

    assert (found.check, found.level) == ("clocks_agree", "warn")
    assert "the clock of b is off by 3600.5 s" in found.found


@pytest.mark.parametrize(("was_named", "level"), [(True, "fail"), (False, "warn")])
def test_an_endpoint_out_of_reach(was_named: bool, level: str) -> None:
    """It is a failure only where the user has said that it is the one."""
    workers = [process(model="api:443 cannot be connected to")]
    found = only(facts(workers=workers, model_url_was_named=was_named))

    assert (found.check, found.level) == ("model_is_reachable", level)


def test_a_platform_that_hides_what_the_driver_says() -> None:
    """Tasks that do not see it are warned of, but where nobody needs it."""
    hidden = facts(workers=[process(), process(host="b", sees_action=False)])
    found = only(hidden)
    assert (found.check, found.level) == ("tasks_see_their_span", "warn")
    assert found.found.startswith("b: ")
    assert 'propagation="broadcast"' in found.advice
    assert complaints(replace(hidden, propagation="broadcast")) == []


def test_every_check_says_what_it_is_about() -> None:
    """A check without a reason or an advice would be an empty place in the docs."""
    assert all(check.title and check.why and check.advice for check in CHECKS)
    assert len({check.title for check in CHECKS}) == len(CHECKS)


def test_the_page_in_the_docs_is_up_to_date(tmp_path: Path) -> None:
    """docs/no-traces.md is what tools/no_traces_page.py writes."""
    root = Path(__file__).parents[2]
    code = "import sys; sys.path.insert(0, sys.argv[1]); import no_traces_page as page; "
    told = subprocess.run(
        [sys.executable, "-c", f"{code}sys.stdout.write(page.page())", str(root / "tools")],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )

    page = (root / "docs" / "no-traces.md").read_text(encoding="utf-8")
    assert told.stdout == page, "run make no-traces-page"
