#!/usr/bin/env bash
# Figures of training and scoring that need a GPU, part by part; each part's table, and the files in runs/bench.
#
#   bash bench/figures.sh                    # all, about 30 minutes on one H200, projected
#   bash bench/figures.sh step160 loop160    # some
#   TEXT=configs/pretrain_160m.yaml bash bench/figures.sh parity    # losses compared on a config's text
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/bench}
mkdir -p "$out"
parts=("$@")
[[ $# -gt 0 ]] || parts=(tests step160 step600 low hf160 hf600 loop160 loop600 parity eval attention)

run() { # NAME COMMAND...
  local name=$1 began=$SECONDS
  shift
  echo "== $name: $*"
  "$@" > "$out/$name.log" 2>&1 || echo "   exit status $?, see $out/$name.log"
  # Everything but JSON, progress and libraries' warnings.
  grep -vE '^\{|Warning:|warnings?\.warn|_warn_once' "$out/$name.log" | tail -n "${LINES_SHOWN:-14}" | cut -c 1-220
  echo "   $((SECONDS - began)) s"
}
step() { run "$1" python -m bench.step --shape "$2" --micro-batch "$3" --steps 5 --rounds 2 --variants "$4"; }
loop() {
  run "$1" python -m bench.loop --shape "$2" --micro-batch "$3" --accumulate 4 --steps 10 --warmup 2 --rounds 2 \
    --log-every 10 --save-every 10
}

for part in "${parts[@]}"; do
  case $part in
    tests) run tests python -m pytest -m gpu tests/data tests/models tests/train tests/utils -p no:cacheprovider -v ;;
    step160)
      step step160 160m 96 fused,fused+cublas,fused+fp8
      step deterministic160 160m 96 fused+deterministic # alone: what cuBLAS is told stays told
      ;;
    step600) step step600 600m 32 fused,fused+cublas,fused+fp8 ;;
    low)
      step low160 160m 96 fused+low
      step low600 600m 48 fused+low,fused+balanced,fused+balanced+fp8
      ;;
    hf160) step hf160 160m 32 fused,hf,hf+liger ;;
    hf600) step hf600 600m 16 fused,hf,hf+liger ;;
    loop160) loop loop160 160m 96 ;;
    loop600) loop loop600 600m 32 ;;
    parity)
      run parity python -m bench.parity --runs fast,again,fp8,compiled,plain --out "$out/parity" ${TEXT:+--data "$TEXT"}
      ;;
    eval) run eval python bench/eval.py ;;
    attention)
      run attention160 python -m bench.attention --shape 160m --rows 32
      run attention600 python -m bench.attention --shape 600m --rows 32
      ;;
    *) echo "no part '$part'" >&2 && exit 2 ;;
  esac
done
