"""Plans: what may change so that a run fits its device, what each change takes, and which is the fastest."""

from tightfit.plan.candidates import Plan
from tightfit.plan.make import PlanResult, card_here, make_plan, named_card, this_host

__all__ = ["Plan", "PlanResult", "card_here", "make_plan", "named_card", "this_host"]
