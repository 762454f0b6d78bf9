"""Run other people's clients against the server: make test-clients installs them, each as its users have it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.serve.serving import CLEAN, Running, Scripted
from vlv.checkpoints.folder import Checkpoint

ROOT = Path(__file__).parents[3]
CLIENTS = Path(os.environ.get("VLV_CLIENTS", ROOT / ".venv/clients"))
HOW = "run make test-clients"

LANGCHAIN = """
from langchain_openai import ChatOpenAI
from langchain_core.messages import HumanMessage
llm = ChatOpenAI(model="tiny", base_url=URL + "/v1", api_key="none", max_tokens=400, temperature=0, max_retries=0)
message = HumanMessage([{"type": "text", "text": "Describe it."}, {"type": "image_url", "image_url": {"url": IMAGE}}])
answer = llm.invoke([message])
print(json.dumps([answer.content, "".join(chunk.content for chunk in llm.stream([message])),
                  answer.usage_metadata["output_tokens"] > 20]))
"""

LITELLM = """
import litellm
messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE}}]}]
options = dict(model="openai/tiny", api_base=URL + "/v1", api_key="none", messages=messages, max_tokens=400, n=1,
               temperature=0, top_p=1, user="me", tools=[], tool_choice="none")
answer = litellm.completion(**options)
pieces = litellm.completion(**options, stream=True)
print(json.dumps([answer.choices[0].message.content,
                  "".join(piece.choices[0].delta.content or "" for piece in pieces),
                  answer.usage.completion_tokens > 20]))
"""

LLAMA_INDEX = """
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.llms.openai_like import OpenAILike
llm = OpenAILike(model="tiny", api_base=URL + "/v1", api_key="none", is_chat_model=True, max_tokens=400, max_retries=0)
message = ChatMessage(role="user", blocks=[TextBlock(text="Describe it."), ImageBlock(url=IMAGE)])
answer = llm.chat([message])
print(json.dumps([answer.message.content, "".join(part.delta or "" for part in llm.stream_chat([message])),
                  answer.raw.usage.completion_tokens > 20]))
"""

NODE = """
import OpenAI from "openai";
const [url, image] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: [{ type: "image_url", image_url: { url: image } }] }];
const answer = await client.chat.completions.create({ model: "tiny", messages, max_tokens: 400 });
const stream = await client.chat.completions.create({
  model: "tiny", messages, stream: true, stream_options: { include_usage: true },
});
let text = "", tokens = 0;
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  tokens = chunk.usage?.completion_tokens ?? tokens;
}
console.log(JSON.stringify([answer.choices[0].message.content, text, tokens > 20]));
"""


class LLMEngine(Scripted):
    """Counters of this module's server."""


@pytest.fixture(scope="module")
def server(captioning_checkpoint):
    running = Running(Checkpoint.open(captioning_checkpoint), LLMEngine)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def image(scene_images) -> str:
    return "data:image/png;base64," + base64.b64encode((scene_images / "00.png").read_bytes()).decode()


