#!/usr/bin/env bash
# Make the environment FOLDER, which sees the packages of .venv and is not seen by it, and install into it:
#
#   scripts/overlay_venv.sh FOLDER PIP-ARGUMENT...
#
# What .venv has already, such as PyTorch, is not installed again. The log is FOLDER.log.
set -euo pipefail
folder=$1 log=$1.log base=${BASE:-.venv}
shift
site() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
"$base/bin/python" -m venv --without-pip --clear "$folder"
echo "import site; site.addsitedir('$(site "$base/bin/python")')" >"$(site "$folder/bin/python")/base.pth"
echo "setup: installing into $folder, a few minutes the first time (log: $log)" >&2
if ! "$folder/bin/python" -m pip install --progress-bar off --disable-pip-version-check --no-input "$@" >"$log" 2>&1; then
    tail -n 15 "$log" | cut -c1-300 >&2
    exit 1
fi
touch "$folder/done"
