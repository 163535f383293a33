"""`tightfit schema`."""

import argparse
import importlib
import json
from collections.abc import Sequence

import msgspec

from tightfit.cli.exits import OK
from tightfit.cli.parser import Parser
from tightfit.wording import say

RECORDS = {
    "all_gpus": ("tightfit.questions.cards", "Cards"),
    "cache": ("tightfit.simulation.cache", "CacheState"),
    "check": ("tightfit.questions.check", "CheckReport"),
    "compare": ("tightfit.questions.compare", "Comparison"),
    "suggest": ("tightfit.questions.suggest", "Suggestions"),
    "doctor": ("tightfit.system.doctor", "Diagnosis"),
    "dryrun": ("tightfit.vgpu.records", "Findings"),
    "explain": ("tightfit.diagnosis.explanation", "ExplanationJson"),
    "largest": ("tightfit.questions.largest", "Largest"),
    "plan": ("tightfit.planner.plan_record", "PlanRecord"),
}
"""Module and record that each command prints with --json."""


def parser() -> Parser:
    found = Parser(
        "schema",
        say("cli.schema.about"),
        examples=["tightfit schema plan"],
    )
    found.add_argument("name", choices=sorted(RECORDS), help=say("cli.schema.name"))
    return found


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    module, record = RECORDS[options.name]
    kind = getattr(importlib.import_module(module), record)
    print(json.dumps(msgspec.json.schema(kind), indent=2))
    return OK
