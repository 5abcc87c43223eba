"""What the calls of a job may spend, and what they have spent on this host."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.delivery.host_account import Event, HostAccount, open_account
from mlflow_ctx_autolog.exceptions import BudgetExceeded, warn_once
from mlflow_ctx_autolog.log_ins import safe_logger
from mlflow_ctx_autolog.prices import Price, cost_of, in_and_out, least_total
from mlflow_ctx_autolog.spans.amounts import Amounts

__all__ = ["Budget", "open_budget"]

_logger = safe_logger(__name__)


class _Spent:
    """What the calls of a job have come to, as far as a host's processes have told.

    Attributes:
        models: Of each model calls, repeats among them, tokens, cost, and calls of which not all
            tokens were told.
        requests: The fingerprints of all requests.
        elsewhere: Calls and cost that the driver knew and this host did not, when it first heard
            of a use of a function, by that.
    """

    def __init__(self) -> None:
        self.models: dict[str, list[float]] = {}
        self.requests: set[str] = set()
        self.elsewhere: dict[str, tuple[float, float]] = {}

    def enter(self, event: Event) -> None:
        match event:
            case ["spent", str(model), *amounts] if len(amounts) == 5:
                known = self.models.setdefault(model, [0, 0, 0, 0.0, 0])
                self.models[model] = [a + b for a, b in zip(known, amounts, strict=True)]
            case ["request", *requests]:
                self.requests.update(map(str, requests))
            case ["elsewhere", str(handover), calls, cost]:
                self.elsewhere.setdefault(handover, (float(calls), float(cost)))

    def events(self) -> list[Event]:
        spent = [["spent", model, *amounts] for model, amounts in self.models.items()]
        elsewhere = [["elsewhere", handover, *known] for handover, known in self.elsewhere.items()]
        return [*spent, ["request", *self.requests], *elsewhere]

    def sum(self, place: int) -> float:
        return sum(amounts[place] for amounts in self.models.values())


class Budget:
    """Lets a task's calls spend what is left, counting those of the whole job on this host.

    Args:
        config: ``max_calls``, ``max_cost`` and ``max_repeats``.
        account: What was spent here.
        handover: Names this use of a function.
        known: What the driver knew to be spent when it was handed over: ``calls`` and ``cost``.
        price_of: Returns US dollars for a million input and output tokens of a model, if known.
    """

    def __init__(
        self,
        config: Config,
        account: HostAccount[_Spent],
        handover: str,
        known: Mapping[str, float],
        price_of: Callable[[str], Price | None],
    ) -> None:
        self._config = config
        self._account = account
        self._handover = handover
        self._price_of = price_of
        with account.changing() as (spent, tell):
            if handover not in spent.elsewhere:
                calls = max(0, known.get("calls", 0) - spent.sum(0))
                tell("elsewhere", handover, calls, max(0.0, known.get("cost", 0.0) - spent.sum(3)))

    def admit(self, model: str, request: str | None) -> None:
        """Count a request that is about to be sent to a model.

        Args:
            model: The model's name.
            request: The request's fingerprint; None where it has none.

        Raises:
            BudgetExceeded: It may not be sent.
        """
        try:
            with self._account.changing() as (spent, tell):
                self._admit(spent, tell, model, request)
        except OSError as error:
            warn_once(_logger, "budget", f"A call is not held against the budget, since {error}")

    def _admit(
        self, spent: _Spent, tell: Callable[..., None], model: str, request: str | None
    ) -> None:
        calls, cost = spent.elsewhere.get(self._handover, (0.0, 0.0))
        parts = [f"{name}: {_shown(*amounts)}" for name, amounts in sorted(spent.models.items())]
        if calls or cost:
            parts.append(f"on other hosts: {calls:,.0f} calls, ${cost:,.4f}")
        calls += spent.sum(0)
        repeats = spent.sum(1)
        cost += spent.sum(3)
        is_repeat = request in spent.requests
        config = self._config
        reason = None
        if config.max_calls is not None and calls >= config.max_calls:
            reason = f"max_calls={config.max_calls:,} is reached"
        elif config.max_repeats is not None and is_repeat and repeats >= config.max_repeats:
            reason = f"max_repeats={config.max_repeats:,} is reached, and it was made before"
        elif config.max_cost is not None and cost >= config.max_cost:
            reason = f"max_cost={config.max_cost:g} is reached"
        elif config.max_cost is not None and self._price_of(model) is None:
            reason = (
                f"max_cost={config.max_cost:g} is set, and nobody knows the price of {model!r}: "
                "give it in prices={model: (input, output)}, in US dollars for a million tokens"
            )
        if reason is not None:
            raise BudgetExceeded(
                f"A call of {model!r} was not made: {reason}. Spent so far: "
                f"{'; '.join(parts) or 'nothing'}. Raise the limit in enable(), or see with "
                "report() what was paid for twice.",
                {"calls": int(calls), "repeats": int(repeats), "cost": cost},
            )
        tell("spent", model, 1, int(is_repeat), 0, 0.0, 0)
        if request is not None and not is_repeat:
            tell("request", request)

    def paid(
        self,
        model: str,
        usage: Amounts,
        cost: float | None,
        estimate: Callable[[], Amounts] = dict,
    ) -> float:
        """Enter what an answer has cost; return that, 0 where it is not known.

        Args:
            model: The model's name.
            usage: Its tokens, by MLflow's names.
            cost: US dollars, where its span says so.
            estimate: Returns about how many tokens it has used, where the server did not say.
        """
        is_told = in_and_out(usage) is not None
        if cost is None:
            cost = self._cost(model, usage, estimate)
        tokens = int(least_total(usage))
        try:
            with self._account.changing() as (_, tell):
                tell("spent", model, 0, 0, tokens, cost, int(not is_told))
        except OSError as error:
            warn_once(_logger, "budget", f"A cost is not held against the budget, since {error}")
        return cost

    def _cost(self, model: str, usage: Amounts, estimate: Callable[[], Amounts]) -> float:
        if self._config.max_cost is None and not usage:
            return 0.0
        price = self._price_of(model)
        if price is None:
            return 0.0
        known = cost_of(price, usage)
        if not known and self._config.max_cost is not None:
            known = cost_of(price, estimate())
            warn_once(
                _logger,
                "no usage",
                f"max_cost={self._config.max_cost:g} counts what some calls of {model!r} cost by "
                "the length of their texts, since the server did not report all tokens; of a "
                "stream, stream_options={'include_usage': True} asks it.",
            )
        return known.get("total_cost", 0.0)


def open_budget(
    config: Config,
    job: str,
    handover: str,
    known: Mapping[str, float],
    price_of: Callable[[str], Price | None],
) -> Budget | None:
    """Return the budget of a job on this host; None where the settings set no limit.

    Args:
        config: The settings.
        job: Names the job: the id of its trace, or its session.
        handover: See :class:`Budget`.
        known: See :class:`Budget`.
        price_of: See :class:`Budget`.
    """
    if not config.has_budget:
        return None
    account = open_account(config.spool_directory, job, "budget", _Spent)
    return Budget(config, account, handover, known, price_of)


def _shown(calls: float, repeats: float, tokens: float, cost: float, untold: float) -> str:
    said = f"{calls:,.0f} calls ({repeats:,.0f} repeated), {tokens:,.0f} tokens, ${cost:,.4f}"
    return f"{said} (not all tokens of {untold:,.0f} calls told)" if untold else said
