"""Verifiers on adversarial completions, and against what is known without them."""

import threading
from typing import Any

import pytest

from rlrazor.experiments.language.tasks import TASKS
from rlrazor.experiments.language.tasks.answers import declared_answer
from rlrazor.experiments.language.tasks.chemistry import NotAnEquation, composition, parse_equation
from rlrazor.experiments.language.tasks.letter_word import words
from rlrazor.experiments.language.tasks.math import verify_math
from rlrazor.experiments.language.tasks.science import verify_science
from rlrazor.experiments.language.tasks.tools import parse_calls, verify_tools

OPTIONS = {"A": "443.600", "B": "CC(=O)C", "C": "C1CCN(C1)", "D": "460.500"}
CHOICE: dict[str, Any] = {"kind": "choice", "reference": "B", "options": OPTIONS}
WATER: dict[str, Any] = {"kind": "equation", "reference": "2H2 + O2 = 2H2O"}
CALLS = {"calls": [{"Action": "search", "Action_Input": '{"query": "Death Note", "page": 1, "tag": ""}'}]}
COLUMNS: dict[str, dict[str, Any]] = {
    "math": {"reference": "42"},
    "gsm8k": {"reference": "42"},
    "math500": {"reference": "\\frac{1}{2}"},
    "science": CHOICE,
    "tools": CALLS,
    "letter-word": {"letter": "d"},
    "multiple": {"number": 7},
}

ADVERSARIAL = {
    "empty": "",
    "spaces": " \n\t ",
    "huge": "a" * 1_000_000,
    "huge lines": "answer is \n" * 100_000,
    "unicode": "答案是 ٤٢ 🧪 \u202e\u0000 ½ Ａ",
    "open boxes": "\\boxed{" * 150_000,
    "open braces": "Action: search\nAction Input: " + "{" * 1_000_000,
    "deep lists": "Action: search\nAction Input: " + "[" * 15_000,
    "spaces without end": "answer" + " " * 500_000 + "option" + " " * 500_000,
    "actions": "Action\t" * 150_000 + ("Action: x\n" * 1_000) + "\n" * 1_000,
    "arrows": "-=" * 500_000 + ">",
    "terms": "H+" * 400_000 + "=" + "(" * 400,
    "brackets": "(((((((((H" * 90 + "=" + "H)2" * 90,
    "nested powers": "The answer is $9^{9^{9^{9}}}$",
    "python powers": "\\boxed{9**9**9**9}",
    "large power": "\\boxed{7^{12345678}}",
    "power of a power": "\\boxed{(9999^{9999})^{9999}}",
    "powers in disguise": "\\boxed{9^{1+(9)\\cdot 9^{9^9}}}",
    "factorials": "\\boxed{99999!}",
    "digits": "\\boxed{" + "9" * 250 + "}",
    "nested fractions": "\\boxed{" + "\\frac{1}{" * 24 + "2" + "}" * 25,
    "unclosed reasoning": "<think> The answer is 42, B, 1/2, dinner.\nAction: search\nAction Input: {}",
}


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("completion", ADVERSARIAL.values(), ids=list(ADVERSARIAL))
def test_adversarial_completions_are_wrong_and_do_not_hang(name: str, completion: str) -> None:
    assert TASKS[name].verify("", completion, **COLUMNS[name]) == 0.0


@pytest.mark.parametrize("completion", ADVERSARIAL.values(), ids=list(ADVERSARIAL))
def test_adversarial_equations(completion: str) -> None:
    assert verify_science("", completion, **WATER) == 0.0


# --- the final answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{1} or rather \\boxed{\\frac{1}{2}} it is", "\\frac{1}{2}"),
        ("\\boxed{1}. The final answer is: 2\nDone.", "2"),
        ("Answer:\n\n 7 apples\n", "7 apples"),
        ("**Answer:** 7", "7"),
        ("2 + 2 = 4\n#### 4", "4"),
        ("\\boxed{1 + {2", ""),
        ("no mark, 42", None),
    ],
)
def test_declared_answer(text: str, answer: str | None) -> None:
    found = declared_answer(text)
    assert (found.strip("* ") if found else found) == answer


