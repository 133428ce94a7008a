"""Serve a GGUF file on this machine, with adapters beside it, by llama.cpp's own HTTP server.

The package `xllamacpp` runs that server inside this process, so no process is left behind. It
answers OpenAI's protocol: any client of it works with `url` + "/v1".
"""

from __future__ import annotations

import http.client
import importlib
import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from ..data.chat import refuse_messages, user
from ..machine import cores
from .export import BASE
from .header import Header, is_adapter, read_header

INSTALL = f"{sys.executable} -m pip install --only-binary :all: xllamacpp openai"

_HOST = "127.0.0.1"
_TEMPLATE = "tokenizer.chat_template"
_SECONDS = 600  # after which a request is given up
Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]
Adapter = str | Mapping[str, float] | None


def available() -> bool:
    """Return whether `xllamacpp` can be imported, without which `serve` raises ImportError."""
    try:
        importlib.import_module("xllamacpp")
    except ImportError:
        return False
    return True


@contextmanager
def serve(
    file: str | os.PathLike,
    adapters: Mapping[str, str | os.PathLike] | None = None,
    port: int | None = None,
    context: int = 2048,
    check: bool = True,
) -> Iterator[Server]:
    """Serve a model in the `with` block, on 127.0.0.1 alone, and stop when the block ends.

    Args:
        file: a GGUF file with a model.
        adapters: {name: GGUF file}, each for this model. Every request says which of them count.
        port: None takes a free one.
        context: the most tokens of a prompt and its answer together.
        check: False serves files as llama.cpp alone would: an adapter beside a base with other
            weights, and ChatML for a file without a chat template.

    Raises ImportError without xllamacpp, and before the server starts FileNotFoundError, TypeError
    or ValueError: a missing file, none in GGUF or cut off, an adapter that does not fit, a port in
    use. RuntimeError if llama.cpp refuses the file."""
    try:
        xllamacpp = importlib.import_module("xllamacpp")
    except ImportError as error:
        raise ImportError(
            f"serve needs the package xllamacpp ({error}). Install it with a network: {INSTALL}"
        ) from None
    model = read_header(file)
    _refuse_model(model, file)
    if not isinstance(adapters, Mapping | None):
        raise TypeError(f"adapters must be {{name: file}}, got {adapters!r:.60}")
    paths = {name: os.fspath(path) for name, path in (adapters or {}).items()}
    for name, path in paths.items():
        _refuse_adapter(name, read_header(path, f"adapters[{name!r}]"), model, file, check)
    _refuse_settings(port, context)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = os.fspath(file)
    parameters.lora_adapters = [
        xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in paths.values()
    ]
    parameters.port = port or 0
    parameters.n_ctx, parameters.n_parallel = context, 1
    parameters.verbosity = 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = _threads()
    server = Server(
        tuple(paths), os.fspath(file), has_template=not check or _TEMPLATE in model.fields
    )
    try:
        server._start(xllamacpp, parameters)
        yield server
    finally:
        server._stop()


