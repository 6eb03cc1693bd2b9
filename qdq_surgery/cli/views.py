"""Commands that show: plan, diff, explain, rules."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

from rich.console import Console

from qdq_surgery.cli.options import (
    check_rules,
    class_option,
    load,
    load_converted,
    model_options,
    output_options,
    rules_of,
    show,
)
from qdq_surgery.convert import convert, plan
from qdq_surgery.report.diff import diff
from qdq_surgery.report.explain import explain
from qdq_surgery.rules.yaml_file import load_rules, shipped_rules
from qdq_surgery.surgery.model_state import plan_of, quantizers
from qdq_surgery.text.progress import steps
from qdq_surgery.text.view import Column, Table

__all__ = ["add_diff", "add_explain", "add_plan", "add_rules"]


def add_plan(command: argparse.ArgumentParser) -> None:
    """Its arguments."""
    model_options(command)
    output_options(command)
    command.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> None:
    with steps(2) as bar:
        bar.next("loading")
        model = load(arguments)
        bar.next("matching")
        check_rules(model, arguments)
        made = plan_of(model) if quantizers(model) else plan(model, rules_of(arguments))
    show(made, arguments)


def add_diff(command: argparse.ArgumentParser) -> None:
    """Its arguments."""
    model_options(command)
    output_options(command)
    command.set_defaults(run=_diff)


def _diff(arguments: argparse.Namespace) -> None:
    with steps(3) as bar:
        bar.next("loading")
        model = load(arguments)
        check_rules(model, arguments)
        bar.next("converting")
        if quantizers(model):
            qmodel, model = model, copy.deepcopy(model).dequantize()
        else:
            qmodel = convert(model, rules_of(arguments))
        bar.next("comparing")
        made = diff(model, qmodel)
    show(made, arguments)


def add_explain(command: argparse.ArgumentParser) -> None:
    """Its arguments."""
    model_options(command)
    command.add_argument("path", metavar="MODULE", nargs="?", default="", help="such as encoder.layer.0 (default: all)")
    output_options(command)
    command.set_defaults(run=_explain)


def _explain(arguments: argparse.Namespace) -> None:
    with steps(1) as bar:
        bar.next("loading")
        qmodel = load_converted(arguments)
    show(explain(qmodel, arguments.path), arguments)


def add_rules(command: argparse.ArgumentParser) -> None:
    """Its arguments."""
    actions = command.add_subparsers(title="actions", required=True, metavar="ACTION")
    action = actions.add_parser("list", help="the rule sets that come with the package")
    action.set_defaults(run=_rules_list)
    action = actions.add_parser("show", help="print a rule file")
    action.add_argument("rules", metavar="RULES", help="a shipped name or a file")
    action.set_defaults(run=_rules_show)
    action = actions.add_parser("check", help="read a rule file and say what is wrong with it")
    action.add_argument("rules", metavar="RULES", help="a shipped name or a file")
    action.add_argument("--model", metavar="MODEL_DIR", help="check that it fits this model, too")
    class_option(action)
    action.set_defaults(run=_rules_check)


def _rules_list(_: argparse.Namespace) -> None:
    found = ((name, load_rules(name)) for name in shipped_rules())
    rows = tuple((name, str(len(rules.rules)), rules.why) for name, rules in found)
    Console(highlight=False).print(Table((Column("name"), Column("rules"), Column("what")), rows))


def _rules_show(arguments: argparse.Namespace) -> None:
    print(load_rules(arguments.rules).text, end="")


def _rules_check(arguments: argparse.Namespace) -> None:
    rules = load_rules(arguments.rules)
    print(f"{rules.name}: {len(rules.rules)} rules, {len(rules.exclude)} exclusions, no mistake found")
    for rule in rules.rules:
        print(f"  {rule.name} ({rule.source}): {rule.pattern}; {rule.scope}")
    if arguments.model is not None:
        made = plan(load(arguments), rules)
        print(f"fits {Path(arguments.model).name} ({made.model}): {made.counted()} in {made.layers} layers")