@pytest.mark.parametrize(
    ("completion", "reference", "right"),
    [
        ("\\boxed{42}", "42", 1),
        ("It is 6 * 7.\n42", "42", 1),
        ("6 * 7 = 42", "42", 1),
        ("The answer is 42 apples.", "42", 1),
        ("The final answer is $42.00$.", "42", 1),
        ("#### $1,234", "1234", 1),
        ("\\boxed{0.5}", "\\frac{1}{2}", 1),
        ("\\boxed{\\frac{2}{4}}", "\\frac{1}{2}", 1),
        ("\\boxed{(x+1)^2}", "x^2+2x+1", 1),
        ("\\boxed{y^{3}x^{2}}", "x^2y^3", 1),
        ("\\boxed{\\frac{x^2}{y^2}}", "(\\frac{x}{y})^2", 1),
        ("\\boxed{1 \\cdot e^{-x^2}}", "e^{-x^2}", 1),
        ("\\boxed{2^{10}}", "1024", 1),
        ("\\boxed{\\pi/2}", "\\frac{\\pi}{2}", 1),
        ("\\boxed{Evelyn}", "\\text{Evelyn}", 1),
        ("<think>\\boxed{1}</think>\n\\boxed{42}", "42", 1),
        # Hidden in the reasoning, taken back, hedged, or almost right.
        ("It could be \\boxed{42}. No: the answer is 43.", "42", 0),
        ("<think>\\boxed{42}</think> I do not know.", "42", 0),
        ("First \\boxed{42}, then \\boxed{43}", "42", 0),
        ("42\nI take it back.", "42", 0),
        ("The answer is 42 or 43.", "42", 0),
        ("The answer is 43 or 42.", "42", 0),
        ("\\boxed{42, 43}", "42", 0),
        ("\\boxed{42", "42", 0),
        ("\\boxed{-42}", "42", 0),
        ("\\boxed{420}", "42", 0),
        ("\\boxed{0.33}", "\\frac{1}{3}", 0),
    ],
)
def test_math(completion: str, reference: str, right: int) -> None:
    assert verify_math("", completion, reference=reference) == right


def test_math_in_a_thread() -> None:
    found: list[float] = []
    answer = "\\boxed{\\frac{3}{6}}"
    thread = threading.Thread(target=lambda: found.append(verify_math("", answer, reference="0.5")))
    thread.start()
    thread.join()
    assert found == [1.0]


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("B", 1),
        (" B.\n", 1),
        ("(B) CC(=O)C", 1),
        ("**B**", 1),
        ("The answer is B", 1),
        ("Counting A and C out, the correct answer is: (B).", 1),
        ("\\boxed{\\text{B}}", 1),
        ("B. CC(=O)C is right, because of the ring.", 1),
        ("A would be too light.\nB", 1),
        ("<think>A, surely. Answer: A</think>B", 1),
        ("A", 0),
        ("b", 0),
        ("A or B", 0),
        ("B or A", 0),
        ("A, B", 0),
        ("B, C", 0),
        ("ABCD", 0),
        ("A\nB\nC\nD", 0),
        ("The answer is B or C", 0),
        ("The answer is B and C", 0),
        ("The answer is B. No, the answer is A.", 0),
        ("B is tempting. The answer is A", 0),
        ("The answer is BC", 0),
        ("The answer is E", 0),
        ("Bromine, I think", 0),
    ],
)
def test_choices(completion: str, right: int) -> None:
    assert verify_science("", completion, **CHOICE) == right


def test_an_option_that_reads_like_a_letter() -> None:
    columns = {**CHOICE, "reference": "C"}
    assert verify_science("", "C. C1CCN(C1)", **columns) == 1
    assert verify_science("", "C1CCN(C1)", **columns) == 0


# --- atoms: counts by hand


@pytest.mark.parametrize(
    ("formula", "atoms"),
    [
        ("H2O", {"H": 2, "O": 1}),
        ("Ca3(PO4)2", {"Ca": 3, "P": 2, "O": 8}),
        ("K4[Fe(CN)6]", {"K": 4, "Fe": 1, "C": 6, "N": 6}),
        ("((CH3)2N)3P", {"C": 6, "H": 18, "N": 3, "P": 1}),
        ("CuSO4*5H2O", {"Cu": 1, "S": 1, "O": 9, "H": 10}),
        ("[(NH3)5Co(O2)Co(NH3)5](NO3)4*2H2O", {"N": 14, "H": 34, "Co": 2, "O": 16}),
        ("SO4{2-}", {"S": 1, "O": 4, "charge": -2}),
        ("Mg{+2}", {"Mg": 1, "charge": 2}),
        ("I({-})", {"I": 1, "charge": -1}),
        ("Cl3Sb", {"Cl": 3, "Sb": 1}),
    ],
)
def test_composition_by_hand(formula: str, atoms: dict[str, int]) -> None:
    assert composition(formula) == atoms


