"""What an answer costs by what the user says, and about what where no server says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from canned import Canned, canned, chat, choice, chunks
from recording import Keeper

from mlflow_ctx_autolog import Config
from mlflow_ctx_autolog.prices import Pricing, cost_of
from mlflow_ctx_autolog.recorder.estimate import estimated_usage
from mlflow_ctx_autolog.spans.attributes import COST, INPUTS, REUSED_FROM
from mlflow_ctx_autolog.spans.quality import ANSWER_CHARS
from mlflow_ctx_autolog.spans.record import SpanRecord
from mlflow_ctx_autolog.spans.values import dump

PRICE = (2.0, 10.0)
# 19 tokens in, 10 out.
PRICED = {"input_cost": 38e-6, "output_cost": 100e-6, "total_cost": 138e-6}
HEADER = "x-litellm-response-cost"


@pytest.mark.parametrize(
    ("usage", "cost"),
    [
        pytest.param({"input_tokens": 1e6, "output_tokens": 1e6}, 12.0, id="both"),
        pytest.param({"input_tokens": 1e6, "total_tokens": 1e6}, 2.0, id="an embedding"),
        pytest.param({"output_tokens": 1e6, "total_tokens": 3e6}, 14.0, id="input left out"),
        pytest.param({"input_tokens": 1e6}, None, id="input only"),
        pytest.param({"total_tokens": 1e6}, None, id="total only"),
        pytest.param({}, None, id="nothing"),
    ],
)
def test_cost_is_of_input_and_output(usage: dict[str, float], cost: float | None) -> None:
    """What cannot be told apart is not known, rather than too little."""
    assert cost_of(PRICE, usage).get("total_cost") == cost


@pytest.fixture
def endpoint() -> Iterator[Canned]:
    with canned() as found:
        found.sends = chat(choice("half an answer"))
        yield found


def ask(url: str, **more: Any) -> Any:
    """Ask once, and read what a stream has."""
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        found = client.chat.completions.create(
            model="alias", messages=[{"role": "user", "content": "How many?"}], **more
        )
        return list(found) if more.get("stream") else found


def ask_raw(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        client.chat.completions.with_raw_response.create(model="alias", messages=[])


def ask_async(url: str) -> None:
    async def asking() -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            await client.chat.completions.create(model="alias", messages=[])

    asyncio.run(asking())


WAYS = pytest.mark.parametrize("way", [ask, ask_raw, ask_async])


@WAYS
def test_price_of_the_model_asked_for_is_taken(
    endpoint: Canned, keeper: Keeper, way: Callable[[str], Any]
) -> None:
    """An alias behind a gateway, whose answer names another model."""
    keeper.pricing = Pricing({"alias": PRICE})
    way(endpoint.url)
    assert keeper.spans[0].get(COST) == pytest.approx(PRICED)


def test_price_of_the_model_that_answered_goes_before(endpoint: Canned, keeper: Keeper) -> None:
    answered = str(endpoint.sends["model"])
    keeper.pricing = Pricing({"alias": (1.0, 1.0), answered: PRICE})
    ask(endpoint.url)
    assert keeper.spans[0].get(COST) == pytest.approx(PRICED)


@WAYS
def test_gateways_own_header_goes_before_prices(
    endpoint: Canned, keeper: Keeper, way: Callable[[str], Any]
) -> None:
    endpoint.headers[HEADER] = "0.025"
    keeper.pricing = Pricing({"alias": PRICE}, HEADER.upper())
    way(endpoint.url)
    assert keeper.spans[0].get(COST) == {"total_cost": 0.025}


@pytest.mark.parametrize("said", ["", "None", "nan", "-1", "a lot"])
def test_header_that_is_no_amount_is_not_taken(endpoint: Canned, keeper: Keeper, said: str) -> None:
    endpoint.headers[HEADER] = said
    keeper.pricing = Pricing({"alias": PRICE}, HEADER)
    ask(endpoint.url)
    assert keeper.spans[0].get(COST) == pytest.approx(PRICED)


def test_header_is_not_heeded_unless_it_is_named(endpoint: Canned, keeper: Keeper) -> None:
    endpoint.headers[HEADER] = "0.025"
    ask(endpoint.url)
    assert keeper.spans[0].get(COST) is None


def test_stream_costs_what_its_usage_says(endpoint: Canned, keeper: Keeper) -> None:
    """Its headers were sent before anybody knew."""
    endpoint.sends = chunks(chat(choice("half an answer")))
    endpoint.headers[HEADER] = "0"
    keeper.pricing = Pricing({"alias": PRICE}, HEADER)
    ask(endpoint.url, stream=True)
    assert keeper.spans[0].get(COST) == pytest.approx(PRICED)


def test_what_is_not_known_has_no_cost(endpoint: Canned, keeper: Keeper) -> None:
    endpoint.sends = chat(choice("half an answer"), usage=None)
    keeper.pricing = Pricing({"alias": PRICE})
    ask(endpoint.url)
    assert keeper.spans[0].get(COST) is None
    assert keeper.spans[0].get(REUSED_FROM) is None


def call(inputs: Any, **attributes: Any) -> SpanRecord:
    """Return the span of a call that asked this."""
    said = {name: dump(value) for name, value in {INPUTS: inputs, **attributes}.items()}
    return SpanRecord("1" * 32, "2" * 16, None, "Completions", 0, 1, said)


def test_estimate_is_of_the_texts() -> None:
    messages = [{"role": "user", "content": "x" * 400}, {"role": "user", "content": "\u00e9" * 200}]
    found = estimated_usage(call({"model": "m" * 900, "messages": messages}, **{ANSWER_CHARS: 41}))
    # Roles are a token each.
    assert found == {"input_tokens": 202, "output_tokens": 11, "total_tokens": 213}


def test_estimate_of_an_image_is_not_of_its_bytes() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
    text = {"type": "text", "text": "What is this?"}
    found = estimated_usage(call({"messages": [{"role": "user", "content": [text, image]}]}))
    assert 1000 < found["input_tokens"] < 1010


def test_settings_are_checked() -> None:
    assert Config(cost_header=HEADER).pricing == Pricing({}, HEADER)
    with pytest.raises(ValueError, match=r"cost_header='x y' is not a header's name"):
        Config(cost_header="x y")
    with pytest.raises(TypeError, match="cost_header=3"):
        Config(cost_header=3)  # type: ignore[arg-type]
    assert json.loads(json.dumps(Config(cost_header=HEADER).to_dict()))["cost_header"] == HEADER
