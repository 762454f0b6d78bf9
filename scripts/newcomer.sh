#!/usr/bin/env bash
# Do what README tells somebody without a GPU, from a clean clone in an environment of its own, and fail at the first
# command that does not do what README says.
#
#   scripts/newcomer.sh [--json FILE] [--tests]        --tests also runs README's `make test`
#
# The commands come from README itself: the sh blocks of SECTIONS. Beside exit code 0, a command must leave the file or
# folder of its -o or --out, captions of every image of its folder, and what a sentence of README that begins with the
# command names in backquotes; and .venv must not be larger than README says. The environment has no variables of the
# caller's Python, and a home folder of its own; pip keeps its configuration and its cache of packages.
set -euo pipefail
SECTIONS="Try it without a GPU|Commands"
root=$(cd "$(dirname "$0")/.." && pwd)
json="" tests=""
while [ $# -gt 0 ]; do
    case "$1" in
    --json) json=$(realpath "$2"); shift 2 ;;
    --tests) tests=1; shift ;;
    *) sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
done
work=$(mktemp -d "${TMPDIR:-/tmp}/newcomer.XXXXXX")
watcher=""
trap '[ -z "$watcher" ] || kill "$watcher" 2>/dev/null || true; rm -rf "$work"' EXIT
clone=$work/clone steps=$work/steps.tsv log=$work/log
mkdir "$work/home"

say() { echo "newcomer: $*" >&2; }
fail() { say "$1"; [ ! -s "$log" ] || tail -n 25 "$log" | cut -c1-300 >&2; exit 1; }
now() { date +%s.%N; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.1f", b - a }'; }
load() { cut -d' ' -f1 /proc/loadavg; }

fresh() {  # fresh COMMAND: run a line of README as a newcomer's shell would
    env -u PYTHONPATH -u PYTHONHOME -u VIRTUAL_ENV HOME="$work/home" \
        PATH="$(dirname "$python"):$PATH" PIP_CACHE_DIR="$cache" XDG_CONFIG_HOME="${XDG_CONFIG_HOME:-$HOME/.config}" XDG_CACHE_HOME="$work/home/.cache" \
        bash -c "$1"
}

commands() {  # the lines of the sh blocks of SECTIONS
    awk -v sections="^## ($SECTIONS)$" '
        /^## /   { wanted = $0 ~ sections }
        /^```sh/ { if (wanted) { block = 1 } next }
        /^```/   { block = 0 }
        block && NF && !/^#/' README.md
}

promised() {  # promised COMMAND: the paths that the sentence of README beginning with `COMMAND` names
    tr '\n' ' ' <README.md | grep -oP "\`\Q$1\E\`[^.]*(\.[^ ][^.]*)*\." | grep -oP '(?<=`)[^` ]*[/.][^` ]*(?=`)' || true
}

written() {  # written COMMAND: the values of -o and --out
    awk '{ for (i = 1; i < NF; i++) if ($i == "-o" || $i == "--out") print $(i + 1) }' <<<"$1"
}

check_captions() {  # check_captions FILE: a caption of every sample image
    "$python" - "$1" <<'PYTHON' || fail "$1 does not hold a caption of each image of assets/samples"
import json, pathlib, sys
records = [json.loads(line) for line in open(sys.argv[1])]
images = {p.name for p in pathlib.Path("assets/samples").iterdir() if p.suffix == ".png"}
assert images and {pathlib.Path(r["id"]).name for r in records} == images and all(r["caption"] for r in records)
PYTHON
}

follow() {  # follow COMMAND: run it, check what it leaves, note its seconds
    local begun path
    begun=$(now)
    say "\$ $1"
    fresh "$1" >"$log" 2>&1 </dev/null || fail "this command of README failed: $1"
    printf '%s\t%s\t%s\n' "$(since "$begun")" "$(load)" "$1" >>"$steps"
    for path in $(written "$1") $(promised "$1"); do
        [ -s "$path" ] || fail "README says that '$1' leaves $path: it is not there, or empty"
        case "$path" in *.jsonl) check_captions "$path" ;; esac
    done
}

watch() {  # the time of the first caption, once there is one
    until [ -s "$clone/out/captions.jsonl" ]; do sleep 0.2; done
    now >"$work/first"
}

python=$(python3 -c 'import sys; print(sys.executable)')  # a version manager's python3 needs the caller's home
cache=$("$python" -m pip cache dir)
cached=$(du -s --block-size=1M "$cache" 2>/dev/null | cut -f1 || true)
load_before=$(load)
start=$(now)
git clone --quiet "file://$root" "$clone"
printf '%s\t%s\t%s\n' "$(since "$start")" "$(load)" "git clone" >>"$steps"
cd "$clone"
watch &
watcher=$!
mapfile -t lines < <(commands)
[ "${#lines[@]}" -gt 0 ] || fail "README has no sh block in the sections $SECTIONS"
left_out=()
for line in "${lines[@]}"; do
    if [ "$line" = "make test" ] && [ -z "$tests" ]; then
        left_out+=("$line")
    else
        follow "$line"
    fi
    if [ "$line" = "make demo" ]; then
        environment=$(du -sb .venv | cut -f1)
        said=$(grep -oP '[\d.]+(?= GB on disk)' README.md | head -1)
        awk -v bytes="$environment" -v said="$said" 'BEGIN { exit !(bytes <= 1.03e9 * said) }' ||
            fail ".venv has $environment bytes, and README says $said GB"
    fi
done
: >"$log"
sleep 0.5  # for watch to look once more
[ -s "$work/first" ] || fail "no command of README has written out/captions.jsonl"
[ -z "$(git status --porcelain)" ] || fail "README's commands leave files that git does not ignore: $(git status --porcelain | head -5)"
report=$("$python" - "$steps" "$start" "$(cat "$work/first")" "$environment" "$(git rev-parse --short HEAD)" "$load_before" \
    "$cached" "${left_out[@]}" <<'PYTHON'
import json, os, sys
steps, start, first, size, commit, load, cached, *left_out = sys.argv[1:]
rows = [line.rstrip("\n").split("\t") for line in open(steps)]
print(json.dumps({
    "command": "scripts/newcomer.sh --json benchmarks/newcomer.json",
    "commit": commit,
    "cores": len(os.sched_getaffinity(0)),
    "load_before": float(load),
    "package_cache_mb_before": int(cached or 0),
    "first_caption_seconds": round(float(first) - float(start), 1),
    "environment_gb": round(int(size) / 1e9, 2),
    "steps": [{"command": c, "seconds": float(s), "load_after": float(l)} for s, l, c in rows],
    "left_out": left_out,
}, indent=2))
PYTHON
)
[ -z "$json" ] || echo "$report" >"$json"
echo "$report"
