#!/bin/sh
# A slice of a meta-training run. Where pieces are still missing it keeps the ones beside it and says which are.
# Exit status 75: not finished, run it again.
#   MINUTES  until it stops, default 8      WORK  kept between slices, default regrad-train at home
#   OUT      where checkpoint and log go, default the folder state beside this file
set -eu
begun=$(date +%s)
here=$(cd "$(dirname "$0")" && pwd)
work=${WORK:-$HOME/regrad-train}
out=${OUT:-$here/state}
mkdir -p "$work/pieces" "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
unpack='import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz").extractall(filter="data")'
leave='import sys; from pathlib import Path; from regrad_vllm.learn.carried import leave_state as leave; leave(*map(Path, sys.argv[1:]))'

cp "$here"/part-* "$work/pieces/" 2>/dev/null || true
missing=$(cd "$work/pieces" && sha256sum -c "$here/parts.sha256" 2>/dev/null | grep -v ': OK$' | cut -d: -f1 || true)
if [ -n "$missing" ]; then
    echo "still to carry:" $missing
    exit 75
fi
cd "$work"
if ! cmp -s "$here/parts.sha256" unpacked; then
    rm -rf code data model start vectors config.toml learner learner.run
    cat pieces/part-* | $python -c "$unpack"
    cp "$here/parts.sha256" unpacked
fi
mkdir -p learner.run
cp vectors/* learner.run/ 2>/dev/null || true
set --
[ ! -f "$here/state/checkpoint.pt.00" ] || set -- --carried "$here/state"
left=$(awk "BEGIN { print (${MINUTES:-8} * 60 - ($(date +%s) - $begun)) / 60 }")
export PYTHONPATH=code
# Whatever ends the slice, what it has done stays.
trap '[ ! -f learner.run/checkpoint.pt ] || $python -c "$leave" learner.run "$out"' EXIT
trap 'exit 75' INT TERM
$python -m regrad_vllm.cli train config.toml --data data --output learner --resume --minutes "$left" "$@"
