#!/bin/sh
# Trains one slice of a run that carry_training.py packed. If pieces are still missing, it keeps those that are beside it
# and prints the names of the missing ones. Exit status 75: not finished, run it again.
#   MINUTES  length of the slice, default 8
#   WORK     kept between slices, default regrad-train at home
#   OUT      folder for checkpoint and log, default state beside this file
set -eu
begun=$(date +%s)
here=$(cd "$(dirname "$0")" && pwd)
work=${WORK:-$HOME/regrad-train}
out=${OUT:-$here/state}
mkdir -p "$work/pieces" "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
unpack='import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz").extractall(filter="data")'
carry="$python -m benchmarks.tools.carry_training"

cp "$here"/part-* "$work/pieces/" 2>/dev/null || true
missing=$(cd "$work/pieces" && sha256sum -c "$here/parts.sha256" 2>/dev/null | grep -v ': OK$' | cut -d: -f1 || true)
if [ -n "$missing" ]; then
    echo "still to carry:" $missing
    exit 75
fi
cd "$work"
if ! cmp -s "$here/parts.sha256" unpacked; then
    rm -rf code data model start start_phi teacher vectors config.toml learner learner.run
    cat pieces/part-* | $python -c "$unpack"
    cp "$here/parts.sha256" unpacked
fi
mkdir -p learner.run
cp vectors/* learner.run/ 2>/dev/null || true
left=$(awk "BEGIN { print (${MINUTES:-8} * 60 - ($(date +%s) - $begun)) / 60 }")
export PYTHONPATH=code
[ ! -f "$here/state/checkpoint.pt.00" ] || $carry take config.toml "$here/state" --output learner
# Whatever ends the slice, what it has done stays.
trap '[ ! -f learner.run/checkpoint.pt ] || $carry leave learner.run "$out"' EXIT
trap 'exit 75' INT TERM
$python -m regrad_vllm.cli train config.toml --data data --output learner --resume --minutes "$left"
