"""Served models on loopback, in each dialect: KLs against brute force, and what is done with servers that misbehave."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlrazor.analysis.forecast import FORWARD, PROBE
from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.guard import compare_served as comparing
from rlrazor.guard import watch as watching
from rlrazor.guard.compare_served import compare_served
from rlrazor.guard.comparison import REVERSE, Pair
from rlrazor.guard.measured_on import MeasuredOn
from rlrazor.guard.served import Asking, between
from rlrazor.lm.kl import Sequences
from rlrazor.lm.probes import GenericText, ProbeSettings
from rlrazor.lm.served import client
from rlrazor.lm.served.known import estimate
from rlrazor.lm.served.local import LocalModel
from rlrazor.lm.served.model import opened
from standing_server import Standing, standing
from tiny_models import char_tokenizer, noisy, saved, tiny_llama

KINDS = ["vllm", "sglang", "llamacpp"]
TOKENIZER = char_tokenizer()
SETTINGS = ProbeSettings(max_new_tokens=4, chat=False, precision="float32")
ON = MeasuredOn(("ab1=", "cd2=", "xyz"), GenericText.of_base(samples=3, max_new_tokens=4), SETTINGS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    base = tiny_llama()
    saved(root / "base", base, TOKENIZER)
    saved(root / "tuned", noisy(base, 0.05), TOKENIZER)
    (root / "prompts.txt").write_text("ab1=\ncd2=\nxyz\n")
    return root


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(watching, "SETTLE", 0.1)
    monkeypatch.delenv(client.KEY, raising=False)


def models() -> dict[str, Any]:
    base = tiny_llama()
    return {"base": base, "tuned": noisy(base, 0.05)}


@torch.no_grad()
def exact(p: Any, q: Any, sequences: Sequences) -> np.ndarray[Any, Any]:
    """KL(p || q) at each token of the completions, over the whole vocabulary, in float64."""
    found = []
    for n, completion in enumerate(sequences.completions):
        before = sequences.before(n)
        ids = torch.tensor([[*before, *completion]])
        mine, yours = (one(input_ids=ids).logits[0].double().log_softmax(-1)[len(before) - 1 : -1] for one in (p, q))
        found.append((mine.exp() * (mine - yours)).sum(-1).numpy())
    return np.concatenate(found)


def drawn(model: Any, count: int, length: int = 5) -> Sequences:
    rng, prompts = torch.Generator().manual_seed(3), [[3], [5, 7], [9, 2, 4]]
    rows = [[] for _ in range(count)]  # type: list[list[int]]
    for n, row in enumerate(rows):
        while len(row) < length:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompts[n % 3], *row]])).logits[0, -1]
            row.append(int(torch.multinomial(logits.softmax(-1), 1, generator=rng)))
    return Sequences(prompts, rows, [n % 3 for n in range(count)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["served base", "served tuned", "both served"])
def test_all_tokens_told_are_the_exact_kl(kind: str, which: str) -> None:
    """With the whole vocabulary known there is nothing to estimate, whatever the dialect."""
    base, tuned = models().values()
    sequences = drawn(base, 4)
    with standing(Standing(models(), TOKENIZER, kind, most=44)) as server:
        if kind == "vllm":
            p_served, q_served = (opened(f"{server.url}#{name}", TOKENIZER, 44) for name in ("base", "tuned"))
        else:
            del server.models["tuned"]
            p_served = opened(server.url, TOKENIZER, 44)
            q_served = None
        p: Any = p_served if which != "served tuned" else LocalModel(base, "float32")
        with standing(Standing({"tuned": tuned}, TOKENIZER, kind, most=44)) as second:
            q_served = q_served or opened(second.url, TOKENIZER, 44)
            q: Any = q_served if which != "served base" else LocalModel(tuned, "float32")
            found = between(p, q, sequences)
    assert found.estimate.positions == pytest.approx(exact(base, tuned, sequences), abs=2e-5)
    assert found.bound.positions == pytest.approx(exact(base, tuned, sequences), abs=2e-3)
    assert max(found.unknown) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_few_tokens_told_are_a_bound_and_an_estimate(kind: str) -> None:
    base, tuned = models().values()
    sequences = drawn(base, 24)
    with standing(Standing({"tuned": tuned}, TOKENIZER, kind)) as server:
        found = between(LocalModel(base, "float32"), opened(server.url, TOKENIZER, 4), sequences)
    kl = exact(base, tuned, sequences)
    assert (found.bound.positions <= kl + 1e-6).all()
    assert found.bound.positions.sum() > 0.3 * kl.sum()
    apart = found.estimate.positions - kl
    assert abs(apart.mean()) < 3 * apart.std() / np.sqrt(len(apart))
    assert apart.std() > 0.01
    assert found.unknown[1] > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_ties_among_the_likeliest_leave_the_estimate_without_bias(kind: str) -> None:
    """By enumeration of every token that may follow: which tokens are told must not depend on that."""
    base, tuned = models().values()
    every = Sequences([[3]], [[token] for token in range(44)], [0] * 44)
    with standing(Standing({"tuned": tuned}, TOKENIZER, kind, grid=0.5)) as server:
        told = opened(server.url, TOKENIZER, 10).read(every)
        q = server.logps(tuned, [3])[-1].double().numpy()
    p = LocalModel(base, "float32").read(every)
    kth, further = np.sort(q)[::-1][9:11]
    assert kth == further  # a tie at the edge
    assert {frozenset(row) for row in told.ids.tolist()} == {frozenset(told.ids[0].tolist())}
    logps = p.drawn
    mean = (np.exp(logps) * estimate(p, told, np.arange(44))).sum()
    assert mean == pytest.approx((np.exp(logps) * (logps - q)).sum(), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("served", ["base", "tuned"])
def test_a_comparison_with_a_served_model(kind: str, served: str, folders: Path) -> None:
    every = models()
    with standing(Standing({served: every[served]}, TOKENIZER, kind, most=44)) as server:
        pair = {name: server.url if name == served else str(folders / name) for name in every}
        found = compare_served(Pair(pair["base"], pair["tuned"]), ON, Asking(44))
    assert found.kinds[served == "tuned"].lower() == kind
    for name, one in found.kl.items():
        assert one.gap == pytest.approx(0, abs=2e-2), name  # all tokens are told
        assert (one.estimate.per_completion.mean > 1e-3) or name == REVERSE
        assert one.estimate.n_prompts == 3
    assert [prompt.total for prompt in found.prompts] == sorted((p.total for p in found.prompts), reverse=True)
    assert np.mean([prompt.total for prompt in found.prompts]) == pytest.approx(
        found.kl[FORWARD].estimate.per_completion.mean, abs=1e-9
    )
    assert set(found.kl) == {FORWARD, PROBE, REVERSE}


@pytest.mark.parametrize("served", ["base", "tuned"])
def test_completions_end_where_either_model_ends_its_own(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server ends at one token alone, the model that is here at many more, as its generation_config.json says."""
    every, ends, seen = models(), {1, *range(5, 44)}, list[Sequences]()
    (here,) = set(every) - {served}
    every[here].generation_config.eos_token_id = sorted(ends)
    saved(tmp_path / "here", every[here], TOKENIZER)

    def between_seen(p: Any, q: Any, sequences: Sequences) -> Any:
        seen.append(sequences)
        return between(p, q, sequences)

    monkeypatch.setattr(comparing, "between", between_seen)
    with standing(Standing({served: every[served]}, TOKENIZER, most=44)) as server:
        pair = {here: str(tmp_path / "here"), served: server.url}
        compare_served(Pair(pair["base"], pair["tuned"]), replace(ON, generic=GenericText(prompts=("b=",))), Asking(44))
    rows = [completion for sequences in seen for completion in sequences.completions]
    assert len(rows) == 7
    assert all(ends.isdisjoint(row[:-1]) for row in rows)
    assert sum(row[-1] in ends for row in rows) > 3