@pytest.mark.parametrize("formula", ["", "h2o", "H2)O", "(H2O", "H-O", "()", "2", "H2O{+}{-}", "H999999"])
def test_what_is_no_formula(formula: str) -> None:
    with pytest.raises(NotAnEquation):
        composition(formula)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("2H2 + O2 = 2H2O", 1),
        ("2 H2 + O2 -> 2 H2O", 1),
        ("2H₂ + O₂ → 2H₂O", 1),
        ("$2H_2 + O_{2} \\rightarrow 2H_2O$", 1),
        ("O2(g)+2H2(g)=2H2O(l)", 1),
        ("4H2 + 2O2 = 4H2O", 1),
        ("H2 + O2 + H2 = 2H2O", 1),
        ("The balanced equation is: 2H2 + O2 = 2H2O.", 1),
        ("\\boxed{2H2 + O2 = 2H2O}", 1),
        ("H2 + O2 = H2O\nSo, balanced:\n2H2 + O2 = 2H2O\nwhich is right.", 1),
        ("H2 + O2 = H2O", 0),
        ("2H2 + O2 = 2H2O\nor rather\nH2 + O2 = H2O", 0),
        ("2H2 + O2 = 2H2O = 2H2O", 0),
        ("2H2O = 2H2 + O2", 0),
        ("H2 + O2 = H2O2", 0),
        ("0H2 + 0O2 = 0H2O", 0),
        ("-2H2 - O2 = -2H2O", 0),
        ("H2 + 1/2 O2 = H2O", 0),
        ("H2 + 0.5O2 = H2O", 0),
        ("4H + O2 = 2H2O", 0),
        ("2H2 + O2 + N2 = 2H2O + N2", 0),
        ("2, 1, 2", 0),
    ],
)
def test_equations(completion: str, right: int) -> None:
    assert verify_science("", completion, **WATER) == right


def test_charge_has_to_balance_and_may_be_written_in_several_ways() -> None:
    columns: dict[str, Any] = {"kind": "equation", "reference": "Al + 3Fe{3+} = Al{3+} + 3Fe{2+}"}
    assert verify_science("", "Al + 3Fe^{3+} -> Al^{3+} + 3Fe^{2+}", **columns) == 1
    assert verify_science("", "Al + 3Fe³⁺ = Al³⁺ + 3Fe²⁺", **columns) == 1
    assert verify_science("", "2Al + 6Fe{+3} = 2Al{+3} + 6Fe{+2}", **columns) == 0  # these are other names
    assert verify_science("", "Al + Fe{3+} = Al{3+} + Fe{2+}", **columns) == 0  # atoms balance, charge does not
    silver: dict[str, Any] = {"kind": "equation", "reference": "Ag{+} + Cl{-} = AgCl"}
    assert verify_science("", "Ag+ + Cl- -> AgCl", **silver) == 1
    assert verify_science("", "Ag+(aq) + Cl-(aq) = AgCl(s)", **silver) == 1


def test_a_reference_that_cannot_be_read_is_an_error_not_a_wrong_answer() -> None:
    with pytest.raises(NotAnEquation):
        verify_science("", "2H2 + O2 = 2H2O", kind="equation", reference="water")


def test_an_equation_is_read_once_per_species() -> None:
    equation = parse_equation("H2 + H2 + O2(g) = 2 H2O")
    assert equation.left == {"H2": 2, "O2": 1}
    assert equation.right == {"H2O": 2}
    assert equation.balanced()


# --- calls


