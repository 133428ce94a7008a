"""llama.cpp's server in this process: what it answers, how it ends, and what is refused."""

import math
import re
import socket
from copy import deepcopy

import gguf
import pytest
import torch
from exported import SERVER, adapted
from tiny import tiny_llama

from peft_lessons import load_tokenizer, merge, save_adapter
from peft_lessons.deploy import INSTALL, adapter_to_gguf, available, serve, to_gguf

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def files(base, saved, tmp_path_factory):
    """Return two adapters of the base, in GGUF."""
    folder = tmp_path_factory.mktemp("adapters")
    first = adapter_to_gguf(saved, folder / "first.gguf", base)
    model = adapted(base)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.neg_().add_(0.1)
    second = adapter_to_gguf(save_adapter(model, folder / "second"), folder / "second.gguf", base)
    return {"first": first, "second": second}


@pytest.fixture(scope="module")
def server(base_file, files):
    with serve(base_file, files) as server:
        yield server


def reached(url):
    """Return whether a server answers at the address."""
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as attempt:
        return attempt.connect_ex((host, int(port))) == 0


# ------------------------------------------------------------------ answers


@SERVER
def test_each_request_gets_its_own_adapter(server):
    alone = {name: server.logprobs(HELLO, name) for name in (None, "first", "second")}
    assert len({tuple(found) for found in alone.values()}) == 3
    assert server.logprobs(HELLO, {"first": 1.0}) == alone["first"]
    assert server.logprobs(HELLO, {"first": 0.0}) == alone[None] == server.logprobs(HELLO)
    both = server.logprobs(HELLO, {"first": 0.5, "second": 1})
    assert both not in alone.values()
    assert server.lora({"second": 0.5}) == [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 0.5}]
    assert server.lora() == [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 0.0}]


@SERVER
def test_an_answer_is_the_likeliest_token_again_and_again(server, base, tokenizer):
    found = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_tensors="pt")
    ids, options = found["input_ids"], dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    wanted = base.generate(**found, **options)[0, ids.shape[1] :]
    assert server.ask(HELLO, max_tokens=6) == server.ask("hello", max_tokens=6)
    text = tokenizer.decode(ids[0])
    assert server.ask(text, max_tokens=6, chat=False) == tokenizer.decode(wanted)
    assert server.ask(ids[0].tolist(), max_tokens=6, chat=False) == tokenizer.decode(wanted)


@SERVER
def test_choices_and_grammars_bind_the_answer(server):
    choices = ['say "yes"', "no\n", "nö"]
    assert server.ask("hello", choices=choices) in choices
    assert server.ask("hello", "first", choices=["no"]) == "no"
    assert re.fullmatch("[ab]{3}", server.ask("hello", grammar="root ::= [ab] [ab] [ab]"))


