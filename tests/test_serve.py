"""The server beside vLLM, against a stand-in for its routes, and against vLLM (T2L_VLLM names its python)."""

import argparse
import concurrent.futures
import http.server
import json
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch

import generate
import lora
from extras import serve
from tests.helpers import DESC, close, command, needs_models, refused, repeated


class StandIn(http.server.ThreadingHTTPServer):
    """vLLM as far as serve.py sees it: models {name: folder}; it may be told to refuse."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Routes)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.models, self.refuses = {"base": ""}, ""
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()


class Routes(http.server.BaseHTTPRequestHandler):
    """The routes of the stand-in."""

    def log_message(self, *_):
        pass

    def reply(self, status: int, content) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.reply(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.refuses:
            self.reply(400, {"error": self.server.refuses})
        elif self.path == "/v1/load_lora_adapter":
            assert lora.load_adapter(content["lora_path"])[0]  # whole when vLLM reads it
            self.server.models[content["lora_name"]] = content["lora_path"]
            self.reply(200, "ok")
        else:
            del self.server.models[content["lora_name"]]
            self.reply(200, "ok")


@pytest.fixture
def vllm():
    server = StandIn()
    yield server
    server.shutdown()


@pytest.fixture
def start(vllm, tmp_path):
    """Starts a server with these settings; returns a function that sends it requests: (status, answer)."""
    running = []

    def run(**settings):
        settings = dict(vllm=vllm.url, out=tmp_path / "served", keep=8, max_lora_rank=8) | settings
        models = dict(hypernet=None, base_model=None, encoder=None, dtype=None, instruction=None)
        writer = serve.Writer(argparse.Namespace(**models | settings), torch.device("cpu"))
        handler = serve.make_handler(writer, settings.get("token"))
        handler.log_message = lambda *_: None
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        running.append(server)
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        return lambda *words, **more: send(f"http://127.0.0.1:{server.server_address[1]}", *words, **more)

    yield run
    for server in running:
        server.shutdown()


def send(url: str, method: str, path: str, content=None, headers={}) -> tuple[int, dict]:
    """A request to a server, and its answer as JSON."""
    data = content if isinstance(content, bytes) or content is None else json.dumps(content).encode()
    request = urllib.request.Request(url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as e:
        return e.code, json.loads(e.read())


ADAPTERS, JSON = "/v1/adapters", {"Content-Type": "application/json"}


def test_a_description_becomes_a_model(start, vllm, tmp_path):
    ask = start()
    status, said = ask("POST", ADAPTERS, {"description": DESC})
    assert status == 200 and said["model"] in vllm.models and said["rank"] == 8
    assert said["messages"] == [{"role": "system", "content": ""}, {"role": "user", "content": "INPUT"}]
    written, _ = lora.load_adapter(vllm.models[said["model"]])
    assert command(generate, "--desc", DESC, "--out", tmp_path / "adapter") == 0
    close(written["q_proj"], lora.load_adapter(tmp_path / "adapter")[0]["q_proj"])
    assert ask("GET", ADAPTERS) == (200, {"adapters": [said]})
    assert ask("DELETE", f"{ADAPTERS}/{said['model']}") == (200, {"model": said["model"], "deleted": True})
    assert list(vllm.models) == ["base"] and not list((tmp_path / "served").iterdir())
    assert ask("DELETE", f"{ADAPTERS}/{said['model']}")[0] == 404


def test_the_same_text_is_written_once_also_at_the_same_time(start, vllm):
    ask = start()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda _: ask("POST", ADAPTERS, {"description": DESC}), range(8)))
    assert {status for status, _ in said} == {200} and len({answer["model"] for _, answer in said}) == 1
    assert len(vllm.models) == 2 and sum(answer["ms"] > 0 for _, answer in said) <= 1
    assert ask("POST", ADAPTERS, {"description": "Reverse the fruits."})[1]["model"] != said[0][1]["model"]


def test_the_oldest_go(start, vllm, tmp_path):
    ask = start(keep=2)
    names = [ask("POST", ADAPTERS, {"description": text})[1]["model"] for text in ("One.", "Two.", "Three.")]
    assert set(vllm.models) == {"base", *names[1:]}
    ask("POST", ADAPTERS, {"description": "Two."})  # asked for again: not the oldest any more
    newest = ask("POST", ADAPTERS, {"description": "Four."})[1]["model"]
    assert set(vllm.models) == {"base", names[1], newest}
    assert {path.name for path in (tmp_path / "served").iterdir()} == {names[1], newest}


def test_what_an_earlier_server_left_is_removed(start, vllm, tmp_path):
    name = start()("POST", ADAPTERS, {"description": DESC})[1]["model"]
    (tmp_path / "served" / ".t2l-half").mkdir()  # it was stopped in the middle of a write
    (tmp_path / "served" / "notes.txt").write_text("mine")
    ask = start()
    assert [path.name for path in (tmp_path / "served").iterdir()] == ["notes.txt"]
    assert ask("POST", ADAPTERS, {"description": DESC})[1]["model"] == name  # which vLLM still has
    assert (tmp_path / "served" / name / "adapter_config.json").exists()


def test_a_document_needs_ranks(start, vllm):
    document = {"document": repeated("cat lamp <eos>\nsun bird wolf plum\n", 3)}
    status, said = start()("POST", ADAPTERS, document)
    assert status == 413 and said["error"].endswith("start vLLM and this server with rank 16")
    assert list(vllm.models) == ["base"]
    status, said = start(max_lora_rank=16)("POST", ADAPTERS, document)
    assert status == 200 and said["rank"] == 16 and said["model"] in vllm.models


WRONG = {
    b"{": 400,
    b"[1]": 400,
    b"{}": 400,
    b'{"description": 3}': 400,
    b'{"description": "  "}': 400,
    b'{"description": "\\ud800"}': 400,
    b'{"description": "a", "document": "b"}': 400,
    b'{"other": "a"}': 400,
    b'{"document": "a unicorn"}': 400,
    b'{"description": "' + b"x" * 300_000 + b'"}': 413,
}


def test_a_wrong_request_is_one_error(start, vllm, tmp_path):
    ask = start()
    for body, expected in WRONG.items():
        status, said = ask("POST", ADAPTERS, body)
        assert status == expected and list(said) == ["error"] and said["error"], body[:30]
    assert ask("GET", "/v1/other")[0] == 404
    assert list(vllm.models) == ["base"] and not list((tmp_path / "served").iterdir())


def test_vllm_may_refuse_or_be_away(start, vllm, tmp_path):
    ask = start()
    vllm.refuses = "no LoRA slot is free"
    status, said = ask("POST", ADAPTERS, {"description": DESC})
    assert (
        status == 502 and "vLLM refuses load_lora_adapter" in said["error"] and vllm.refuses in said["error"]
    )
    assert not list((tmp_path / "served").iterdir()) and ask("GET", ADAPTERS)[1] == {"adapters": []}
    vllm.refuses = ""
    assert ask("POST", ADAPTERS, {"description": DESC})[0] == 200  # now it works
    away = start(vllm="http://127.0.0.1:1", out=tmp_path / "other")
    status, said = away("POST", ADAPTERS, {"description": DESC})
    assert status == 502 and "vLLM does not answer at http://127.0.0.1:1" in said["error"]


def test_a_token_is_asked_for(start, monkeypatch):
    ask = start(token="secret")
    assert ask("GET", ADAPTERS)[0] == 401
    assert ask("GET", ADAPTERS, headers={"Authorization": "Bearer wrong"})[0] == 401
    assert ask("GET", ADAPTERS, headers={"Authorization": "Bearer secret"})[0] == 200
    monkeypatch.setattr("sys.argv", ["serve.py", "--host", "0.0.0.0"])
    refused("so it needs --token", serve.parse_args)


# -------------------- The real one --------------------

TWENTY = """just the family name please|Put the surname first, then a comma and the first name.
Say hello to them.|Give the initials with full stops.|Write the name in brackets.|Only the first name.
Put the name in quotes.|Write it in bold.|Add an exclamation mark.|Replace the space by an underscore.
Say it twice.|Start with Answer:|Make it a question.|Put it in parentheses.|Make a user name of it.
Everything in small letters.|The last name, in brackets.|Surname first, in quotes.|the initials, in bold
First name and an exclamation mark"""
PEOPLE = ["Ada Lovelace", "Grace Hopper", "Alan Turing", "Mary Shelley"]


@needs_models
def test_vllm_answers_as_generate_does(tmp_path, capsys):
    """20 descriptions, 4 at a time."""
    python = os.environ.get("T2L_VLLM")
    if not python:
        pytest.skip("T2L_VLLM names no python with vLLM")
    base, encoder = os.environ["T2L_BASE"], os.environ["T2L_ENCODER"]
    texts = TWENTY.replace("\n", "|").split("|")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        base,
        "--served-model-name",
        "base",
    ]
    start += "--enable-lora --max-lora-rank 8 --max-loras 4 --max-model-len 512 --enforce-eager".split()
    env = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1"}
    url = f"http://127.0.0.1:{port}"
    with open(tmp_path / "vllm.log", "w") as log:
        vllm = subprocess.Popen([*start, "--port", str(port)], env=env, stdout=log, stderr=log, cwd=tmp_path)
    try:
        for _ in range(300):
            assert vllm.poll() is None, (tmp_path / "vllm.log").read_text()[-2000:]
            try:
                send(url, "GET", "/v1/models")
                break
            except OSError:
                time.sleep(1)
        settings = dict(vllm=url, out=tmp_path / "served", keep=64, max_lora_rank=8, instruction=None)
        settings |= dict(hypernet=None, base_model=base, encoder=encoder, dtype=None)
        writer = serve.Writer(argparse.Namespace(**settings), torch.device("cpu"))

        def ask(i: int) -> str:
            """The answer of vLLM for a description, which is a model by then."""
            said = writer.write("descriptions", texts[i])
            messages = json.loads(json.dumps(said["messages"]).replace("INPUT", PEOPLE[i % 4]))
            request = dict(model=said["model"], messages=messages, temperature=0, max_tokens=32)
            status, answer = send(url, "POST", "/v1/chat/completions", request, JSON)
            assert status == 200, answer
            return answer["choices"][0]["message"]["content"].strip()

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(ask, range(len(texts))))
    finally:
        vllm.terminate()
        vllm.wait(60)
    net, reader = writer.nets["descriptions"], writer.readers["descriptions"]
    expected = []
    for i, text in enumerate(texts):
        adapters, _ = generate.write_adapters(net, [text], writer.base, reader)
        adapter, args = lora.select(adapters, 0), argparse.Namespace(max_new_tokens=32)
        asked = [PEOPLE[i % 4]]
        expected += generate.ask(writer.base, writer.tokenizer, asked, adapter, net.config.scaling, "", args)
    assert answers == expected and len(texts) == 20
