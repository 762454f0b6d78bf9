"""Test what a run says of its progress, and what its timeline says of its stages."""

from __future__ import annotations

import time

from serve.reports import timeline
from serve.reports.progress import Progress
from serve.reports.timeline import Timeline


def test_a_pipe_gets_a_line_when_something_has_changed(capsys):
    progress = Progress()
    for _ in range(5):
        progress.show(progress.line())
    assert capsys.readouterr().err == "0 images  loading the models\n"
    progress.caption()
    for _ in range(3):
        progress.show(progress.line())
    progress.failed += 1
    for _ in range(3):
        progress.show(progress.line())
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["1 images", "2 images"] and "1 failed" in lines[1]
    for _ in range(2):  # closing lines are always there
        progress.show("done", last=True)
    assert capsys.readouterr().err == "done\ndone\n"


def test_the_pace_is_named_only_after_a_while(monkeypatch):
    stages = Timeline()
    stages.places.update({"decoding": 2, "the encoder": 1})
    assert stages.summary() == ""  # nothing has worked yet
    stages.window = time.monotonic() - 5
    stages.span("decoding", stages.window, stages.window + 1)
    stages.span("the encoder", stages.window, stages.window + 4)
    assert stages.summary() == "busy: decoding 10% of 2, the encoder 80% of 1"
    monkeypatch.setattr(timeline, "MIN_SECONDS", 4.0)
    assert stages.summary().endswith("; the pace was set by the encoder")