# The command


@pytest.fixture
def razor(folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    """`razor compare BASE TUNED` with more options: the exit code, standard output, and standard error."""

    def call(base: str, tuned: str, *more: str) -> tuple[int, str, str]:
        capfd.readouterr()
        own = ["--prompts", str(folders / "prompts.txt"), "--max-new-tokens", "4", "--no-chat"]
        code = main(["compare", base, tuned, *own, "--out", str(tmp_path / "page.html"), *more])
        return (code, *capfd.readouterr())

    return call


def test_the_command_prints_the_estimate_and_the_bound(folders: Path, razor: Any, tmp_path: Path) -> None:
    (tmp_path / "generic.jsonl").write_text('{"prompt": "b="}\n{"prompt": "c"}\n')
    generic = ["--generic", str(tmp_path / "generic.jsonl")]
    clearly = [*generic, "--samples", "32"]  # of 3 prompts the interval is wide
    with standing(Standing(models(), TOKENIZER)) as server:
        tuned = f"{server.url}/v1#tuned"
        code, out, _ = razor(str(folders / "base"), tuned, "--json", "--fail-above-kl", "1e-9", *clearly)
        found = json.loads(out)
        assert code == found["exit_code"] == 1
        assert found["verdict"] == "above the limit"
        assert found["kinds"] == {"base": "here", "tuned": "Vllm"}
        assert found["gap"]["kl_forward"] == pytest.approx(
            found["kl"]["kl_forward"]["mean"] - found["at_least"]["kl_forward"]["mean"]
        )
        assert found["at_most"] == {"kl_forward": None, "kl_probe": None, "kl_reverse": None}
        assert found["top_k"] == 20
        assert 0 < found["not_told"]["kl_forward"][1] < 0.5
        code, out, _ = razor(str(folders / "base"), tuned, "--fail-above-kl", "1e6", *generic)
        assert code == 0
        assert "at least" in out
        assert "within the limit" in out.lower()
        page = (tmp_path / "page.html").read_text()
        assert "at least" in page
        assert tuned in page


def test_both_served_needs_a_tokenizer(folders: Path, razor: Any, tmp_path: Path) -> None:
    (tmp_path / "generic.jsonl").write_text('{"prompt": "b="}\n')
    with standing(Standing(models(), TOKENIZER)) as server:
        both = f"{server.url}#base", f"{server.url}#tuned"
        code, _, said = razor(*both)
        assert code == 2
        assert "--tokenizer" in said
        code, out, said = razor(
            *both, "--tokenizer", str(folders / "base"), "--json", "--generic", str(tmp_path / "generic.jsonl")
        )
    assert code == 0, said
    assert json.loads(out)["kinds"] == {"base": "Vllm", "tuned": "Vllm"}


def test_a_key_is_sent_and_never_shown(
    folders: Path, razor: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    generic = tmp_path / "generic.jsonl"
    generic.write_text('{"prompt": "b="}\n')
    command = [str(folders / "base"), "", "--generic", str(generic)]
    with standing(Standing(models(), TOKENIZER, key="sk-secret-7")) as server:
        command[1] = f"{server.url}#tuned"
        code, out, said = razor(*command)
        assert (code, out) == (2, "")
        assert f"wants a key (401): put it into the environment as {client.KEY}" in said
        monkeypatch.setenv(client.KEY, "sk-wrong-1")
        code, _, said = razor(*command)
        assert code == 2
        assert "does not take the key" in said
        assert "sk-wrong-1" not in said
        monkeypatch.setenv(client.KEY, "sk-secret-7")
        code, out, said = razor(*command, "--json")
        assert code == 0
        assert "sk-secret-7" not in out + said + (tmp_path / "page.html").read_text()
        assert all("sk-secret-7" not in json.dumps([path, body]) for path, body, _ in server.seen)
        monkeypatch.setenv(client.KEY, "sk\nX: y")
        assert "no key has" in razor(*command)[2]
        monkeypatch.setenv(client.KEY, "sk-secret-7")
        server.fault = lambda path, body: (400, {"error": "bad sk-secret-7 \x1b[31m<b>[/x]"})
        said = razor(*command)[2]
    assert "bad *** \\x1b[31m<b>[/x]" in said


Fault = tuple[str, Any, str]
LOGITS = {"logprob": 3.0, "rank": 1}
FAULTS: dict[str, Fault] = {
    "an error": ("/v1/completions", (500, {"error": {"message": "out of\nmemory \x1b[31m"}}), "answers 500 to"),
    "too busy": ("/v1/models", (503, b"loading"), "answers 503 to /v1/models, 4 times: loading."),
    "no JSON": ("/v1/models", (200, b"<html>hello</html>"), "not JSON"),
    "deep JSON": ("/v1/models", (200, b"[" * 100_000), "not JSON"),
    "elsewhere": ("/v1/models", (307, {}), "to another address, which is not followed"),
    "no models": ("/v1/models", (200, {"data": []}), "names no model"),
    "another shape": ("/v1/completions", (200, {"choices": []}), "otherwise than OpenAI's and vLLM's do"),
    "no log-probabilities": ("/v1/completions", (200, {"choices": [{"text": ""}]}), "does not tell prompt_logprobs"),
    "fewer positions": (
        *("/v1/completions", (200, {"choices": [{"prompt_logprobs": [None]}]})),
        "it changes prompts",
    ),
    "another tokenizer": ("/detokenize", (200, {"prompt": "hello"}), "Token ids mean something else to"),
    "no text": ("/detokenize", (404, {"detail": "Not Found"}), "answers 404 to /detokenize: Not Found."),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_server_that_misbehaves_is_a_sentence(what: str, folders: Path, razor: Any) -> None:
    where, answer, message = FAULTS[what]
    with standing(Standing(models(), TOKENIZER, context=128)) as server:
        server.fault = lambda path, body: answer if path == where else None
        code, out, said = razor(str(folders / "base"), f"{server.url}#tuned")
    assert (code, out) == (2, "")
    assert message in " ".join(said.split())
    assert "\x1b" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: dict(list(row.items())[:5]), "give --top-k 5, or start it"),
        (lambda row: {name: {"logprob": 0.0} for name in row}, "no log-probabilities"),
        (lambda row: {name: {"logprob": "a"} for name in row}, "no log-probability of a token"),
        (lambda row: {f"-{name}9": one for name, one in row.items()}, "no log-probability of a token"),
        (lambda row: {str(int(name) + 90): one for name, one in row.items()}, "reads other token ids"),
        (lambda row: None, "no log-probability of a token"),
        (lambda row: {name: {"logprob": float("nan")} for name in row}, "no log-probability of a token"),
        (lambda row: {name: {"logprob": -(10**400)} for name in row}, "no log-probability of a token"),
        (lambda row: {**row, str(10**20): {"logprob": -0.1}}, "no log-probability of a token"),
    ],
)
def test_log_probabilities_that_are_none_are_refused(change: Any, message: str, folders: Path, razor: Any) -> None:
    server = Standing(models(), TOKENIZER, context=128)

    def changed(path: str, body: Any) -> tuple[int, Any] | None:
        if path != "/v1/completions" or "prompt_logprobs" not in body:
            return None
        status, answer = server.answered(path, body)
        first, *rows = answer["choices"][0]["prompt_logprobs"]
        return status, {"choices": [{"prompt_logprobs": [first, *map(change, rows)]}]}

    server.fault = changed
    with standing(server):
        code, _, said = razor(str(folders / "base"), f"{server.url}#tuned")
    assert code == 2
    assert message in " ".join(said.split())


