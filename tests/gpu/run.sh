#!/usr/bin/env bash
# Tests, benchmarks and the experiment on a GPU, in one command:
#     bash tests/gpu/run.sh --limit 480 --out DIR [--device cpu] [--bundle .bundle]
# On a machine that has PyTorch but not the other packages, carry the folder .bundle along, which `python tests/gpu/bundle.py` makes:
# its wheels are installed beside, not into, that machine's Python. Without it the packages of the present environment are used, and the
# experiment runs on phantoms. If the way there is short of space, leave the 43 MB of stored encoders at home while the tree is copied:
# `bash tests/gpu/aside.sh COMMAND …` (or `aside.sh out`, then `aside.sh back`).
# Three processes: tests (180 s at most), benchmarks (120 s), experiment (the rest of --limit). DIR gets at most eight files, each below
# 16 MB, written as soon as they are known: log.txt tests.xml bench.json run.json scores.npz c2l.safetensors.0 c2l.safetensors.1.
# --device cpu rehearses everything at toy size; half, a quarter and a quarter of --limit are the caps then. The exit status is 0 if all three wrote something.
set -uo pipefail
limit=480 device=cuda bundle=.bundle out=
while [ $# -gt 0 ]; do
    case $1 in
        --limit|--out|--device|--bundle) declare "${1#--}=$2"; shift 2 ;;
        *) echo "unknown: $1" >&2; exit 2 ;;
    esac
done
[ -n "$out" ] || { echo "--out DIR is missing" >&2; exit 2; }
began=$(date +%s)
mkdir -p "$out"
out=$(realpath "$out")
cd "$(dirname "$0")/../.."
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
caps=(180 120)
[ "$device" != cpu ] || caps=($((limit/2)) $((limit/4)))
left() { echo $((limit - $(date +%s) + began)); }
least() { echo $(($1 < $(left) ? $1 : $(left))); }

export PYTHONUNBUFFERED=1 MPLBACKEND=agg C2L_TEST_DEVICE=$device PYTHONPATH="$PWD:$PWD/tests/helpers:$PWD/tests/gpu:$PWD/tests/bench${PYTHONPATH:+:$PYTHONPATH}"
export NUMBA_CACHE_DIR="$site/numba"
[ "$device" != cpu ] || export CUDA_VISIBLE_DEVICES=
{
    if compgen -G "$bundle/wheels/*.whl" > /dev/null; then
        python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site/packages" "$bundle"/wheels/*.whl
        PYTHONPATH="$site/packages:$PYTHONPATH"
    fi
    pool=()
    if [ -f "$bundle/pool/pool.csv" ]; then pool=(--pool "$bundle/pool"); fi
    nvidia-smi -L 2> /dev/null || echo "no GPU"

    echo "== tests"
    cap=$(least "${caps[0]}")
    timeout -k 15 "$cap" python3 -m pytest -v -p no:cacheprovider -rfEs --durations=15 -o addopts= -o junit_logging=all -o junit_family=xunit1 \
        --junitxml="$out/tests.xml" tests/gpu/test_gpu_step.py tests/gpu/test_gpu_learner.py tests/gpu/test_gpu_commands.py
    echo "== benchmarks, $(left) s left"
    cap=$(least "${caps[1]}")
    timeout -k 15 "$cap" python3 -W ignore tests/bench/bench_gpu.py --device "$device" --seconds $((cap - 5)) --save "$out/bench.json"
    echo "== experiment, $(left) s left"
    cap=$(left)
    [ "$cap" -lt 10 ] || timeout -k 15 "$cap" python3 -W ignore nbs/results/gpu/run.py --device "$device" --seconds $((cap - 5)) --out "$out" "${pool[@]}"
    echo "== $(left) s left"
} 2>&1 | tee "$out/log.txt"

status=0
for name in tests.xml bench.json run.json; do
    if [ -s "$out/$name" ]; then echo "$name: $(stat -c %s "$out/$name") bytes"; else echo "$name: missing"; status=1; fi
done
grep -E "^(FAILED|ERROR)|^[0-9]+ (passed|failed)|figures,|\| short$|'name'" "$out/log.txt" || true
exit $status