def _threads() -> int:
    """Return how many threads may compute: no more than cores, nor than OMP_NUM_THREADS says."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores(), int(wanted)) if wanted.isdecimal() and int(wanted) else cores()


def _refuse_settings(port: int | None, context: int) -> None:
    for name, value in (("port", port), ("context", context)):
        given = value is not None or name == "context"
        if given and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be an integer, got {value!r}")
    if context < 1:
        raise ValueError(f"context={context} must be at least 1 token, such as 2048")
    if port is None:
        return
    if not 0 < port < 65536:
        raise ValueError(f"port={port} must be from 1 to 65535; None takes a free one")
    with socket.socket() as probe:
        if os.name == "posix":  # a server that has just stopped leaves its port in a state of rest
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            raise ValueError(
                f"port={port} cannot be used ({error.strerror}): name another one; None takes a "
                "free one"
            ) from None


def _refuse_model(model: Header, file: str | os.PathLike) -> None:
    if is_adapter(model):
        raise ValueError(
            f"file={os.fspath(file)!r} is an adapter: serve its base, with adapters={{name: file}}"
        )


def _refuse_adapter(
    name: str, adapter: Header, model: Header, file: str | os.PathLike, check: bool
) -> None:
    """Raise ValueError for an adapter that does not fit the model, in shapes or, with `check`, in
    the weights that it was trained beside."""
    what = f"adapters[{name!r}]"
    if not is_adapter(adapter):
        raise ValueError(f"{what} is a whole model, not an adapter: serve it as the file itself")
    for key, shape in adapter.shapes.items():
        weight, _, letter = key.rpartition(".lora_")
        due = model.shapes.get(weight)
        if due is None or (due[1] != shape[1] if letter == "a" else due[0] != shape[0]):
            raise ValueError(
                f"{what} was made for another model than {os.fspath(file)!r}: {key!r} has shape "
                f"{shape}, and {weight!r} there {due or 'is missing'}"
            )
    trained, served = (header.fields.get(BASE, "meta") for header in (adapter, model))
    if check and "meta" not in (trained, served) and trained != served:
        raise ValueError(
            f"{what} was trained on a base with other weights than those in {os.fspath(file)!r}: "
            "serve its own base, unmerged, or pass check=False if you mean it"
        )


class Server:
    """A running server; `serve` makes it.

    `url` is its address. A prompt is a text, which is one message of the user, or a list of
    messages; with `chat=False` it is a text that goes on, or a list of token ids. `adapter` is the
    name of one, {name: scale} of several, or None for the base alone."""

    def __init__(self, adapters: tuple[str, ...], file: str, has_template: bool):
        self.adapters, self.url = adapters, ""
        self._file, self._has_template, self._native = file, has_template, None

    def __repr__(self) -> str:
        state = self.url if self._native is not None else "stopped"
        return f"<Server of {self._file}: {state}>"

    def _start(self, xllamacpp: Any, parameters: Any) -> None:
        try:
            self._native = xllamacpp.Server(parameters)
        except RuntimeError as error:
            raise RuntimeError(
                f"llama.cpp does not load {self._file!r}: {error} The header of the file is "
                "whole: is there memory enough for it, and is its architecture known?"
            ) from None
        self.url = self._native.listening_address

    def _stop(self) -> None:
        if self._native is None:
            return
        try:
            # llama.cpp's loop never ends if it is told to before it begins. An answer that comes
            # out of the loop says that it has begun.
            with suppress(RuntimeError):
                self._send("GET", "/lora-adapters", timeout=10)
        finally:
            self._native = None  # the last reference: llama.cpp's threads end here

    def lora(self, adapter: Adapter = None) -> list[dict[str, float]]:
        """Return what a request must say so that just this adapter counts: the field "lora", with
        the scale of every adapter.

        llama.cpp takes an adapter that is not named at its default, and an unknown number for none
        at all. ValueError for an unknown name, TypeError for a scale that is no number."""
        scales = {adapter: 1.0} if isinstance(adapter, str) else dict(adapter or {})
        for name in scales:
            if name not in self.adapters:
                known = ", ".join(map(repr, self.adapters)) or "none"
                raise ValueError(f"adapter={name!r} is unknown: this server has {known}")
            if not isinstance(scales[name], int | float):
                raise TypeError(f"the scale of {name!r} must be a number, got {scales[name]!r}")
        return [
            {"id": number, "scale": float(scales.get(name, 0.0))}
            for number, name in enumerate(self.adapters)
        ]

    def ask(
        self,
        prompt: Prompt,
        adapter: Adapter = None,
        max_tokens: int = 64,
        choices: Sequence[str] | None = None,
        grammar: str | None = None,
        chat: bool = True,
    ) -> str:
        """Return the likeliest answer, token by token (temperature 0). Prompts that begin alike are
        cheaper one after the other: the server keeps what it has computed.

        `choices` allows these texts alone, `grammar` what a grammar in llama.cpp's GBNF derives
        from its `root`; either may cut a text into more tokens than a free answer has.

        Raises ValueError for a wrong prompt, one longer than the context, an unknown adapter or a
        wrong grammar, RuntimeError if the server has been stopped."""
        if choices is not None and grammar is not None:
            raise ValueError("ask takes choices=... or grammar=..., not both")
        if choices is not None:
            grammar = _grammar_of(choices)
        body = {"temperature": 0, "lora": self.lora(adapter)}
        if grammar is not None:
            body["grammar"] = grammar
        if not chat:
            body |= {"prompt": _raw(prompt), "n_predict": max_tokens}
            return self._post("/completion", body)["content"]
        body |= {"messages": self._messages(prompt), "max_tokens": max_tokens}
        return self._post("/v1/chat/completions", body)["choices"][0]["message"]["content"]

    def tokens(self, prompt: Prompt, chat: bool = True) -> list[int]:
        """Return the ids that the server makes of a prompt. Errors as `ask`."""
        if chat:
            messages = {"messages": self._messages(prompt)}
            prompt = self._post("/apply-template", messages)["prompt"]
        elif not isinstance(_raw(prompt), str):
            return list(prompt)
        body = {"content": prompt, "add_special": True, "parse_special": True}
        return self._post("/tokenize", body)["tokens"]

    def logprobs(
        self, prompt: Prompt, adapter: Adapter = None, top: int = 10, chat: bool = True
    ) -> dict[int, float]:
        """Return {token id: log-probability} of the `top` likeliest next tokens, the likeliest
        first. Errors as `ask`."""
        body = {"prompt": self.tokens(prompt, chat), "n_predict": 1, "n_probs": top}
        body |= {"temperature": 0, "cache_prompt": False, "lora": self.lora(adapter)}
        first = self._post("/completion", body)["completion_probabilities"][0]
        return {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}

    def score(
        self,
        prompt: Prompt,
        completion: str | Sequence[int],
        adapter: Adapter = None,
        chat: bool = True,
    ) -> list[float]:
        """Return the log-probability of each token of a completion after a prompt. A text becomes
        tokens by itself, without an end token. Errors as `ask`."""
        known, found = self.tokens(prompt, chat), []
        for number in self.tokens(completion, chat=False):
            # The bias makes the token the answer; the log-probability is that without a bias.
            body = {"prompt": known, "n_predict": 1, "n_probs": 1, "temperature": 0}
            body |= {"lora": self.lora(adapter), "logit_bias": [[number, 1000]]}
            answer = self._post("/completion", body)["completion_probabilities"][0]
            found.append(answer["logprob"])
            known = [*known, number]
        return found

    def _messages(self, prompt: Prompt) -> list[Mapping[str, str]]:
        messages = [user(prompt)] if isinstance(prompt, str) else prompt
        refuse_messages(messages, "prompt")
        if not self._has_template:
            raise ValueError(
                f"{self._file!r} has no chat template, so it takes no messages: pass chat=False to "
                "continue a text"
            )
        return list(messages)

    def _post(self, path: str, body: Mapping) -> dict:
        """Send a request and return its answer. Errors as `ask`."""
        if self._native is None:
            raise RuntimeError("the server is stopped: ask inside the block of `with serve(...)`")
        status, answer = self._send("POST", path, json.dumps(body))
        if status == 200:
            return answer
        reason = answer.get("error", {}).get("message", answer)
        if "context" in str(reason):
            reason = f"{reason}. The model's own limit aside, serve(..., context=...) sets it"
        raise (ValueError if status < 500 else RuntimeError)(f"llama.cpp refuses this: {reason}")

    def _send(
        self, method: str, path: str, body: str | None = None, timeout: float = _SECONDS
    ) -> tuple[int, Any]:
        """Return status and content of an answer. RuntimeError if none comes. No proxy is asked:
        the server is on this machine."""
        address = self.url.partition("://")[2]
        connection = http.client.HTTPConnection(address, timeout=timeout)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise RuntimeError(f"the server at {self.url} does not answer: {error}") from None
        finally:
            connection.close()


def _raw(prompt: Prompt) -> str | Sequence[int]:
    """Return a prompt that no template changes. TypeError for messages."""
    is_ids = isinstance(prompt, Sequence) and all(isinstance(number, int) for number in prompt)
    if not isinstance(prompt, str) and not (is_ids and prompt):
        raise TypeError(f"with chat=False a prompt is a text or a list of ids, got {prompt!r:.60}")
    return prompt


def _grammar_of(choices: Sequence[str]) -> str:
    """Return a grammar that allows these texts alone."""
    if isinstance(choices, str) or not choices or not all(isinstance(c, str) for c in choices):
        raise ValueError(f"choices={choices!r} must be a list of texts")
    return "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