def test_what_llama_cpp_says_of_a_prompt_is_shown_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(client.KEY, "sk-secret-7")
    with standing(Standing({"base": tiny_llama()}, TOKENIZER, "llamacpp")) as server:
        asked = opened(server.url, TOKENIZER, 4)
        server.fault = lambda path, body: (200, {"tokens_evaluated": "\x1b[31msk-secret-7\n<b>", "tokens": []})
        with pytest.raises(RazorError) as raised:
            asked.draw([[3, 4]], 1, 3, [1])
    assert "was sent 2 token ids and read \\x1b[31m*** <b>: it changes prompts." in str(raised.value)


def test_a_server_that_recovers_is_asked_again(folders: Path) -> None:
    failures = [500, 429, 503]
    with standing(Standing(models(), TOKENIZER)) as server:
        server.fault = lambda path, body: (failures.pop(), {}) if failures else None
        assert opened(f"{server.url}#tuned", TOKENIZER).kind == "Vllm"
    assert not failures


@pytest.mark.parametrize(
    ("said", "waited"),
    [("nan", 0.5), ("inf", 0.5), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.5), ("-3", 0.0), ("7", 7.0), ("1e9", 30.0)],
)
def test_a_server_says_how_long_it_wants_to_be_left_alone(
    said: str, waited: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "WAITS", (0.5,))
    monkeypatch.setattr(client, "TRIES", 2)
    waits: list[float] = []
    with standing(Standing(models(), TOKENIZER, retry_after=said)) as server:
        server.fault = lambda path, body: (503, {})
        with pytest.raises(RazorError, match="answers 503"):
            client.Client(client.Address.of(server.url), waits.append).get("/v1/models")
    assert waits == [waited]


