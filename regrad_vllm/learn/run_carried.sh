#!/bin/sh
# A slice of a meta-training run. Where pieces are still missing it keeps the ones beside it and says which are.
#   MINUTES  length of the slice, default 9      WORK  kept between slices, default regrad-train at home
#   OUT      where checkpoint, log and at the end the learner go, default the folder state beside this file
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=${WORK:-$HOME/regrad-train}
out=${OUT:-$here/state}
python=${PYTHON:-python3}
unpack='import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz").extractall(filter="data")'
mkdir -p "$work/pieces" "$out"
cp "$here"/part-* "$work/pieces/" 2>/dev/null || true
missing=$(cd "$work/pieces" && sha256sum -c "$here/parts.sha256" 2>/dev/null | grep -v ': OK$' | cut -d: -f1 || true)
if [ -n "$missing" ]; then
    echo "still to carry:" $missing
    exit 0
fi
cd "$work"
if ! cmp -s "$here/parts.sha256" unpacked; then
    rm -rf code data model start vectors config.toml learner learner.run
    cat pieces/part-* | $python -c "$unpack"
    cp "$here/parts.sha256" unpacked
fi
mkdir -p learner.run
cp vectors/* learner.run/ 2>/dev/null || true
# A machine that has gone on since has the newer checkpoint; a fresh one begins with the carried one.
[ -f learner.run/checkpoint.pt ] || cp "$here"/state/*.* learner.run/ 2>/dev/null || true
status=0
PYTHONPATH=code $python -m regrad_vllm.cli train config.toml --data data --output learner --resume \
    --minutes "${MINUTES:-9}" || status=$?
cp learner.run/checkpoint.pt learner.run/log.jsonl "$out/"
[ ! -d learner ] || cp -r learner "$out/"
exit $status
