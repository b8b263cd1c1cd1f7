"""A completions server as a process of its own: a small model behind HTTP, on 127.0.0.1 alone, that also misbehaves.

    python completions_server.py SETTINGS.json

It writes its port to the settings' ``ready`` file once it serves, and a line for each request to ``log``: its number,
the fault, its key, the names in its body and a digest of the prompt. The settings are read anew at each request, and
another ``turn`` counts from 0 again: ``model`` (a folder with its tokenizer), ``faults`` (number of the request -> what
is done instead), ``always`` (a fault) from the number ``from`` on, ``shift`` (added to every token id that it tells),
``key``.
"""

import hashlib
import json
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def digest(prompt: str | list[int]) -> str:
    """What tells prompts apart."""
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, path: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.path, self.turn, self.served = path, None, 0
        self.lock = threading.Lock()
        settings = json.loads(path.read_text())
        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(settings["model"])
        self.model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32).eval()

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are no news."""

    def request(self, key: str | None, body: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        """The settings now, and the fault with which this request meets; it is noted."""
        with self.lock:
            settings = json.loads(self.path.read_text())
            if settings["turn"] != self.turn:
                self.turn, self.served = settings["turn"], 0
            number = self.served
            self.served += 1
            always = settings.get("always") if number >= settings.get("from", 0) else None
            fault = settings.get("faults", {}).get(str(number)) or always
            with Path(settings["log"]).open("a") as file:
                line = {"number": number, "fault": fault, "key": key, "fields": sorted(body)}
                file.write(json.dumps(line | {"prompt": digest(body["prompt"])}) + "\n")
        return settings, fault

    @torch.inference_mode()
    def logs(self, token_ids: list[int]) -> torch.Tensor:
        with self.lock:
            logits = self.model(torch.tensor([token_ids])).logits[0]
        return logits.log_softmax(-1)


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing to standard error."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        settings, fault = self.server.request(self.headers.get("Authorization"), body)
        if self.path != "/v1/completions":
            return self.answer(404, b"{}")
        if settings.get("key") and self.headers.get("Authorization") != f"Bearer {settings['key']}":
            return self.answer(401, b"{}")
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return self.connection.close()
        if fault == "429":
            return self.answer(429, b"{}", {"Retry-After": settings.get("retry_after", "0")})
        if fault in ("500", "503", "400"):
            return self.answer(int(fault), json.dumps({"error": {"message": f"no: {body['prompt']}"}}).encode())
        if fault == "redirect":
            return self.answer(307, b"", {"Location": settings["elsewhere"]})
        if fault == "slow":
            time.sleep(settings.get("slow_seconds", 30))
        content = json.dumps(self.completion(body, settings.get("shift", 0))).encode()
        if fault == "truncated":
            content = content[: len(content) // 2]
        if fault == "nested":
            content = b"[" * 100_000
        if fault == "garbled":
            return self.answer(200, content, {"Content-Encoding": "gzip"})
        if fault == "huge":
            content = b" " * 5_000_000 + content
        if fault == "dripping":
            self.answer(200, content[:1], {}, length=len(content))
            for _ in range(200):
                time.sleep(0.1)
                self.wfile.write(b" ")
                self.wfile.flush()
            return None
        if fault == "cut":  # says more bytes than it sends
            self.answer(200, content[: len(content) // 2], {}, length=len(content))
            self.close_connection = True
            return self.connection.close()
        return self.answer(200, content)

    def answer(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def completion(self, body: dict[str, Any], shift: int) -> dict[str, Any]:
        server, prompt = self.server, body["prompt"]
        token_ids = server.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        logs = server.logs(token_ids) if token_ids else torch.zeros(0, 1)
        classes = body.get("prompt_logprobs") or body.get("logprobs") or 1
        values, ids = logs.topk(min(classes, logs.shape[-1]), dim=-1)
        tops: list[dict[int, float] | None] = [None]
        for place, token_id in enumerate(token_ids[1:]):
            top = dict(zip(ids[place].tolist(), values[place].tolist(), strict=True))
            tops.append({token_id: logs[place, token_id].item()} | top)
        names = [f"token_id:{i + shift}" if shift else server.tokenizer.decode([i]) for i in token_ids]
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length", "logprobs": None}
        if "prompt_logprobs" in body:
            choice["prompt_token_ids"] = [i + shift for i in token_ids]
            choice["prompt_logprobs"] = [
                None
                if top is None
                else {
                    str(i): {"logprob": value, "rank": rank + 1, "decoded_token": "x"}
                    for rank, (i, value) in enumerate(top.items())
                }
                for top in tops
            ]
        elif body.get("echo"):
            choice["logprobs"] = {
                "tokens": names,
                "token_logprobs": [None if t is None else t[i] for t, i in zip(tops, token_ids, strict=True)],
                "top_logprobs": [
                    None if t is None else {server.tokenizer.decode([i]): value for i, value in t.items()} for t in tops
                ],
                "text_offset": [0] * len(token_ids),
            }
        return {"id": "1", "object": "text_completion", "model": body["model"], "choices": [choice]}


if __name__ == "__main__":
    running = Server(Path(sys.argv[1]))
    ready = Path(json.loads(Path(sys.argv[1]).read_text())["ready"])
    ready.with_suffix(".new").write_text(str(running.server_address[1]))
    ready.with_suffix(".new").rename(ready)
    running.serve_forever()
