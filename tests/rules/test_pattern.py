"""Patterns: what is printed reads back as the same tree, and whatever is not a pattern is refused with its column."""

from __future__ import annotations

import re
import sys
import warnings
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pattern_trees import ANYTHING, PROPERTY, trees

from qdq_surgery.errors import QdqSurgeryError, RuleFileError
from qdq_surgery.rules.pattern import (
    ACTIVATIONS,
    COMMUTATIVE,
    LAYOUT,
    OPERATORS,
    Operand,
    Pattern,
    operator_fits,
    parse_pattern,
)


#: Derandomized, so that a red run is a change of the code and never the luck of the draw.
@PROPERTY
@given(tree=trees())
def test_what_is_printed_reads_back(tree: Pattern) -> None:
    text = str(tree)
    assume(len(text) <= 500)
    assert parse_pattern(text) == tree
    assert str(parse_pattern(text)) == text


@PROPERTY
@given(tree=trees(), gap=st.sampled_from([" ", "  ", "\t"]))
def test_blanks_between_the_words_mean_nothing(tree: Pattern, gap: str) -> None:
    text = re.sub(r"([(),=])", rf"{gap}\1{gap}", str(tree).replace(" ", ""))
    assume(len(text) <= 500)
    assert parse_pattern(text) == tree


@PROPERTY
@given(tree=trees())
def test_captures_stand_in_the_order_in_which_they_are_written(tree: Pattern) -> None:
    # Read off the text: a word that no bracket follows is a capture, except inside maybe(...).
    text = re.sub(r"maybe\([^()]*\)", "maybe", str(tree))
    words = [word for word in re.findall(r"[a-z0-9_]+(?![a-z0-9_(])", text) if word != "_"]
    assert list(tree.captures()) == words


#: Pieces that Python's grammar has something to say about, so that the soup gets past the first character.
PIECES = [
    *["linear", "add", "maybe", "dropout", "q", "k", "_", "x", "foo", "(", "(", ")", ")", ",", ", ", "=", "==", ":="],
    *["*", "**", ".", ":", ";", "[", "]", "{", "}", "'", '"', "\\", "#", "@", "-", "~", "!", "$", "?", "`", "1", "1e9"],
    *["lambda", "if", "else", "for", "in", "not", "await", "yield", "None", "True", "f'{", "}'", " ", "\n", "\t", "\0"],
    *["é", "𠮷", "😀", "\r\n", "1is", "0xf", "or", "\\d", "----", "**z"],
]


def attempt(text: str) -> Pattern | RuleFileError:
    try:
        return parse_pattern(text)
    except RuleFileError as error:
        return error