def last_line(command: list[str], **options):
    """Return the JSON value that a command prints last."""
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, **options)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("module", "script"),
    [("langchain_openai", LANGCHAIN), ("litellm", LITELLM), ("llama_index/llms/openai_like", LLAMA_INDEX)],
    ids=["langchain", "litellm", "llamaindex"],
)
def test_python_clients(server, image, module, script):
    """A caption at once, streamed, and its usage; a limit of 400 tokens is above this server's."""
    if not list(CLIENTS.glob(f"lib/python*/site-packages/{module}")):
        pytest.skip(f"{module} is not installed: {HOW}")
    script = f"import json\nURL, IMAGE = {server.url!r}, {image!r}\n{script}"
    environment = {"PATH": os.environ["PATH"], "HOME": str(CLIENTS), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    answer = last_line([str(CLIENTS / "bin/python"), "-c", script], env=environment)
    assert answer == [CLEAN, CLEAN, True]


def test_openai_for_node(server, image):
    folder = CLIENTS / "node"
    if not (folder / "node_modules/openai").is_dir() or not shutil.which("node"):
        pytest.skip(f"openai for Node is not installed: {HOW}")
    (folder / "client.mjs").write_text(NODE)
    assert last_line(["node", str(folder / "client.mjs"), server.url, image]) == [CLEAN, CLEAN, True]


def test_guidellm(server, captioning_checkpoint, tmp_path):
    """Its images with a number of tokens for each, streamed, two at a time."""
    program = CLIENTS / "guidellm/bin/guidellm"
    if not program.is_file():
        pytest.skip(f"guidellm is not installed: {HOW}")
    options = {
        "--backend": f"kind=openai_http,target={server.url},model=tiny",
        "--profile": "kind=concurrent,streams=2",
        "--constraint": "kind=max_requests,count=6",
        "--data": "kind=synthetic_image,width=128,height=96,output_tokens=20",
        "--tokenizer": f"kind=huggingface_auto,model={captioning_checkpoint / 'llm'}",
        "--output": f"kind=json,path={tmp_path / 'r.json'}",
    }
    command = [program, "run", *(word for option in options.items() for word in option), "--disable-console"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(CLIENTS), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    (benchmark,) = json.loads((tmp_path / "r.json").read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert len(requests["successful"]) == 6 and not requests["errored"], requests["errored"][:1]
    assert {request["output_metrics"]["text_tokens"] for request in requests["successful"]} == {20}


@pytest.fixture(scope="module")
def open_webui(server, tmp_path_factory):
    """Open WebUI beside our server, which is its only source of models; yield its URL."""
    program, folder = CLIENTS / "open-webui/bin/open-webui", tmp_path_factory.mktemp("open-webui")
    if not program.is_file():
        pytest.skip(f"Open WebUI is not installed: {HOW}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "DATA_DIR": str(folder),
        "WEBUI_SECRET_KEY": "of this test",
        "OPENAI_API_BASE_URLS": f"{server.url}/v1",
        "OPENAI_API_KEYS": "none",
        "ENABLE_OLLAMA_API": "False",
        # it loads a model for its search in documents otherwise
        "RAG_EMBEDDING_ENGINE": "openai",
        "OFFLINE_MODE": "True",
        "HF_HUB_OFFLINE": "1",
        "ENABLE_VERSION_UPDATE_CHECK": "False",
        "ANONYMIZED_TELEMETRY": "False",
    }
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
    command = [program, "serve", "--host", "127.0.0.1", "--port", port]
    with (folder / "log").open("w") as log:
        run = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                assert run.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
                time.sleep(0.5)
            yield url
        finally:
            run.kill()
            run.wait()


def test_open_webui(open_webui, image):
    """Its first user lists the models and chats, with and without a stream, as its page does."""
    user = {"name": "a", "email": "a@example.org", "password": "of this test", "profile_image_url": ""}
    token = httpx.post(f"{open_webui}/api/v1/auths/signup", json=user, timeout=60).json()["token"]
    with httpx.Client(base_url=open_webui, headers={"Authorization": f"Bearer {token}"}, timeout=60) as client:
        models = client.get("/api/models").json()["data"]
        assert [model["id"] for model in models if model.get("owned_by") == "openai"] == ["tiny"], models
        content = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": image}}]
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
        answer = client.post("/api/chat/completions", json={**body, "stream": False})
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == CLEAN
        answer = client.post("/api/chat/completions", json={**body, "stream": True})
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        pieces = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk.get("choices", [])]
        assert "".join(pieces) == CLEAN, answer.text


def test_what_open_webui_sends(server, image):
    """Send the requests of Open WebUI 0.12.4, by its source code, where it is not installed.

    routers/openai.py lists models and sends chats; utils/payload.py adds the parameters of its settings;
    routers/tasks.py asks for titles, tags and follow-up questions without an image, which this model cannot answer.
    """
    headers = {"Content-Type": "application/json", "Authorization": "Bearer none"}
    (model,) = httpx.get(f"{server.url}/v1/models", headers=headers).json()["data"]
    user = {
        "role": "user",
        "content": [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": image}}],
    }
    settings = {
        "temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 1000, "frequency_penalty": 0.0,
        "presence_penalty": 0.0, "seed": 1, "stop": ["<end>"], "reasoning_effort": "low", "logit_bias": {},
    }  # fmt: skip
    body = {
        "model": model["id"],
        "messages": [{"role": "system", "content": "Be brief."}, user],
        "stream": True,
        "stream_options": {"include_usage": True},
        **settings,
    }
    text, usage = "", None
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, headers=headers) as answer:
        assert answer.status_code == 200 and "text/event-stream" in answer.headers["content-type"]
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                usage = chunk.get("usage") or usage
                text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
    assert text == CLEAN and usage["completion_tokens"] > 20
    title = {"model": model["id"], "messages": [{"role": "user", "content": "Write a title."}], "stream": False}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=title, headers=headers)
    assert answer.status_code == 400 and "must hold one image_url, not 0" in answer.json()["error"]["message"]


def test_vllms_benchmark_client(server, captioning_checkpoint, tmp_path, image):
    """`vllm bench serve` with images, ignore_eos and streams that end with the usage."""
    pytest.importorskip("vllm")
    script = (
        "from vllm.benchmarks.serve import add_cli_args, main; from argparse import ArgumentParser; "
        "parser = ArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
    )
    words = [
        "--backend",
        "openai-chat",
        "--base-url",
        server.url,
        "--endpoint",
        "/v1/chat/completions",
        "--model",
        "tiny",
        "--tokenizer",
        str(captioning_checkpoint / "llm"),
        "--dataset-name",
        "custom_image",
        "--dataset-path",
        str(tmp_path / "images.jsonl"),
        "--num-prompts",
        "8",
        "--custom-output-len",
        "20",
        "--save-result",
        "--result-filename",
        "r.json",
        "--result-dir",
        str(tmp_path),
        "--ignore-eos",
        "--extra-body",
        '{"raw": true}',
    ]
    lines = [json.dumps({"prompt": "Describe it.", "image_files": [image]}) for _ in range(8)]
    (tmp_path / "images.jsonl").write_text("\n".join(lines) + "\n")
    run = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["completed"], result["failed"]) == (8, 0) and result["total_output_tokens"] == 8 * 20, result
