#!/usr/bin/env bash
# torchrun killed by SIGKILL leaves its workers running: they go on with their collectives to the end of the job.
#
# Guess, written before the first run: the workers end with the agent, or at the latest in the next all_reduce, since
#   the rendezvous store that they were started with lives in the agent and is gone.
# Versions: torch 2.13.0 (gloo, CPU), numpy 2.3.5, Python 3.11, two workers on one machine.
# Behaviour: every worker is the leader of a session of its own, so neither the agent's death nor a kill of its process
#   group reaches it, and no parent-death signal is set. Collectives run over connections that exist already; only what
#   needs the store fails: a new process group. A scheduler that kills the agent and starts the job again has two
#   jobs that write the same checkpoints. SIGTERM to the agent does stop the workers.
# Output seen:
#   worker's session is its own: True
#   SIGKILL at step 20: both workers reached step 80
#   a new group after the agent's death: DistNetworkError
#   SIGTERM at step 20: stopped before step 80
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cd "$dir"
cat >worker.py <<'PY'
import os
import sys
import time

import torch
import torch.distributed as dist

name, steps = sys.argv[1], 80
dist.init_process_group("gloo")
rank = dist.get_rank()


def write(text):
    with open(f"{name}.{rank}", "a") as file:
        file.write(f"{text}\n")


write(os.getsid(0) == os.getpid())
for step in range(1, steps + 1):
    x = torch.ones(1)
    dist.all_reduce(x)
    assert x.item() == 2
    write(step)
    time.sleep(0.1)
try:
    dist.new_group()
except Exception as error:
    write(type(error).__name__)
else:
    write("made")
PY
cat >watch.py <<'PY'
import signal
import subprocess
import sys
import time
from pathlib import Path


def lines(name, rank):
    file = Path(f"{name}.{rank}")
    return file.read_text().split() if file.exists() else []


def stopped_at(name, number):
    agent = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "worker.py", name],
        stderr=subprocess.DEVNULL,
    )
    while len(lines(name, 0)) < 21:
        time.sleep(0.02)
    agent.send_signal(number)
    agent.wait()
    time.sleep(25)
    return [lines(name, rank) for rank in (0, 1)]


killed = stopped_at("killed", signal.SIGKILL)
print("worker's session is its own:", killed[0][0])
reached = [max(int(word) for word in rows if word.isdigit()) for rows in killed]
print(f"SIGKILL at step 20: both workers reached step {min(reached)}")
print("a new group after the agent's death:", killed[0][-1])
assert killed[0][0] == "True" and reached == [80, 80] and killed[0][-1] not in ("made", "80")
ended = stopped_at("ended", signal.SIGTERM)
assert all(int(rows[-1]) < 80 for rows in ended)
print("SIGTERM at step 20: stopped before step 80")
PY
OMP_NUM_THREADS=1 "$dir/env/bin/python" watch.py