def call(arguments: str, name: str = "search") -> str:
    return f"Action: {name}\nAction Input: {arguments}"


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (call('{"query": "Death Note", "page": 1}'), 1),
        (call('{"page": "1", "query": "death  note"}'), 1),
        (call('{"page": 1.0, "query": "Death Note", "tag": null, "filters": {}}'), 1),
        (call('{"query": "Death Note",\n "page": 1}', "SEARCH"), 1),
        (call('```json\n{"query": "Death Note", "page": 1}\n```'), 1),
        (call('{"query": "Death Note", "page": 1}\nThat is all.'), 1),
        ("Thought: I search.\n" + call('{"query": "Death Note", "page": 1}') + "\nObservation: found", 1),
        ('Action 1: search\nAction 1 Input: {"query": "Death Note", "page": 1}', 1),
        ("<think>" + call("{}") + "</think>\n" + call('{"query": "Death Note", "page": 1}'), 1),
        (call('{"query": "Death Note", "page": 2}'), 0),
        (call('{"query": "Death Note"}'), 0),
        (call('{"query": "Death Note", "page": 1, "limit": 3}'), 0),
        (call('{"query": "Death Note", "page": 1}', "find"), 0),
        (call('{"query": "Death Note", "page": 1'), 0),
        (call('["Death Note", 1]'), 0),
        (call('{"query": ${any}, "page": 1}'), 0),
        (call('{"query": "<left open>", "page": 1}'), 0),
        ("<think>" + call('{"query": "Death Note", "page": 1}') + "</think>\nI do not know.", 0),
        (call('{"query": "Death Note", "page": 1}') + "\n" + call('{"query": "Death Note", "page": 1}'), 0),
        (call('{"query": "Death Note", "page": 1}') + "\n" + call("{}", "other"), 0),
        ('search({"query": "Death Note", "page": 1})', 0),
    ],
)
def test_calls(completion: str, right: int) -> None:
    assert verify_tools("", completion, **CALLS) == right


def test_calls_are_read_in_order() -> None:
    assert parse_calls(call('{"A": "X"}') + "\n\n" + call("{}", "`other`")) == [("search", {"a": "x"}), ("other", {})]


def test_what_a_reference_leaves_open_matches_anything() -> None:
    calls = [
        {"Action": "search", "Action_Input": '{"query": "x"}'},
        {"Action": "details", "Action_Input": '{"id": ${id from search}, "since": "{start date}"}'},
        {"Action": "getDetails", "Action_Input": '{"Question": "Which one?"}'},
        {"Action": "[Optional]update", "Action_Input": "{}"},
    ]
    ask, search = call('{"question": "May I?"}', "getDetails"), call('{"query": "x"}')
    details = call('{"id": 7, "since": "May"}', "details")
    assert verify_tools("", f"{ask}\n{details}\n{search}", calls=calls) == 1
    assert verify_tools("", f"{search}\n{details}\n{ask}\n{call('{}', 'update')}", calls=calls) == 1
    assert verify_tools("", f"{search}\n{details}\n{ask}\n{call('{}', 'delete')}", calls=calls) == 0
    assert verify_tools("", f"{search}\n{details}\n{call('{}', 'update')}", calls=calls) == 0
    assert verify_tools("", f"{search}\n{ask}\n" + call('{"id": 7}', "details"), calls=calls) == 0


def test_open_and_closed_references_find_their_own_calls() -> None:
    """The call with a fixed argument must not be spent on the reference that would take any."""
    calls = [{"Action": "get", "Action_Input": text} for text in ('{"id": ${id}}', '{"id": 1}', '{"id": 2}')]
    made = [call(f'{{"id": {number}}}', "get") for number in (1, 2, 9)]
    assert verify_tools("", "\n".join(made), calls=calls) == 1
    assert verify_tools("", "\n".join([made[0], made[2], made[2]]), calls=calls) == 0


# --- words


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (" dinner", 1),
        ("Dog", 1),
        ("d", 0),
        (" cat", 0),
        (" dinner dog", 0),
        ("dinner.", 0),
        ("dxyz", 0),
        (" ḋinner", 0),
        ("dinner\u200b", 0),
    ],
)
def test_letter_word(completion: str, right: int) -> None:
    assert TASKS["letter-word"].verify("", completion, letter="d") == right


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        *((f" {7 * factor}", 1) for factor in range(2, 13)),
        ("14 ", 1),
        (" 7", 0),
        (" 91", 0),
        (" 27720", 0),
        (" 15", 0),
        (" 014", 0),
        (" +14", 0),
        (" 14.", 0),
        (" 14 21", 0),
        (" 1_4", 0),
        (" ١٤", 0),
        (" fourteen", 0),
    ],
)
def test_multiple(completion: str, right: int) -> None:
    assert TASKS["multiple"].verify("", completion, number=7) == right


def test_the_word_list() -> None:
    listed = [word for same_letter in words().values() for word in same_letter]
    assert len(listed) == len(set(listed)) == 8369
    assert all(word.isascii() and word.isalpha() and word.islower() and len(word) > 1 for word in listed)
    assert min(len(same_letter) for same_letter in words().values()) == len(words()["x"]) == 15