@PROPERTY
@given(text=st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_a_soup_of_pieces_is_a_pattern_or_is_refused_within_the_text(text: str) -> None:
    result = attempt(text)
    if isinstance(result, Pattern):
        assert set(result.operators) <= OPERATORS
    else:
        assert result.line is None
        assert result.column is not None
        assert 1 <= result.column <= len(text) + 1


@PROPERTY
@given(
    text=st.text(max_size=200) | st.text(alphabet="()-~", max_size=600) | st.text(alphabet="\0\ud800é(", max_size=40)
)
def test_any_text_is_refused_in_the_same_way(text: str) -> None:
    with pytest.raises(RuleFileError):  # no operator's name comes out of these alphabets by chance
        parse_pattern(text)


# -- good patterns ---------------------------------------------------------------------------------------------------

SHIPPED = [
    pytest.param("linear(x, w)", Pattern(("linear",), (Operand(capture="x"), Operand(capture="w"))), id="bare"),
    pytest.param(
        "matmul(a=maybe(dropout)(softmax(_)), v)",
        Pattern(
            ("matmul",),
            (
                Operand(
                    Pattern(("dropout",), (Operand(Pattern(("softmax",), (ANYTHING,))),), optional=True), capture="a"
                ),
                Operand(capture="v"),
            ),
        ),
        id="named-then-bare",
    ),
    pytest.param(
        "matmul(q, k=transpose(_))",
        Pattern(("matmul",), (Operand(capture="q"), Operand(Pattern(("transpose",), (ANYTHING,)), "k"))),
        id="bare-then-named",
    ),
    pytest.param(
        "where(a, b=gelu(_), c)",
        Pattern(("where",), (Operand(capture="a"), Operand(Pattern(("gelu",), (ANYTHING,)), "b"), Operand(None, "c"))),
        id="named-between-bare",
    ),
    pytest.param(
        "where(a=gelu(_), _, c=relu(d), e)",
        Pattern(
            ("where",),
            (
                Operand(Pattern(("gelu",), (ANYTHING,)), "a"),
                ANYTHING,
                Operand(Pattern(("relu",), (Operand(capture="d"),)), "c"),
                Operand(capture="e"),
            ),
        ),
        id="two-named-two-bare",
    ),
    pytest.param(
        "gather(matmul(content, position=transpose(_)))",
        Pattern(
            ("gather",),
            (
                Operand(
                    Pattern(
                        ("matmul",),
                        (Operand(capture="content"), Operand(Pattern(("transpose",), (ANYTHING,)), "position")),
                    )
                ),
            ),
        ),
        id="unnamed-operator-inside",
    ),
    pytest.param(
        "add(maybe(mul, div)(_), y)",
        Pattern(("add",), (Operand(Pattern(("mul", "div"), (ANYTHING,), optional=True)), Operand(capture="y"))),
        id="maybe-one-of-two",
    ),
    pytest.param(
        "add(maybe(dropout)(maybe(mul)(linear(x))))",
        Pattern(
            ("add",),
            (
                Operand(
                    Pattern(
                        ("dropout",),
                        (
                            Operand(
                                Pattern(
                                    ("mul",), (Operand(Pattern(("linear",), (Operand(capture="x"),))),), optional=True
                                )
                            ),
                        ),
                        optional=True,
                    )
                ),
            ),
        ),
        id="maybe-in-maybe",
    ),
    pytest.param("softmax()", Pattern(("softmax",)), id="operands-left-out"),
    pytest.param("cat(_, _)", Pattern(("cat",), (ANYTHING, ANYTHING)), id="anything-twice"),
]


@pytest.mark.parametrize(("text", "tree"), SHIPPED)
def test_reads_as(text: str, tree: Pattern) -> None:
    assert parse_pattern(text) == tree
    assert str(tree) == text


@pytest.mark.parametrize(
    ("text", "captures"),
    [
        pytest.param("linear(_)", (), id="none"),
        pytest.param("linear(x, w)", ("x", "w"), id="bare"),
        pytest.param("add(local=linear(x), residual)", ("local", "x", "residual"), id="outer-before-inner"),
        pytest.param("add(b=maybe(dropout)(linear(a)), c)", ("b", "a", "c"), id="through-maybe"),
    ],
)
def test_captures(text: str, captures: tuple[str, ...]) -> None:
    assert parse_pattern(text).captures() == captures


def test_named_anything_is_the_bare_name() -> None:
    assert parse_pattern("add(a=_, b)") == parse_pattern("add(a, b)")


def test_the_longest_text_has_500_characters() -> None:
    assert parse_pattern("linear(x)" + " " * 491) == parse_pattern("linear(x)")
    with pytest.raises(RuleFileError, match=r"has 501 characters.*at most 500"):
        parse_pattern("linear(x)" + " " * 492)


def test_patterns_are_frozen_and_hashable() -> None:
    pattern = parse_pattern("add(a=linear(_), b)")
    assert {pattern: 1}[parse_pattern("add(a = linear(_), b)")] == 1
    with pytest.raises(FrozenInstanceError):
        pattern.optional = True  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        pattern.operands[0].capture = "c"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("wanted", "found", "fits"),
    [
        pytest.param("linear", "linear", True, id="itself"),
        pytest.param("linear", "matmul", False, id="another"),
        pytest.param("activation", "gelu", True, id="member-of-activation"),
        pytest.param("activation", "activation", True, id="activation-itself"),
        pytest.param("activation", "softmax", False, id="softmax-is-no-activation"),
        # The group is not a member of itself the other way round: a pattern that asks for gelu must not get a silu.
        pytest.param("gelu", "activation", False, id="group-for-member"),
        pytest.param("gelu", "silu", False, id="member-for-member"),
    ],
)
def test_operator_fits(wanted: str, found: str, fits: bool) -> None:
    assert operator_fits(wanted, found) is fits


