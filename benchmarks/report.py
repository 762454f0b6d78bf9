"""All committed figures on one page that needs nothing but a browser: python -m benchmarks.report -o out/report.html

Reads benchmarks/*.json and benchmarks/training/*.json; --load, --trace, --bench and --artifacts put what serve.bench,
serve.vllm_caption --trace, export.bench and the exports have written in their place: benchmarks.measure runs those and
makes the page in one go. A section without figures says which command makes them.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.charts import bars, lanes, roofline, table
from serve.reports.bench_page import conditions, curves, plot
from vlv.common import html as pages
from vlv.common.files import atomic_write

FOLDER = Path(__file__).parent


def encoder(report: dict) -> str:
    """Speed beside its ceiling, and the error beside the speed."""
    run = report["runs"][0]
    images = {name: 60 / run["seconds"][name]["median"] for name in ("ours", "eager", "sdpa")}
    work = {"reached": run["operations_per_s"] / 1e9}
    rows = [
        ("", "ours", "transformers (eager)"),
        ("peak memory, GB", *(f"{run['peak_rss'][n] / 1e9:.2f}" for n in ("ours", "eager"))),
    ]
    error = run["error"]["ours_to_theirs"]
    return (
        bars("Images a minute, full size, float32, two cores", images, "/min")
        + bars(
            f"Work a second; {run['of_ceiling']:.0%} of the matmul ceiling (dashed)",
            work,
            "GFLOP/s",
            run["matmul_ceiling_per_s"] / 1e9,
        )
        + table(rows)
        + f"<p>Relative error against theirs: {error['max']:.1e} at most, {error['rms']:.1e} RMS.</p>"
    )


def captions(report: dict) -> str:
    """Throughput against what one would run instead, and memory over a long run."""
    parts = report["parts"]
    names = {"service": "this toolkit", "greedy": "transformers, greedy", "published": "published, beam 4"}
    rates = {names[name]: parts[name]["images_per_second"] for name in names}
    images, memory = parts["memory"]["images"], parts["memory"]["curve_mib"]
    return (
        bars("Captions a second, bundled checkpoint", rates, "/s")
        + plot(f"MiB of all processes over {images:,} images", [*range(len(memory))], {"": memory}, "sample")
        + f"<p>First caption after {parts['startup']['first_caption_seconds']:.0f} s; equal to the reference's: "
        f"{html.escape(report['service_captions_equal_to_greedy'])}.</p>"
    )


def scenes(report: dict) -> str:
    """What is right in captions and reconstructions of scenes never seen."""
    words, drawn = report["captions"], report["reconstructions"]
    shares = {name: 100 * words[name] for name in ("objects", "count", "background", "sizes", "places", "relation")}
    seen = {
        "from its embeddings": 100 * drawn["objects_named"],
        "from another's": 100 * drawn["objects_named_shuffled"],
    }
    return bars(f"Right in {report['scenes']} held-out captions", shares, "%") + bars(
        "Objects found in reconstructions", seen, "%"
    )


def training(reports: dict[str, dict]) -> str:
    """The loss of each stage over its steps."""
    found = []
    for name, report in reports.items():
        points = report["history"]
        losses = {"loss": [p["loss"] for p in points]}
        found.append(plot(f"{name}: loss over steps", [p["step"] for p in points], losses, "steps"))
    return "".join(found)


def scale(report: dict) -> str:
    """The simulation of a large run, with its assumptions."""
    first = report["runs"][0]["assumed"]
    rows = [("assumed images/s a GPU", "days", "GPU hours", "cost", "read, Gbit/s", "decoding cores a GPU")]
    for run in report["runs"]:
        found = run["found"]
        cells = (
            found["days"],
            found["gpu_hours"],
            found["cost"],
            found["read_gbit_per_second"],
            run["decode_cores_per_gpu"],
        )
        rows.append((run["assumed"]["rate"], *(f"{value:,.1f}" for value in cells)))
    about = (
        f"{first['images']:,} images on {first['gpus']} GPUs at {first['price']:g} an hour: simulated, not measured."
    )
    return f"<p>{about}</p>{table(rows)}"


def roof(report: dict) -> str:
    """Each operation of the encoder below the roof of this machine, as shares of its fastest matrix product."""
    ridge = report["flops_per_s"] / report["bytes_per_s"]
    kinds: dict[str, list[tuple[float, float]]] = {}
    rows = [("operation", "operations a byte", "of the product's speed", "of its roof", "rel. error")]
    for found in report["operations"]:
        intensity, share = found["flops"] / found["bytes"], found["flops"] / found["seconds"] / report["flops_per_s"]
        kinds.setdefault(found["operation"], []).append((intensity, share))
        of_roof = share / min(1, intensity / ridge)
        rows.append((found["name"], f"{intensity:.1f}", f"{share:.1%}", f"{of_roof:.0%}", f"{found['error']:.1e}"))
    about = (
        f"The roof: a copy's bandwidth up to {ridge:.0f} operations a byte, beyond it a large matrix product's speed."
    )
    return roofline(kinds, ridge) + f"<p>{about}</p>" + table(rows)


def runtimes(report: dict) -> str:
    """export.bench's latency and throughput over the batch, with each runtime's error."""
    runs = [run for run in report["runs"] if "p50_ms" in run]
    batches = sorted({run["batch"] for run in runs})
    at = {(run["runtime"], run["batch"]): run for run in runs}
    names = list(dict.fromkeys(run["runtime"] for run in runs))

    def lines(key: str) -> dict[str, list]:
        return {name: [at.get((name, batch), {}).get(key) for batch in batches] for name in names}

    rows = [("runtime", "precision", "images a batch", "ms, p50", "ms, p99", "RMS error", "peak GB")]
    for run in runs:
        times = (f"{run['p50_ms']:.1f}", f"{run['p99_ms']:.1f}", f"{run['error']['rms']:.1e}")
        rows.append((run["runtime"], run["precision"], run["batch"], *times, f"{run['peak_bytes'] / 1e9:.2f}"))
    return (
        plot("Milliseconds a batch, median", batches, lines("p50_ms"), "images a batch")
        + plot("Images a second", batches, lines("images_per_s"), "images a batch")
        + table(rows)
    )


def load(report: dict) -> str:
    """serve.bench's answers at each offered rate."""
    return "".join(curves(report["sweep"])) + f"<p>{html.escape(conditions(report))}</p>"


