"""serve.ray_batch on a Ray cluster of this machine, with its workers, its driver and a node killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

ray = pytest.importorskip("ray", reason='ray is not installed: python -m pip install "ray[data]"')

import psutil  # noqa: E402
import uvicorn  # noqa: E402
from pyarrow import Table, parquet  # noqa: E402
from starlette.applications import Starlette  # noqa: E402
from starlette.routing import Mount  # noqa: E402
from starlette.staticfiles import StaticFiles  # noqa: E402

ROOT = Path(__file__).parents[3]


@pytest.fixture
def start(command, tmp_path):
    """Starts the command as a process; whatever of it is left at the end is killed."""
    started = []
    env = {**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}  # Ray keeps a token at home

    def begin(*more: str) -> subprocess.Popen:
        words = [sys.executable, "-m", "serve.ray_batch", *command, *more]
        process = subprocess.Popen(words, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        return process

    yield begin
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()


def parts(output: Path) -> list[Path]:
    return sorted(output.glob("part-*.parquet"))


def wait_for(count: int, output: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while len(parts(output)) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()[-3000:]
        time.sleep(0.02)


def writers(process: subprocess.Popen) -> list[psutil.Process]:
    """The language-model actors under a driver."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):  # it has just ended
            if "MapBatches(Write)" in " ".join(child.cmdline()):
                found.append(child)
    return found


@pytest.fixture
def web(pictures):
    """The URL of a server of the pictures' folder."""
    app = Starlette(routes=[Mount("/", StaticFiles(directory=pictures))])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(20)


def test_urls_are_read_by_the_workers(web, pictures, captioning_checkpoint, tmp_path):
    """Images behind http and file URLs, and in a shard behind a URL, have the captions of the local files."""
    with tarfile.open(pictures / "s.tar", "w") as shard:
        shard.add(pictures / "02.png", "02.png")
        shard.add(pictures / "03.png", "03.png")
    listed = [f"{web}/00.png", (pictures / "01.png").as_uri(), f"{web}/absent.png"]
    parquet.write_table(Table.from_pydict({"url": listed}), tmp_path / "list.parquet")
    sources = [str(tmp_path / "list.parquet"), f"{web}/s.tar", *(str(pictures / f"{i:02}.png") for i in range(4))]
    flags = ["--engine", "transformers", "--max-tokens", "60", "--cpus", "4", "--unit", "3"]
    words = [*sources, str(tmp_path / "out"), "--ckpt", str(captioning_checkpoint), *flags]
    run = subprocess.run(
        [sys.executable, "-m", "serve.ray_batch", *words],
        cwd=ROOT,
        env={**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, run.stderr  # one image is absent
    rows = [row for file in parts(tmp_path / "out") for row in parquet.read_table(file).to_pylist()]
    captions = {row["id"]: row["caption"] for row in rows}
    (error,) = [row for f in (tmp_path / "out").glob("errors/*") for row in parquet.read_table(f).to_pylist()]
    assert error["id"] == listed[2] and error["kind"] == "missing"
    for number, url in enumerate([*listed[:2], f"{web}/s.tar/02.png", f"{web}/s.tar/03.png"]):
        assert captions[url] == captions[str(pictures / f"{number:02}.png")]
    assert len(captions) == 8


def test_a_queue_gets_more_actors(start, scene_images, pictures):
    """Units that wait for the language model get it a second actor."""
    for file in scene_images.glob("*.png"):
        shutil.copy(file, pictures)
    driver, most = start("--unit", "1", "--llms", "1-3", "--cpus", "8"), 0
    deadline = time.monotonic() + 240
    while driver.poll() is None and most < 2:
        assert time.monotonic() < deadline
        with contextlib.suppress(psutil.NoSuchProcess):
            most = max(most, len(writers(driver)))
        time.sleep(0.1)
    assert most >= 2, driver.stderr.read()[-3000:]


def assert_complete(output: Path, pictures: Path) -> None:
    counts = Counter(row["id"] for file in parts(output) for row in parquet.read_table(file).to_pylist())
    assert counts == Counter(str(file) for file in pictures.glob("[0-9]*.png"))
    failed = [row["id"] for file in output.glob("errors/*") for row in parquet.read_table(file).to_pylist()]
    assert failed == [str(pictures / "broken.png")]


def test_killed_workers_and_a_killed_driver_lose_and_double_nothing(start, pictures, tmp_path):
    output = tmp_path / "out"
    first = start("--unit", "1")
    wait_for(2, output, first)
    (writer,) = writers(first)
    writer.send_signal(signal.SIGKILL)  # Ray starts another, and does its unit again
    wait_for(5, output, first)
    children = psutil.Process(first.pid).children(recursive=True)
    os.kill(first.pid, signal.SIGKILL)
    for child in children:  # the machine with it
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    first.wait()
    before = {file: file.stat().st_mtime_ns for file in parts(output)}
    assert 5 <= len(before) < 13
    second = start("--unit", "1")
    _, told = second.communicate(timeout=240)
    assert second.returncode == 1, told  # one image failed
    assert f"{len(before)} are done, {13 - len(before)} to do" in told
    assert all(file.stat().st_mtime_ns == when for file, when in before.items())  # none was done again
    assert_complete(output, pictures)
    assert start("--unit", "1").wait(60) == 0  # nothing is left


def test_a_node_that_dies_loses_and_doubles_nothing(start, pictures, tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("HOME", str(tmp_path))
    output = tmp_path / "out"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        nodes = [cluster.add_node(num_cpus=3), cluster.add_node(num_cpus=3)]
        cluster.wait_for_nodes()
        driver = start("--unit", "1", "--address", cluster.address)
        wait_for(2, output, driver)
        cluster.remove_node(nodes[0], allow_graceful=False)
        _, told = driver.communicate(timeout=280)
        assert driver.returncode == 1, told
        assert_complete(output, pictures)
    finally:
        cluster.shutdown()