def test_every_group_is_made_of_operators() -> None:
    assert ACTIVATIONS < OPERATORS
    assert LAYOUT < OPERATORS
    assert COMMUTATIVE < OPERATORS
    # A layout operator is looked through, so it must not also be one that patterns are about.
    assert not LAYOUT & (ACTIVATIONS | COMMUTATIVE | {"linear", "matmul", "transpose", "softmax"})


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_every_operator_can_be_written(operator: str) -> None:
    assert parse_pattern(f"{operator}(x)") == Pattern((operator,), (Operand(capture="x"),))


# -- bad patterns ----------------------------------------------------------------------------------------------------

#: ``^`` marks the place that the error must name; it is taken out before the text is read.
BAD = [
    # What is not an operator with operands.
    pytest.param("^", "pattern syntax", "write for example", id="empty"),
    pytest.param("^linear", "found 'linear' where an operator is wanted", r"for example linear\(x, w\)", id="no-call"),
    pytest.param("^_", "found '_' where an operator is wanted", "with its operands", id="only-anything"),
    pytest.param("^[linear(x)]", r"found '\[linear\(x\)\]' where an operator", "with its operands", id="list"),
    pytest.param("^linear(x) + linear(y)", r"found 'linear\(x\) \+ linear\(y\)'", "with its operands", id="sum"),
    pytest.param("^lambda: x", "found 'lambda: x' where an operator", "with its operands", id="lambda"),
    pytest.param("linear(x, ^1)", "found '1' where an operator", "with its operands", id="number-operand"),
    pytest.param("linear(x, ^'w')", "found ''w'' where an operator", "with its operands", id="string-operand"),
    pytest.param("linear(^None, w)", "found 'None' where an operator", "with its operands", id="none-operand"),
    pytest.param("linear(x, ^w.T)", r"found 'w\.T' where an operator", "with its operands", id="attribute-operand"),
    pytest.param("linear(x, ^*w)", r"found '\*w' where an operator", "with its operands", id="star-operand"),
    pytest.param("linear(x, **^w)", r"^found \*\* in the pattern", "write each operand", id="double-star-operand"),
    # Too deep to be printed back: the place is named all the same.
    pytest.param("^" + "-" * 490 + "x", r"^found '\.\.\.' where an operator", "with its operands", id="490-signs"),
    pytest.param(
        "linear(x, k=^" + "-" * 480 + "x)", r"^found '\.\.\.' where an operator", "with its operands", id="signs-inside"
    ),
    pytest.param(
        "add(maybe(^" + "-" * 480 + "x)(_), y)", r"^found '\.\.\.' inside maybe", "operator names", id="signs-in-maybe"
    ),
    pytest.param("linear(^x if y else z)", "found 'x if y else z' where", "with its operands", id="conditional"),
    pytest.param("add(a=_, ^b[0])", r"found 'b\[0\]' where an operator", "with its operands", id="index-after-named"),
    # Operators.
    pytest.param("^foo(x)", "unknown operator 'foo'", "known: .*linear.*", id="unknown-operator"),
    pytest.param("linear(x, ^foo(w))", "unknown operator 'foo'", "known: ", id="unknown-operator-inside"),
    pytest.param("add(a=_, b=_, ^foo(x))", "unknown operator 'foo'", "known: ", id="unknown-operator-after-named"),
    pytest.param("add(a=gelu(b=_), c=^foo(x))", "unknown operator 'foo'", "known: ", id="unknown-operator-named"),
    pytest.param("^Linear(x)", "unknown operator 'Linear'", "known: ", id="capital-letter"),
    pytest.param("^_(x)", "unknown operator '_'", "known: ", id="anything-as-operator"),
    pytest.param("^torch.matmul(a, b)", r"found 'torch\.matmul' as an operator", "write its plain name", id="dotted"),
    pytest.param("add(x, ^ops[0](y))", r"found 'ops\[0\]' as an operator", "write its plain name", id="indexed"),
    pytest.param("^linear(x)(y)", r"only maybe\(\.\.\.\) may be called twice", r"maybe\(dropout\)\(x\)", id="twice"),
    pytest.param("add(q, ^linear(x)(y))", "may be called twice", r"maybe\(dropout\)\(x\)", id="twice-inside"),
    # Nothing is evaluated: these are only text.
    pytest.param("^__import__('os')(x)", "may be called twice", "write maybe", id="import"),
    pytest.param("^__import__('os').system('true')", "as an operator", "write its plain name", id="import-system"),
    pytest.param("linear(x, ^exec('1/0'))", "unknown operator 'exec'", "known: ", id="exec"),
    # maybe
    pytest.param("^maybe(dropout)", r"maybe\(\.\.\.\) has no operand", r"maybe\(dropout\)\(x\)", id="maybe-once"),
    pytest.param("add(x, ^maybe(dropout))", "has no operand", r"maybe\(dropout\)\(x\)", id="maybe-once-inside"),
    pytest.param(
        "^maybe(dropout)(_)", "outermost operator .* cannot be optional", "around maybe", id="maybe-outermost"
    ),
    pytest.param("add(^maybe()(_), x)", "names no operator", r"maybe\(dropout\)\(x\)", id="maybe-of-nothing"),
    pytest.param("add(^maybe(mul)(), x)", "takes one operand, found 0", "write maybe", id="maybe-no-operand"),
    pytest.param("add(^maybe(mul)(_, _), x)", "takes one operand, found 2", "write maybe", id="maybe-two-operands"),
    pytest.param("add(maybe(^foo)(_), x)", "unknown operator 'foo'", "known: ", id="maybe-unknown-operator"),
    pytest.param("add(maybe(mul, ^foo)(_), x)", "unknown operator 'foo'", "known: ", id="maybe-second-unknown"),
    pytest.param("add(maybe(^'mul')(_), x)", r"found ''mul'' inside maybe", "operator names", id="maybe-string"),
    pytest.param("add(maybe(^mul(_))(_), x)", r"found 'mul\(_\)' inside maybe", "operator names", id="maybe-call"),
    pytest.param("add(maybe(^*mul)(_), x)", r"found '\*mul' inside maybe", "operator names", id="maybe-star"),
    pytest.param(
        "add(maybe(dropout, **^z)(_), y)", r"^found \*\* in the pattern", "write operator names", id="maybe-double-star"
    ),
    pytest.param(
        "add(maybe(**^z)(_), y)", r"^found \*\* in the pattern", "write operator names", id="maybe-only-double-star"
    ),
    pytest.param(
        "add(maybe(dropout)(**^z), y)", r"^found \*\* in the pattern", "each operand", id="maybe-double-star-operand"
    ),
    pytest.param("add(^maybe(mul)(q), x)", "a capture directly inside", r"name=maybe\(dropout\)\(_\)", id="maybe-bare"),
    pytest.param(
        "add(^maybe(mul)(q=gelu(_)), x)", "a capture directly inside", "capture the operand", id="maybe-named"
    ),
    # captures
    pytest.param("linear(^gelu)", "'gelu' is an operator, here used as a capture", "write another name", id="operator"),
    pytest.param("add(^linear=_, b)", "'linear' is an operator, here used", "write another name", id="named-operator"),
    pytest.param("add(a, ^gelu=relu(_))", "'gelu' is an operator, here used", "another name", id="named-as-another"),
    # Written, '_' would read back as 'anything' and 'maybe' as the beginning of maybe(...).
    pytest.param("add(^_=_, b)", "^'_' is no name in the pattern", "another name", id="named-anything"),
    pytest.param(
        "add(^_=linear(_), b)", "^'_' is no name in the pattern", "another name", id="operator-named-anything"
    ),
    pytest.param("add(^maybe, b)", "^'maybe' is .* here used as a capture", "another name", id="maybe-bare-word"),
    pytest.param("add(^maybe=_, b)", "^'maybe' is .* here used as a capture", "another name", id="named-maybe"),
    pytest.param("add(^maybe=gelu(_))", "^'maybe' is .* here used as a capture", "another", id="operator-named-maybe"),
    pytest.param("linear(a=^b)", "'a=b' names one operand twice", "write a alone", id="two-names"),
    pytest.param("linear(a=^gelu)", "'a=gelu' names one operand twice", "write a alone", id="name-and-operator"),
    pytest.param("linear(a=(^b=gelu(_)))", "where an operator is wanted", "with its operands", id="name-in-brackets"),
    # The second x is meant, but a name has no place in the tree: the error is about the pattern as a whole.
    pytest.param("^linear(x, x)", "'x' is captured twice", "each capture name once", id="captured-twice"),
    pytest.param("^add(x=gelu(_), relu(x))", "'x' is captured twice", "each capture name once", id="captured-deep"),
    # Columns count characters, whatever number of bytes they take.
    pytest.param("linear(é, ^foo(x))", "unknown operator 'foo'", "known: ", id="after-two-bytes"),
    pytest.param("linear(𠮷, ^foo(x))", "unknown operator 'foo'", "known: ", id="after-four-bytes"),
    pytest.param("where(é=_, ü=_, ^foo(x))", "unknown operator 'foo'", "known: ", id="after-two-bytes-named"),
    pytest.param("where(a=_, é, b=^foo(x))", "unknown operator 'foo'", "known: ", id="two-bytes-between-named"),
    pytest.param("linear(^'é', x)", "found ''é'' where an operator", "with its operands", id="two-bytes-themselves"),
    pytest.param("linear(é, **^w)", r"found \*\* in the pattern", "each operand", id="double-star-after-two-bytes"),
    pytest.param("linear(é, x)^)", "pattern syntax: unmatched", "write for example", id="unmatched-after-two-bytes"),
    pytest.param("add(é=_, b=_, c^]", "pattern syntax: .*not match", "write for example", id="wrong-after-two-bytes"),
    pytest.param("linear(𠮷, ^😀)", "pattern syntax: invalid character '😀'", "write for example", id="four-bytes"),
    # A line break is a blank, so that columns go on counting: a line feed is one character, CR LF are two.
    pytest.param("linear(x,\n ^foo(w))", "unknown operator 'foo'", "known: ", id="second-line"),
    pytest.param("linear(x,\r\n ^foo(w))", "unknown operator 'foo'", "known: ", id="second-line-cr-lf"),
    pytest.param("where(é=_,\n\tü,\n ^foo(w))", "unknown operator 'foo'", "known: ", id="third-line"),
    pytest.param("linear(x)\n^)", "pattern syntax: unmatched", "write for example", id="unmatched-on-the-second-line"),
    pytest.param("linear^(x\n", "pattern syntax: .*never closed", "write for example", id="never-closed-lines"),
    # Python's own syntax errors; the wording is Python's.
    pytest.param("linear^(x", "pattern syntax: .*never closed", "write for example", id="never-closed"),
    pytest.param("linear(x)^)", "pattern syntax: unmatched", "write for example", id="unmatched-bracket"),
    pytest.param("linear(a=gelu(_), b=_)^)", "pattern syntax: unmatched", "write for example", id="unmatched-named"),
    pytest.param("linear(x^]", "pattern syntax: .*does not match", "write for example", id="wrong-bracket"),
    pytest.param("linear(^, x)", "pattern syntax", "write for example", id="comma-first"),
    pytest.param("linear(^$)", "pattern syntax", "write for example", id="dollar"),
    pytest.param("linear(x)^; linear(y)", "pattern syntax", "write for example", id="two-statements"),
    pytest.param("linear(x^\N{NO-BREAK SPACE})", "pattern syntax", "write for example", id="no-break-space"),
    pytest.param("^linear(\0)", "pattern syntax: .*null", r"linear", id="nul"),
    pytest.param("^linear(\ud800)", "pattern syntax: .*surrogate", "write for example", id="lone-surrogate"),
    pytest.param("^" + "linear(" * 100, "the pattern has 700 characters", "at most 500", id="too-long"),
]


