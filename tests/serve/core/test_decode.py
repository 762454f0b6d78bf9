"""The decode processes: right crops, one error an image, and no file that can end the run."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from PIL import Image

from serve.core.decode import DecodeError, DecodePool
from serve.core.inputs import Item, expand
from vlv.data.image import ImageError, load_crop

SIZE = 16


def run(work, workers: int = 2, slots: int = 6):
    """Run work(pool) inside a pool."""

    async def main():
        async with DecodePool(SIZE, workers, slots) as pool:
            return await asyncio.wait_for(work(pool), 60)

    return asyncio.run(main())


async def crop(pool: DecodePool, item: Item):
    slot = await pool.slot()
    try:
        await pool.decode(item, slot)
        return pool.crops[slot].copy()
    except ImageError as error:
        return error.kind
    finally:
        pool.release(slot)


def test_many_through_few_slots(scene_images):
    items = list(expand([str(scene_images)]))

    async def work(pool):
        return await asyncio.gather(*(crop(pool, item) for item in items * 3))

    for item, pixels in zip(items * 3, run(work), strict=True):
        assert np.array_equal(pixels, load_crop(item.path, SIZE)), item.id


def test_tiles_travel_with_their_boxes(tmp_path):
    """The squares after the first one come with the answer; a slot that is used again has none of them."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, 3 * SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    item = Item("wide", str(tmp_path / "wide.png"))

    async def work(pool):
        slot = await pool.slot()
        await pool.decode(item, slot, "tiles")
        tiles = pool.squares(slot).copy(), pool.boxes(slot)
        pool.release(slot)
        slot = await pool.slot()
        await pool.decode(item, slot)
        return *tiles, pool.squares(slot), pool.boxes(slot)

    squares, boxes, center, (box,) = run(work, slots=1)
    assert [box[0] for box in boxes] == [0, 11, 21, 32] and box == (SIZE, 0, 2 * SIZE, SIZE)
    for (left, top, right, bottom), square in zip([*boxes, box], [*squares, *center], strict=True):
        assert np.array_equal(square, pixels[top:bottom, left:right].transpose(2, 0, 1))


def test_errors_travel(tmp_path, scene_images):
    (tmp_path / "empty.png").touch()
    items = [Item("e", str(tmp_path / "empty.png")), Item("m", "/absent"), next(expand([str(scene_images)]))]

    async def work(pool):
        return await asyncio.gather(*(crop(pool, item) for item in items))

    empty, missing, pixels = run(work)
    assert (empty, missing) == ("empty", "missing") and pixels.shape == (3, SIZE, SIZE)


def test_a_killed_process_costs_one_image(tmp_path, scene_images):
    """A file that hangs its decoder stands for one that crashes it: here we send the signal."""
    os.mkfifo(tmp_path / "hangs.png")
    hangs = Item("hangs", str(tmp_path / "hangs.png"))
    good = list(expand([str(scene_images)]))[:8]

    async def work(pool):
        first = asyncio.create_task(crop(pool, hangs))
        await asyncio.sleep(0)
        rest = [asyncio.create_task(crop(pool, item)) for item in good]
        (worker,) = pool._workers
        while not (worker.ready and worker.waiting):
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.3)
        os.kill(worker.process.pid, signal.SIGSEGV)
        return await first, await asyncio.gather(*rest)

    killed, others = run(work, workers=1)
    assert killed == "damaged"
    for item, pixels in zip(good, others, strict=True):
        assert np.array_equal(pixels, load_crop(item.path, SIZE))


def test_processes_that_cannot_start(monkeypatch):
    monkeypatch.setattr("serve.core.decode._work", print)  # ends at once, without a word

    async def work(pool):
        await crop(pool, Item("a", "a.png"))

    with pytest.raises(DecodeError, match="did not start"):
        run(work)


def test_a_process_that_cannot_be_replaced(monkeypatch, scene_images):
    """The pool is broken, and says so to whoever comes later."""
    item = next(expand([str(scene_images)]))

    async def work(pool):
        await crop(pool, item)
        monkeypatch.setattr("serve.core.decode._work", print)
        (worker,) = pool._workers
        worker.process.kill()
        while pool._workers:
            await asyncio.sleep(0.05)
        for _ in range(2):
            with pytest.raises(DecodeError, match="did not start"):
                await crop(pool, item)

    run(work, workers=1)


def test_no_process_outlives_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import asyncio, sys\n"
        "from serve.core.decode import DecodePool\n"
        "async def main():\n"
        "    async with DecodePool(16, 2, 4) as pool:\n"
        "        while not all(w.ready for w in pool._workers): await asyncio.sleep(0.01)\n"
        "        print(*(w.process.pid for w in pool._workers), flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "if __name__ == '__main__': asyncio.run(main())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    parent.stdout.close()


def test_import_is_light():
    """A decode process and the writers of outputs do not need torch, which would cost each two seconds and 300 MB."""
    code = "import sys, serve.core.decode, serve.vllm_caption, serve.outputs.factory; print('torch' in sys.modules)"
    started = time.monotonic()
    run_ = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run_.stdout.strip() == "False", run_.stderr
    assert time.monotonic() - started < 20
