"""Describe a task, get a model name: a small server beside vLLM, which serves the base model.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True python -m vllm.entrypoints.openai.api_server \\
        --model HuggingFaceTB/SmolLM2-135M-Instruct --enable-lora --max-lora-rank 8 --max-loras 4
    python -m extras.serve --base_model smollm2-135m --vllm http://localhost:8000
    curl localhost:8001/v1/adapters -d '{"description": "just the family name please"}'

The answer's "model" is a model of vLLM for any OpenAI client; "messages" show how to ask it. Routes:

    POST   /v1/adapters         {"description": "..."} or {"document": "..."} -> model, rank, ms, messages
    GET    /v1/adapters         the models, the oldest first
    DELETE /v1/adapters/MODEL   unloads one

A document needs rank 8 for each of its chunks, and 8 more: start vLLM with a larger --max-lora-rank, and this
server with the same --max_lora_rank. vLLM must be able to read the folder of --out.
"""

import argparse
import hashlib
import hmac
import json
import shutil
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch

import generate
import lora
import model
from support import flags, processes
from support.files import UserError, command

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes
LONGEST = 200_000  # bytes of a request
PREFIX = "t2l-"  # of the names of models


class Refused(Exception):
    """A request that is answered by an error: (status, message)."""


def call(url: str, route: str, content: dict | None = None) -> bytes:
    """The answer of one of vLLM's routes. Raises Refused if vLLM is away, or refuses."""
    data = json.dumps(content).encode() if content else None
    request = Request(f"{url}/v1/{route}", data, {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=120) as response:
            return response.read()
    except HTTPError as e:
        reason = " ".join(e.read(500).decode(errors="replace").split())
        raise Refused(502, f"vLLM refuses {route}: {reason}") from None
    except OSError as e:
        raise Refused(502, f"vLLM does not answer at {url}: {e}") from None


class Writer:
    """Writes adapters and has vLLM load them, one request at a time."""

    def __init__(self, args, device: torch.device):
        self.args, self.lock = args, threading.Lock()
        self.nets, self.marks, reason = {}, {}, None  # {"descriptions" or "documents": ...}
        for reads in ("descriptions", "documents"):
            try:
                self.nets[reads], folder = generate.load_net(args.hypernet, reads, args, device)
                weights = (folder / "hypernet.safetensors").read_bytes()
                self.marks[reads] = hashlib.sha256(weights).hexdigest()
            except UserError as e:
                reason = e
        if not self.nets:
            raise reason
        configs = [net.config for net in self.nets.values()]
        self.base, self.tokenizer = generate.load_base_for(configs, args, device)
        self.readers = {}
        for reads, net in self.nets.items():
            self.readers[reads] = generate.load_reader_for(net, self.base, self.tokenizer, args)
        self.known = {}  # {model: the answer to the request}, the oldest first
        args.out.mkdir(parents=True, exist_ok=True)
        for left in args.out.glob(f"*{PREFIX}*"):  # by an earlier server
            shutil.rmtree(left)

    def loaded(self) -> set[str]:
        """The models that vLLM has."""
        return {entry["id"] for entry in json.loads(call(self.args.vllm, "models"))["data"]}

    def write(self, reads: str, text: str) -> dict:
        """The model for a description or a document; it is written if it is not there yet."""
        if reads not in self.nets:
            raise Refused(400, f"this server has no hypernetwork that reads {reads}")
        name = PREFIX + hashlib.sha256(f"{self.marks[reads]} {text}".encode()).hexdigest()[:16]
        with self.lock:
            if name in self.known and name in self.loaded():
                self.known[name] = self.known.pop(name)  # the youngest now
                return self.known[name] | {"ms": 0}
            self.known[name] = self.write_new(name, reads, text)
            while len(self.known) > self.args.keep:
                self.remove(next(iter(self.known)))
            return self.known[name]

    def write_new(self, name: str, reads: str, text: str) -> dict:
        """Write an adapter, have vLLM load it, and say how to ask it."""
        net, started = self.nets[reads], time.perf_counter()
        model.check_known(self.tokenizer, [text] if reads == "documents" else [])
        adapters, _ = generate.write_adapters(net, [text], self.base, self.readers[reads])
        milliseconds = round((time.perf_counter() - started) * 1000)
        adapter = lora.select(adapters, 0)
        rank = next(iter(adapter.values()))[0].shape[-2]
        if rank > self.args.max_lora_rank:
            needed = next((r for r in RANKS if r >= rank), None)
            way_out = f"start vLLM and this server with rank {needed}" if needed else "shorten the text"
            raise Refused(413, f"this needs an adapter of rank {rank}: {way_out}")
        folder = self.args.out / name
        with tempfile.TemporaryDirectory(dir=self.args.out, prefix=f".{PREFIX}") as tmp:
            lora.save_adapter(Path(tmp) / name, adapter, net.config)
            (Path(tmp) / name).rename(folder)  # whole, or not at all
        try:
            if name not in self.loaded():  # it may have it from an earlier server
                path = {"lora_name": name, "lora_path": str(folder.resolve())}
                call(self.args.vllm, "load_lora_adapter", path)
        except Refused:
            shutil.rmtree(folder)
            raise
        instruction = text + model.SUFFIX if net.config.instruction and reads == "descriptions" else ""
        messages = model.chat(self.tokenizer, "INPUT", instruction)
        return {"model": name, "rank": rank, "ms": milliseconds, "messages": messages}

    def remove(self, name: str) -> dict:
        """Unload a model and delete its folder."""
        if name not in self.known:
            raise Refused(404, f"there is no model {name}")
        if name in self.loaded():
            call(self.args.vllm, "unload_lora_adapter", {"lora_name": name})
        shutil.rmtree(self.args.out / name)
        del self.known[name]
        return {"model": name, "deleted": True}


def read_request(body: bytes) -> tuple[str, str]:
    """("descriptions" or "documents", text) of a request."""
    try:
        ((kind, text),) = json.loads(body).items()
        text.encode()
    except (ValueError, AttributeError):
        kind, text = "", ""
    if kind not in ("description", "document") or not text.strip():
        raise Refused(400, 'send {"description": "..."} or {"document": "..."}, not empty')
    return f"{kind}s", text.strip()


def make_handler(writer: Writer, token: str | None) -> type:
    """The class that answers requests, in JSON; errors are {"error": "..."}."""

    class Handler(BaseHTTPRequestHandler):
        """One request."""

        def act(self) -> dict:
            """Do what the request asks for."""
            given = self.headers.get("Authorization", "").encode()
            if token and not hmac.compare_digest(given, f"Bearer {token}".encode()):
                raise Refused(401, "the header Authorization: Bearer TOKEN is missing or wrong")
            length = self.headers.get("Content-Length", "0")
            if not length.isdigit() or int(length) > LONGEST:
                raise Refused(413, f"a request has at most {LONGEST:,} bytes")
            if self.command == "DELETE" and self.path.startswith("/v1/adapters/"):
                with writer.lock:
                    return writer.remove(self.path.removeprefix("/v1/adapters/"))
            if self.path != "/v1/adapters":
                raise Refused(404, f"there is no {self.path}, but /v1/adapters")
            if self.command == "GET":
                return {"adapters": list(writer.known.values())}
            return writer.write(*read_request(self.rfile.read(int(length))))

        def do_POST(self) -> None:
            """Send as JSON what act() returns, or what was wrong with the request."""
            try:
                status, content = 200, self.act()
            except Refused as e:
                status, content = e.args
                content = {"error": content}
            except UserError as e:
                status, content = 400, {"error": str(e)}
            body = json.dumps(content).encode() + b"\n"
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_DELETE = do_POST

    return Handler


def parse_args() -> argparse.Namespace:
    """The flags."""
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--vllm", default="http://localhost:8000", help="address of the vLLM server")
    add("--host", default="127.0.0.1", help="address to listen at; others than this one need --token")
    add("--port", type=int, default=8001, help="port to listen at")
    add("--token", help="what clients have to send: Authorization: Bearer TOKEN")
    add("--keep", type=flags.at_least(1), default=64, help="so many models; then the oldest go")
    add("--max_lora_rank", type=int, choices=RANKS, default=8, help="that of vLLM")
    add("--out", type=Path, default=Path("out/served"), help="folder of the adapters")
    generate.add_model_flags(parser)
    args = parser.parse_args()
    args.vllm = args.vllm.rstrip("/")
    if args.host not in ("127.0.0.1", "localhost") and not args.token:
        raise UserError(f"--host {args.host}: others can reach it there, so it needs --token")
    return args


def main() -> None:
    args = parse_args()
    writer = Writer(args, processes.start_single(args.device))
    try:
        server = ThreadingHTTPServer((args.host, args.port), make_handler(writer, args.token))
    except OSError as e:
        raise UserError(f"--port {args.port}: {e}") from None
    print(f"http://{args.host}:{args.port}/v1/adapters, beside {args.vllm}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    command(main)
