"""Losses: pure maths on arrays. Each returns `Sum(num, den)`; the step divides once."""

from __future__ import annotations

from collections.abc import Callable

from llamax.losses import next_token, router
from llamax.losses.sum import Sum

__all__ = ["LOSSES", "Sum", "next_token", "router"]

# The terms that `config.Losses` weighs, by the names of its fields.
LOSSES: dict[str, Callable[..., Sum]] = {
    "next_token": next_token.next_token,
    "router_balance": router.balance,
    "router_z": router.z_loss,
}
