#!/usr/bin/env bash
# What is to be measured whenever a GPU is at hand, most wanted first. Each job has a time limit, and
# a job that fails is recorded and does not stop the rest. Every job's output goes to a file in the
# folder; a short table is printed last.
#
#   experiments/launch/gpu_jobs.sh [--dry-run] [FOLDER]
#
# FOLDER is experiments/results/speed/gpu-<date> if left out; PYTHON names the interpreter.
# --dry-run prints the commands and writes nothing.
set -uo pipefail

dry_run=
folder=
for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=yes ;;
    -*) echo "gpu_jobs.sh: unknown flag $argument; usage: gpu_jobs.sh [--dry-run] [FOLDER]" >&2; exit 2 ;;
    *)
      [ -z "$folder" ] || { echo "gpu_jobs.sh: give one folder" >&2; exit 2; }
      folder=$argument
      ;;
  esac
done
# A folder is meant from where the user stands; the jobs run from the repository's root.
root=$(cd "$(dirname "$0")/../.." && pwd)
case $folder in
  "") folder=$root/experiments/results/speed/gpu-$(date +%F) ;;
  /*) ;;
  *) folder=$PWD/$folder ;;
esac
cd "$root" || exit 1
python=${PYTHON:-python3}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

if [ -z "$dry_run" ]; then
  if [ -e "$folder/jobs.tsv" ]; then
    echo "gpu_jobs.sh: $folder holds an earlier run; give another folder" >&2
    exit 2
  fi
  mkdir -p "$folder" || exit 2
  printf 'job\tstatus\tseconds\n' >"$folder/jobs.tsv"
fi

number=0
failed=0

# job NAME MINUTES COMMAND...: standard output to NAME.json or NAME.txt, errors to NAME.log.
job() {
  local name minutes kind start status
  number=$((number + 1))
  name=$(printf '%02d_%s' "$number" "$1")
  minutes=$2
  shift 2
  kind=txt
  case " $* " in *" --format=json "*) kind=json ;; esac
  if [ -n "$dry_run" ]; then
    printf '%s (at most %s min): %s\n' "$name" "$minutes" "$*"
    return
  fi
  start=$(date +%s)
  timeout --kill-after=30 "${minutes}m" "$@" >"$folder/$name.$kind" 2>"$folder/$name.log"
  status=$?
  case $status in
    0) status=ok ;;
    124 | 137) status="time limit of $minutes min" failed=1 ;;
    *) status="failed ($status)" failed=1 ;;
  esac
  printf '%s\t%s\t%s\n' "$name" "$status" "$(($(date +%s) - start))" | tee -a "$folder/jobs.tsv"
}

bench() { # NAME MINUTES FLAGS...
  local name=$1 minutes=$2
  shift 2
  job "$name" "$minutes" "$python" -m moejax.cli bench "$@" --format=json
}

layers="sonicmoe olmoe qwen3_30b deepseek_v2_lite"
models="olmoe_150m olmoe_500m olmoe_1b"

# 1. Versions, and the two ceilings.
job card 1 nvidia-smi
job packages 2 "$python" -m pip list
bench ceilings 5 --suite=ceilings

# 2. Every dispatcher against the reference, values and gradients, BF16 and FP32.
bench agreement 15 --suite=agreement

# 3. Grouped products: tuned leg by leg, then the layer at four shapes, whole and in parts.
bench tune 25 --tune --shapes="${layers// /,}"
for shape in $layers; do
  bench "moe_$shape" 15 --suite=moe --shapes="$shape" --profile
done

# 4. Attention.
bench attention 10 --suite=attention

# 5. Whole models: loads of a fresh router, balanced and skewed, dense beside them; then learned
#    routing with the ledger on, and its last recorded loads in the same step. The largest fills
#    65 GB: more than jax takes of a card by itself, and more than its own allocator has in one piece
#    (the benchmark sets the same).
memory="XLA_PYTHON_CLIENT_ALLOCATOR=${XLA_PYTHON_CLIENT_ALLOCATOR:-cuda_async}"
memory+=" XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}"
for model in $models; do
  bench "model_$model" 15 --suite=model --shapes="$model"
done
for model in $models; do
  workdir=$folder/train_$model
  # shellcheck disable=SC2086
  job "train_$model" 15 env $memory GPU_MODEL="$model" "$python" -m moejax.cli train \
    --config=experiments/launch/gpu_model.py --workdir="$workdir" --format=json
  # Up to 40 GB that nothing reads again.
  [ -n "$dry_run" ] || rm -rf "$workdir/checkpoints"
  bench "learned_$model" 10 --suite=model --shapes="$model" --loads=recorded \
    --trace="$workdir/metrics.jsonl"
done
for model in $models; do
  bench "transformers_$model" 15 --suite=model --shapes="$model" --loads=untrained \
    --against=transformers
done

# 6. Ablations: dense against MoE with its dollars, then every causal router.
for ablation in dense_vs_moe router_shootout; do
  job "ablate_$ablation" 90 "$python" -m moejax.cli ablate \
    --config="experiments/ablations/$ablation.py" --workdir="$folder/$ablation"
done

[ -n "$dry_run" ] && exit 0
{
  echo
  "$python" -m moejax.bench.summary "$folder"
  echo
  column -t -s "$(printf '\t')" "$folder/jobs.tsv" 2>/dev/null || cat "$folder/jobs.tsv"
} | tee "$folder/summary.txt"
exit "$failed"
