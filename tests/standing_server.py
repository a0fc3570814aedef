"""A server on loopback that speaks vLLM's, SGLang's or llama.cpp's dialect around a model in memory, for the tests.

The answers have the fields that the real servers' have, as far as they are read here, in their order; log-probabilities
are float32.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

Fault = Callable[[str, Any], tuple[int, Any] | None]
"""Of a path and the request's body, what is answered instead: a status, and JSON or bytes; None: as usual."""


@dataclass(eq=False)
class Standing:
    """A model, or several by their names, and how they are served. `seen`: each request's path, body and headers."""

    models: dict[str, Any]
    tokenizer: Any
    kind: str = "vllm"
    most: int = 20
    key: str | None = None
    fault: Fault = lambda path, body: None
    part_of_character: frozenset[int] = frozenset()  # tokens of which llama.cpp tells no probabilities
    context: int = 64
    grid: float = 0.0  # logits are multiples of it, as those of bfloat16 are of some number: likelihoods tie
    retry_after: str | None = None
    url: str = ""
    seen: list[tuple[str, Any, dict[str, str]]] = field(default_factory=list)

    def answered(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"object": "list", "data": [self._card(name) for name in self.models]}
        if path == "/detokenize":
            name = {"vllm": "prompt", "sglang": "text", "llamacpp": "content"}[self.kind]
            return 200, {name: self.tokenizer.decode(body["tokens"])}
        if self.kind == "vllm" and body.get("model") not in self.models:
            return 404, {"error": {"message": f"The model `{body.get('model')}` does not exist.", "code": 404}}
        model = self.models.get(body.get("model"), next(iter(self.models.values())))
        known = {("vllm", "/v1/completions"): self._vllm, ("sglang", "/generate"): self._sglang}
        known |= {("llamacpp", "/completion"): self._llamacpp}
        if (self.kind, path) not in known:
            return 404, {"detail": "Not Found"}
        return known[self.kind, path](model, body)

    def _card(self, name: str) -> dict[str, Any]:
        card = {"id": name, "object": "model", "owned_by": self.kind}
        if self.kind == "llamacpp":
            vocab = next(iter(self.models.values())).config.vocab_size
            return {**card, "aliases": [], "meta": {"n_vocab": vocab, "n_ctx": self.context}}
        return {**card, "root": name, "max_model_len": self.context}

    def _vllm(self, model: Any, body: dict[str, Any]) -> tuple[int, Any]:
        prompt, most = body["prompt"], body["max_tokens"]
        if len(prompt) + most > self.context:
            return 400, {"error": {"message": f"This model's maximum context length is {self.context} tokens."}}
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length", "stop_reason": None}
        if (top := body.get("prompt_logprobs")) is not None:
            if top > self.most:
                return 400, {"error": {"message": f"Requested prompt logprobs of {top}, maximum is {self.most}"}}
            rows = [self._row(row, top, token) for row, token in self._after(model, prompt)]
            choice["prompt_logprobs"] = [None, *rows]
            return 200, {"choices": [choice]}
        if body.get("return_token_ids"):
            choice["token_ids"] = self._drawn(model, prompt, most, body["seed"])
        return 200, {"choices": [choice]}

    def _row(self, logps: torch.Tensor, top: int, token: int) -> dict[str, Any]:
        ranked = logps.topk(min(top, len(logps)))
        shown = {token: logps[token].item()} | dict(zip(ranked.indices.tolist(), ranked.values.tolist(), strict=True))
        return {str(one): {"logprob": logp, "rank": 1, "decoded_token": "x"} for one, logp in shown.items()}

    def _sglang(self, model: Any, body: dict[str, Any]) -> tuple[int, Any]:
        prompt, how = body["input_ids"], body["sampling_params"]
        seed = sum(prompt) + len(self.seen)
        told: dict[str, Any] = {"finish_reason": {"type": "length", "length": how["max_new_tokens"]}}
        if body.get("return_logprob"):
            own: list[Any] = [[None, prompt[0], None]]
            tops: list[Any] = [None]
            for logps, token in self._after(model, prompt):
                ranked = logps.topk(min(body["top_logprobs_num"], self.most, len(logps)))
                own.append([logps[token].item(), token, None])
                tops.append(
                    [[v, i, None] for v, i in zip(ranked.values.tolist(), ranked.indices.tolist(), strict=True)]
                )
            told |= {"input_token_logprobs": own, "input_top_logprobs": tops}
        tokens = self._drawn(model, prompt, how["max_new_tokens"], seed)
        if tokens[-1] == 1:
            told["finish_reason"] = {"type": "stop", "matched": 1}
        return 200, {"text": "", "output_ids": tokens, "meta_info": told}

    def _llamacpp(self, model: Any, body: dict[str, Any]) -> tuple[int, Any]:
        prompt, most = body["prompt"], body["n_predict"]
        answer = {"tokens_evaluated": len(prompt), "truncated": False, "stop_type": "limit"}
        if not body.get("n_probs"):
            return 200, {**answer, "tokens": self._drawn(model, prompt, most, body["seed"])}
        assert most == 1
        assert not body["post_sampling_probs"]
        ((token, _),) = body["logit_bias"]
        if token not in self.part_of_character:
            logps = self._next(model, prompt)
            ranked = logps.topk(min(body["n_probs"], len(logps)))
            tops = [
                {"id": i, "token": "", "bytes": [], "logprob": v}
                for v, i in zip(ranked.values.tolist(), ranked.indices.tolist(), strict=True)
            ]
            row = {"id": token, "token": "", "bytes": [], "logprob": logps[token].item(), "top_logprobs": tops}
            answer["completion_probabilities"] = [row]
        return 200, answer

    def _after(self, model: Any, tokens: list[int]) -> list[tuple[torch.Tensor, int]]:
        """The log-probabilities at each token but the first, and the token."""
        return list(zip(self.logps(model, tokens)[:-1], tokens[1:], strict=True))

    def _next(self, model: Any, tokens: list[int]) -> torch.Tensor:
        return self.logps(model, tokens)[-1]

    def _drawn(self, model: Any, prompt: list[int], most: int, seed: int) -> list[int]:
        rng, found = torch.Generator().manual_seed(seed), list[int]()
        while len(found) < most and found[-1:] != [1]:
            found.append(int(torch.multinomial(self._next(model, [*prompt, *found]).exp(), 1, generator=rng)))
        return found

    @torch.no_grad()
    def logps(self, model: Any, tokens: list[int]) -> torch.Tensor:
        """After each of the tokens, over the whole vocabulary (T, V)."""
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens])).logits[0].float()
        return ((logits / self.grid).round() * self.grid if self.grid else logits).log_softmax(-1)


@contextmanager
def standing(server: Standing) -> Iterator[Standing]:
    """The server, as long as it is needed, at its `url`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Any) -> None:
            server.seen.append((self.path, body, dict(self.headers)))
            if server.key is not None and self.headers.get("Authorization") != f"Bearer {server.key}":
                status, answer = 401, {"error": f"Unauthorized: {self.headers.get('Authorization')}"}
            else:
                status, answer = server.fault(self.path, body) or server.answered(self.path, body)
            sent = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            if server.retry_after is not None:
                self.send_header("Retry-After", server.retry_after)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *arguments: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
