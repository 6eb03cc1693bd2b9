"""Texts of rule files: made up, and mutated."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import yaml

from fuzzing.data import WEIRD_NUMBERS, WEIRD_TEXTS, mutated

__all__ = ["MUTATIONS", "NEUTRAL", "generated"]

_PATTERNS = [
    "linear(x, w)",
    "add(x=maybe(dropout)(linear(_)), w)",
    "matmul(x, w=maybe(div, mul)(transpose(_)))",
    "layer_norm(add(x, w))",
]
_SPECS = [
    "default",
    "{num_bits: 4, axis: 0}",
    "{calibrator: {name: percentile, percentile: 99.99}}",
    "{num_bits: 16, unsigned: true, max_amax: 10.5, learn: true}",
    "{calibrator: {name: mse, num_bins: 512}, narrow_range: true}",
]
_ENTRIES = ['within: ["*.output", "*.ffn"]', "layers: [0, 3]", 'sites: "add_*"', "rules: rule0", "layers: all"]
_COUNTS = ["6", "[6, 10]", "{min: 1}", "{min: 1, max: 4}"]


def generated(random_: random.Random) -> str:
    """A rule file without a mistake."""
    pick = random_.choice
    lines = ["schema: 1", "name: mine", "why: it is made up", "# some specs", "specs:"]
    lines += [f"  s{index}: {pick(_SPECS)}" for index in range(2)]
    lines.append("rules:")
    for index in range(random_.randint(1, 5)):
        lines += [f"  - name: rule{index}", "    why: 'it pays' # so they say", "    match:"]
        lines += [f"      layers: {pick(('all', '0', '[1, 2]'))}", f'      pattern: "{pick(_PATTERNS)}"']
        name = f"{{spec: s0, as: x{index}_input_quantizer}}"
        lines.append(f"    quantize: {{x: {pick((name, 's1', 'default'))}, w: s1}}")
        if random_.random() < 0.5:
            lines.append(f"    expect: {{per_layer: {pick(_COUNTS)}, model_types: {{bert: {pick(_COUNTS)}}}}}")
    for section in ("exclude", "share"):
        if random_.random() < 0.5:
            lines += [f"{section}:", f"  - {{why: it may, {pick(_ENTRIES)}}}"]
    if random_.random() < 0.3:
        lines.append("calibration: {dropout: true}")
    return "\n".join(lines) + "\n"


# What changes a text ------------------------------------------------------------------------------------------------


def _bytes(random_: random.Random, content: bytes) -> bytes:
    place = random_.randrange(len(content) + 1)
    letters = random_.choice((range(256), range(32, 127), content or b" "))
    new = bytes(random_.choice(letters) for _ in range(random_.randint(0, 3)))
    return content[:place] + new + content[place + random_.randint(0, 4) :]


def _tokens(random_: random.Random, content: bytes) -> bytes:
    tokens = re.findall(rb"\w+|\s+|[^\w\s]", content) or [b"a"]
    place, other = random_.randrange(len(tokens)), random_.randrange(len(tokens))
    signs = [
        b": ",
        b"- ",
        b"[",
        b"]",
        b"{",
        b"}",
        b"&a ",
        b"*a",
        b"!!str ",
        b"!x ",
        b"---\n",
        b"|\n",
        b"? ",
        b"%",
        b"'",
    ]
    change = random_.randrange(4)
    if change == 0:
        tokens[place] = tokens[other]
    elif change == 1:
        tokens[place], tokens[other] = tokens[other], tokens[place]
    elif change == 2:
        tokens[place] = b""
    else:
        tokens.insert(place, random_.choice(signs))
    return b"".join(tokens)


def _lines(random_: random.Random, content: bytes) -> bytes:
    lines = content.splitlines(keepends=True) or [b"\n"]
    place, other = random_.randrange(len(lines)), random_.randrange(len(lines))
    change = random_.randrange(4)
    if change == 0:
        lines.insert(place, lines[other])  # a key that stands twice, for one
    elif change == 1:
        lines[place], lines[other] = lines[other], lines[place]
    elif change == 2:
        del lines[place]
    else:
        lines[place] = random_.choice((b"  ", b"\t", b" ", b"- ")) + lines[place]
    return b"".join(lines)


def _structure(random_: random.Random, content: bytes) -> bytes:
    try:
        data = mutated(random_, yaml.safe_load(content))
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True).encode(errors="surrogatepass")
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, RecursionError):
        return _lines(random_, content)


def _numbers(random_: random.Random, content: bytes) -> bytes:
    numbers = [*re.finditer(rb"\b[0-9][0-9.]*\b", content)]
    odd = [b"0x10", b"010", b"1_000", b"1:30", b"+1", b"-0", b".5", b"5.", b".inf", b".nan", b"1e5", b"1.0e-60", b"~"]
    new = random_.choice([*odd, *(str(number)[:4200].encode() for number in WEIRD_NUMBERS)])
    if not numbers:
        return content + b"\nschema: " + new
    found = random_.choice(numbers)
    return content[: found.start()] + new + content[found.end() :]


def _texts(random_: random.Random, content: bytes) -> bytes:
    """A letter, a word or an escape that is unlike the others."""
    words = [*re.finditer(rb"[A-Za-z_]+", content)] or [*re.finditer(b"", content)]
    found = random_.choice(words)
    text = random_.choice(WEIRD_TEXTS)
    quoted = '"' + "".join(f"\\U{ord(letter):08X}" for letter in text[:100]) + '"'
    new = random_.choice([text, quoted, quoted[1:-1], f"'{text}'"]).encode(errors="surrogatepass")
    return content[: found.start()] + new + content[found.end() :]


def _sizes(random_: random.Random, content: bytes) -> bytes:
    """One line, word or sign very often."""
    pieces = [
        *re.findall(rb"[^\n]*\n|\w+|[\[\]{},:]", content),
        b"[",
        b"{a: ",
        b"- ",
        b"? ",
        b"[],",
        b"a, ",
        b'"\\x41"',
    ]
    piece = random_.choice(pieces) or b" "
    place = random_.randrange(len(content) + 1)
    times = min(random_.choice((3, 20, 300, 2000, 300_000)), random_.choice((60_000, 300_000)) // len(piece))
    return content[:place] + piece * times + content[place:]


def _nesting(random_: random.Random, content: bytes) -> bytes:
    opening, closing = random_.choice([(b"[", b"]"), (b"{a: ", b"}"), (b"neg(", b")"), (b"(", b")"), (b"- ", b"")])
    depth = random_.choice((2, 5, 14, 17, 70, 1000, 6000))
    values = [*re.finditer(rb"(?<=: )[^\n]+", content)] or [*re.finditer(b"", content)]
    found = random_.choice(values)
    return content[: found.start()] + opening * depth + found.group() + closing * depth + content[found.end() :]


#: By kind.
MUTATIONS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "bytes": _bytes,
    "tokens": _tokens,
    "lines": _lines,
    "structure": _structure,
    "numbers": _numbers,
    "texts": _texts,
    "sizes": _sizes,
    "nesting": _nesting,
}

# What changes a text and not what it says ---------------------------------------------------------------------------


def _comments(random_: random.Random, text: str) -> str:
    lines = text.splitlines()
    for _ in range(random_.randint(1, 9)):
        lines.insert(random_.randrange(len(lines) + 1), random_.choice(("", "# schema: 2", "  # [", "#" * 500)))
    return "\n".join(lines) + "\n"


def _ends(random_: random.Random, text: str) -> str:
    return text.replace("\n", random_.choice(("\r\n", "\r", "\n\n", "  \n", " # why\n")))


def _wider(random_: random.Random, text: str) -> str:
    """More blanks before each line that is indented, and after each key."""
    wide = (
        re.sub(r"(?m)^ +", lambda found: found.group() + " " * more, text) if (more := random_.randint(0, 5)) else text
    )
    return re.sub(r"(?m)^( *[a-z_]+:) (?=\S)", r"\1" + " " * random_.randint(1, 5), wide)


NEUTRAL = [_comments, _ends, _wider]