def timeline(events: list[dict]) -> str:
    """When each stage worked, from a --trace."""
    spans = [(e["cat"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in events if e["ph"] == "X"]
    return lanes(spans)


def precisions(report: dict) -> str:
    """What a lower precision gains and loses, full-size encoder, and how many greedy tokens it keeps."""
    speed, kept = report["speed"], report["captions"]
    rows = [("", "seconds an image", "times torch's speed", "max rel. error", "RMS", "greedy tokens kept")]
    for name, error in speed["errors"].items():
        tokens = kept.get(name.removeprefix("onnx "), {}).get("scenes", {}).get("agreement")
        rows.append((
            name, f"{speed['seconds'][name]['median']:.1f}", f"{speed['speedup'][name]:.2f}", f"{error['max']:.1e}",
            f"{error['rms']:.1e}", "–" if tokens is None else f"{tokens:.1%}",
        ))  # fmt: skip
    return table(rows) + "<p>Tokens: of the bundled checkpoint's captions of scenes, with the encoder in INT8.</p>"


def drift(folders: list[Path]) -> str:
    """Each artifact's distance from float32, at its worst output, from the manifests of exports."""
    rows = [("artifact", "precision", "max rel. error", "RMS", "greedy tokens kept")]
    for folder in folders:
        for name, entry in json.loads((folder / "manifest.json").read_text())["artifacts"].items():
            checks = entry.get("verification") or {}
            outputs = list(checks.get("outputs", {}).values())
            worst = [f"{max(o[key] for o in outputs):.1e}" if outputs else "–" for key in ("max", "rms")]
            kept = (checks.get("captions") or {}).get("agreement")
            rows.append((name, entry["precision"], *worst, "–" if kept is None else f"{kept:.1%}"))
    return table(rows)


def section(title: str, draw, source: Path | None, command: str) -> str:
    """A part of the page from one JSON file, or the command that makes it."""
    head = f"<h2>{html.escape(title)}</h2>"
    if source is None or not source.is_file():
        return f'{head}<p class="none">Not measured yet: <code>{html.escape(command)}</code></p>'
    report = json.loads(source.read_text())
    about = report if isinstance(report, dict) else {}
    machine = about.get("machine", about)
    on = [str(machine[k]) for k in ("cpu", "cores", "commit") if k in machine]
    on += [f"load {machine[k]:g} before" for k in ("load_before", "load") if k in machine]
    made = html.escape(f"{about.get('command', command)} ({', '.join(on)})" if on else command)
    return f"{head}{draw(report)}<p><small>{made}</small></p>"


def page(
    load_json: Path | None = None,
    trace: Path | None = None,
    bench: Path | None = None,
    artifacts: Sequence[Path] = (),
) -> str:
    """The whole page; what is not given is the committed one."""
    stages = {f.stem: json.loads(f.read_text()) for f in sorted((FOLDER / "training").glob("*.json"))}
    gallery = FOLDER.parent / "docs" / "gallery.png"
    measure = "python -m benchmarks.measure IMAGES --ckpt DIR"
    traced = "python -m serve.vllm_caption IMAGES --ckpt DIR --trace benchmarks/trace.json"
    exported = f"<h3>Exported here</h3>{drift(list(artifacts))}" if artifacts else ""
    sections = [
        section("The encoder", encoder, FOLDER / "encoder_cpu.json", "python -m benchmarks.encoder_cpu"),
        section("Its operations below their roof", roof, FOLDER / "roofline.json", "python -m benchmarks.roofline"),
        section("Runtimes", runtimes, bench or FOLDER / "runtimes.json", measure),
        section("Precision and drift", precisions, FOLDER / "export_cpu.json", "python -m benchmarks.export_cpu"),
        exported,
        section("Captioning", captions, FOLDER / "caption.json", "python benchmarks/caption.py"),
        section("Where the time goes", timeline, trace or FOLDER / "trace.json", traced),
        section("Under load", load, load_json or FOLDER / "load.json", measure),
        section(
            "What the bundled checkpoint has learned", scenes, FOLDER / "scenes.json", "python -m vlv.evaluate.scenes"
        ),
        f"<h2>Its training</h2>{training(stages)}",
        section(
            "A billion images", scale, FOLDER / "scale.json", "python -m benchmarks.scale -o benchmarks/scale.json"
        ),
    ]
    if gallery.is_file():
        data = base64.b64encode(gallery.read_bytes()).decode()
        about = "An image, what is reconstructed from its embeddings alone, and its caption."
        sections.append(f'<h2>Gallery</h2><img alt="{about}" src="data:image/png;base64,{data}"><p>{about}</p>')
    return pages.page("VLV captioning toolkit: what was measured", "\n".join(sections))


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.report", description="All figures on one page.")
    p.add_argument("-o", "--output", type=Path, default=Path("out/report.html"), metavar="HTML")
    p.add_argument("--load", type=Path, metavar="JSON", help="what serve.bench wrote")
    p.add_argument("--trace", type=Path, metavar="JSON", help="what serve.vllm_caption --trace wrote")
    p.add_argument("--bench", type=Path, metavar="JSON", help="what export.bench wrote")
    p.add_argument("--artifacts", type=Path, nargs="+", default=[], metavar="DIR", help="folders of exports")
    args = p.parse_args(argv)
    for given in (args.load, args.trace, args.bench, *(folder / "manifest.json" for folder in args.artifacts)):
        if given is not None and not given.exists():
            print(f"error: there is no {given}", file=sys.stderr)
            return 2
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output) as file:
        file.write_text(page(args.load, args.trace, args.bench, args.artifacts), encoding="utf-8")
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
