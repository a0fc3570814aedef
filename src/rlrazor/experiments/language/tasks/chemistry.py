r"""Chemical equations: read them, count atoms and charge, and say whether a balancing is right.

An equation is two sides joined by one of `= -> => \rightarrow` or an arrow, a side is terms joined by `+`, a term is a
positive whole coefficient (1 where there is none) and a formula. Formulas may have nested brackets, `()`, `[]`; water
of crystallisation after `*`, `·` or `.`; a state `(s)`, `(l)`, `(g)`, `(aq)`, which is ignored; subscripts as digits,
as Unicode or as `_2`; and a charge `{+}`, `{2-}`, `{+2}`, `^{2-}`, `^2-` or, at the end, a bare `+` or `-`.

Anything that looks like an element's symbol counts as one (the data have `Kl`). `Fe3+` without a caret reads as three
irons with charge +1, which is not what its writer meant.
"""

import re
from collections import Counter
from dataclasses import dataclass

Composition = Counter[str]  # atoms of each element, and the charge under "charge"

LONGEST = 1000  # characters of an equation; the longest reference has 94
DIGITS = 5  # of a coefficient or a subscript; the largest coefficient of a reference is 5776

_ARROW = re.compile(r"\\(?:long)?(?:left)?(?:right)?arrow|\\to\b|<?[-=]+>|[→⟶⇌⇒⟹↔]")
_DIGITS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_CHARGE = re.compile(r"\(?\{(?:(\d*)([+-])|([+-])(\d+))\}\)?")
_STATE = re.compile(r"\((?:s|l|g|aq|cr)?\)")
_TOKEN = re.compile(r"([A-Z][a-z]?)(\d*)|([(\[])|([)\]])(\d*)")


class NotAnEquation(ValueError):  # noqa: N818
    """The text cannot be read as a chemical equation."""


@dataclass(frozen=True)
class Equation:
    """The coefficient of each formula on either side; formulas are written without state symbols."""

    left: Counter[str]
    right: Counter[str]

    @property
    def species(self) -> tuple[frozenset[str], frozenset[str]]:
        """The formulas of either side, in no order."""
        return frozenset(self.left), frozenset(self.right)

    def balanced(self) -> bool:
        """Whether both sides have the same atoms and charge. Raises NotAnEquation for a formula that has no reading."""
        return _total(self.left) == _total(self.right)


def parse_equation(text: str) -> Equation:
    """Read one equation. Raises NotAnEquation."""
    if len(text) > LONGEST:
        raise NotAnEquation(f"longer than {LONGEST} characters")
    sides = _ARROW.sub("=", _plain(text)).split("=")
    if len(sides) != 2:
        raise NotAnEquation("not exactly two sides")
    return Equation(*(_side(side) for side in sides))


def composition(formula: str) -> Composition:
    """Atoms and charge of a formula such as `[Co(NH3)6]Cl3*2H2O` or `SO4{2-}`. Raises NotAnEquation."""
    charges = _CHARGE.findall(formula)
    if len(charges) > 1:
        raise NotAnEquation(f"more than one charge in {formula}")
    total: Composition = Counter()
    for part in re.split(r"[*·•.]", _CHARGE.sub("", formula)):
        match = re.match(r"\d*", part)
        leading = match.group() if match else ""
        for element, count in _atoms(part[len(leading) :]).items():
            total[element] += count * _number(leading)
    for size, sign, sign_first, size_last in charges:
        total["charge"] = _number(size or size_last) * (1 if (sign or sign_first) == "+" else -1)
    return total


def _plain(text: str) -> str:
    """One spelling for everything that has several."""
    text = re.sub(r"[⁰¹²³⁴-⁹]*[⁺⁻]", lambda found: "{" + found.group().translate(_SUPERSCRIPTS) + "}", text)
    text = text.translate(_DIGITS).replace("−", "-").replace("·", "*").replace("•", "*")
    text = re.sub(r"\\(?:ce|text|mathrm|,|;|\s)|[$`]|\*\*", "", text)
    text = re.sub(r"_\{?(\d+)\}?", r"\1", text)
    text = re.sub(r"\^\{?(\d*[+-]\d*)\}?", r"{\1}", text)
    # A bare charge: a sign that directly follows its formula and ends the term.
    text = re.sub(r"(?<=[A-Za-z\d)\]])([+-])(?=\s*\((?:s|l|g|aq)\)|\s+(?:\+|=|-+>|→)|\s*$)", r"{\1}", text)
    return text.strip().strip(".,;")


def _side(text: str) -> Counter[str]:
    terms: Counter[str] = Counter()
    for term in re.split(r"\+(?![\d]*\})", text):  # not the sign within a charge
        match = re.fullmatch(r"\s*(\d*)[\s*]*(.*?)\s*", term, re.DOTALL)
        coefficient, formula = match.groups() if match else ("", "")
        formula = "".join(_STATE.sub("", formula).split())
        if not formula or _number(coefficient) == 0:
            raise NotAnEquation("an empty term, or a coefficient of 0")
        terms[formula] += _number(coefficient)
    return terms


def _total(side: Counter[str]) -> Composition:
    total: Composition = Counter()
    for formula, coefficient in side.items():
        for element, count in composition(formula).items():
            total[element] += coefficient * count
    return Counter({element: count for element, count in total.items() if count})


def _atoms(formula: str) -> Composition:
    stack: list[Composition] = [Counter()]
    position = 0
    while position < len(formula):
        match = _TOKEN.match(formula, position)
        if match is None:
            raise NotAnEquation(f"cannot read {formula[position : position + 20]}")
        element, count, opened, closed, times = match.groups()
        if element:
            stack[-1][element] += _number(count)
        elif opened:
            stack.append(Counter())
        elif closed and len(stack) > 1:
            group = stack.pop()
            for inner, inner_count in group.items():
                stack[-1][inner] += inner_count * _number(times)
        else:
            raise NotAnEquation("a bracket is closed that was not opened")
        position = match.end()
    if len(stack) > 1 or not stack[0]:
        raise NotAnEquation("a bracket is not closed, or there is no element")
    return stack[0]


def _number(digits: str) -> int:
    if len(digits) > DIGITS:
        raise NotAnEquation("a number too large to be meant")
    return int(digits or 1)
