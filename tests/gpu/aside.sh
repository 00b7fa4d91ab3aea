#!/usr/bin/env bash
# The stored encoders (43 MB) out of the working tree, while it is copied to another machine:
#     bash tests/gpu/aside.sh COMMAND …      # out, the command, back, whatever becomes of the command
#     bash tests/gpu/aside.sh out            # where one command cannot embrace the copying; then `aside.sh back`
# They lie in git's own folder meanwhile. `git status` is clean again afterwards.
set -euo pipefail
cd "$(dirname "$0")"
tree=$(git rev-parse --show-toplevel)
kept=$(git rev-parse --absolute-git-dir)/c2l-encoders
encoders=$tree/nbs/results/encoders
out() { mkdir -p "$kept"; find "$encoders" -name '*.safetensors' -exec mv {} "$kept"/ \;; }
back() { [ ! -d "$kept" ] || { find "$kept" -name '*.safetensors' -exec mv {} "$encoders"/ \;; rmdir "$kept"; }; }
case ${1-} in
    out) out ;;
    back) back ;;
    '') sed -n '2,5s/^# \?//p' "$(basename "$0")"; exit 2 ;;
    *)
        trap back EXIT
        trap 'exit 130' INT TERM
        out
        cd "$OLDPWD"
        "$@"
        ;;
esac
