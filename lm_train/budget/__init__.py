"""The run is held to its budget: what it has used over all its starts, and whether another step still fits. Free of torch."""

from lm_train.budget.account import Account, Start, Tariff, check_currency
from lm_train.budget.guard import Guard, Rounds, Wish
from lm_train.budget.spending import Spending, held_since, rank_spending

__all__ = [
    "Account",
    "Guard",
    "Rounds",
    "Spending",
    "Start",
    "Tariff",
    "Wish",
    "check_currency",
    "held_since",
    "rank_spending",
]