@SERVER
def test_a_completion_is_scored_token_by_token(server, base, tokenizer):
    ids = tokenizer("A wide river, and a boat.<eos> And")["input_ids"]
    with torch.no_grad():
        ours = base(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    ours = [row[number].item() for row, number in zip(ours, ids[1:], strict=True)]
    theirs = server.score(ids[:1], ids[1:], chat=False)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 5e-3
    assert theirs != server.score(ids[:1], ids[1:], "first", chat=False)
    best, top = next(iter(server.logprobs(HELLO).items()))
    assert math.isclose(server.score(HELLO, [best])[0], top, abs_tol=1e-5)
    assert len(server.score(HELLO, " a boat")) == len(tokenizer(" a boat")["input_ids"])


@SERVER
def test_openais_client_works_unchanged(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(
        base_url=server.url + "/v1",
        api_key="none",
        http_client=openai.DefaultHttpxClient(trust_env=False),
    )
    answers = set()
    for name in (None, "first"):
        answer = client.chat.completions.create(
            model="any",
            messages=HELLO,
            max_tokens=6,
            temperature=0,
            extra_body={"lora": server.lora(name)},
        )
        answers.add(answer.choices[0].message.content)
        assert answer.choices[0].message.content == server.ask(HELLO, name, max_tokens=6)
    assert len(answers) == 2
    client.close()


@SERVER
@pytest.mark.parametrize(
    ("prompt", "options", "message", "error"),
    [
        (
            "hello",
            {"adapter": "third"},
            "adapter='third' is unknown.*'first', 'second'",
            ValueError,
        ),
        ("hello", {"adapter": {"first": "half"}}, "scale of 'first' must be a number", TypeError),
        ("hello", {"choices": ["a"], "grammar": "root ::= [a]"}, "not both", ValueError),
        ("hello", {"choices": "yes"}, "choices='yes' must be a list", ValueError),
        ("hello", {"choices": []}, "must be a list of texts", ValueError),
        ("hello", {"grammar": "root := ["}, "llama.cpp refuses this: .*grammar", ValueError),
        ("hello " * 300, {}, "exceeds the available context size", ValueError),
        ([{"role": "robot", "content": "x"}], {}, "role 'robot'", ValueError),
        ([], {}, "prompt must be a list of messages", ValueError),
        (HELLO, {"chat": False}, "a text or a list of ids", TypeError),
        ([], {"chat": False}, "a text or a list of ids", TypeError),
    ],
)
def test_a_wrong_request_is_refused(server, prompt, options, message, error):
    with pytest.raises(error, match=message):
        server.ask(prompt, **options)


# ------------------------------------------------------------------ beginning and end


@SERVER
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_it_ends_with_the_block_however_that_ends(base_file, error):
    with pytest.raises(error), serve(base_file) as server:
        assert reached(server.url)
        raise error
    assert not reached(server.url) and repr(server).endswith(": stopped>")
    with pytest.raises(RuntimeError, match="the server is stopped: ask inside the block"):
        server.ask("hello")


@SERVER
def test_it_ends_even_if_it_has_hardly_begun(base_file):
    """Each of ten that end at once: llama.cpp alone hangs in about half of such attempts."""
    for _ in range(10):
        with serve(base_file):
            pass


@SERVER
def test_the_same_port_serves_twice_in_a_row_and_says_nothing(base_file, files, capfd):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for _ in range(2):
        with serve(base_file, files, port=port) as server:
            assert server.url == f"http://127.0.0.1:{port}"
            server.ask("hello", "first", max_tokens=1)
            with pytest.raises(ValueError, match=f"port={port} cannot be used"):
                serve(base_file, port=port).__enter__()
    assert capfd.readouterr() == ("", "")


@SERVER
def test_a_server_that_went_away_is_an_error_not_a_hang(base_file):
    with serve(base_file) as server:
        server.ask("hello", max_tokens=1)
        address, server._native = server.url, object()
        assert not reached(address)
        with pytest.raises(RuntimeError, match=f"the server at {address} does not answer"):
            server.ask("hello")


@SERVER
@pytest.mark.parametrize(
    ("options", "message", "error"),
    [
        ({"port": 0}, "port=0 must be from 1 to 65535; None takes a free one", ValueError),
        ({"port": "8000"}, "port must be an integer, got '8000'", TypeError),
        ({"context": 0}, "context=0 must be at least 1", ValueError),
        ({"context": None}, "context must be an integer, got None", TypeError),
        ({"adapters": "a.gguf"}, "adapters must be {name: file}, got 'a.gguf'", TypeError),
    ],
)
def test_wrong_settings_are_refused(base_file, options, message, error):
    with pytest.raises(error, match=message), serve(base_file, **options):
        pass


@SERVER
def test_a_file_that_is_none_is_named_before_it_starts(base_file, files, tmp_path, capfd):
    cut, text = tmp_path / "cut.gguf", tmp_path / "text.gguf"
    whole = base_file.read_bytes()
    text.write_text("no model", encoding="utf-8")
    (tmp_path / "empty.gguf").touch()
    wrong = {
        "missing.gguf": (FileNotFoundError, "there is no such file"),
        "text.gguf": (ValueError, "is not a GGUF file"),
        "empty.gguf": (ValueError, "is not a GGUF file"),
        "": (ValueError, "is a folder: export it first, with to_gguf or adapter_to_gguf"),
    }
    for name, (error, message) in wrong.items():
        with pytest.raises(error, match=message), serve(tmp_path / name):
            pass
        with pytest.raises(error, match=rf"adapters\['a'\]=.*{message}"):
            serve(base_file, {"a": tmp_path / name}).__enter__()
    for size in (6, 40, 5000, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf' is broken or cut off"), serve(cut):
            pass
    with pytest.raises(ValueError, match="is an adapter: serve its base"), serve(files["first"]):
        pass
    with pytest.raises(ValueError, match="is a whole model"), serve(base_file, {"a": base_file}):
        pass
    assert capfd.readouterr() == ("", "")


@SERVER
def test_a_whole_file_that_llama_cpp_does_not_know_is_named(tmp_path):
    file = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(file, "no-such-architecture")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(RuntimeError, match=r"llama\.cpp does not load '.*odd\.gguf'"), serve(file):
        pass


@SERVER
def test_an_adapter_of_another_base_is_refused(base, base_file, files, tokenizer, tmp_path):
    other = tiny_llama(vocab_size=4096, intermediate_size=128)
    wider = to_gguf(other, tmp_path / "wider.gguf", "F32", tokenizer)
    message = r"adapters\['a'\] was made for another model than .* and 'blk\..*' there"
    with pytest.raises(ValueError, match=message), serve(wider, {"a": files["first"]}):
        pass
    model = adapted(base)
    merge(model)
    merged = to_gguf(model, tmp_path / "merged.gguf", "F32", tokenizer)
    message = "trained on a base with other weights .* unmerged, or pass check=False"
    with pytest.raises(ValueError, match=message), serve(merged, {"a": files["first"]}):
        pass
    with serve(merged, {"a": files["first"]}, check=False) as server:
        assert server.logprobs(HELLO, "a") != server.logprobs(HELLO)


@SERVER
def test_a_quantised_base_is_the_adapters_own(base, files, tokenizer, tmp_path):
    half = deepcopy(base).bfloat16()
    file = to_gguf(half, tmp_path / "q.gguf", "Q4_0", tokenizer)
    with serve(file, files) as server:
        assert server.logprobs(HELLO, "first") != server.logprobs(HELLO)


@SERVER
def test_a_file_without_a_chat_template_takes_no_messages(base, tmp_path):
    file = to_gguf(base, tmp_path / "m.gguf", "F32", load_tokenizer("tinylm"))
    with serve(file) as server:
        assert server.ask("hello", chat=False, max_tokens=2)
        for ask in (server.ask, server.tokens, server.logprobs):
            with pytest.raises(ValueError, match="no chat template.*chat=False"):
                ask("hello")
    with serve(file, check=False) as server:
        assert (
            "im_start"
            in server.ask.__self__._post("/apply-template", {"messages": HELLO})["prompt"]
        )


# ------------------------------------------------------------------ without the package


def test_without_xllamacpp_one_sentence_says_how_to_install_it(base_file, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("importlib.import_module", missing)
    assert not available()
    with pytest.raises(ImportError, match=re.escape(INSTALL)), serve(base_file):
        pass
    assert "--only-binary :all: xllamacpp" in INSTALL
