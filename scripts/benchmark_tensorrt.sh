#!/usr/bin/env bash
# Measures TensorRT on one model: half precision, and INT8 with the three rule sets for residual adds.
#
#   scripts/benchmark_tensorrt.sh [--dry-run] [--model FOLDER] [--texts FILE] [--output FOLDER] [--shapes "1x128 8x128"]
#
# For a machine with an NVIDIA GPU and TensorRT 10.8 or later: trtexec on the PATH, or TRTEXEC=/path/to/trtexec.
# Without --model it is BERT-base with random weights, as fast as any other; --texts are what to calibrate with, one in
# each line. Writes the ONNX files, and for each file and shape (batch x tokens) the times, the layers and the log; then
# prints the medians and the receipts. --dry-run prints the commands and runs none.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dry= model= texts= output=$PWD/tensorrt-out shapes="1x128 8x128 1x384"

usage() {
  sed -n '2,/^set/p' "${BASH_SOURCE[0]}" | sed -n 's/^# \{0,1\}//p'
}

fail() {
  echo "benchmark_tensorrt.sh: $1" >&2
  exit "${2:-1}"
}

while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=1 ;;
    --help | -h) usage && exit 0 ;;
    --model | --texts | --output | --shapes)
      [ $# -gt 1 ] || fail "$1 needs a value" 2
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    *) fail "unknown option $1; see --help" 2 ;;
  esac
  shift
done
[ -z "$texts" ] || [ -n "$model" ] || fail "--texts needs --model, a folder with a tokenizer" 2
for shape in $shapes; do
  [[ $shape =~ ^[1-9][0-9]*x[1-9][0-9]*$ ]] || fail "'$shape' is no shape; write batch and tokens, such as 8x128" 2
done
# The paths given are seen from where the command was given; the rest runs in the repository.
for name in model texts output; do
  [[ -z ${!name} || ${!name} == /* ]] || printf -v "$name" %s "$PWD/${!name}"
done

trtexec=${TRTEXEC:-$(command -v trtexec || true)}
if [ -z "$trtexec" ] && [ -x /usr/src/tensorrt/bin/trtexec ]; then
  trtexec=/usr/src/tensorrt/bin/trtexec
fi
if [ -n "$dry" ]; then
  trtexec=${trtexec:-trtexec} python=python
elif [ -z "$trtexec" ] || ! command -v "$trtexec" > /dev/null; then
  fail "trtexec is not here${trtexec:+ ($trtexec)}. It comes with TensorRT (https://developer.nvidia.com/tensorrt, or the \
container nvcr.io/nvidia/tensorrt); put it on the PATH or set TRTEXEC. --dry-run prints the commands."
else
  source "$here/setup.sh" onnx
fi
cd "$here/.."

# Prints a command as it can be given to a shell.
show() {
  local word
  for word in "$@"; do
    if [[ $word =~ ^[[:alnum:]_./:=,+-]+$ ]]; then printf '%s ' "$word"; else printf '%q ' "$word"; fi
  done
  echo
}

run() {
  show "$@"
  [ -n "$dry" ] || "$@"
}

# shellcheck disable=SC2086 # the shapes are words
run "$python" scripts/benchmark_tensorrt.py files "$output" --shapes $shapes \
  ${model:+--model "$model"} ${texts:+--texts "$texts"}

for shape in $shapes; do
  # One engine for each shape: INT8 attention is fused for fixed lengths above all.
  ports=input_ids:$shape,attention_mask:$shape
  for file in float16 tensorrt tensorrt-both tensorrt-none; do
    # On TensorRT 10 --stronglyTyped keeps the types of the file; on 11 all networks are so, and it does nothing.
    command=(
      "$trtexec" --onnx="$output/$file.onnx" --stronglyTyped
      --minShapes="$ports" --optShapes="$ports" --maxShapes="$ports"
      --loadInputs="input_ids:$output/input_ids.$shape.bin,attention_mask:$output/attention_mask.$shape.bin"
      --profilingVerbosity=detailed --exportLayerInfo="$output/$file.$shape.layers.json"
      --exportTimes="$output/$file.$shape.times.json"
      --useCudaGraph --useSpinWait --noDataTransfers --warmUp=500 --duration=10
    )
    show "${command[@]}"
    if [ -z "$dry" ] && ! "${command[@]}" > "$output/$file.$shape.log" 2>&1; then
      tail -n 20 "$output/$file.$shape.log" >&2
      fail "no engine of $file.onnx for $shape; all that trtexec said is in $output/$file.$shape.log"
    fi
  done
done

# shellcheck disable=SC2086
run "$python" scripts/benchmark_tensorrt.py report "$output" --shapes $shapes