@pytest.mark.parametrize(("marked", "found", "fix"), BAD)
def test_refused_at(marked: str, found: str, fix: str) -> None:
    text, column = marked.replace("^", "", 1), marked.index("^") + 1
    with pytest.raises(RuleFileError) as caught:
        parse_pattern(text)
    error = caught.value
    assert (error.path, error.line, error.column) == (None, None, column)
    assert re.search(found, error.found)
    assert re.search(fix, error.fix)
    # The pattern itself is quoted, but never at a length that hides the message.
    assert f"in the pattern '{text[:80]}'" in error.found
    assert len(error.found) < 300


PATHOLOGICAL = [
    pytest.param("(" * 100_000, id="100k-open"),
    pytest.param("(" * 50_000 + ")" * 50_000, id="50k-pairs"),
    pytest.param("linear(" * 20_000 + "x" + ")" * 20_000, id="20k-calls"),
    pytest.param("(" * 249 + "x" + ")" * 249, id="249-pairs"),
    pytest.param("[" * 499, id="499-lists"),
    pytest.param("linear(" * 71, id="71-open-calls"),
    pytest.param("maybe(add)(" * 45, id="45-open-maybes"),
    pytest.param("f" + "()" * 249, id="249-calls-in-a-row"),
    pytest.param("lambda:" * 71 + "x", id="71-lambdas"),
    pytest.param("-" * 490 + "x", id="490-signs"),
    pytest.param("not " * 120 + "x", id="120-nots"),
    pytest.param("x" + "[0]" * 160, id="160-indices"),
    pytest.param("x" + ".y" * 240, id="240-attributes"),
    pytest.param("1" + "+1" * 249, id="249-sums"),
    pytest.param("1" + "**1" * 166, id="166-powers"),
    pytest.param("linear(" + "9" * 490 + ")", id="huge-integer"),
    pytest.param("linear(" + "f'{" * 160 + ")", id="f-strings-in-f-strings"),
    pytest.param("linear(f'{" + 'f"{' * 100 + "x" + '}"' * 100 + "}')", id="f-strings-that-end"),
    pytest.param("linear(" + "x if y else " * 40 + "z)", id="40-conditionals"),
    pytest.param("linear(" + "x:=" * 160 + "x)", id="160-walruses"),
    pytest.param("linear(" + "x=" * 240 + "x)", id="240-names"),
    pytest.param("linear(" + "a<" * 240 + "a)", id="240-comparisons"),
    pytest.param("linear(" + "a or " * 95 + "a)", id="95-ors"),
    pytest.param("linear(" + "{**" * 160 + "x", id="160-double-stars"),
    pytest.param("linear(" + "\\" * 400 + ")", id="400-backslashes"),
    pytest.param("linear(\0)", id="nul"),
    pytest.param("linear(" + "\ud83d\ude00" * 100 + ")", id="surrogates"),
    pytest.param("linear('" + "\\'" * 245, id="string-that-does-not-end"),
    pytest.param("[" * 250 + "]" * 250, id="250-lists"),
    pytest.param("neg(" * 65 + "x" + ")" * 65, id="65-calls"),
    pytest.param("add(x," * 80, id="80-open-operands"),
]


