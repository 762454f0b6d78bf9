"""serve.ray_batch without Ray: what it reads and plans, each stage as an actor would call it, and what it refuses."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import Table, parquet

from serve import ray_batch
from serve.core.inputs import Item, SourceError, expand
from serve.ray.decode import Decode
from serve.ray.stages import Encode, Write
from serve.ray.store import Store, part, plan, unit_items
from vlv.common.command import Misuse
from vlv.data.image import ImageError, load_crops
from vlv.model.config import VLVConfig


def test_the_plan_names_each_image_once(pictures, tmp_path):
    store = Store(str(tmp_path / "out"))
    sources = [str(pictures), str(pictures / "00.png")]  # one of them twice
    assert plan(store, expand(sources, column="url"), {"model": "a"}, 4) == 4
    held = [item.id for unit in range(4) for item in unit_items(store, unit)]
    assert held == sorted(str(file) for file in pictures.iterdir())
    # taken up again it is what it was, whatever has come to the folder since
    (pictures / "zz.png").write_bytes(b"new")
    assert plan(store, expand(sources, column="url"), {"model": "a"}, 4) == 4
    with pytest.raises(Misuse, match="DST was begun with model a, and this is b: choose another DST"):
        plan(store, iter([]), {"model": "b"}, 4)


SIZE = 64  # pixels of the bundled checkpoint's crops


ITEMS = [
    Item("id", "path"),
    Item("http://host/a.tar/b.png", "http://host/a.tar", 512, 90),
    Item("t.parquet/3", "/t.parquet", row=3, column="image", lenient=True),
    Item("id", "path", problem="a problem"),
]


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.id)
def test_every_kind_of_item_stays_what_it_is_in_another_process(item, tmp_path):
    """An item travels to decode processes and to Ray's workers; there it has to know how it is read."""
    assert pickle.loads(pickle.dumps(item)) == item
    store = Store(str(tmp_path))
    assert plan(store, [item], {}, 1) == 1 and unit_items(store, 0) == [item]


def test_a_plan_that_was_killed_is_made_again(pictures, tmp_path):
    def dies():
        yield from list(expand([str(pictures)], column="url"))[:6]
        raise KeyboardInterrupt

    store = Store(str(tmp_path / "out"))
    with pytest.raises(KeyboardInterrupt):
        plan(store, dies(), {}, 4)
    assert plan(store, expand([str(pictures)], column="url"), {}, 4) == 4


def test_urls_and_lists_of_urls(pictures, tmp_path):
    urls = [(pictures / name).as_uri() for name in ("00.png", "gone.png")] + [str(pictures / "01.png")]
    listed = tmp_path / "list.parquet"
    parquet.write_table(Table.from_pydict({"url": urls, "other": [1, 2, 3]}), listed)
    first, gone, local = expand([str(listed)], column="url")
    assert first.read() == (pictures / "00.png").read_bytes() and first.id == urls[0]
    assert local.read() == (pictures / "01.png").read_bytes() and local.is_file
    with pytest.raises(ImageError, match="there is no such file"):
        gone.read()
    with pytest.raises(SourceError, match=r"no column picture: it has \['url', 'other'\]"):
        list(expand([str(listed)], column="picture"))
    assert {Path(item.id).name for item in expand([pictures.as_uri()], column="url")} == {
        f.name for f in pictures.iterdir()
    }
    with pytest.raises(Misuse, match="nonsense://x/y cannot be opened"):
        list(expand(["nonsense://x/y"], column="url"))


def test_shards_and_globs_behind_urls(pictures):
    """A shard is listed by its headers; each member is then fetched by its range."""
    import fsspec

    memory, content = fsspec.filesystem("memory"), io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as shard:
        for name in ("00.png", "01.png"):
            shard.add(pictures / name, name)
    memory.pipe({"/data/a.tar": content.getvalue(), "/data/b.png": b"b", "/data/c.tar": content.getvalue()[:-7000]})
    items = list(expand(["memory://data"], column="url"))
    assert [item.id.removeprefix("memory://").lstrip("/") for item in items[:3]] == [
        "data/a.tar/00.png", "data/a.tar/01.png", "data/b.png",
    ]  # fmt: skip
    for item, name in zip(items, ("00.png", "01.png"), strict=False):
        assert not item.is_file and item.read() == (pictures / name).read_bytes()
    with pytest.raises(ImageError, match=r"the shard (ends after \d+ of \d+ bytes|cannot be read to its end)"):
        [item.read() for item in items[3:]]
    assert [item.read() for item in expand(["memory://data/*.png"], column="url")] == [b"b"]
    assert len(list(expand(["memory://data/a.tar"], column="url"))) == 2
    with pytest.raises(SourceError, match="no images at memory://nothing"):
        list(expand(["memory://nothing"], column="url"))


def test_a_store_in_memory_as_object_stores_are():
    store = Store("memory://captions")
    assert store.names(".parquet") == set()
    store.write("part-000000.parquet", b"x")
    store.write("errors/part-000000.parquet", b"y")
    assert store.names(".parquet") == {"part-000000.parquet"} and store.read("errors/part-000000.parquet") == b"y"
    for _ in range(2):
        store.remove("errors/part-000000.parquet")
    with pytest.raises(FileNotFoundError):
        store.read("errors/part-000000.parquet")
    with pytest.raises(FileNotFoundError):
        store.read("part-000001.parquet")


