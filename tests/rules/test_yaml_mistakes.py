"""Rule files with one bad thing in them are refused with line, column and remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rule_texts import (
    GOOD,
    HEAD,
    RULES,
    RULES_WITH,
    SECOND,
    Cases,
    check,
    refusal,
    with_calibration,
    with_calibrator,
    with_count,
    with_exclude,
    with_key,
    with_match,
    with_pattern,
    with_quantize,
    with_rule,
    with_share,
    with_spec,
    write,
    write_marked,
)

from qdq_surgery.rules.quant_spec import QuantSpec
from qdq_surgery.rules.schema import SCHEMA
from qdq_surgery.rules.yaml_file import load_rules

NOT_YAML: Cases = {
    "bracket-not-closed": ("schema: [1\nname^: mine\n", "not YAML: expected ',' or ']'", "brackets"),
    "brace-not-closed": ("schema: 1\nrules: {a: 1\n^", "not YAML: expected ',' or '}'", "brackets"),
    "tab-for-indentation": ("schema: 1\nspecs:\n^\ts: default\n", r"not YAML: found character '\\t'", "indentation"),
    "quote-not-closed": ("schema: 1\nname: 'mine\n^", "not YAML: found unexpected end of stream", "check"),
    "two-colons": ("schema: 1\nname: mine^: yours\n", "not YAML: mapping values are not allowed here", "check"),
    "worse-indentation": ("schema: 1\n  name^: mine\n", "not YAML: mapping values are not allowed", "indentation"),
    "at-sign": ("schema: 1\nname: ^@mine\n", "not YAML: found character '@'", "check"),
    "unknown-escape": ('schema: 1\nname: "\\^q"\n', "not YAML: found unknown escape character 'q'", "check"),
    "undefined-tag-handle": ("schema: 1\nname: ^!x!foo mine\n", "not YAML: found undefined tag handle", "check"),
    "two-documents": (f"{GOOD}^---\n{GOOD}", "^found a second document$", "one document: remove '---'"),
    "second-document-empty": (f"{GOOD}...\n^---\n", "^found a second document$", "one document: remove '---'"),
    "second-document-a-word": (f"{GOOD}^--- mine\n", "^found a second document$", "one document: remove '---'"),
}

NOT_DATA: Cases = {
    "tag-python-apply": (
        f"{HEAD}why: ^!!python/object/apply:os.system [false]\n{RULES}",
        "the YAML tag 'tag:yaml.org,2002:python/object/apply:os.system'",
        "plain data: remove the tag",
    ),
    "tag-python-name": (f"{HEAD}why: ^!!python/name:os.system x\n{RULES}", "the YAML tag .*python/name", "remove"),
    "tag-of-ones-own": (f"{HEAD}why: ^!foo x\n{RULES}", "the YAML tag '!foo'", "remove the tag"),
    "tag-at-the-top": (f"--- ^!foo\n{GOOD}", "the YAML tag '!foo'", "remove the tag"),
    "tag-of-a-list": (f"{HEAD}rules: ^!!seq []\n", "the YAML tag 'tag:yaml.org,2002:seq'", "remove the tag"),
    "tag-of-a-key": (f"{HEAD}^!!str why: x\n{RULES}", "the YAML tag 'tag:yaml.org,2002:str'", "remove the tag"),
    "tag-set": (f"{HEAD}specs: ^!!set {{a, b}}\n{RULES}", "the YAML tag 'tag:yaml.org,2002:set'", "remove the tag"),
    # A tag that says what is true anyway is refused too: there is one way to write a value.
    "tag-harmless": (f"schema: ^!!int 1\nname: mine\n{RULES}", "the YAML tag 'tag:yaml.org,2002:int'", "remove"),
    "tag-empty": (f"{HEAD}why: ^! x\n{RULES}", "the YAML tag '!'", "remove the tag"),
    "anchor-on-a-word": (f"{HEAD}why: ^&a x\n{RULES}", "an anchor or alias", "write the value out"),
    "anchor-on-a-list": (f"{HEAD}rules: ^&a []\n", "an anchor or alias", "write the value out"),
    "anchor-on-a-mapping": (f"{HEAD}specs: ^&a {{s: default}}\n{RULES}", "an anchor or alias", "write the value out"),
    "alias-without-anchor": (f"{HEAD}why: ^*a\n{RULES}", "an anchor or alias", "write the value out"),
    # A bomb of nested aliases: the first anchor ends it, so nothing ever grows.
    "billion-laughs": (
        f"{HEAD}a: ^&a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n",
        "an anchor or alias",
        "write the value out",
    ),
    "merge-key": (f"{HEAD}^<<: {{why: x}}\n{RULES}", "unknown key '<<' in the file", "known: "),
    "too-deep-lists": (f"{HEAD}why: {'[' * 15}^[{']' * 16}\n{RULES}", "deeper than 16 levels", "needs five"),
    "too-deep-mappings": (f"{'{a: ' * 16}^{{a: 1{'}' * 17}\n", "deeper than 16 levels", "needs five"),
    "too-deep-lines": ("".join(f"{' ' * i}a:\n" for i in range(16)) + " " * 16 + "^a: 1\n", "deeper than 16", "five"),
}

MISSING: Cases = {
    "schema": (f"^name: mine\n{RULES}", "the key 'schema' is missing", f"write schema: {SCHEMA}"),
    "schema-after-a-comment": (f"# mine\n\n^name: mine\n{RULES}", "the key 'schema' is missing", "write schema: 1"),
    "name": (f"^schema: 1\n{RULES}", "the key 'name' is missing", "write name:"),
    "name-when-extending": ("^schema: 1\nextends: qdqbert\n", "the key 'name' is missing", "write name:"),
    "rules": ("^schema: 1\nname: mine\n", "the key 'rules' is missing", "write rules:"),
    "all-but-schema": ("^schema: 1\n", "the key 'name' is missing", "write name:"),
    "everything": ("^{}\n", "the key 'schema' is missing", "write schema: 1"),
    "rule-name": (with_rule("^{why: w, match: {}, quantize: {}}"), "a rule has no key 'name'", "write name:"),
    "rule-why": (with_rule("^{name: a, match: {}, quantize: {}}"), "a rule has no key 'why'", "write why:"),
    "rule-match": (with_rule("^{name: a, why: w, quantize: {}}"), "a rule has no key 'match'", "write match:"),
    "rule-quantize": (with_rule("^{name: a, why: w, match: {}}"), "a rule has no key 'quantize'", "write quantize:"),
    "rule-everything": (with_rule("^{}"), "a rule has no key 'name'", "write name:"),
    "pattern": (with_match("^{layers: all}"), "rule 'first' has no pattern", r"pattern: linear\(x, w\)"),
    "calibrator-name": (with_calibrator("^{percentile: 99.9}"), "calibrator has no name", "name: percentile"),
    "exclude-why": (with_exclude("^sites: '*'"), "exclude entry has no key 'why'", "say why"),
    "exclude-everything": (with_exclude("^{}"), "exclude entry has no key 'why'", "say why"),
    "exclude-what": (with_exclude("^why: because"), "exclude entry names nothing", "within, layers, sites or rules"),
    "share-why": (with_share("^sites: '*'"), "share entry has no key 'why'", "say why these have one range"),
    "share-everything": (with_share("^{}"), "share entry has no key 'why'", "say why"),
    "share-what": (
        with_share("^why: because"),
        "share entry names nothing",
        "write within, layers, sites, rules or captures$",
    ),
    # Optional says how much is found, not what is meant.
    "share-what-optional": (
        with_share("^{why: because, optional: true}"),
        "share entry names nothing",
        "write within, layers, sites, rules or captures$",
    ),
    "count-range": (with_count("^{}"), "per_layer says nothing", "min, max or both"),
    "promise-of-nothing": (with_key("expect: ^{}"), "expect promises nothing", "per_layer, total, model_types"),
    "promise-to-nobody": (
        with_key("expect: {per_layer: 6, model_types: ^{}}"),
        "model_types names no model type",
        "for example bert: 6",
    ),
    "count-list": (with_count("^[]"), "per_layer allows no number", r"6, \[6, 10\] or \{min: 1\}"),
    "quantize-captures": (
        with_quantize("{}").replace("- name", "- ^name"),
        "rule 'first' quantizes nothing",
        "at least one capture",
    ),
}

UNKNOWN_KEY: Cases = {
    "file": (
        f"{HEAD}^rule: []\n{RULES}",
        "unknown key 'rule' in the file",
        "known: calibration, exclude, extends, name, rules, schema, share, specs, why$",
    ),
    "file-capital": (f"{HEAD}^Why: x\n{RULES}", "unknown key 'Why' in the file", "known: .*why"),
    "spec": (with_spec("{^bits: 8}"), r"unknown key 'bits' in specs\.s", "known: axis, calibrator, .*num_bits"),
    "spec-amax": (with_spec("{^amax: 1}"), r"unknown key 'amax' in specs\.s", "known: .*learn, max_amax, "),
    "calibrator": (with_calibrator("{name: mse, ^bins: 256}"), "unknown key 'bins' in calibrator", "known: .*num_bins"),
    "rule": (with_key("^expects: {}"), "unknown key 'expects' in a rule", "known: expect, match, name"),
    "match": (
        with_match('{pattern: "linear(x)", ^layer: 0}'),
        "unknown key 'layer' in match",
        "known: layers, pattern",
    ),
    "quantize": (with_quantize("{x: {^name: a_quantizer}}"), r"unknown key 'name' in quantize\.x", "known: as, spec"),
    "expect": (
        with_key("expect: {^layer: 6}"),
        "unknown key 'layer' in expect",
        "known: model_types, per_layer, total",
    ),
    "count": (with_count("{^minimum: 6}"), "unknown key 'minimum' in per_layer", "known: max, min"),
    "total": (with_key("expect: {total: {^least: 6}}"), "unknown key 'least' in total", "known: max, min"),
    "model-type-count": (
        with_key("expect: {model_types: {bert: {^least: 6}}}"),
        r"unknown key 'least' in model_types\.bert",
        "known: max, min",
    ),
    "exclude": (
        with_exclude("{why: w, ^rule: first}"),
        "unknown key 'rule' in an exclude entry",
        "known: layers, optional, rules",
    ),
    "share": (
        with_share("{why: w, ^site: a}"),
        "unknown key 'site' in a share entry",
        "known: captures, layers, optional, rules, sites, why, within$",
    ),
    # An exclude entry is about single sites.
    "exclude-captures": (
        with_exclude("{why: w, ^captures: x}"),
        "unknown key 'captures' in an exclude entry",
        "known: layers, optional, rules, sites, why, within$",
    ),
    "calibration": (
        with_calibration("{^batches: 8}"),
        "unknown key 'batches' in calibration",
        "known: dropout, recalibrate_weights$",
    ),
    "key-is-a-list": (with_spec("{^[num_bits]: 8}"), "a key is a list", "a plain word"),
    "key-is-a-mapping": (with_spec("{? ^{a: b} : 8}"), "a key is a mapping", "a plain word"),
    "spec-name-is-a-list": (f"{HEAD}specs:\n  ? ^[a]\n  : default\n{RULES}", "a key is a list", "a plain word"),
}

REPEATED_KEY: Cases = {
    "file": (f"{HEAD}^name: again\n{RULES}", r"the key 'name' stands twice \(first in line 2\)", "remove one"),
    "file-quoted": (f'{HEAD}^"name": again\n{RULES}', r"the key 'name' stands twice \(first in line 2\)", "remove one"),
    "rules": (f"{GOOD}^{RULES}", r"the key 'rules' stands twice \(first in line 3\)", "remove one"),
    "spec-name": (f"{HEAD}specs:\n  s: default\n  ^s: default\n{RULES}", "'s' stands twice .first in line 4", "remove"),
    "spec": (with_spec("{axis: 0, ^axis: 1}"), r"the key 'axis' stands twice \(first in line 4\)", "remove one"),
    "calibrator": (
        with_calibrator("{name: mse, ^name: max}"),
        r"'name' stands twice \(first in line 4\)",
        "remove one",
    ),
    "rule": (with_key("^why: again"), r"the key 'why' stands twice \(first in line 5\)", "remove one"),
    "match": (
        with_match('{pattern: "linear(x)", ^pattern: "gelu(x)"}'),
        r"'pattern' stands twice \(first in line 6\)",
        "remove one",
    ),
    "quantize": (with_quantize("{x: default, ^x: default}"), r"'x' stands twice \(first in line 7\)", "remove one"),
    "place": (with_quantize("{x: {spec: default, ^spec: default}}"), r"'spec' stands twice", "remove one"),
    "expect": (with_key("expect: {total: 1, ^total: 1}"), r"'total' stands twice \(first in line 8\)", "remove one"),
    "model-type": (with_key("expect: {model_types: {bert: 6, ^bert: 6}}"), "'bert' stands twice", "remove one"),
    "count": (with_count("{min: 1, ^min: 1}"), r"the key 'min' stands twice", "remove one"),
    "exclude": (with_exclude("{why: w, sites: a, ^why: w}"), "the key 'why' stands twice", "remove one"),
    "share": (with_share("{why: w, sites: a, ^sites: b}"), "the key 'sites' stands twice", "remove one"),
    "calibration": (with_calibration("{dropout: true, ^dropout: true}"), "the key 'dropout' stands twice", "remove"),
    "share-section": (f"{with_share('{why: w, sites: a}')}^share: []\n", "the key 'share' stands twice", "remove one"),
}


def each(kind: str, values: str, found: str, fix: str, **places: Callable[[str], str]) -> Cases:
    """Every value, split at ``|``, in every place."""
    return {
        f"{kind}-{place.replace('_', '-')}-{value}": (build(f"^{value}"), found, fix)
        for place, build in places.items()
        for value in values.split("|")
    }


NOT_A_TEXT: Cases = {
    **each(
        "text",
        # What looks like something else in YAML 1.1 is never silently a text, and never silently that something.
        "3|1.5|yes|No|true|null|~|''|'  '|2001-12-14|[a]|{a: b}",
        "is .*, not a text",
        "in quotes if it looks like a number",
        name=lambda value: f"schema: 1\nname: {value}\n{RULES}",
    ),
    **each(
        "text",
        "3|off|[a]",
        "is .*, not a text",
        "write a word, in quotes",
        why=lambda value: f"{HEAD}why: {value}\n{RULES}",
        extends=lambda value: f"{HEAD}extends: {value}\n",
        rule_name=lambda value: GOOD.replace("name: first", f"name: {value}"),
        rule_why=lambda value: GOOD.replace("why: it pays", f"why: {value}"),
        pattern=lambda value: with_match(f"{{pattern: {value}}}"),
        spec_of_place=lambda value: with_quantize(f"{{x: {{spec: {value}}}}}"),
        name_of_place=lambda value: with_quantize(f"{{x: {{as: {value}}}}}"),
        calibrator_name=lambda value: with_calibrator(f"{{name: {value}}}"),
        within_item=lambda value: with_match(f'{{pattern: "linear(x)", within: [a, {value}]}}'),
        exclude_why=lambda value: with_exclude(f"{{why: {value}, sites: a}}"),
        sites_item=lambda value: with_exclude(f"{{why: w, sites: [a, {value}]}}"),
        rules_item=lambda value: with_exclude(f"{{why: w, rules: [first, {value}]}}"),
        share_why=lambda value: with_share(f"{{why: {value}, sites: a}}"),
        share_sites_item=lambda value: with_share(f"{{why: w, sites: [a, {value}]}}"),
        share_captures_item=lambda value: with_share(f"{{why: w, captures: [x, {value}]}}"),
    ),
    **each(
        "text",
        "3|on",
        "is .*, not a text",
        "write a word, in quotes",
        place=lambda value: with_quantize(f"{{x: {value}}}"),
        calibrator=with_calibrator,
        within=lambda value: with_match(f'{{pattern: "linear(x)", within: {value}}}'),
        sites=lambda value: with_exclude(f"{{why: w, sites: {value}}}"),
        rules=lambda value: with_exclude(f"{{why: w, rules: {value}}}"),
        captures=lambda value: with_share(f"{{why: w, captures: {value}}}"),
    ),
}

#: Half a character cannot be printed or written to a file. YAML's escapes are single characters, so two are no pair.
SURROGATES: Cases = each(
    "surrogate",
    r'"\uD800"|"a\uDFFF"|"\uD83D\uDE00"',
    r" has half a character \(a surrogate\)$",
    "remove the escape",
    name=lambda value: f"schema: 1\nname: {value}\n{RULES}",
    why=lambda value: f"{HEAD}why: {value}\n{RULES}",
    extends=lambda value: f"{HEAD}extends: {value}\n",
    rule_name=lambda value: GOOD.replace("name: first", f"name: {value}"),
    rule_why=lambda value: GOOD.replace("why: it pays", f"why: {value}"),
    pattern=lambda value: with_match(f"{{pattern: {value}}}"),
    place=lambda value: with_quantize(f"{{x: {value}}}"),
    name_of_place=lambda value: with_quantize(f"{{x: {{as: {value}}}}}"),
    calibrator=with_calibrator,
    within=lambda value: with_match(f'{{pattern: "linear(x)", within: {value}}}'),
    sites_item=lambda value: with_exclude(f"{{why: w, sites: [a, {value}]}}"),
    rules_item=lambda value: with_exclude(f"{{why: w, rules: [first, {value}]}}"),
)

NOT_WHOLE: Cases = {
    **each(
        "int",
        "8.0|'8'|eight|yes|null|~|0x8|0b11|0o7|1:30|[8]|{min: 8}|.inf",
        "num_bits is .*, not a (decimal )?whole number",
        "for example 8",
        num_bits=lambda value: with_spec(f"{{num_bits: {value}}}"),
    ),
    # YAML 1.1 calls these whole numbers, most of them worth something else than they look; the last is only too long.
    **each(
        "int",
        "0x8|0b11|1:30|-1:30|0_7|1_0|8_|+0x8|1000000000",
        "is '.{2,60}', not a decimal whole number$",
        "for example 8",
        num_bits=lambda value: with_spec(f"{{num_bits: {value}}}"),
    ),
    **each(
        "int",
        "0_1|1_|0b1|0x1",
        "schema is '.*', not a decimal whole number$",
        "for example 8",
        schema=lambda value: f"schema: {value}\nname: mine\n{RULES}",
    ),
    **each(
        "int",
        "1.5|'1'|on|0x1|0_1",
        "is .*, not a (decimal )?whole number",
        "write for example",
        schema=lambda value: f"schema: {value}\nname: mine\n{RULES}",
        axis=lambda value: with_spec(f"{{axis: {value}}}"),
        num_bins=lambda value: with_calibrator(f"{{name: mse, num_bins: {value}}}"),
        layers=lambda value: with_match(f'{{pattern: "linear(x)", layers: {value}}}'),
        layers_item=lambda value: with_match(f'{{pattern: "linear(x)", layers: [0, {value}]}}'),
        exclude_layers=lambda value: with_exclude(f"{{why: w, layers: {value}}}"),
        share_layers=lambda value: with_share(f"{{why: w, layers: {value}}}"),
        per_layer=with_count,
        per_layer_item=lambda value: with_count(f"[6, {value}]"),
        min=lambda value: with_count(f"{{min: {value}}}"),
        max=lambda value: with_count(f"{{min: 1, max: {value}}}"),
        total=lambda value: with_key(f"expect: {{total: {value}}}"),
        model_type=lambda value: with_key(f"expect: {{model_types: {{bert: {value}}}}}"),
    ),
    # Only 'null' is null: an empty value or a wave is more likely to be something that was forgotten.
    **each(
        "int",
        "~|none|Null|NULL",
        "axis is .*, not a whole number",
        "for example 8",
        axis=lambda value: with_spec(f"{{axis: {value}}}"),
    ),
    # 'all' is a word for the whole key, not for one of several layers.
    **each(
        "int",
        "all|null|some",
        "layers is .*, not a whole number",
        "for example",
        layers_item=lambda value: with_match(f'{{pattern: "linear(x)", layers: [{value}]}}'),
    ),
}

NOT_A_NUMBER: Cases = each(
    "number",
    "'99'|all|yes|null|.inf|-.inf|.nan|0x63|1e1|1:30.5|[99]|{a: 99}",
    "(percentile|max_amax) is .*, not a (decimal )?number",
    "for example 99.99",
    percentile=lambda value: with_calibrator(f"{{name: percentile, percentile: {value}}}"),
    max_amax=lambda value: with_spec(f"{{max_amax: {value}}}"),
)

NOT_A_BOOLEAN: Cases = each(
    "bool",
    "yes|no|on|off|True|FALSE|y|1|0|null|~|'true'|\"false\"|[true]|{true: 1}",
    r"(unsigned|narrow_range|optional|learn|dropout|recalibrate_weights) is ",
    "write true or false",
    unsigned=lambda value: with_spec(f"{{unsigned: {value}}}"),
    narrow_range=lambda value: with_spec(f"{{narrow_range: {value}}}"),
    optional=lambda value: with_key(f"optional: {value}"),
    learn=lambda value: with_spec(f"{{learn: {value}}}"),
    share_optional=lambda value: with_share(f"{{why: w, sites: a, optional: {value}}}"),
    dropout=lambda value: with_calibration(f"{{dropout: {value}}}"),
    recalibrate_weights=lambda value: with_calibration(f"{{recalibrate_weights: {value}}}"),
)

NOT_A_LIST: Cases = {
    **each(
        "list",
        "3|some|null|{a: b}",
        "is .*",
        "write a list",
        rules=lambda value: f"{HEAD}rules: {value}\n",
        exclude=lambda value: f"{GOOD}exclude: {value}\n",
        share=lambda value: f"{GOOD}share: {value}\n",
    ),
    **each(
        "list",
        "{a: b}",
        "is a mapping",
        "write a list",
        within=lambda value: with_match(f'{{pattern: "linear(x)", within: {value}}}'),
        layers=lambda value: with_match(f'{{pattern: "linear(x)", layers: {value}}}'),
        sites=lambda value: with_exclude(f"{{why: w, sites: {value}}}"),
        rule_globs=lambda value: with_exclude(f"{{why: w, rules: {value}}}"),
        captures=lambda value: with_share(f"{{why: w, captures: {value}}}"),
    ),
}

NOT_A_MAPPING: Cases = {
    **each(
        "mapping",
        "3|some|null|[a]",
        "is ('3' .int|'some' .str|'null' .null|a list)",
        "write keys",
        specs=lambda value: f"{HEAD}specs: {value}\n{RULES}",
        spec=with_spec,
        rule=with_rule,
        match=with_match,
        quantize=with_quantize,
        expect=lambda value: with_key(f"expect: {value}"),
        model_types=lambda value: with_key(f"expect: {{model_types: {value}}}"),
        exclude=with_exclude,
        share=with_share,
        calibration=with_calibration,
    ),
    # One word is a short form here, so only a list cannot be meant.
    **each(
        "mapping",
        "[a]",
        "is a list",
        "write keys",
        place=lambda value: with_quantize(f"{{x: {value}}}"),
        calibrator=with_calibrator,
    ),
    **each(
        "mapping", "[a]|mine|3|'mine'|~", "found .* at the top", "keys: schema, name", file=lambda value: f"{value}\n"
    ),
}

PATTERNS: Cases = {
    "unknown-operator": (with_pattern('"linear(x, ^foo(w))"'), "unknown operator 'foo'", "known: .*linear"),
    "unknown-operator-first": (with_pattern('"^foo(x)"'), "unknown operator 'foo'", "known: "),
    "single-quotes": (with_pattern("'linear(x, ^foo(w))'"), "unknown operator 'foo'", "known: "),
    "no-quotes": (with_match("{pattern: ^foo(x)}"), "unknown operator 'foo'", "known: "),
    "no-quotes-block": (
        with_match("\n      pattern: linear(x, w=^foo(_))"),
        "unknown operator 'foo'",
        "known: ",
    ),
    "after-named-operands": (with_pattern('"where(a=_, b=_, ^foo(x))"'), "unknown operator 'foo'", "known: "),
    "inside-maybe": (with_pattern('"add(maybe(mul, ^foo)(_), x)"'), "unknown operator 'foo'", "known: "),
    # In a block the text does not stand where the key does: its start is the best there is.
    "literal-block": (
        with_match("\n      pattern: ^|\n        linear(x, foo(w))"),
        "unknown operator 'foo'",
        "known: ",
    ),
    "folded-block": (with_match("\n      pattern: ^>\n        linear(x, foo(w))"), "unknown operator 'foo'", "known: "),
    # Nor does it where a text goes over two lines, or where an escape is longer than what it stands for.
    "double-quotes-on-two-lines": (
        with_match('\n      pattern: ^"linear(x,\n        foo(w))"'),
        "unknown operator 'foo'",
        "known: ",
    ),
    "single-quotes-on-two-lines": (
        with_match("\n      pattern: ^'linear(x,\n        foo(w))'"),
        "unknown operator 'foo'",
        "known: ",
    ),
    "no-quotes-on-two-lines": (
        with_match("\n      pattern: ^linear(x,\n        foo(w))"),
        "unknown operator 'foo'",
        "known: ",
    ),
    "first-of-two-lines": (
        with_match('\n      pattern: ^"linear(foo(x),\n        w)"'),
        "unknown operator 'foo'",
        "known: ",
    ),
    "line-continued": (
        with_match('\n      pattern: ^"linear(x, \\\n        foo(w))"'),
        "unknown operator 'foo'",
        "known: ",
    ),
    "never-closed-on-two-lines": (
        with_match('\n      pattern: ^"linear(x,\n        w"'),
        "pattern syntax: .*never closed",
        "for example",
    ),
    "escape": (with_pattern('^"linear(x,\\x20foo(w))"'), "unknown operator 'foo'", "known: "),
    "escape-after-the-place": (with_pattern('^"linear(foo(x),\\x20w)"'), "unknown operator 'foo'", "known: "),
    "doubled-quotes": (with_pattern("^'linear(x, ''w'')'"), "found ''w'' where an operator is wanted", "operands"),
    # Columns count characters.
    "after-two-bytes": (with_pattern('"linear(é, ^foo(x))"'), "unknown operator 'foo'", "known: "),
    "after-four-bytes": (with_pattern("'linear(𠮷, ^foo(x))'"), "unknown operator 'foo'", "known: "),
    "after-two-bytes-named": (with_pattern('"where(é=_, ü=_, ^foo(x))"'), "unknown operator 'foo'", "known: "),
    "after-two-bytes-unmatched": (with_pattern('"add(é=_, b=_)^)"'), "pattern syntax: unmatched", "for example"),
    "after-another-key-of-many-bytes": (
        with_match('{within: "größer → 😀", pattern: "linear(x, ^foo(w))"}'),
        "unknown operator 'foo'",
        "known: ",
    ),
    "after-blanks": (with_pattern('"linear(x,   ^foo(w))  "'), "unknown operator 'foo'", "known: "),
    "490-signs": (
        with_pattern(f'"^{"-" * 490}x"'),
        r"^found '\.\.\.' where an operator is wanted",
        "with its operands",
    ),
    "maybe-double-star": (with_pattern('"add(maybe(dropout, **^z)(_), y)"'), r"^found \*\* in", "operator names"),
    "named-anything": (with_pattern('"add(^_=linear(_), b)"'), "'_' is no name", "another name"),
    "named-maybe": (with_pattern('"add(b, ^maybe=_)"'), "'maybe' is .* here used as a capture", "another name"),
    "never-closed": (with_pattern('"linear^(x, w"'), "pattern syntax: .*never closed", "for example"),
    "unmatched": (with_pattern('"linear(x, w)^)"'), "pattern syntax: unmatched", "for example"),
    "unmatched-after-named": (with_pattern('"add(a=_, b=_)^)"'), "pattern syntax: unmatched", "for example"),
    "two-statements": (with_pattern('"linear(x)^; gelu(x)"'), "pattern syntax: ", "for example"),
    "no-operator": (with_pattern('"^x"'), "found 'x' where an operator is wanted", "an operator with its operands"),
    "operand": (with_pattern('"linear(x, ^1)"'), "found '1' where an operator is wanted", "with its operands"),
    "maybe-outermost": (with_pattern('"^maybe(mul)(_)"'), "cannot be optional", "around maybe"),
    "captured-twice": (with_pattern('"^linear(x, x)"'), "'x' is captured twice", "each capture name once"),
    "too-long": (with_pattern(f'"^linear(x){" " * 500}"'), "has 509 characters", "at most 500"),
    # Read, never evaluated.
    "import": (with_pattern("\"^__import__('os')(x)\""), "only maybe.* may be called twice", "write maybe"),
    "import-call": (with_pattern("\"^__import__('os').system('true')\""), "as an operator", "plain name"),
    "open": (with_pattern("\"linear(x, ^open('/etc/passwd'))\""), "unknown operator 'open'", "known: "),
    "comprehension": (with_pattern('"linear(^[y for y in x])"'), "where an operator is wanted", "with its operands"),
}

MEANING: Cases = {
    "schema-2": (f"schema: ^2\nname: mine\n{RULES}", "schema 2 is not known", "this release reads schema 1"),
    "schema-0": (f"schema: ^0\nname: mine\n{RULES}", "schema 0 is not known", "this release reads schema 1"),
    "schema-negative": (f"schema: ^-1\nname: mine\n{RULES}", "schema -1 is not known", "reads schema 1"),
    "capture-not-in-pattern": (
        with_quantize("{x: default, ^y: default}"),
        "rule 'first' quantizes 'y', which its pattern does not capture",
        "the pattern captures: x, w$",
    ),
    "capture-of-no-captures": (
        RULES_WITH.format(match='{pattern: "linear(_)"}', quantize="{^x: default}"),
        "rule 'first' quantizes 'x'",
        "the pattern captures: none$",
    ),
    "anything-is-no-capture": (
        RULES_WITH.format(match='{pattern: "linear(_, w)"}', quantize="{^_: default}"),
        "rule 'first' quantizes '_'",
        "the pattern captures: w$",
    ),
    **{
        f"quantizer-name-{name}": (
            with_quantize(f"{{x: ^{{as: '{name}'}}}}"),
            f"'{re.escape(name)}' is no quantizer name",
            "ending in _quantizer",
        )
        for name in ("q", "Q_quantizer", "_quantizer", "a.b_quantizer", "q-quantizer", "q_quantizer ", "q_quantizers")
    },
    "unknown-calibrator": (with_calibrator("^mean"), "unknown calibrator 'mean'", "max, histogram, percentile"),
    "unknown-calibrator-name": (with_calibrator("^{name: mean}"), "unknown calibrator 'mean'", "write one of max"),
    "calibrator-in-capitals": (with_calibrator("^Max"), "unknown calibrator 'Max'", "write one of max"),
    **{
        f"percentile-of-{name}": (
            with_calibrator(f"^{{name: {name}, percentile: 99.9}}"),
            f"calibrator '{name}' takes no percentile",
            "name: percentile",
        )
        for name in ("max", "histogram", "entropy", "mse", "best")
    },
    **{
        f"percentile-{value}": (
            with_calibrator(f"^{{name: percentile, percentile: {value}}}"),
            r"percentile .* is outside \(0, 100\]",
            "99.99",
        )
        for value in ("0", "0.0", "-1", "100.01", "9999")
    },
    "num-bins-of-max": (with_calibrator("^{name: max, num_bins: 256}"), "'max' keeps no histogram", "remove"),
    **{
        f"num-bins-{value}": (
            with_calibrator(f"^{{name: entropy, num_bins: {value}}}"),
            f"num_bins {value} is outside 128 to 1048576",
            "2048",
        )
        for value in ("-1", "0", "127", "1048577")
    },
    **{
        f"num-bits-{value}": (with_spec(f"^{{num_bits: {value}}}"), f"num_bits {value} is outside 2 to 16", "8")
        for value in ("-8", "0", "1", "17")
    },
    **{
        f"axis-{value}": (with_spec(f"^{{axis: {value}}}"), f"axis {value} is outside -1 to 3", "or null")
        for value in ("-4", "-2", "4", "768")
    },
    **{
        f"axis-with-{name}": (
            with_spec(f"^{{axis: 0, calibrator: {name}}}"),
            f"calibrator '{name}' needs one range per tensor, but axis is 0",
            r"axis: null, or calibrator: max \(for weights also mse\)$",
        )
        for name in ("histogram", "percentile", "entropy", "best")
    },
    **{
        f"max-amax-{value}": (
            with_spec(f"^{{max_amax: {value}}}"),
            "^max_amax .* is no range$",
            "^write a number above 0, for example 10$",
        )
        for value in ("0", "0.0", "-1", "-0.5")
    },
    # A list that names nothing has a place of its own.
    **{
        f"share-{key}-nothing": (
            with_share(f"{{why: w, {key}: ^[]}}"),
            f"^{key} names nothing$",
            r"^write a glob such as 'add_\*', or leave it out$",
        )
        for key in ("sites", "rules", "captures")
    },
    "share-layers-nothing": (with_share("^{why: w, layers: []}"), "layers names no layer", r"all, 0 or \[0, 1\]"),
    "share-layers-negative": (with_share("^{why: w, layers: -1}"), "^layer -1 does not exist$", "count from 0"),
    "share-within-nothing": (with_share("^{why: w, within: []}"), "within names no module", "glob such as"),
    "unsigned-and-narrow": (
        with_spec("^{unsigned: true, narrow_range: true}"),
        "narrow_range .* the grid is unsigned",
        "remove one",
    ),
    # 'default' has a meaning already. What is wrong is the set of names, so the place is where the file's keys begin.
    **{
        f"spec-called-default-{name}": (
            f"# mine\n^{HEAD}specs: {{a: default, default: {spec}}}\n{RULES}",
            "a spec is called 'default', which means pytorch-quantization's default descriptors",
            "rename it",
        )
        for name, spec in {"as-it-is": "default", "otherwise": "{num_bits: 4}"}.items()
    },
    # What a scope or a count says is refused where its rule begins.
    "within-nothing": (
        with_match('{pattern: "linear(x)", within: []}').replace("- name", "- ^name"),
        "within names no module",
        "glob such as",
    ),
    "layers-nothing": (
        with_match('{pattern: "linear(x)", layers: []}').replace("- name", "- ^name"),
        "layers names no layer",
        r"all, 0 or \[0, 1\]",
    ),
    **{
        f"layers-{value}": (
            with_match(f'{{pattern: "linear(x)", layers: {value}}}').replace("- name", "- ^name"),
            "^layer -1 does not exist$",
            "layers count from 0",
        )
        for value in ("-1", "[-1]", "[0, -1]")
    },
    **{
        f"count-{key.partition(':')[0]}-{value}": (
            with_key(f"expect: {{{key.format(value)}}}").replace("- name", "- ^name"),
            "^a count of -1 cannot be$",
            "write 0 or more",
        )
        for key in ("per_layer: {}", "total: {}", "model_types: {{bert: {}}}")
        for value in ("-1", "[6, -1]", "{min: -1}", "{max: -1}")
    },
    **{
        f"count-range-{key.partition(':')[0]}": (
            with_key(f"expect: {{{key.format('{min: 5, max: 2}')}}}").replace("- name", "- ^name"),
            "^no count is at least 5 and at most 2$",
            "exchange them",
        )
        for key in ("per_layer: {}", "total: {}", "model_types: {{bert: {}}}")
    },
}

#: Checks over the whole of a file, with what it extends: the mark stands on the line that the error must name. Which
#: key of the rule or of the exclude entry is meant cannot be said, so there is no column.
WHOLE: Cases = {
    "undefined-spec": (
        with_quantize("{x: int4}").replace("- name", "- ^name"),
        "rule 'first' uses the spec 'int4', which is not defined",
        "known: default$",
    ),
    "undefined-spec-beside-others": (
        with_spec("default").replace("x: default", "x: {spec: t}").replace("- name", "- ^name"),
        "rule 'first' uses the spec 't', which is not defined",
        "known: default, s$",
    ),
    "undefined-spec-of-the-second-rule": (
        GOOD + "  # a comment\n\n^" + SECOND.replace("as: x_quantizer", "spec: t"),
        "rule 'second' uses the spec 't', which is not defined",
        "known: default$",
    ),
    "one-quantizer-in-two-rules": (
        "# a comment\n" + with_quantize("{x: {as: x_quantizer}}") + "^" + SECOND,
        "^rules 'first' and 'second' both name a quantizer 'x_quantizer'$",
        "its own name under 'as'",
    ),
    "one-quantizer-twice-in-a-rule": (
        with_quantize("{x: {as: x_quantizer}, w: {as: x_quantizer}}").replace("- name", "- ^name"),
        "^rule 'first' twice names a quantizer 'x_quantizer'$",
        "its own name under 'as'",
    ),
    "one-quantizer-twice-in-the-second-rule": (
        GOOD + "^" + SECOND.replace("gelu(x)", "add(x, y)").replace("}}}", "}, y: {as: x_quantizer}}}"),
        "^rule 'second' twice names a quantizer 'x_quantizer'$",
        "its own name under 'as'",
    ),
    "two-rules-of-one-name": (
        GOOD + "^" + SECOND.replace("second", "first"),
        "^two rules are called 'first'$",
        "rename one",
    ),
    "exclude-unknown-rule": (
        with_exclude("^{why: w, rules: second}"),
        "exclude names the rule 'second', which does not exist",
        "^rules: first$",
    ),
    "exclude-unknown-glob": (
        with_exclude("^{why: w, rules: [first, 'sec*']}"),
        r"exclude names the rule 'sec\*', which does not exist",
        "^rules: first$",
    ),
    "exclude-unknown-rule-in-the-second-entry": (
        with_exclude("{why: w, rules: first}\n  - why: w\n    layers: 0\n    rules: third").replace("- why", "- ^why"),
        "exclude names the rule 'third', which does not exist",
        "^rules: first$",
    ),
    "exclude-unknown-rule-of-several": (
        GOOD + SECOND.replace("second", "a-rule") + "exclude:\n  - ^{why: w, rules: [third]}\n",
        "exclude names the rule 'third', which does not exist",
        "^rules: a-rule, first$",
    ),
    "exclude-from-no-rules": (
        HEAD + "rules: []\nexclude:\n  - ^{why: w, rules: '*'}\n",
        r"exclude names the rule '\*', which does not exist",
        "^rules: none$",
    ),
    "share-unknown-rule": (
        with_share("^{why: w, rules: second}"),
        "^share names the rule 'second', which does not exist$",
        "^rules: first$",
    ),
    "share-unknown-glob-optional": (
        with_share("^{why: w, rules: [first, 'sec*'], optional: true}"),
        r"^share names the rule 'sec\*', which does not exist$",
        "^rules: first$",
    ),
    "share-unknown-rule-in-the-second-entry": (
        with_share("{why: w, rules: first}\n  - why: w\n    layers: 0\n    rules: third").replace("- why", "- ^why"),
        "^share names the rule 'third', which does not exist$",
        "^rules: first$",
    ),
    "share-behind-an-exclude": (
        with_exclude("{why: w, rules: first}") + "share:\n  - ^{why: w, rules: second}\n",
        "^share names the rule 'second', which does not exist$",
        "^rules: first$",
    ),
}

BAD: dict[str, Cases] = {
    "not-yaml": NOT_YAML,
    "not-data": NOT_DATA,
    "missing": MISSING,
    "unknown-key": UNKNOWN_KEY,
    "repeated-key": REPEATED_KEY,
    "type": {**NOT_A_TEXT, **SURROGATES, **NOT_WHOLE, **NOT_A_NUMBER, **NOT_A_BOOLEAN, **NOT_A_LIST, **NOT_A_MAPPING},
    "pattern": PATTERNS,
    "meaning": MEANING,
}


@pytest.mark.parametrize(
    ("text", "found", "fix"),
    [pytest.param(*case, id=f"{group}-{name}") for group, cases in BAD.items() for name, case in cases.items()],
)
def test_refused_at(text: str, found: str, fix: str, tmp_path: Path) -> None:
    path, line, column = write_marked(tmp_path / "mine.yaml", text)
    check(refusal(path), path, line, column, found, fix)


@pytest.mark.parametrize(("text", "found", "fix"), [pytest.param(*case, id=name) for name, case in WHOLE.items()])
def test_refused_on_the_line(text: str, found: str, fix: str, tmp_path: Path) -> None:
    path, line, _ = write_marked(tmp_path / "mine.yaml", text)
    check(refusal(path), path, line, None, found, fix)


def test_the_file_that_the_bad_ones_are_made_from_is_good(tmp_path: Path) -> None:
    # Otherwise a bad file could be refused for another reason than the one it was written for.
    assert [rule.name for rule in load_rules(write(tmp_path / "a.yaml", GOOD)).rules] == ["first"]
    assert load_rules(write(tmp_path / "b.yaml", with_spec("{num_bits: 4}"))).spec("s") == QuantSpec(4)
    assert load_rules(write(tmp_path / "c.yaml", with_exclude("{why: w, rules: first}"))).exclude[0].why == "w"
    assert load_rules(write(tmp_path / "d.yaml", with_share("{why: w, rules: first}"))).share[0].why == "w"
    assert load_rules(write(tmp_path / "e.yaml", with_calibration("{dropout: true}"))).calibration.dropout


@pytest.mark.parametrize("end", [pytest.param("\r\n", id="crlf"), pytest.param("\r", id="cr")])
def test_other_line_ends_are_counted_as_lines(end: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", GOOD.replace("\n", end) + f"    optional: yes{end}")
    check(refusal(path), path, 8, 15, "optional is 'yes'", "true or false")


def test_a_byte_order_mark_is_no_character(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "\N{BYTE ORDER MARK}" + GOOD)
    assert load_rules(path).name == "mine"
    path = write(tmp_path / "mine.yaml", "\N{BYTE ORDER MARK}Schema: 1\n" + GOOD)
    check(refusal(path), path, 1, 1, "unknown key 'Schema'", "known: ")