def read_at_depth(text: str, left: int) -> Pattern | str:
    """The pattern, or why it is none, read where only ``left`` more calls fit on the stack."""

    def descend(levels: int) -> Pattern | str:
        if levels:
            return descend(levels - 1)
        result = attempt(text)
        return result if isinstance(result, Pattern) else str(result)

    return descend(sys.getrecursionlimit() - depth_now() - left)


def depth_now() -> int:
    frame, depth = sys._getframe(), 0
    while frame.f_back is not None:
        frame, depth = frame.f_back, depth + 1
    return depth


@pytest.mark.parametrize("left", [150, 60])
@pytest.mark.parametrize(
    "text",
    [
        *PATHOLOGICAL,
        *(pytest.param(param.values[0].replace("^", "", 1), id=f"bad-{param.id}") for param in BAD),  # type: ignore[union-attr]
        *(pytest.param(param.values[0], id=param.id) for param in SHIPPED),
        pytest.param("linear(" * 62 + "x" + ")" * 62, id="62-calls"),
        pytest.param("neg(" * 64 + "x" + ")" * 64, id="64-calls"),
        pytest.param("a" * 500, id="500-letters"),
    ],
)
def test_the_verdict_does_not_depend_on_the_depth_of_the_stack(text: str, left: int) -> None:
    result = attempt(text)
    deep = read_at_depth(text, left)
    if isinstance(result, Pattern):
        # Two trees are compared by recursion, their texts are not.
        assert str(deep) == str(result)
        assert isinstance(deep, Pattern)
    else:
        assert deep == str(result)


