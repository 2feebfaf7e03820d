#!/usr/bin/env bash
# What is to be known of a CUDA card, within 9 minutes and without network:
#
#   bash bench/on_device.sh [--shape 70b|quarter|small|tiny] [--seconds 540]
#
# 1. Wheels in .whl/ (`make wheels`) are installed, as far as this Python lacks them, into a folder that goes afterwards.
# 2. The tests that need a card: pytest -m cuda.
# 3. bench.scale_70b: every site of the shape, in nf4. 4. bench.nf4_layer: one layer, for the share of peak it reaches.
#
# Each part is given what time is left, and writes what it has as it goes: to $OUT, or to bench/results/. A result that is
# not complete is called *.part.json. Python is $PY, or that of .venv, or python3; $WHEELS names another folder than
# .whl. Without a card the tests are skipped and the default shape is the quarter; `--shape tiny` tries everything there.
# Exit status: 0 everything passed, 1 something failed or was not finished, 2 something is missing.

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
SECONDS=0
shape=auto total=540
while (($# > 1)); do
    case $1 in
        --shape) shape=$2 ;;
        --seconds) total=$2 ;;
        *) break ;;
    esac
    shift 2
done
if (($#)) || [[ ! $shape =~ ^[a-z0-9]+$ || ! $total =~ ^[0-9]+$ ]]; then
    echo "usage: bash bench/on_device.sh [--shape 70b|quarter|small|tiny] [--seconds 540]" >&2
    exit 2
fi
out=${OUT:-bench/results} wheels=${WHEELS:-.whl}
mkdir -p "$out" || exit 2
if [ -z "${PY:-}" ]; then
    PY=python3
    [ ! -x .venv/bin/python ] || PY=.venv/bin/python
fi
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1

GRACE=8    # seconds that a part may take to be ended, and the script after it
LAYER=45   # and that are kept for the last part, and
TESTS=180  # that the tests may take at most
summary=() failed=0

left() { echo $((total - SECONDS - GRACE)); }

# part NAME SECONDS COMMAND...: run it for so long at most, and note how it went
part() {
    local name=$1 limit=$2 begun=$SECONDS status word
    shift 2
    if ((limit < 5)); then
        summary+=("$name: not run, no time was left")
        failed=1
        return
    fi
    echo "==> $name (at most $limit s)"
    timeout --kill-after=3 "$limit" "$@"
    status=$?
    case $status in
        0) word=passed ;;
        3) word="out of time, what it has is written" ;;
        124 | 137) word="ended, its time was over" ;;
        *) word="failed ($status)" ;;
    esac
    ((status == 0)) || failed=1
    summary+=("$name: $word, $((SECONDS - begun)) s")
}

# the time at which a part that is given so many seconds stops by itself
moment() { echo $(($(date +%s) + $1 - 5)); }

finish() {
    echo "==> after $SECONDS of $total s"
    printf '%s\n' "${summary[@]}"
    exit "$1"
}

main() {
    local site files tests seconds
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
    if compgen -G "$wheels/*.whl" >/dev/null; then
        mapfile -t files < <("$PY" -m bench.lacking --wheels "$wheels" | grep .)
        echo "to be installed from $wheels: ${files[*]##*/}"
        ((${#files[@]} == 0)) || part wheels "$(left)" \
            "$PY" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "${files[@]}"
        export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
    fi
    # what lacks, then a real import: better known now than after the tests
    part imports "$(left)" "$PY" -m bench.lacking --import bench.scale_70b
    ((failed == 0)) || finish 2

    tests=$(grep -l 'mark.cuda' tests/*.py)
    seconds=$(left)
    # shellcheck disable=SC2086  # one file a word
    part tests $((seconds < TESTS ? seconds : TESTS)) "$PY" -m pytest -q -rs -m cuda -p no:cacheprovider $tests
    seconds=$(($(left) - LAYER))
    part scale_70b "$seconds" \
        "$PY" -m bench.scale_70b --shape "$shape" --out "$out" --until "$(moment "$seconds")"
    seconds=$(left)
    part nf4_layer "$seconds" \
        "$PY" -m bench.nf4_layer --shape "$shape" --out "$out" --until "$(moment "$seconds")"
    finish "$failed"
}

main 2>&1 | tee "$out/on_device.log"
exit "${PIPESTATUS[0]}"
