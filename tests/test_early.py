"""Errors that need no model come before anything heavy is imported, and a network that is not there is asked once."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from rlrazor.errors import RazorError
from rlrazor.lm import hub, task_names

TINY = "tiny --lr 1e-3 --task letters"
# Command: what is said. All in one process, which is not to have imported torch in the end.
EARLY = {
    "compare base tuned --prompts nope.txt": "There is no nope.txt, which --prompts names.",
    "compare base tuned --prompts here --law nope.json": "There is no law in nope.json. `razor calibrate` makes one.",
    "compare base tuned --prompts here --fail-above 2": "--fail-above must be a fraction of 1, less than 1, not 2.",
    "compare base tuned --prompts here --prior winogrand": "lm-eval has no task winogrand. Did you mean winogrande",
    "compare base tuned --prompts here --prior mmlu,zzzqqq": "lm-eval has no task zzzqqq. `lm-eval ls tasks` lists",
    "pick nope": "There is no folder nope.",
    f"finetune {TINY} --method dr-gpro": "Unknown method 'dr-gpro'.",
    f"finetune {TINY}x": "There is no task 'lettersx'.",
    f"finetune {TINY} --epochs many": "epochs: 'many' is not a whole number.",
    f"finetune {TINY} --generic nope": "There is no nope, which --generic names.",
    "calibrate tiny": "Name the new task: --task NAME",
    "calibrate base --task letters --prior winogrand --data-mirror .": "lm-eval has no task winogrand.",
    "calibrate org/model --task math --dry-run": "is not on this machine and the hub cannot be reached.",
    "sweep --base tiny --task letters --methods sftt": "Unknown method 'sftt'.",
    "compare base ./nope --prompts here": "There is no ./nope. Give a hub id, a folder with a model, or a .gguf file.",
    "compare base nope.gguf --prompts here": "There is no nope.gguf. Give a hub id,",
    "calibrate ./nope --task letters": "There is no ./nope.",
    "evaluate ./nope --task letters": "There is no ./nope.",
    "continual nope.yaml": "There is no nope.yaml.",
    "continual tasks.yaml --base ./nope": "There is no ./nope.",
    "continual tasks.yaml --base tiny --method dr-gpro": "Unknown method 'dr-gpro'.",
}


def test_errors_that_need_no_model_do_not_wait_for_torch(tmp_path: Path) -> None:
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
    (tmp_path / "here").write_text("a\n")
    (tmp_path / "tasks.yaml").write_text("lr: 1e-3\ntasks: [ascending, descending]\n")
    code = f"""
import json, sys, time
from rlrazor.cli import main
for command in {[*EARLY]}:
    begun = time.monotonic()
    code = main(command.split())
    heavy = [name for name in ("torch", "transformers", "trl", "datasets", "lm_eval") if name in sys.modules]
    print(json.dumps([code, time.monotonic() - begun, heavy]), flush=True)
"""
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{closed_port()}", "HF_HOME": str(tmp_path / "cache")}
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        os.environ.pop(name, None)
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, check=True)
    found = [json.loads(printed) for printed in done.stdout.splitlines()]
    said = done.stderr.splitlines()
    assert [code for code, _, _ in found] == [2] * len(EARLY), done.stderr
    for sentence, expected in zip(said, EARLY.values(), strict=True):
        assert sentence.startswith("razor: ")
        assert expected in sentence
    assert [heavy for _, _, heavy in found] == [[]] * len(EARLY)
    assert max(seconds for _, seconds, _ in found) < 30  # of waiting for a hub that is not there, a minute was usual


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# --- The hub ---


ANSWERS = hub.answers  # which conftest.py replaces


@pytest.fixture(autouse=True)
def _environment(_no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "answers", ANSWERS)
    for name in ("HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "x")  # to be put back
        monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(403)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_any_answer_is_an_answer(server: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    hub.settle()
    assert not hub.is_offline()


def test_without_an_answer_the_libraries_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    hub.settle()
    assert hub.is_offline()
    assert constants.HF_HUB_OFFLINE
    monkeypatch.setattr(hub, "answers", lambda: pytest.fail("asked again"))
    hub.settle()


def test_a_hub_that_keeps_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begun = time.monotonic()
        assert not hub.answers()
        assert time.monotonic() - begun < 1


def test_who_has_set_the_switch_is_not_overruled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "answers", lambda: pytest.fail("asked"))
    for value, offline in (("0", False), ("1", True), ("on", True)):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        hub.settle()
        assert hub.is_offline() == offline


# --- lm-eval's names ---


def test_names_are_found_however_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tasks" / "some"
    folder.mkdir(parents=True)
    (folder / "a.yaml").write_text('"task": "quoted"\ntag:\n  - listed\n  - other\noutput_type: loglikelihood\n')
    (folder / "_template_yaml").write_text("tag: included  # a comment\n")
    (folder / "b.yaml").write_text("group: 'grouped'\ntask: [one, two]\nmetric_list:\n  - metric: task_acc\n")
    (folder / "c.py").write_text("task: not_this\n")

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(task_names, "find_spec", lambda name: Spec())
    task_names.known_names.cache_clear()
    try:
        found = task_names.known_names()
        assert found == {"quoted", "listed", "other", "included", "grouped", "one", "two", "a", "comment"}
        task_names.check_names(["mmlu", "grouped", str(folder / "a.yaml")])
        with pytest.raises(RazorError, match=r"no task quotd. Did you mean quoted\?"):
            task_names.check_names(["listed", "quotd"])
    finally:
        task_names.known_names.cache_clear()


@pytest.mark.slow
def test_all_names_of_lm_eval_are_found() -> None:
    """Half a minute: its own index reads and parses 14,000 files."""
    tasks = pytest.importorskip("lm_eval.tasks")
    assert set(tasks.TaskManager().all_tasks) <= task_names.known_names()