def test_a_pattern_is_printed_wherever_the_stack_ends() -> None:
    pattern = parse_pattern("neg(" * 64 + "x" + ")" * 64)

    def descend(levels: int) -> tuple[str, tuple[str, ...]]:
        return descend(levels - 1) if levels else (str(pattern), pattern.captures())

    assert descend(sys.getrecursionlimit() - depth_now() - 40) == ("neg(" * 64 + "x" + ")" * 64, ("x",))


@pytest.mark.parametrize("text", PATHOLOGICAL)
def test_pathological_texts_are_refused(text: str) -> None:
    error = attempt(text)
    assert isinstance(error, RuleFileError)
    assert error.column is not None
    assert 1 <= error.column <= len(text) + 1
    assert str(error).isprintable()


def test_deep_calls_within_the_length_are_read() -> None:
    # 62 levels: what fits into 500 characters must not run into a recursion limit.
    text = "linear(" * 62 + "x" + ")" * 62
    pattern = parse_pattern(text)
    assert str(pattern) == text
    assert pattern.captures() == ("x",)


@pytest.mark.parametrize("filter_", ["always", "error"])
@pytest.mark.parametrize(
    ("text", "found"),
    [
        pytest.param(r"linear('\d')", r"found ''\d'' where an operator is wanted", id="escape"),
        pytest.param("linear(1is 2)", "found '1is 2' where an operator is wanted", id="number-before-is"),
        pytest.param("linear(0xfor x)", "found '0xfor x' where an operator is wanted", id="hexadecimal-before-or"),
    ],
)
def test_what_python_warns_about_is_refused_without_a_warning(text: str, found: str, filter_: Any) -> None:
    # Under "error" Python turns the warning into a SyntaxError: the message must not depend on the caller's filters.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(filter_)
        with pytest.raises(RuleFileError) as refused:
            parse_pattern(text)
    assert [str(warning.message) for warning in caught] == []
    assert refused.value.found == f"{found} in the pattern '{text}'"
    assert refused.value.column == 8


def test_a_pattern_may_stand_on_several_lines() -> None:
    assert parse_pattern("matmul(q,\r\n\tk=transpose(\n_\r)\n)\n") == parse_pattern("matmul(q, k=transpose(_))")


def test_captures_need_not_be_ascii() -> None:
    assert parse_pattern("add(größe=gelu(_), é)").captures() == ("größe", "é")


def test_names_that_only_look_like_a_reserved_one_are_captures() -> None:
    assert parse_pattern("add(__, maybe_=_)").captures() == ("__", "maybe_")


def test_the_error_is_the_packages_own() -> None:
    with pytest.raises(QdqSurgeryError) as caught:
        parse_pattern("linear(")
    # Python's SyntaxError says nothing more, so it is not chained.
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