def test_token_ids_that_no_tokenizer_has_are_refused() -> None:
    with standing(Standing({"base": tiny_llama()}, TOKENIZER)) as server:
        asked = opened(server.url, TOKENIZER, 4)
        for ids in ([1 << 31], [-1], [True], [10**20], [2.0]):
            answer = 200, {"choices": [{"token_ids": ids}]}
            server.fault = lambda path, body, answer=answer: answer  # type: ignore[misc]
            with pytest.raises(RazorError, match="something else than at most 3 token ids"):
                asked.draw([[3]], 1, 3, [1])
        server.fault = lambda path, body: (200, {"data": [{"id": "base", "aliases": 5}]})
        with pytest.raises(RazorError, match="has no model other"):
            opened(f"{server.url}#other", TOKENIZER, 4)


def test_sources_that_are_no_servers_are_sentences(folders: Path, razor: Any, tmp_path: Path) -> None:
    base, adapter = str(folders / "base"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    law = tmp_path / "law.json"
    law.write_text("{}")
    with standing(Standing(models(), TOKENIZER)) as server:
        for tuned, options, message in (
            ("http://127.0.0.1:9", [], "does not answer: Connection refused."),
            ("http://user:secret@127.0.0.1:9", [], "holds no password, key or query"),
            ("http://127.0.0.1:9/v1?key=secret", [], "holds no password, key or query"),
            ("http://user:secret@127.0.0.1:99999999", [], "holds no password, key or query"),
            ("http://user:secret@[::1", [], "holds no password, key or query"),
            ("http://user:1#secret@127.0.0.1:9", [], "holds no password, key or query"),
            ("http://[::1", [], "is no address of a server"),
            ("http://", [], "is no address of a server"),
            ("http://127.0.0.1:99999999", [], "is no address of a server"),
            (f"{server.url}#tunde", [], "has no model tunde. It has base, tuned."),
            (server.url, [], "has several models: name one"),
            (f"{server.url}#tuned", ["--law", str(law)], "--law needs the models themselves"),
            (f"{server.url}#tuned", ["--fail-above", "0.1"], "--fail-above needs the models themselves"),
            (f"{server.url}#tuned", ["--prior", "winogrande"], "--prior needs the models themselves"),
            (f"{server.url}#tuned", ["--generic", "paragraphs"], "is not measured of a served model"),
            (f"{server.url}#tuned", ["--turns", "all"], "leave --turns all out"),
            (f"{server.url}#tuned", ["--top-k", "0"], "--top-k must be at least 1"),
            (f"{server.url}#tuned", ["--top-k", "30"], "Requested prompt logprobs of 30"),
            (str(folders / "tuned"), ["--top-k", "5"], "--top-k is about served models"),
        ):
            code, out, said = razor(base, tuned, *options)
            assert (code, out) == (2, ""), tuned
            assert message in " ".join(said.split())
            assert "secret" not in said
        code, _, said = razor(f"{server.url}#base", str(adapter))
        assert code == 2
        assert "is an adapter, whose base is behind a server" in " ".join(said.split())


def test_a_token_that_is_part_of_a_character_is_read_all_the_same(folders: Path) -> None:
    """llama.cpp tells no probabilities where it is one."""
    base, tuned = models().values()
    sequences = drawn(base, 3)
    parts = frozenset(token for completion in sequences.completions for token in completion[::2]) - {1}
    with standing(Standing({"tuned": tuned}, TOKENIZER, "llamacpp", part_of_character=parts)) as server:
        found = between(LocalModel(base, "float32"), opened(server.url, TOKENIZER, 44), sequences)
    assert found.estimate.positions == pytest.approx(exact(base, tuned, sequences), abs=2e-5)


def test_servers_are_asked_for_the_whole_distribution(folders: Path) -> None:
    """Not what a generation_config.json would have: top-p, a penalty, another temperature."""
    for kind in KINDS:
        with standing(Standing({"base": tiny_llama()}, TOKENIZER, kind)) as server:
            opened(server.url, TOKENIZER).draw([[3, 4]], 2, 3, [1])
            bodies = [body for path, body, _ in server.seen if path not in ("/v1/models", "/detokenize")]
        for body in bodies:
            how = body.get("sampling_params", body)
            assert how["temperature"] == how["top_p"] == 1
            assert how["min_p"] == 0
            assert how["top_k"] in (0, -1)
            assert how.get("repetition_penalty", how.get("repeat_penalty")) == 1
        assert len(bodies) == 2


# A watched run


def test_a_run_is_watched_against_a_served_base(
    folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    saved(run / "checkpoint-2", models()["tuned"], TOKENIZER)
    saved(run / "checkpoint-4", noisy(tiny_llama(), 0.1), TOKENIZER)
    (tmp_path / "generic.jsonl").write_text('{"prompt": "b="}\n{"prompt": "c"}\n')
    with standing(Standing({"base": tiny_llama()}, TOKENIZER, most=44)) as server:
        command = ["watch", str(run), "--base", server.url, "--prompts", str(folders / "prompts.txt"), "--once"]
        command += ["--max-new-tokens", "4", "--no-chat", "--json", "--generic", str(tmp_path / "generic.jsonl")]
        assert main(command) == 2
        assert "--tokenizer" in capfd.readouterr().err
        command += ["--tokenizer", str(folders / "base"), "--top-k", "44"]
        assert main(command) == 0
        out, said = capfd.readouterr()
        assert "estimates without bias" in " ".join(said.split())
        rows = [json.loads(line) for line in out.splitlines()]
        assert [row["step"] for row in rows] == [2, 4]
        for row in rows:  # all tokens are told
            assert row["kl_forward"] == pytest.approx(row["kl_forward_at_least"], abs=1e-2)
            assert row["kl_forward"] > 0.01
        assert rows[0]["kl_forward"] < rows[1]["kl_forward"]
        assert main(command) == 0  # the log goes on, and nothing is measured again
        assert capfd.readouterr().out == ""
        assert main([*command, "--law", str(folders / "prompts.txt")]) == 2
        assert "--law needs the models themselves" in " ".join(capfd.readouterr().err.split())
        server.models = {"base": noisy(tiny_llama(), 0.5)}
        assert main(command) == 2
        assert "which are of another base" in " ".join(capfd.readouterr().err.split())


def test_a_watch_that_is_begun_again_measures_on_the_same_completions(
    folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The stand-in for SGLang draws others each time, as SGLang does."""
    run, tuned = tmp_path / "run", models()["tuned"]
    saved(run / "checkpoint-2", tuned, TOKENIZER)
    (tmp_path / "generic.jsonl").write_text('{"prompt": "b="}\n{"prompt": "c"}\n')
    with standing(Standing({"base": tiny_llama()}, TOKENIZER, "sglang", most=44)) as server:
        command = ["watch", str(run), "--base", server.url, "--prompts", str(folders / "prompts.txt"), "--once"]
        command += ["--max-new-tokens", "4", "--no-chat", "--json", "--generic", str(tmp_path / "generic.jsonl")]
        command += ["--tokenizer", str(folders / "base"), "--top-k", "44"]
        rows = []
        for step in (2, 4, 6):
            saved(run / f"checkpoint-{step}", tuned, TOKENIZER)
            if step == 6:
                (run / "razor.jsonl.drawn.json").unlink()
            assert main(command) == 0
            out, said = capfd.readouterr()
            rows += [json.loads(line) for line in out.splitlines()]
            assert ("it has drawn anew" in " ".join(said.split())) == (step == 6)
        kept = run / "razor.jsonl.drawn.json"
        for text in ("{}", "[", kept.read_text().replace('"prompt_of": [0', '"prompt_of": [7')):
            kept.write_text(text)
            assert main(command) == 2
            assert "delete it, and the base draws anew." in " ".join(capfd.readouterr().err.split())
    assert [row["step"] for row in rows] == [2, 4, 6]
    for name in ("kl_forward", "kl_probe"):  # the same weights
        kls = [row[name] for row in rows]
        assert kls[1] == pytest.approx(kls[0], rel=1e-6)
        assert kls[2] != pytest.approx(kls[0], rel=1e-3)
