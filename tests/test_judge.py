"""The judge against an endpoint on loopback that answers, fails, hangs or talks nonsense."""

import http.server
import json
import logging
import threading
import time

import pytest

from pvm_jax.evals.judge import Judge, JudgeError, correct
from pvm_jax.evals.questions import Question, Verdict

KEY = "sk-a-key-that-nobody-must-see"
QUESTION = Question("7", "How long is the rope?", "B", {"A": "10 cm", "B": "12 cm"})


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Replies as the list `script` of the server says: a text, a status, raw bytes, or something to call."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, dict(self.headers), json.loads(body)))
        step = self.server.script.pop(0)
        if callable(step):
            return step(self)
        status, raw = (step, b"{}") if isinstance(step, int) else (200, step)
        if isinstance(step, str):
            raw = json.dumps({"model": "judge-0801", "choices": [{"message": {"content": step}}]}).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.requests, server.script, server.over = [], [], threading.Event()
    server.daemon_threads, server.block_on_close = True, False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def judge(endpoint, monkeypatch):
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    monkeypatch.setenv("no_proxy", "*")

    def make(**options) -> Judge:
        options = {"key_variable": "TEST_JUDGE_KEY", "pause": 0.01, "seconds": 60.0} | options
        return Judge(f"http://127.0.0.1:{endpoint.server_port}/v1", "some-judge", **options)

    return make


def test_asks_and_stores_who_replied(endpoint, judge):
    endpoint.script += ['{"correct": true}', "No."]
    right = judge()(QUESTION, "<think>10?</think><answer>twelve centimetres \ud800</answer>")
    assert right.verdict.right and right.verdict.answer.startswith("twelve")
    assert (right.model, right.error) == ("judge-0801", None)
    assert judge()(QUESTION, "ten").verdict == Verdict("ten", False)

    path, headers, body = endpoint.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "some-judge" and body["temperature"] == 0
    (message,) = body["messages"]
    for part in ("How long is the rope?\nA. 10 cm\nB. 12 cm", "B. 12 cm\n</correct_answer>", "twelve centimetres"):
        assert part in message["content"]
    assert "10?" not in message["content"], "thinking is not what is judged"


def test_tries_again_what_may_pass(endpoint, judge):
    endpoint.script += [503, b"<html>busy</html>", "perhaps", 429, '```json\n{"correct": "yes"}\n```']
    start = time.monotonic()
    assert judge(tries=5, pause=0.02)(QUESTION, "12 cm").verdict.right
    assert time.monotonic() - start > 0.02 * (1 + 2 + 4 + 8)
    assert len(endpoint.requests) == 5


@pytest.mark.parametrize(
    "script, requests, reason",
    [
        ([500, 500], 2, "status 500"),
        ([401], 1, "status 401"),
        ([302], 1, "status 302"),
        ([b"not JSON", b"[1]"], 2, "no chat completion"),
        ([b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}'], 2, "no chat completion"),
        ([b"[" * 100_000, b"\xff"], 2, "no chat completion"),
        (["I would say that it is almost correct", '{"correct": 0.5}'], 2, "neither yes nor no"),
        ([b"x" * (2**20 + 1)], 1, "longer than 1 MiB"),
        ([lambda handler: handler.connection.close()] * 2, 2, "no connection"),
    ],
)
def test_a_failing_judge_marks_and_never_scores(endpoint, judge, caplog, script, requests, reason):
    endpoint.script += script
    caplog.set_level(logging.DEBUG)
    judged = judge(tries=2)(QUESTION, "12 cm")
    assert judged.verdict == Verdict(None, False) and judged.model == "some-judge"
    assert reason in judged.error and len(endpoint.requests) == requests
    assert KEY not in judged.error + repr(judged) + repr(judge()) + caplog.text


def test_a_judge_that_hangs_is_left(endpoint, judge):
    def hang(handler):
        handler.server.over.wait(60)

    def trickle(handler):
        handler.send_response(200)
        handler.end_headers()
        while not handler.server.over.wait(0.05):
            handler.wfile.write(b" ")

    endpoint.script += [hang, trickle]
    for _ in (hang, trickle):
        judged = judge(tries=1, seconds=0.3)(QUESTION, "12 cm")
        assert "no reply within 0.3 s (try 1 of 1)" in judged.error and not judged.verdict.right


def test_nobody_there(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    judged = Judge("http://127.0.0.1:9", "m", tries=1)(QUESTION, "12 cm")  # the port of `discard`, which is closed
    assert "no connection (ConnectionRefusedError)" in judged.error and not judged.verdict.right


def test_nobody_is_asked_about_nothing(endpoint, judge):
    assert judge()(QUESTION, "<think>It may be 12").verdict == Verdict(None, False)
    assert not endpoint.requests


@pytest.mark.parametrize(
    "url", ["localhost:8000", "file:///etc/passwd", "http://", "https://me:hunter2@host/v1", "http://["]
)
def test_addresses_that_are_none(url):
    with pytest.raises(JudgeError, match="expected http") as raised:
        Judge(url, "m")
    assert "hunter2" not in str(raised.value)


def test_a_key_is_needed_if_one_is_named(judge, monkeypatch):
    monkeypatch.delenv("TEST_JUDGE_KEY")
    with pytest.raises(JudgeError, match="TEST_JUDGE_KEY, which is not set"):
        judge()(QUESTION, "12 cm")
    monkeypatch.setenv("TEST_JUDGE_KEY", f"{KEY}\nHost: x")
    with pytest.raises(JudgeError, match="TEST_JUDGE_KEY") as raised:
        judge()(QUESTION, "12 cm")
    assert KEY not in str(raised.value)
    monkeypatch.setenv("TEST_JUDGE_KEY", "")


def test_replies():
    for text in ("yes", "Yes.", "TRUE", '"correct"', "<think>no?</think>yes", '{"correct": true, "why": "same"}'):
        assert correct(text) is True, text
    for text in ("no", "incorrect", '{"correct": false}', '```\n{"correct": "No"}\n```'):
        assert correct(text) is False, text
    for text in ("", "yes and no", "not correct", '{"correct": null}', '{"correct": 1}', "{}", "{", "```", "[true]"):
        assert correct(text) is None, text