def test_the_stages_one_after_another(args, options, pictures, captioning_checkpoint):
    store = Store(args.output)
    assert plan(store, expand(args.paths, column="url"), {}, args.unit) == 4
    decode, encode, write = Decode(args.output, SIZE, 1), Encode(options), Write(options)
    try:
        results = [write(encode(decode({"unit": np.array([unit])}))) for unit in range(4)]
        again = write(encode(decode({"unit": np.array([3])})))  # as after a worker's death: the same file
    finally:
        decode._loop.run_until_complete(decode._pool.__aexit__())
        write._loop.run_until_complete(write._engine.close())
    assert sum(r["captions"][0] for r in results) == 12 and sum(r["errors"][0] for r in results) == 1
    assert again == results[3]
    rows = [row for unit in range(4) for row in parquet.read_table(f"{args.output}/{part(unit)}.parquet").to_pylist()]
    assert sorted(row["id"] for row in rows) == sorted(str(f) for f in pictures.glob("[0-9]*.png"))
    assert {row["caption"] for row in rows} == captions_of(pictures, captioning_checkpoint)
    (error,) = [row for f in Path(args.output).glob("errors/*") for row in parquet.read_table(f).to_pylist()]
    assert error["id"].endswith("broken.png") and "not recognised as an image" in error["error"]


def test_a_unit_in_another_crop(args, pictures, capsys):
    store = Store(args.output)
    pixels = np.random.default_rng(0).integers(0, 256, (6 * SIZE, 8 * SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(pictures / "00.png", "JPEG")
    plan(store, expand(args.paths, column="url"), {}, args.unit)
    decode = Decode(args.output, SIZE, 1, False, "pad", True)
    try:
        columns = decode({"unit": np.array([0])})
    finally:
        decode._loop.run_until_complete(decode._pool.__aexit__())
    for item, crop in zip(unit_items(store, 0), columns["crop"], strict=True):
        assert np.array_equal(crop, load_crops(item.read(), SIZE, "pad", fast_jpeg=True).pixels[0])
    assert not np.array_equal(columns["crop"][0], load_crops(pictures / "00.png", SIZE, "pad").pixels[0])
    assert ray_batch.main([*args.paths, args.output, "--ckpt", "x", "--crop", "tiles"]) == 2
    assert "--crop tiles: a unit has one caption an image here" in capsys.readouterr().err


def captions_of(pictures: Path, checkpoint: Path) -> set[str]:
    """What the reference writes of the good pictures."""
    import torch

    from vlv.checkpoints.folder import Checkpoint
    from vlv.data.image import load_crop
    from vlv.model.captioner import Captioner

    captioner = Captioner.load(Checkpoint.open(checkpoint))
    size = captioner.encoder.config.image_size
    crops = torch.from_numpy(np.stack([load_crop(f, size) for f in sorted(pictures.glob("[0-9]*.png"))]))
    return set(captioner.captions(crops, max_new_tokens=60))


def test_a_shard_that_loses_an_image_and_is_written_again(args, options, pictures):
    """An image that is gone since it was decoded is an error, and none any more once the unit is done again."""
    options, output = replace(options, format="webdataset"), Path(args.output)
    plan(Store(args.output), expand(args.paths, column="url"), {}, args.unit)
    decode, encode, write = Decode(args.output, SIZE, 1), Encode(options), Write(options)
    gone, content = pictures / "01.png", (pictures / "01.png").read_bytes()
    try:
        batch = encode(decode({"unit": np.array([0])}))
        gone.unlink()
        assert write(batch)["errors"] == 1
        (error,) = parquet.read_table(output / "errors" / "part-000000.parquet").to_pylist()
        assert error["id"] == str(gone) and error["kind"] == "missing"
        gone.write_bytes(content)
        assert write(batch)["captions"] == 4 and not [*(output / "errors").iterdir()]
        with pytest.raises(RuntimeError, match="Ray has split unit 0, 3 of 4 rows came together"):
            write({name: column[:3] for name, column in batch.items()})
    finally:
        decode._loop.run_until_complete(decode._pool.__aexit__())
        write._loop.run_until_complete(write._engine.close())
    with tarfile.open(output / "part-000000.tar") as shard:
        members = {member.name: shard.extractfile(member).read() for member in shard}
    assert [*members] == [f"{i:06}{kind}" for i in range(4) for kind in (".png", ".txt", ".json")]
    record = json.loads(members["000001.json"])
    assert members["000001.png"] == content and members["000001.txt"].decode() == record["caption"]
    assert record["id"] == str(gone)


def test_the_page_says_how_many_images_a_unit_may_have():
    page = (Path(__file__).parents[3] / "docs" / "scale.md").read_text()
    assert f"With the published 3B checkpoint that is {ray_batch.max_images(VLVConfig()):,} images" in page


def test_refused_in_one_sentence(command, capsys, tmp_path):
    for change, words in {
        ("--ckpt", "/absent"): "error: --ckpt: no checkpoint at /absent",
        ("--llms", "3-1"): "expected a number of actors such as 2, or a range such as 1-8, got '3-1'",
        ("--llm-gpu", "2"): "expected a share of a GPU above 0 and up to 1, got '2'",
        ("--unit", "1000000"): "error: --unit 1000000: with this checkpoint at most",
    }.items():
        try:
            code = ray_batch.main([*command, *change])
        except SystemExit as exit:
            code = exit.code
        stderr = capsys.readouterr().err
        assert code == 2 and words in stderr and stderr.count("\n") == 1, stderr
    assert not (tmp_path / "out").exists()
