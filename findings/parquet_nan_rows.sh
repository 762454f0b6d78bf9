#!/usr/bin/env bash
# A Parquet dataset split by `score > 0.5` and its negation loses rows whose score is NaN, as row groups get smaller.
#
# Guess, written before the first run: a filter pushed down to a file's statistics returns the rows that the same filter
#   returns in memory, NaN included; what `score > 0.5` does not keep, its negation does.
# Versions: pyarrow 26.0.1, numpy 2.3.5, Python 3.11.
# Behaviour: minimum and maximum of a row group leave NaN out, as the format asks, but the dataset reader takes them as
#   bounds of every value: a group of 0.6 to 0.9 and NaN is skipped by `not score > 0.5`, though in memory a NaN passes
#   it. Sorted or clustered scores lose NaN rows in most groups, shuffled ones in none, and one group as large as
#   the file keeps all: the number of rows depends on row_group_size. Where all other values of a group are equal (a
#   constant default), even is_nan finds nothing: the search for broken rows says that there are none. read_table
#   with filters, Dataset.to_table and count_rows agree with each other. Arrow issue 34162 has the case of is_null.
# Output seen (100000 rows in order of score, 100 of them NaN):
#   in memory: 49848 kept + 50152 rejected
#   row groups of 1000: 49848 kept + 50099 rejected, 53 lost
#   row groups of 10000: 49848 kept + 50112 rejected, 40 lost
#   row groups of 100000: 49848 kept + 50152 rejected, 0 lost
#   is_nan of [1.0, nan, 1.0]: in memory 1 row, from the file 0 rows
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet pyarrow==26.0.1 numpy==2.3.5
cd "$dir"
"$dir/env/bin/python" - <<'PY'
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

ROWS, BROKEN = 100_000, 100
rng = np.random.default_rng(0)
score = np.sort(rng.random(ROWS).astype(np.float32))
score[rng.choice(ROWS, BROKEN, replace=False)] = np.nan
table = pa.table({"id": np.arange(ROWS), "score": score})
keep = pc.field("score") > 0.5
kept, rejected = table.filter(keep).num_rows, table.filter(~keep).num_rows
print(f"in memory: {kept} kept + {rejected} rejected")
assert kept + rejected == ROWS

lost = []
for size in (1000, 10_000, ROWS):
    pq.write_table(table, "scores.parquet", row_group_size=size)
    dataset = ds.dataset("scores.parquet")
    above, below = (dataset.to_table(filter=rule).num_rows for rule in (keep, ~keep))
    assert pq.read_table("scores.parquet", filters=~keep).num_rows == dataset.count_rows(filter=~keep) == below
    lost.append(ROWS - above - below)
    print(f"row groups of {size}: {above} kept + {below} rejected, {lost[-1]} lost")
assert lost[0] > lost[1] > lost[2] == 0

small = pa.table({"score": [1.0, np.nan, 1.0]})
pq.write_table(small, "small.parquet")
broken = pc.is_nan(pc.field("score"))
in_memory, in_file = small.filter(broken).num_rows, pq.read_table("small.parquet", filters=broken).num_rows
print(f"is_nan of [1.0, nan, 1.0]: in memory {in_memory} row, from the file {in_file} rows")
assert (in_memory, in_file) == (1, 0)
PY
